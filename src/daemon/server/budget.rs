//! Memory that peers can make a server keep, counted in bytes.
//!
//! A `Budget` is shared by all callers of a listener; each has a `CallerBudget` in it, each of its
//! connections a `ConnectionBudget` in that, and whatever keeps bytes for a peer holds a `BudgetReservation`.
//!
//! 1. A caller is given no more than what would remain free after it. So one that takes all it can, on
//!    however many connections, leaves half of the budget to others, two leave a third or more, and a new
//!    one always gets something. A caller that holds nothing may have all that is free, since one message
//!    can be larger than that.
//!    Likewise each of its connections is given no more than would remain to the others of it, nor more
//!    than a connection's limit; but one that holds nothing may have all that the caller may.
//! 2. Calls of one connection wait in line, and only the first of them waits for the budget: many
//!    calls of one peer are not woken by what others give back.
//! 3. `charge` counts what is there already, also beyond a limit; whoever charges has asked for room
//!    before.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Whoever waits for room longer than this is refused.
const RESERVE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Budget {
    total: u64,
    per_connection: u64,
    state: Mutex<BudgetState>,
    released: Notify,
}

#[derive(Debug, Default)]
struct BudgetState {
    used: u64,
    /// Connections that wait for room that others have, and since when there was no moment without.
    starved: u32,
    starved_since: Option<Instant>,
}

/// One caller's part of a budget, on all its connections.
#[derive(Debug)]
pub(super) struct CallerBudget {
    budget: Arc<Budget>,
    /// Changed under `Budget::state`.
    held: AtomicU64,
}

/// One connection's part of a caller's.
#[derive(Debug)]
pub(super) struct ConnectionBudget {
    budget: Arc<Budget>,
    caller: Arc<CallerBudget>,
    /// Locked after `Budget::state`.
    state: Mutex<ConnectionUse>,
    line: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct ConnectionUse {
    held: u64,
    /// When bytes were last written or given back, or first held.
    progress: Instant,
}

/// Bytes that are counted; given back when dropped.
#[derive(Debug)]
pub struct BudgetReservation {
    account: Arc<ConnectionBudget>,
    bytes: u64,
}

/// A wait, while there is one.
pub(super) type PendingFuture<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// There was no room for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this server keeps as much for its callers as it may, and had no room for {bytes} bytes more for {} seconds; read the answers of calls that are under way, and try again", RESERVE_TIMEOUT.as_secs())]
pub(super) struct BudgetExhausted {
    bytes: u64,
}

impl Budget {
    pub(super) fn new(total: u64, per_connection: u64) -> Arc<Self> {
        Arc::new(Budget {
            total,
            per_connection,
            state: Mutex::default(),
            released: Notify::new(),
        })
    }

    pub(super) fn caller(self: &Arc<Self>) -> Arc<CallerBudget> {
        Arc::new(CallerBudget {
            budget: self.clone(),
            held: AtomicU64::new(0),
        })
    }

    #[cfg(test)]
    fn account(self: &Arc<Self>) -> Arc<ConnectionBudget> {
        self.caller().account()
    }

    /// For how long somebody has been waiting for bytes that others hold.
    pub(super) fn starved_for(&self, now: Instant) -> Option<Duration> {
        let since = self.state.lock().starved_since?;
        Some(now.saturating_duration_since(since))
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.state.lock().used
    }
}

impl CallerBudget {
    /// That of a new connection.
    pub(super) fn account(self: &Arc<Self>) -> Arc<ConnectionBudget> {
        Arc::new(ConnectionBudget {
            budget: self.budget.clone(),
            caller: self.clone(),
            state: Mutex::new(ConnectionUse {
                held: 0,
                progress: Instant::now(),
            }),
            line: tokio::sync::Mutex::default(),
        })
    }
}

impl ConnectionBudget {
    /// Counts bytes, as soon as there is room for them.
    pub(super) async fn reserve(
        self: &Arc<Self>,
        bytes: u64,
    ) -> Result<BudgetReservation, BudgetExhausted> {
        self.reserve_within(RESERVE_TIMEOUT, bytes).await
    }

