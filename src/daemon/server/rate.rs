//! How fast a caller may ask for something: so much a second, and a second's worth at once.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What was asked for is owed, and paid off by time.
#[derive(Debug)]
pub(super) struct Rate {
    /// 0 for without limit.
    per_second: u64,
    /// When all that was taken is paid off.
    paid: Mutex<Option<Instant>>,
}

impl Rate {
    pub(super) fn new(per_second: u64) -> Self {
        Rate {
            per_second,
            paid: Mutex::new(None),
        }
    }

    /// Takes some of it. How long to wait before the next.
    pub(super) fn take(&self, amount: u64, now: Instant) -> Duration {
        if self.per_second == 0 {
            return Duration::ZERO;
        }
        let cost = Duration::from_secs_f64(amount as f64 / self.per_second as f64);
        let mut paid = self.paid.lock();
        let owed = paid.map_or(now, |paid| paid.max(now)) + cost;
        *paid = Some(owed);
        (owed - now).saturating_sub(BURST)
    }

    /// How long a taker would wait.
    pub(super) fn delay(&self, now: Instant) -> Duration {
        let owed = self
            .paid
            .lock()
            .map(|paid| paid.saturating_duration_since(now));
        owed.unwrap_or_default().saturating_sub(BURST)
    }

    /// Whether nothing is owed.
    pub(super) fn is_paid(&self, now: Instant) -> bool {
        self.paid.lock().is_none_or(|paid| paid <= now)
    }
}

const BURST: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seconds_worth_is_there_at_once_and_the_rest_in_its_time() {
        let start = Instant::now();
        let rate = Rate::new(10);
        for _ in 0..10 {
            assert_eq!(rate.take(1, start), Duration::ZERO);
        }
        assert_eq!(rate.take(5, start), Duration::from_millis(500));
        assert!(!rate.is_paid(start + Duration::from_millis(1499)));
        let later = start + Duration::from_millis(1500);
        assert!(rate.is_paid(later));
        assert_eq!(rate.delay(later), Duration::ZERO);
        assert_eq!(rate.take(10, later), Duration::ZERO);
        assert_eq!(rate.take(1, later), Duration::from_millis(100));
        assert_eq!(Rate::new(0).take(u64::MAX, start), Duration::ZERO);
    }
}
