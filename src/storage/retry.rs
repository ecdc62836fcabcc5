//! Trying again: whether, how often, for how long, and how long to wait in between.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};

/// From the first failure, how long a call is tried again.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

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

/// The attempts at one call.
pub(super) struct Attempts {
    failures: u32,
    first_failure: Option<Instant>,
    delays: <ExponentialBuilder as BackoffBuilder>::Backoff,
}

impl Default for Attempts {
    fn default() -> Self {
        Attempts {
            failures: 0,
            first_failure: None,
            delays: DELAYS.build(),
        }
    }
}

impl Attempts {
    /// Counts a failure, and waits before the next attempt. False when there should be none.
    pub(super) async fn wait(&mut self, transience: Transience) -> bool {
        let most = match transience {
            Transience::Permanent => return false,
            Transience::Doubtful => BELIEVED_AFTER,
            Transience::Transient => u32::MAX,
        };
        self.failures += 1;
        let first = *self.first_failure.get_or_insert_with(Instant::now);
        if self.failures >= most || first.elapsed() >= RETRY_TIMEOUT {
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
        let mut attempts = Attempts::default();
        assert!(!attempts.wait(Transience::Permanent).await);
        for _ in 1..BELIEVED_AFTER {
            assert!(attempts.wait(Transience::Doubtful).await);
        }
        assert!(!attempts.wait(Transience::Doubtful).await);
        assert!(attempts.wait(Transience::Transient).await);
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