    async fn reserve_within(
        self: &Arc<Self>,
        limit: Duration,
        bytes: u64,
    ) -> Result<BudgetReservation, BudgetExhausted> {
        if let Ok(_first) = self.line.try_lock()
            && let Some(reservation) = self.try_reserve(bytes)
        {
            return Ok(reservation);
        }
        tokio::time::timeout(limit, self.wait(|| self.try_reserve(bytes)))
            .await
            .map_err(|_| BudgetExhausted { bytes })
    }

    /// Whether `charge` may be called now.
    pub(super) fn has_room(&self) -> bool {
        let shared = self.budget.state.lock();
        self.fits(&shared, self.state.lock().held, 1)
    }

    /// Returns when `charge` may be called.
    pub(super) async fn wait_for_space(self: Arc<Self>) {
        self.wait(|| self.has_room().then_some(())).await;
    }

    /// Counts bytes that are there already.
    pub(super) fn charge(self: &Arc<Self>, bytes: u64) -> BudgetReservation {
        let mut shared = self.budget.state.lock();
        self.take(&mut shared, bytes)
    }

    /// For how long this connection has held bytes without any progress.
    pub(super) fn stalled_for(&self, now: Instant) -> Option<Duration> {
        let own = self.state.lock();
        (own.held > 0).then(|| now.saturating_duration_since(own.progress))
    }

    /// Counts bytes, if there is room for them now.
    pub(super) fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<BudgetReservation> {
        let mut shared = self.budget.state.lock();
        let held = self.state.lock().held;
        self.fits(&shared, held, bytes)
            .then(|| self.take(&mut shared, bytes))
    }

    fn take(self: &Arc<Self>, shared: &mut BudgetState, bytes: u64) -> BudgetReservation {
        let mut own = self.state.lock();
        if own.held == 0 {
            own.progress = Instant::now();
        }
        own.held += bytes;
        self.caller.held.fetch_add(bytes, Ordering::Relaxed);
        shared.used += bytes;
        BudgetReservation {
            account: self.clone(),
            bytes,
        }
    }

    fn fits(&self, shared: &BudgetState, held: u64, bytes: u64) -> bool {
        let budget = &self.budget;
        let free = budget.total.saturating_sub(shared.used);
        let of_caller = self.caller.held.load(Ordering::Relaxed);
        if of_caller == 0 {
            return bytes <= free;
        }
        // What the caller may hold, so that as much remains free.
        let share = free.saturating_add(of_caller) / 2;
        let left = share.checked_sub(of_caller.saturating_add(bytes));
        match (left, held) {
            (None, _) => false,
            (Some(_), 0) => true,
            (Some(left), held) => held.saturating_add(bytes) <= budget.per_connection.min(left),
        }
    }

    async fn wait<T>(&self, ready: impl Fn() -> Option<T>) -> T {
        let _first = self.line.lock().await;
        let mut short = None;
        loop {
            let released = self.budget.released.notified();
            if let Some(ready) = ready() {
                return ready;
            }
            if short.is_none() && self.is_below_its_limit() {
                short = Some(StarvedWaiter::new(&self.budget));
            }
            released.await;
        }
    }

    /// It is others who keep this connection waiting.
    fn is_below_its_limit(&self) -> bool {
        let of_caller = self.caller.held.load(Ordering::Relaxed);
        of_caller < self.budget.total / 4 && self.state.lock().held < self.budget.per_connection / 2
    }
}

/// A connection that waits for what others hold.
struct StarvedWaiter<'a>(&'a Budget);

impl<'a> StarvedWaiter<'a> {
    fn new(budget: &'a Budget) -> Self {
        let mut shared = budget.state.lock();
        shared.starved += 1;
        shared.starved_since.get_or_insert_with(Instant::now);
        StarvedWaiter(budget)
    }
}

