//! Serving gRPC on a listener: bounded in memory, in descriptors and in time, whatever callers do.
//!
//! 1. Memory that callers can make a server keep is counted in three budgets: what they send, what
//!    they ask for, and their calls. `budget` says how it is shared among connections.
//! 2. Connections are fewer than the descriptors that the process may have, so that files and other
//!    listeners have theirs. The one that has been idle for longest gives way to a new one.
//! 3. Whatever a status says fits into everybody's headers (`status`).
//!
//! To read in this order: this file accepts connections; `opening` is how one begins, `connection` what
//! it is then, `call` one call on it, `access` whether it is allowed; `services` are what is called.
//! `pages` serves browsers, in place of all that.
//!
//! tonic's own server could not keep (1) and (2): none of its connections can be told to go away, or be
//! cut, by itself.

use std::{
    collections::BTreeMap,
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

use self::{budget::Budget, connection::ClientConnection};
use super::{
    Failure,
    listen::{AcceptedStream, Listener, Socket},
    process,
    tls::TlsAcceptor,
};

mod access;
mod budget;
mod call;
mod connection;
mod opening;
mod pages;
mod services;
mod status;

pub use access::{Access, PageAccess, Policy, warn_grants};
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
/// what its calls have been given.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Calls that are read together with their cancellation. A client that is interrupted cancels all that
/// it has just asked for; at 20, the default of h2, that ends the calls of all who share the
/// connection.
const PENDING_RESETS: usize = 1000;

/// In the life of a connection: frames of calls that were answered before their client had sent
/// everything, and forgotten before it stopped. Beyond that h2 ends the connection, whose default is
/// 1024; each may leave an unread answer of a few bytes behind.
const ERROR_RESETS: usize = 16_384;

impl ServerLimits {
    fn apply(&self, protocol: &mut http2::Builder<TokioExecutor>) {
        protocol
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
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
    received: Arc<Budget>,
    answers: Arc<Budget>,
    calls: Arc<Budget>,
    acceptor: Option<TlsAcceptor>,
    policy: Policy,
    open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    half_open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    next: AtomicU64,
    ended: Notify,
    tasks: TaskTracker,
    stopping: CancellationToken,
    killed: CancellationToken,
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
    let server = Arc::new(Server {
        routes: routes.prepare(),
        received: Budget::new(limits.received, limits.request_bytes_per_connection),
        answers: Budget::new(limits.answers, limits.response_bytes_per_connection),
        calls: Budget::new(limits.calls, u64::from(limits.calls_per_connection)),
        limits: Arc::new(limits),
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
                        self.close_idle_connection();
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
            if self.open.lock().len() < self.limits.connections || self.close_idle_connection() {
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

    /// Has the connection that called nothing for longest give way; those that never called first.
    fn close_idle_connection(&self) -> bool {
        let open = self.open.lock();
        let longest = open
            .values()
            .filter(|caller| !caller.is_evicted())
            .filter_map(|caller| Some((caller.idle()?, caller)))
            .min_by_key(|(idle, _)| *idle);
        match longest {
            Some((_, caller)) => {
                caller.evict();
                true
            }
            None => false,
        }
    }

    fn start(self: &Arc<Self>, connection: AcceptedStream) {
        let budgets = [&self.received, &self.answers, &self.calls];
        let (largest, policy) = (self.limits.largest_message, self.policy.clone());
        let caller = ClientConnection::new(&connection, largest, policy, budgets);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(number, caller.clone());
        self.insert_half_open(number, &caller);
        let server = self.clone();
        self.tasks.spawn(async move {
            let open = ConnectionGuard { server, number };
            let server = &open.server;
            connection::serve(
                connection,
                caller,
                server.acceptor.clone(),
                || drop(server.half_open.lock().remove(&number)),
                server.routes.clone(),
                server.limits.clone(),
                server.answers.clone(),
                server.stopping.clone(),
                server.killed.clone(),
            )
            .await;
        });
    }
}

impl Server {
    fn insert_half_open(&self, number: u64, caller: &Arc<ClientConnection>) {
        let mut half_open = self.half_open.lock();
        half_open.insert(number, caller.clone());
        if half_open.len() > self.limits.half_open
            && let Some((_, oldest)) = half_open.pop_first()
        {
            oldest.evict();
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
        self.server.half_open.lock().remove(&self.number);
        self.server.open.lock().remove(&self.number);
        self.server.ended.notify_waiters();
    }
}
