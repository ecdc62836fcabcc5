//! Serving gRPC on a listener: bounded in memory, in descriptors and in time, whatever callers do.
//!
//! 1. Memory that callers can make a server keep is counted in budgets: what they send, what they ask for,
//!    their calls and their connections. `budget` says how they are shared among callers, `caller` who
//!    these are.
//! 2. Connections are fewer than the descriptors that the process may have, so that files and other
//!    listeners have theirs. The one that has been idle for longest gives way to a new one; where one caller
//!    has more than its share of them, one of its own.
//! 3. Whatever a status says fits into everybody's headers (`status`).
//!
//! To read in this order: this file accepts connections; `opening` is how one begins, `connection` what
//! it is then, `call` one call on it, `access` whether it is allowed; `services` are what is called.
//! `pages` serves browsers, in place of all that.
//!
//! tonic's own server could not keep (1) and (2): none of its connections can be told to go away, or be
//! cut, by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use self::{
    caller::{Accounts, Caller, CallerKey, Callers},
    connection::ClientConnection,
};
use super::{
    Failure, LogRateLimit,
    listen::{AcceptedStream, Listener, Socket},
    process,
    tls::TlsAcceptor,
};
use crate::auth::Identity;

mod access;
mod budget;
mod call;
mod caller;
mod connection;
mod opening;
mod pages;
mod rate;
mod services;
mod status;

pub use access::{Access, PageAccess, Policy, client_name, warn_grants};
pub use budget::BudgetReservation;
pub use call::{RequestReservation, ResponseBudget, with_reservation};
pub use pages::{PageLimits, PageOrigin, serve_pages};
pub use services::Services;

/// What one listener grants its callers.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Bytes of messages that are on their way in, on one connection and on all.
    pub received: u64,
    /// The same, on one connection.
    pub request_bytes_per_connection: u64,
    /// Bytes of answers that are not written to their connections, on one and on all.
    pub answers: u64,
    /// The same, on one connection.
    pub response_bytes_per_connection: u64,
    /// Bytes that may arrive ahead of the calls of all connections, besides 64 KiB of each.
    pub windows: u64,
    /// Calls under way on all connections.
    pub calls: u64,
    /// The same, on one connection.
    pub calls_per_connection: u32,
    /// Connections that are open.
    pub connections: usize,
    /// Those of them on which neither TLS nor HTTP/2 has begun; the oldest gives way.
    pub half_open: usize,
    /// Bytes of a message.
    pub largest_message: u64,
    /// Until TLS and HTTP/2 have begun.
    pub handshake: Duration,
    /// Until the first call.
    pub first_call: Duration,
    /// Without a call.
    pub idle: Duration,
    /// Of each caller; 0 for as many as it likes.
    pub requests_per_second: u64,
    /// Of messages of each caller, in both directions; 0 for as many as it likes.
    pub bytes_per_second: u64,
    /// Without reading any of what was asked for; and that when others wait for the room.
    pub stalled: Duration,
    /// The same, when others wait for the room.
    pub stalled_when_short: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            received: 256 << 20,
            request_bytes_per_connection: 64 << 20,
            answers: 256 << 20,
            response_bytes_per_connection: 64 << 20,
            windows: 512 << 20,
            // A Bazel with --jobs=2000 has as many streams on one connection, and proxies gather
            // several of them.
            calls: 50_000,
            calls_per_connection: 10_000,
            connections: connection_limit(),
            half_open: 1000,
            largest_message: 16 << 20,
            handshake: Duration::from_secs(10),
            first_call: Duration::from_secs(60),
            idle: Duration::from_secs(30 * 60),
            requests_per_second: 0,
            bytes_per_second: 0,
            stalled: Duration::from_secs(300),
            stalled_when_short: Duration::from_secs(10),
        }
    }
}

/// Two listeners together leave a fifth of all descriptors to files.
fn connection_limit() -> usize {
    let limit = process::file_limit().map_or(MAX_CONNECTIONS, |limit| {
        usize::try_from(limit).unwrap_or(MAX_CONNECTIONS)
    });
    (limit / 5 * 2).clamp(8, MAX_CONNECTIONS)
}

const MAX_CONNECTIONS: usize = 10_000;

