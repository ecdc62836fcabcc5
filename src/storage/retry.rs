//! Trying again: whether, how often, for how long, and how long to wait in between.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use backon::{BackoffBuilder, ExponentialBuilder};

/// From the first failure, how long a call is tried again where nothing else can be asked.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Of a budget of retries: each call adds one of these, and each retry takes `RETRY_COST`.
const MOST_SAVED: u32 = 100 * RETRY_COST;
const RETRY_COST: u32 = 10;

/// How often a server may say that the trouble is its own, or that it is full, before it is believed.
const BELIEVED_AFTER: u32 = 5;

/// Twice as long after each failure, and up to as much again at random, so that many clients do not
/// come back at once.
const DELAYS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(50))
    .with_max_delay(Duration::from_millis(1600))
    .without_max_times()
    .with_jitter();

/// Whether a call that failed may succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transience {
    Permanent,
    /// Permanent when it is said again and again.
    Doubtful,
    Transient,
}

/// How calls to one peer are tried again.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// From the first failure.
    timeout: Duration,
    /// `None` where nothing else can be asked, so that retries are all that is left.
    budget: Option<Arc<RetryBudget>>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            timeout: RETRY_TIMEOUT,
            budget: None,
        }
    }
}

impl RetryPolicy {
    /// For so long, and no more than one retry for ten calls in the long run, so that a peer that is in
    /// trouble is not asked several times as much as before.
    pub fn budgeted(timeout: Duration) -> Self {
        RetryPolicy {
            timeout,
            budget: Some(Arc::default()),
        }
    }

    /// The attempts at a call that is about to be made.
    pub(super) fn attempts(&self) -> Attempts {
        if let Some(budget) = &self.budget {
            budget.save();
        }
        Attempts {
            failures: 0,
            first_failure: None,
            delays: DELAYS.build(),
            policy: self.clone(),
        }
    }
}

/// How many retries all calls to a peer have left together.
#[derive(Debug)]
struct RetryBudget(AtomicU32);

impl Default for RetryBudget {
    fn default() -> Self {
        RetryBudget(AtomicU32::new(MOST_SAVED))
    }
}

impl RetryBudget {
    fn save(&self) {
        let more = |saved: u32| Some((saved + 1).min(MOST_SAVED));
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// False when nothing is left.
    fn take(&self) -> bool {
        let less = |saved: u32| saved.checked_sub(RETRY_COST);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }
}

/// The attempts at one call.
pub(super) struct Attempts {
    failures: u32,
    first_failure: Option<Instant>,
    delays: <ExponentialBuilder as BackoffBuilder>::Backoff,
    policy: RetryPolicy,
}

impl Attempts {
    /// The first failure was then, unless there was one before.
    pub(super) fn failing_since(&mut self, begun: Instant) {
        self.first_failure.get_or_insert(begun);
    }

    /// What was asked for has come closer: failures before that count no more.
    pub(super) fn progressed(&mut self) {
        self.failures = 0;
        self.first_failure = None;
        self.delays = DELAYS.build();
    }

    /// Counts a failure, and waits before the next attempt. False when there should be none.
    pub(super) async fn wait(&mut self, transience: Transience) -> bool {
        let most = match transience {
            Transience::Permanent => return false,
            Transience::Doubtful => BELIEVED_AFTER,
            Transience::Transient => u32::MAX,
        };
        self.failures += 1;
        let first = *self.first_failure.get_or_insert_with(Instant::now);
        if self.failures >= most || first.elapsed() >= self.policy.timeout {
            return false;
        }
        if self
            .policy
            .budget
            .as_ref()
            .is_some_and(|budget| !budget.take())
        {
            return false;
        }
        tokio::time::sleep(self.delays.next().unwrap_or_default()).await;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_doubtful_failure_is_believed_when_it_is_repeated() {
        let mut attempts = RetryPolicy::default().attempts();
        assert!(!attempts.wait(Transience::Permanent).await);
        for _ in 1..BELIEVED_AFTER {
            assert!(attempts.wait(Transience::Doubtful).await);
        }
        assert!(!attempts.wait(Transience::Doubtful).await);
        assert!(attempts.wait(Transience::Transient).await);
    }

    #[tokio::test]
    async fn failures_before_progress_count_no_more() {
        let mut attempts = RetryPolicy::budgeted(Duration::ZERO).attempts();
        assert!(!attempts.wait(Transience::Transient).await);
        let mut attempts = RetryPolicy::default().attempts();
        for _ in 0..3 {
            for _ in 1..BELIEVED_AFTER {
                assert!(attempts.wait(Transience::Doubtful).await);
            }
            attempts.progressed();
        }
    }

    #[tokio::test]
    async fn a_budget_of_retries_runs_out_and_is_filled_by_calls() {
        let policy = RetryPolicy::budgeted(Duration::from_secs(60));
        let budget = policy.budget.clone().unwrap();
        while budget.take() {}
        assert!(!policy.attempts().wait(Transience::Transient).await);
        for _ in 0..RETRY_COST {
            policy.attempts();
        }
        assert!(policy.attempts().wait(Transience::Transient).await);
        assert!(!policy.attempts().wait(Transience::Transient).await);
    }

    #[test]
    fn delays_grow_to_a_limit_and_differ_from_one_caller_to_another() {
        let mut longest = Duration::from_millis(100);
        for delay in DELAYS.build().take(10) {
            assert!(delay >= longest / 2 && delay <= longest, "{delay:?}");
            longest = (longest * 2).min(Duration::from_millis(3200));
        }
        assert_ne!(DELAYS.build().next(), DELAYS.build().next());
    }
}
