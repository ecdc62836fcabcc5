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
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    access::Policy,
    budget::BudgetReservation,
    caller::{Accounts, Caller, CallerKey, Callers},
    limits::ServerLimits,
};
use crate::{
    auth::Identity,
    daemon::{Peer, PeerCertificate, listen::AcceptedStream, tokens::TokenTurn},
};

/// How often a connection is looked at.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// What a client has to read GOAWAY and to close the connection by itself.
pub(super) const GOAWAY_GRACE: Duration = Duration::from_secs(2);
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
pub(super) enum Decision {
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

    /// What the peer has shown in its handshake; called once, before it is known who calls.
    pub(super) fn show(&self, certificate: Option<PeerCertificate>) {
        if let Some(certificate) = certificate {
            let _ = self.certificate.set(certificate);
        }
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

    /// What shall become of it now.
    pub(super) fn decide(&self, now: Instant, limits: &ServerLimits) -> Decision {
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