/// A piece of 4 MiB in flight needs no round trip on a LAN. This is what a connection can hold besides
/// what its calls have been given; one that finds no room for that among all of them has less.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// With which every connection begins (RFC 9113, section 6.9.2).
const SMALLEST_WINDOW: u32 = 65_535;

/// Calls that are read together with their cancellation. A client that is interrupted cancels all that
/// it has just asked for; at 20, the default of h2, that ends the calls of all who share the
/// connection.
const PENDING_RESETS: usize = 1000;

/// In the life of a connection: frames of calls that were answered before their client had sent
/// everything, and forgotten before it stopped. Beyond that h2 ends the connection, whose default is
/// 1024; each may leave an unread answer of a few bytes behind.
const ERROR_RESETS: usize = 16_384;

impl ServerLimits {
    /// `window` is how much may arrive on the connection ahead of its calls.
    fn apply(&self, window: u32, protocol: &mut http2::Builder<TokioExecutor>) {
        protocol
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW.min(window))
            .initial_connection_window_size(window)
            .max_concurrent_streams(self.calls_per_connection)
            .max_frame_size(1 << 20)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(ERROR_RESETS)
            .keep_alive_interval(Duration::from_secs(60))
            .keep_alive_timeout(Duration::from_secs(20));
    }
}

struct Server {
    limits: Arc<ServerLimits>,
    routes: Routes,
    callers: Arc<Callers>,
    acceptor: Option<TlsAcceptor>,
    policy: Policy,
    open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    half_open: Mutex<HalfOpen>,
    next: AtomicU64,
    ended: Notify,
    tasks: TaskTracker,
    stopping: CancellationToken,
    killed: CancellationToken,
}

/// Connections on which neither TLS nor HTTP/2 has begun.
#[derive(Default)]
struct HalfOpen {
    connections: BTreeMap<u64, Arc<ClientConnection>>,
    /// Their numbers, by who makes them.
    by_caller: BTreeMap<CallerKey, BTreeSet<u64>>,
}

/// Serves until `stopping`, then gives calls that are under way `drain` to finish.
pub async fn serve(
    listener: Listener,
    routes: Routes,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    serve_within(listener, routes, ServerLimits::default(), stopping, drain).await
}

/// As `serve`, with limits of the caller's choice.
pub async fn serve_within(
    listener: Listener,
    routes: Routes,
    limits: ServerLimits,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    let limits = Arc::new(limits);
    let server = Arc::new(Server {
        routes: routes.prepare(),
        callers: Arc::new(Callers::new(&limits)),
        limits,
        acceptor: listener.acceptor(),
        policy: listener.policy(),
        open: Mutex::default(),
        half_open: Mutex::default(),
        next: AtomicU64::new(0),
        ended: Notify::new(),
        tasks: TaskTracker::new(),
        stopping,
        // Also when this future is dropped.
        killed: CancellationToken::new(),
    });
    let _kill = server.killed.clone().drop_guard();
    for socket in listener.into_sockets() {
        server.tasks.spawn(server.clone().accept_all(socket));
    }
    server.stopping.cancelled().await;
    server.tasks.close();
    // Whatever is left then is killed.
    let _ = tokio::time::timeout(drain, server.tasks.wait()).await;
    Ok(())
}

