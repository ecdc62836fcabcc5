//! The connections of a listener that are open: as many as there are descriptors for, and of each caller
//! its share.
//!
//! When all are open, the one that has been idle for longest gives way; where one caller has more than its
//! share, one of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::Router;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use super::{
    access::{self, Policy},
    caller::{Accounts, Caller, CallerKey, Callers},
    connection::{ClientConnection, NO_HTTP2},
    limits::ServerLimits,
};
use crate::{
    auth::Identity,
    daemon::{
        LogRateLimit, PeerCertificate,
        listen::{AcceptedStream, Listener},
        tls::TlsAcceptor,
    },
};

/// Lines about connections that were refused.
static REFUSALS: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));
/// Lines about connections on which HTTP/2 did not begin.
static NEVER_OPENED: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));

/// What is served on the connections of a listener.
pub(super) enum Protocol {
    Grpc(Routes),
    Pages(Router),
}

/// One listener.
pub(super) struct Server {
    pub limits: Arc<ServerLimits>,
    pub protocol: Protocol,
    callers: Arc<Callers>,
    pub acceptor: Option<TlsAcceptor>,
    policy: Policy,
    open: Mutex<BTreeMap<u64, Arc<ClientConnection>>>,
    half_open: Mutex<HalfOpen>,
    next: AtomicU64,
    ended: Notify,
    pub tasks: TaskTracker,
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

/// A connection, and its place among those of the listener.
pub(super) struct OpenConnection {
    pub server: Arc<Server>,
    number: u64,
    pub client: Arc<ClientConnection>,
}

impl Server {
    /// One that has no connection yet.
    pub(super) fn new(
        listener: &Listener,
        protocol: Protocol,
        limits: ServerLimits,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        let limits = Arc::new(limits);
        Arc::new(Server {
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
            killed: CancellationToken::new(),
        })
    }

    /// Returns when there may be one connection more.
    pub(super) async fn wait_for_capacity(&self) {
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
    pub(super) fn close_idle_connection(&self, of: Option<&CallerKey>) -> bool {
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
            if !makes_way && let Some(lines_withheld) = REFUSALS.admit(Instant::now()) {
                tracing::info!(
                    client = %caller.key,
                    lines_withheld,
                    "closed a connection: its caller has as many as it may, and all have calls under way"
                );
            }
            makes_way.then(|| caller.connect_beyond())
        })
    }

    /// Why a connection is closed on which nothing begins; `None` where that is not worth a line, since
    /// browsers connect ahead of what they ask for.
    fn reason_of_silence(&self) -> Option<&'static str> {
        match self.protocol {
            Protocol::Grpc(_) => Some(NO_HTTP2),
            Protocol::Pages(_) => None,
        }
    }

    /// A place for a new connection; `None` when its caller may have no more.
    pub(super) fn admit(self: &Arc<Self>, connection: &AcceptedStream) -> Option<OpenConnection> {
        let key = CallerKey::of(&Identity::nobody(), &connection.peer());
        let client = ClientConnection::new(
            connection,
            self.limits.clone(),
            self.policy.clone(),
            self.callers.clone(),
            self.connect(&self.callers.get(&key))?,
        );
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(number, client.clone());
        self.insert_half_open(number, key, &client);
        Some(OpenConnection {
            server: self.clone(),
            number,
            client,
        })
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

impl OpenConnection {
    /// What `opening` makes of the connection; `None` when it is over already.
    pub(super) async fn open<T>(
        &self,
        opening: impl Future<Output = Result<T, String>>,
    ) -> Option<T> {
        let server = &self.server;
        let opened = tokio::select! {
            opened = tokio::time::timeout(server.limits.handshake, opening) => opened,
            () = server.killed.cancelled() => return None,
            () = server.stopping.cancelled() => return None,
            () = self.client.evicted() => return None,
        };
        let reason = match opened {
            Ok(Ok(opened)) => return Some(opened),
            Ok(Err(reason)) => reason,
            Err(_) => server.reason_of_silence()?.to_owned(),
        };
        if let Some(lines_withheld) = NEVER_OPENED.admit(Instant::now()) {
            tracing::info!(peer = ?self.client.peer, reason, lines_withheld, "closed a connection");
        }
        None
    }

    /// The peer has said who makes the connection, in a handshake if there was one. False when that caller
    /// may have no more of them.
    pub(super) fn identify(&self, certificate: Option<PeerCertificate>) -> bool {
        let Self { server, client, .. } = self;
        let identity = access::identify(&client.peer, certificate.as_ref());
        client.show(certificate);
        server.half_open.lock().remove(self.number);
        let key = CallerKey::of(&identity, &client.peer);
        let mut may_go_on = true;
        if client.accounts().caller.key != key {
            match server.connect(&server.callers.get(&key)) {
                Some(accounts) => client.belong_to(accounts),
                None => may_go_on = false,
            }
        }
        // It is set here alone.
        let _ = client.identity.set(Arc::new(identity));
        may_go_on
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.client.closed.cancel();
        self.server.half_open.lock().remove(self.number);
        self.server.open.lock().remove(&self.number);
        self.server.ended.notify_waiters();
    }
}
