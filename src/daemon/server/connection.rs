//! One connection: who calls, for how long nobody did, and when it is closed.
//!
//! 1. A connection that has not said what HTTP/2 begins with (RFC 9113, section 3.4), or has called
//!    nothing, or calls nothing any more, is closed after a while. Clients hear of it before (GOAWAY),
//!    and connect again at their next call.
//! 2. A connection whose peer does not read what it asked for is closed: nothing else gives back what
//!    is kept for it. That is sooner when others wait for the room.
//! 3. A connection whose peer has shown a certificate is closed when that has expired.
//! 4. Whether a peer is still there is asked by PING; one that is not is hyper's to close.

use std::{
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::{
    ServerLimits,
    accept::Server,
    access::{self, Policy},
    budget::BudgetReservation,
    call,
    caller::{Accounts, Caller, CallerKey, Callers},
    opening::{self, OpenedConnection},
};
use crate::{
    auth::Identity,
    daemon::{LogRateLimit, Peer, PeerCertificate, listen::AcceptedStream, tokens::TokenTurn},
};

/// How often a connection is looked at.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// What a client has to read GOAWAY and to close the connection by itself.
pub(super) const GOAWAY_GRACE: Duration = Duration::from_secs(2);
/// Lines about connections on which HTTP/2 did not begin.
static REFUSALS: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));
/// Of a connection of gRPC that stays silent.
pub(super) const NO_HTTP2: &str = "its peer does not speak HTTP/2, or not at all";
/// The preface of HTTP/2, and the head of the frame that follows it.
const PREFACE: u64 = 24 + 9;

/// Whose connection it is, and what is counted for it.
pub(super) struct ClientConnection {
    pub peer: Peer,
    /// What it has shown in a handshake.
    certificate: OnceLock<PeerCertificate>,
    /// Who it is; set before it calls.
    pub identity: OnceLock<Arc<Identity>>,
    pub policy: Policy,
    /// In the line of those whose tokens are verified.
    pub token_turn: TokenTurn,
    pub limits: Arc<ServerLimits>,
    callers: Arc<Callers>,
    accounts: Mutex<ConnectionAccounts>,
    activity: Mutex<CallActivity>,
    /// Bytes that have arrived.
    arrived: Arc<AtomicU64>,
    /// Somebody else needs its descriptor.
    evict: CancellationToken,
    /// It has ended.
    pub closed: CancellationToken,
}

/// The connection that a call came by.
#[derive(Clone, Debug, Default)]
pub struct CallConnection(Option<CancellationToken>);

impl CallConnection {
    pub(super) fn new(connection: &ClientConnection) -> Self {
        CallConnection(Some(connection.closed.clone()))
    }

    /// None, when it is no server of ours that calls.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }

    /// Whether it is there still: so a call that has ended was ended by the peer, and not lost.
    pub fn is_open(&self) -> bool {
        self.0.as_ref().is_some_and(|closed| !closed.is_cancelled())
    }
}

/// Whose the connection is.
#[derive(Debug)]
struct ConnectionAccounts {
    current: Arc<Accounts>,
    /// Those of whom it was before, which hold what the calls do that were made then.
    earlier: Vec<Arc<Accounts>>,
    /// A token has said whose it is.
    has_token: bool,
}

/// Whose a call is.
pub(super) struct CallOwner {
    pub caller: Arc<Caller>,
    /// Where its bytes are counted.
    pub accounts: Arc<Accounts>,
    /// It counts among the calls of somebody else than the connection's caller.
    _counted: Option<BudgetReservation>,
}

#[derive(Debug)]
struct CallActivity {
    under_way: u64,
    called: bool,
    /// When the last call ended, or the connection was made.
    since: Instant,
}

/// A call, until its answer was handed to the connection.
pub(super) struct ActiveCall {
    caller: Arc<ClientConnection>,
    _counted: BudgetReservation,
}

/// What shall become of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Keep,
    /// Its client hears of it first.
    CloseGracefully,
    /// At once, for this reason.
    Abort(&'static str),
}

impl ClientConnection {
    pub(super) fn new(
        connection: &AcceptedStream,
        limits: Arc<ServerLimits>,
        policy: Policy,
        callers: Arc<Callers>,
        accounts: Accounts,
    ) -> Arc<Self> {
        Arc::new(ClientConnection {
            peer: connection.peer(),
            certificate: OnceLock::new(),
            identity: OnceLock::new(),
            policy,
            token_turn: TokenTurn::default(),
            limits,
            callers,
            accounts: Mutex::new(ConnectionAccounts {
                current: Arc::new(accounts),
                earlier: Vec::new(),
                has_token: false,
            }),
            activity: Mutex::new(CallActivity {
                under_way: 0,
                called: false,
                since: Instant::now(),
            }),
            arrived: connection.arrived(),
            evict: CancellationToken::new(),
            closed: CancellationToken::new(),
        })
    }