impl Drop for StarvedWaiter<'_> {
    fn drop(&mut self) {
        let mut shared = self.0.state.lock();
        shared.starved -= 1;
        if shared.starved == 0 {
            shared.starved_since = None;
        }
    }
}

impl BudgetReservation {
    /// A part of what it counts was written, although its memory is not given back before the rest.
    pub fn progressed(&self) {
        self.account.state.lock().progress = Instant::now();
    }
}

impl Drop for BudgetReservation {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut shared = self.account.budget.state.lock();
        shared.used -= self.bytes;
        let of_caller = &self.account.caller.held;
        of_caller.fetch_sub(self.bytes, Ordering::Relaxed);
        let mut own = self.account.state.lock();
        own.held -= self.bytes;
        own.progress = Instant::now();
        drop((own, shared));
        self.account.budget.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(account: &Arc<ConnectionBudget>) -> Vec<BudgetReservation> {
        std::iter::from_fn(|| account.try_reserve(1)).collect()
    }

    #[test]
    fn whoever_takes_all_he_can_on_however_many_connections_leaves_half_to_others() {
        let budget = Budget::new(1200, 1000);
        let greedy = budget.caller();
        let connections: Vec<_> = (0..100).map(|_| greedy.account()).collect();
        let held: Vec<_> = connections.iter().map(take_all).collect();
        assert_eq!(held[0].len(), 300, "half of what its caller may have");
        assert_eq!(held[1].len(), 150);
        assert!(budget.used() <= 600);
        let (second, third) = (budget.account(), budget.account());
        assert!(
            second.try_reserve(500).is_some(),
            "one who holds nothing may have all that is free"
        );
        let two = take_all(&second);
        assert!(two.len() >= 140, "{}", two.len());
        assert!(take_all(&third).len() >= 100);
        drop(held);
        drop(two);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn no_connection_has_more_than_its_limit() {
        let budget = Budget::new(1000, 100);
        let account = budget.account();
        let held = account.try_reserve(60).unwrap();
        assert!(account.try_reserve(41).is_none());
        assert!(account.try_reserve(40).is_some());
        drop(held);
        assert_eq!(budget.used(), 0);
        let _held = account.try_reserve(30).unwrap();
        let charged = account.charge(500);
        assert!(!account.has_room());
        assert!(budget.account().has_room());
        drop(charged);
        assert!(account.has_room());
    }

    #[tokio::test]
    async fn calls_of_one_connection_wait_in_line_until_there_is_room() {
        let budget = Budget::new(1000, 100);
        let account = budget.account();
        let held = account.reserve(100).await.unwrap();
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let account = account.clone();
                tokio::spawn(async move { account.reserve(10).await.map(drop) })
            })
            .collect();
        tokio::task::yield_now().await;
        let now = Instant::now();
        assert_eq!(budget.starved_for(now), None, "it is its own fault");
        assert!(account.stalled_for(now + RESERVE_TIMEOUT) >= Some(RESERVE_TIMEOUT));
        drop(held);
        for call in waiting {
            call.await.unwrap().unwrap();
        }
        assert_eq!(account.stalled_for(Instant::now()), None);
    }

    #[tokio::test]
    async fn whoever_waits_too_long_for_what_others_hold_is_refused() {
        let budget = Budget::new(1000, 1000);
        let _held = budget.account().reserve(1000).await.unwrap();
        let waiting = budget.account();
        let soon = Duration::from_millis(20);
        let call = tokio::spawn(async move { waiting.reserve_within(soon, 10).await.map(drop) });
        tokio::task::yield_now().await;
        assert!(budget.starved_for(Instant::now()).is_some());
        assert_eq!(call.await.unwrap(), Err(BudgetExhausted { bytes: 10 }));
        assert_eq!(budget.starved_for(Instant::now()), None);
    }
}
