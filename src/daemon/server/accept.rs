//! Accepting connections of a listener, of gRPC or of pages: as many as there are descriptors for, and of
//! each caller its share; and ending them.
//!
//! 1. When all are open, the one that has been idle for longest gives way; where one caller has more than
//!    its share, one of its own.
//! 2. Neither a process without descriptors left nor a connection that died in the queue ends the loop, or
//!    has it spin.
//! 3. After `stopping`, nothing new is accepted, and calls that are under way have a while to end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::Router;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use super::{
    ServerLimits,
    access::Policy,
    caller::{Accounts, Caller, CallerKey, Callers},
    connection::{self, ClientConnection},
    pages,
};
use crate::{
    auth::Identity,
    daemon::{
        LogRateLimit,
        listen::{AcceptedStream, Listener, Socket},
        tls::TlsAcceptor,
    },
};

/// What is served on the connections of a listener.
pub(super) enum Protocol {
    Grpc(Routes),
    Pages(Router),
}

/// One listener.
pub(super) struct Server {
    pub limits: Arc<ServerLimits>,
    protocol: Protocol,
    callers: Arc<Callers>,
    pub acceptor: Option<TlsAcceptor>,
    policy: Policy,
    open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    half_open: Mutex<HalfOpen>,
    next: AtomicU64,
    ended: Notify,
    tasks: TaskTracker,
    pub stopping: CancellationToken,
    pub killed: CancellationToken,
}

/// Connections on which neither TLS nor HTTP/2 has begun.
#[derive(Default)]
struct HalfOpen {
    connections: BTreeMap<u64, Arc<ClientConnection>>,
    /// Their numbers, by who makes them.
    by_caller: BTreeMap<CallerKey, BTreeSet<u64>>,
}

/// Serves until `stopping`, then gives calls that are under way `drain` to finish.
pub(super) async fn accept_and_drain(
    listener: Listener,
    protocol: Protocol,
    limits: ServerLimits,
    stopping: CancellationToken,
    drain: Duration,
) {
    let limits = Arc::new(limits);
    let server = Arc::new(Server {
        protocol,
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
            self.limits.clone(),
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
            let _closed = client.closed.clone().drop_guard();
            let server = &open.server;
            match &server.protocol {
                Protocol::Grpc(routes) => {
                    connection::serve(server, number, connection, client, routes.clone()).await;
                }
                Protocol::Pages(router) => {
                    pages::serve(server, number, connection, client, router.clone()).await;
                }
            }
        });
    }

    /// Why a connection is closed on which nothing begins; `None` where that is not worth a line, since
    /// browsers connect ahead of what they ask for.
    pub(super) fn reason_of_silence(&self) -> Option<&'static str> {
        match self.protocol {
            Protocol::Grpc(_) => Some(connection::NO_HTTP2),
            Protocol::Pages(_) => None,
        }
    }

    /// A connection has said who makes it. False when that caller may have no more.
    pub(super) fn opened(
        &self,
        number: u64,
        client: &ClientConnection,
        identity: &Identity,
    ) -> bool {
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