    /// What it holds, and whose it is.
    pub(super) fn accounts(&self) -> Arc<Accounts> {
        self.accounts.lock().current.clone()
    }

    /// From now on it is another caller's.
    pub(super) fn belong_to(&self, accounts: Accounts) {
        let mut known = self.accounts.lock();
        let before = std::mem::replace(&mut known.current, Arc::new(accounts));
        before.leave();
        known.earlier.push(before);
    }

    /// Whose a call is; an error is a caller that may have no more of them.
    pub(super) fn owner(&self, identity: &Identity) -> Result<CallOwner, CallerKey> {
        let key = CallerKey::of(identity, &self.peer);
        let mut accounts = self.accounts();
        if accounts.caller.key == key {
            return Ok(CallOwner {
                caller: accounts.caller.clone(),
                accounts,
                _counted: None,
            });
        }
        let caller = self.callers.get(&key);
        let is_unnamed = self.identity.get().is_none_or(|known| known.is_nobody());
        let is_first_token = is_unnamed && !identity.is_nobody() && !self.accounts.lock().has_token;
        if is_first_token && let Some(new) = caller.connect() {
            self.accounts.lock().has_token = true;
            self.belong_to(new);
            accounts = self.accounts();
        }
        let counted = caller.begin_call().ok_or(key)?;
        Ok(CallOwner {
            caller,
            accounts,
            _counted: Some(counted),
        })
    }

    /// An error tells how many calls are under way.
    pub(super) fn begin_call(self: &Arc<Self>, accounts: &Accounts) -> Result<ActiveCall, u64> {
        let mut activity = self.activity.lock();
        activity.called = true;
        let counted = accounts.calls.try_reserve(1).ok_or(activity.under_way)?;
        activity.under_way += 1;
        Ok(ActiveCall {
            caller: self.clone(),
            _counted: counted,
        })
    }

    /// Whether it ever called, and since when it does not. `None` while a call is under way.
    pub(super) fn idle(&self) -> Option<(bool, Instant)> {
        let activity = self.activity.lock();
        (activity.under_way == 0).then_some((activity.called, activity.since))
    }

    /// What `opening` makes of the connection; `None` when it is over already.
    pub(super) async fn open<T>(
        &self,
        server: &Server,
        opening: impl Future<Output = Result<T, String>>,
    ) -> Option<T> {
        let opened = tokio::select! {
            opened = tokio::time::timeout(server.limits.handshake, opening) => opened,
            () = server.killed.cancelled() => return None,
            () = server.stopping.cancelled() => return None,
            () = self.evict.cancelled() => return None,
        };
        let reason = match opened {
            Ok(Ok(opened)) => return Some(opened),
            Ok(Err(reason)) => reason,
            Err(_) => server.reason_of_silence()?.to_owned(),
        };
        if let Some(lines_withheld) = REFUSALS.admit(Instant::now()) {
            tracing::info!(peer = ?self.peer, reason, lines_withheld, "closed a connection");
        }
        None
    }

    /// What the peer has shown in its handshake; called once, before it is known who calls.
    pub(super) fn show(&self, certificate: Option<PeerCertificate>) {
        if let Some(certificate) = certificate {
            let _ = self.certificate.set(certificate);
        }
    }

    /// Now it is known who makes the connection. False when it may have no more of them.
    pub(super) fn identify(&self, server: &Server, number: u64) -> bool {
        let identity = access::identify(&self.peer, self.certificate.get());
        let may_go_on = server.opened(number, self, &identity);
        // It is set here alone.
        let _ = self.identity.set(Arc::new(identity));
        may_go_on
    }

    /// Whether what the peer has shown counts no longer.
    pub(super) fn has_expired(&self) -> bool {
        let certificate = self.certificate.get();
        certificate.is_some_and(|certificate| certificate.not_after < SystemTime::now())
    }

    /// Returns when somebody else needs its place.
    pub(super) async fn evicted(&self) {
        self.evict.cancelled().await;
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.evict.is_cancelled()
    }

    pub(super) fn evict(&self) {
        self.evict.cancel();
    }

