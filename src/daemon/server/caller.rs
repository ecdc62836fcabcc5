//! Callers of a listener, and what each of them takes of it, on all of its connections.
//!
//! 1. A caller is who it proved to be, by a certificate, a token or the kernel; else the address that it
//!    calls from, of IPv6 its first 64 bits, since a host has all of them.
//! 2. A connection is a caller's: its address's at first, then that of whom its certificate names, or its
//!    first token. What it holds counts there from then on. Calls with other tokens, as proxies make them,
//!    count among their own caller's calls and rates, while what they hold is the connection's.
//! 3. A caller that has no connection is forgotten as soon as it owes nothing (`rate`).

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;
use tokio::time::Sleep;

use super::{
    budget::{Budget, BudgetReservation, CallerBudget, ConnectionBudget},
    limits::{CONNECTION_WINDOW, SMALLEST_WINDOW, ServerLimits},
    rate::Rate,
};
use crate::{auth::Identity, daemon::Peer};

/// What one caller takes.
#[derive(Debug)]
pub(super) struct Caller {
    pub key: CallerKey,
    received: Arc<CallerBudget>,
    answers: Arc<CallerBudget>,
    calls: Arc<CallerBudget>,
    connections: Arc<CallerBudget>,
    windows: Arc<CallerBudget>,
    pub requests: Rate,
    pub bytes: Rate,
}

/// Who a caller is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum CallerKey {
    Identity(String),
    Address(IpAddr),
    Unknown,
}

/// All callers of a listener.
pub(super) struct Callers {
    received: Arc<Budget>,
    answers: Arc<Budget>,
    calls: Arc<Budget>,
    connections: Arc<Budget>,
    windows: Arc<Budget>,
    limits: Arc<ServerLimits>,
    known: Mutex<KnownCallers>,
}

struct KnownCallers {
    callers: BTreeMap<CallerKey, Arc<Caller>>,
    /// So many, and those that are gone are forgotten.
    full_at: usize,
}

/// One connection's part of what its caller takes.
#[derive(Debug)]
pub(super) struct Accounts {
    pub caller: Arc<Caller>,
    pub received: Arc<ConnectionBudget>,
    pub answers: Arc<ConnectionBudget>,
    pub calls: Arc<ConnectionBudget>,
    /// Its place among the connections, until it is another caller's.
    place: Mutex<Option<BudgetReservation>>,
}

impl CallerKey {
    pub(super) fn of(identity: &Identity, peer: &Peer) -> Self {
        match (identity.is_nobody(), peer) {
            (false, _) => CallerKey::Identity(identity.name().to_owned()),
            (true, Peer::Unix { uid, .. }) => CallerKey::Identity(format!("uid:{uid}")),
            (true, Peer::Tcp(Some(address))) => {
                CallerKey::Address(match address.ip().to_canonical() {
                    IpAddr::V4(address) => address.into(),
                    IpAddr::V6(address) => {
                        let network = u128::from(address) >> 64 << 64;
                        Ipv6Addr::from(network).into()
                    }
                })
            }
            (true, Peer::Tcp(None)) => CallerKey::Unknown,
        }
    }
}

impl fmt::Display for CallerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallerKey::Identity(name) => f.write_str(name),
            CallerKey::Address(address) => address.fmt(f),
            CallerKey::Unknown => f.write_str("unknown"),
        }
    }
}

impl Accounts {
    /// The connection is no longer its caller's.
    pub(super) fn leave(&self) {
        *self.place.lock() = None;
    }
}

impl Callers {
    pub(super) fn new(limits: &Arc<ServerLimits>) -> Self {
        Callers {
            received: Budget::new(limits.received, limits.request_bytes_per_connection),
            answers: Budget::new(limits.answers, limits.response_bytes_per_connection),
            calls: Budget::new(limits.calls, u64::from(limits.calls_per_connection)),
            connections: Budget::new(limits.connections as u64, u64::MAX),
            windows: Budget::new(limits.windows, u64::MAX),
            limits: limits.clone(),
            known: Mutex::new(KnownCallers {
                callers: BTreeMap::new(),
                full_at: 64,
            }),
        }
    }

    /// Bytes of answers that nobody has read yet.
    pub(super) fn answers(&self) -> &Budget {
        &self.answers
    }

    pub(super) fn get(&self, key: &CallerKey) -> Arc<Caller> {
        let mut known = self.known.lock();
        if let Some(caller) = known.callers.get(key) {
            return caller.clone();
        }
        if known.callers.len() >= known.full_at {
            let now = Instant::now();
            known.callers.retain(|_, caller| {
                let owes_nothing = caller.requests.is_paid(now) && caller.bytes.is_paid(now);
                Arc::strong_count(caller) > 1 || !owes_nothing
            });
            known.full_at = (known.callers.len() * 2).max(64);
        }
        let caller = Arc::new(Caller {
            key: key.clone(),
            received: self.received.caller(),
            answers: self.answers.caller(),
            calls: self.calls.caller(),
            connections: self.connections.caller(),
            windows: self.windows.caller(),
            requests: Rate::new(self.limits.requests_per_second),
            bytes: Rate::new(self.limits.bytes_per_second),
        });
        known.callers.insert(key.clone(), caller.clone());
        caller
    }
}

impl Caller {
    /// How long it waits after so many bytes, if at all.
    pub(super) fn pause_after(&self, bytes: usize) -> Option<Pin<Box<Sleep>>> {
        let delay = self.bytes.take(bytes as u64, Instant::now());
        (!delay.is_zero()).then(|| Box::pin(tokio::time::sleep(delay)))
    }

    /// What a new connection takes; `None` when this caller has as many as it may.
    pub(super) fn connect(self: &Arc<Self>) -> Option<Accounts> {
        let place = self.connections.account().try_reserve(1)?;
        Some(self.accounts(place))
    }

    /// The same for a connection that another one makes way for.
    pub(super) fn connect_beyond(self: &Arc<Self>) -> Accounts {
        self.accounts(self.connections.account().charge(1))
    }

    fn accounts(self: &Arc<Self>, place: BudgetReservation) -> Accounts {
        Accounts {
            caller: self.clone(),
            received: self.received.account(),
            answers: self.answers.account(),
            calls: self.calls.account(),
            place: Mutex::new(Some(place)),
        }
    }

    /// How much may arrive on a new connection ahead of its calls, while it is held.
    pub(super) fn window(&self) -> (u32, Option<BudgetReservation>) {
        let account = self.windows.account();
        let sizes = std::iter::successors(Some(CONNECTION_WINDOW), |size| Some(size / 2));
        let mut sizes = sizes.take_while(|size| *size > SMALLEST_WINDOW);
        let found = sizes.find_map(|size| Some((size, account.try_reserve(u64::from(size))?)));
        match found {
            Some((size, held)) => (size, Some(held)),
            None => (SMALLEST_WINDOW, None),
        }
    }

    /// Counts a call that comes on somebody else's connection.
    pub(super) fn begin_call(&self) -> Option<BudgetReservation> {
        self.calls.account().try_reserve(1)
    }
}