impl Server {
    async fn accept_all(self: Arc<Self>, socket: Socket) {
        loop {
            let accepted = tokio::select! {
                () = self.stopping.cancelled() => return,
                accepted = socket.accept() => accepted,
            };
            match accepted {
                Ok(connection) => {
                    tokio::select! {
                        () = self.stopping.cancelled() => return,
                        () = self.wait_for_capacity() => self.start(connection),
                    }
                }
                Err(error) => {
                    // Out of descriptors, or a connection that died in the queue: neither ends the
                    // server, and the first one must not make it spin.
                    tracing::warn!(%error, "could not accept a connection");
                    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                        self.close_idle_connection(None);
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Returns when there may be one connection more.
    async fn wait_for_capacity(&self) {
        loop {
            let ended = self.ended.notified();
            if self.open.lock().len() < self.limits.connections || self.close_idle_connection(None)
            {
                return;
            }
            tracing::warn!(
                connections = self.limits.connections,
                "all connections that this process has descriptors for have calls under way; a new one \
                 waits (raise LimitNOFILE= of the unit)"
            );
            ended.await;
        }
    }

    /// Has the connection that called nothing for longest give way; those that never called first. `of` is
    /// the caller whose it must be, if any.
    fn close_idle_connection(&self, of: Option<&CallerKey>) -> bool {
        let open = self.open.lock();
        let longest = open
            .values()
            .filter(|client| !client.is_evicted())
            .filter(|client| of.is_none_or(|of| client.accounts().caller.key == *of))
            .filter_map(|client| Some((client.idle()?, client)))
            .min_by_key(|(idle, _)| *idle);
        match longest {
            Some((_, client)) => {
                client.evict();
                true
            }
            None => false,
        }
    }

    /// A place for one more connection of a caller; of one that has as many as it may, an idle one gives way.
    fn connect(&self, caller: &Arc<Caller>) -> Option<Accounts> {
        caller.connect().or_else(|| {
            let is_leaving = |client: &ClientConnection| {
                client.is_evicted() && client.accounts().caller.key == caller.key
            };
            let makes_way = self.close_idle_connection(Some(&caller.key))
                || self.open.lock().values().any(|client| is_leaving(client));
            if !makes_way && let Some(lines_withheld) = REFUSALS.admit(std::time::Instant::now()) {
                tracing::info!(
                    client = %caller.key,
                    lines_withheld,
                    "closed a connection: its caller has as many as it may, and all have calls under way"
                );
            }
            makes_way.then(|| caller.connect_beyond())
        })
    }

    fn start(self: &Arc<Self>, connection: AcceptedStream) {
        let key = CallerKey::of(&Identity::nobody(), &connection.peer());
        let Some(accounts) = self.connect(&self.callers.get(&key)) else {
            return;
        };
        let policy = self.policy.clone();
        let client = ClientConnection::new(
            &connection,
            self.limits.largest_message,
            policy,
            self.callers.clone(),
            accounts,
        );
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(number, client.clone());
        self.insert_half_open(number, key, &client);
        let server = self.clone();
        self.tasks.spawn(async move {
            let open = ConnectionGuard { server, number };
            let server = &open.server;
            connection::serve(
                connection,
                client.clone(),
                server.acceptor.clone(),
                |identity| server.opened(number, &client, identity),
                server.routes.clone(),
                server.limits.clone(),
                server.stopping.clone(),
                server.killed.clone(),
            )
            .await;
        });
    }

    /// A connection has said who makes it. False when that caller may have no more.
    fn opened(&self, number: u64, client: &ClientConnection, identity: &Identity) -> bool {
        self.half_open.lock().remove(number);
        let key = CallerKey::of(identity, &client.peer);
        if client.accounts().caller.key == key {
            return true;
        }
        match self.connect(&self.callers.get(&key)) {
            Some(accounts) => {
                client.belong_to(accounts);
                true
            }
            None => false,
        }
    }

    fn insert_half_open(&self, number: u64, key: CallerKey, client: &Arc<ClientConnection>) {
        let mut half_open = self.half_open.lock();
        half_open.connections.insert(number, client.clone());
        half_open.by_caller.entry(key).or_default().insert(number);
        if half_open.connections.len() > self.limits.half_open {
            half_open.evict_one();
        }
    }
}

/// Lines about connections that were refused.
static REFUSALS: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));

impl HalfOpen {
    fn remove(&mut self, number: u64) -> Option<Arc<ClientConnection>> {
        let client = self.connections.remove(&number)?;
        self.by_caller.retain(|_, numbers| {
            numbers.remove(&number);
            !numbers.is_empty()
        });
        Some(client)
    }

    /// The oldest of whoever has most of them.
    fn evict_one(&mut self) {
        let most = self.by_caller.values().max_by_key(|numbers| numbers.len());
        let oldest = most.and_then(|numbers| numbers.first().copied());
        if let Some(client) = oldest.and_then(|oldest| self.remove(oldest)) {
            client.evict();
        }
    }
}

/// A connection's place.
struct ConnectionGuard {
    server: Arc<Server>,
    number: u64,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.server.half_open.lock().remove(self.number);
        self.server.open.lock().remove(&self.number);
        self.server.ended.notify_waiters();
    }
}