    fn decide(&self, now: Instant, limits: &ServerLimits) -> Decision {
        let short = self
            .callers
            .answers()
            .starved_for(now)
            .is_some_and(|short| short >= CHECK_INTERVAL);
        let limit = if short {
            limits.stalled_when_short
        } else {
            limits.stalled
        };
        let stalls = {
            let known = self.accounts.lock();
            let mut all = known.earlier.iter().chain([&known.current]);
            all.any(|accounts| {
                let stalled = accounts.answers.stalled_for(now);
                stalled.is_some_and(|stalled| stalled >= limit)
            })
        };
        if stalls {
            return Decision::Abort("its peer does not read what it asked for");
        }
        if self.has_expired() {
            return Decision::CloseGracefully;
        }
        let Some((called, since)) = self.idle() else {
            return Decision::Keep;
        };
        let idle = now.saturating_duration_since(since);
        if self.arrived.load(Ordering::Relaxed) < PREFACE && idle >= limits.handshake {
            return Decision::Abort(NO_HTTP2);
        }
        let limit = if called {
            limits.idle
        } else {
            limits.first_call
        };
        if idle >= limit {
            return Decision::CloseGracefully;
        }
        Decision::Keep
    }
}

impl Drop for ActiveCall {
    fn drop(&mut self) {
        let mut activity = self.caller.activity.lock();
        activity.under_way -= 1;
        activity.since = Instant::now();
    }
}

enum Event {
    Ended(Result<(), hyper::Error>),
    Stopping,
    Evict,
    Killed,
    Look,
}

/// Until the connection is closed, or the server stops.
pub(super) async fn serve(
    server: &Server,
    number: u64,
    connection: AcceptedStream,
    caller: Arc<ClientConnection>,
    routes: Routes,
) {
    let limits = &server.limits;
    let opening = opening::open(connection, server.acceptor.as_ref());
    let (connection, refusal) = match caller.open(server, opening).await {
        None => return,
        Some(OpenedConnection::Refused(connection, why)) => (connection, Some(why)),
        Some(OpenedConnection::Served(connection, certificate)) => {
            caller.show(certificate);
            (connection, None)
        }
    };
    if !caller.identify(server, number) {
        return;
    }
    let service = {
        let caller = caller.clone();
        service_fn(move |request| {
            let (caller, routes) = (caller.clone(), routes.clone());
            async move {
                Ok::<_, std::convert::Infallible>(match refusal {
                    None => call::answer(&caller, routes, request).await,
                    Some(why) => call::refuse_connection(&caller, why),
                })
            }
        })
    };
    let mut protocol = http2::Builder::new(TokioExecutor::new());
    let (window, _held) = caller.accounts().caller.window();
    limits.apply(window, &mut protocol);
    let mut serving = pin!(protocol.serve_connection(TokioIo::new(connection), service));
    let round = CHECK_INTERVAL
        .min(limits.handshake)
        .min(limits.first_call)
        .min(limits.idle)
        .min(limits.stalled_when_short);
    // From when on it is cut, unless calls are under way.
    let mut leaving: Option<Instant> = None;
    let mut told_to_stop = false;
    loop {
        let event = tokio::select! {
            ended = &mut serving => Event::Ended(ended),
            () = server.killed.cancelled() => Event::Killed,
            () = server.stopping.cancelled(), if !told_to_stop => Event::Stopping,
            () = caller.evict.cancelled(), if leaving.is_none() => Event::Evict,
            () = tokio::time::sleep(round) => Event::Look,
        };
        let now = Instant::now();
        match event {
            Event::Ended(Ok(())) | Event::Killed => return,
            Event::Ended(Err(error)) => {
                tracing::debug!(peer = ?caller.peer, %error, "a connection ended");
                return;
            }
            Event::Evict if caller.idle().is_some_and(|(called, _)| !called) => return,
            Event::Stopping | Event::Evict => {
                told_to_stop |= server.stopping.is_cancelled();
                serving.as_mut().graceful_shutdown();
                leaving.get_or_insert(now + GOAWAY_GRACE);
            }
            Event::Look => match caller.decide(now, limits) {
                Decision::Abort(reason) => {
                    tracing::info!(peer = ?caller.peer, reason, "closed a connection");
                    return;
                }
                _ if leaving.is_some_and(|end| now >= end) => {
                    if caller.idle().is_some() {
                        return;
                    }
                }
                Decision::CloseGracefully if leaving.is_none() => {
                    serving.as_mut().graceful_shutdown();
                    leaving = Some(now + GOAWAY_GRACE);
                }
                Decision::CloseGracefully | Decision::Keep => {}
            },
        }
    }
}
