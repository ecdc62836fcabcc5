//! A circuit breaker: whether a server is used.
//!
//! 1. After so many faults in a row, of calls or of health checks, a server is out of use, and nobody
//!    waits for it.
//! 2. It is tried again by a health check: when that is answered, it is half open, and used. The next
//!    fault takes it out of use for twice as long as before; a call that succeeds, or another health
//!    check, closes the breaker.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

/// How long a server is left alone, first and at most.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub(super) struct Breaker {
    /// In a row.
    most_faults: u32,
    state: Mutex<BreakerState>,
    usable: watch::Sender<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BreakerState {
    /// Failed calls say nothing about health checks, nor the other way round: a server may answer these
    /// and be stuck with its disk.
    Closed {
        failed_calls: u32,
        failed_checks: u32,
    },
    Open {
        until: Instant,
        pause: Duration,
    },
    HalfOpen {
        pause: Duration,
    },
}

const CLOSED: BreakerState = BreakerState::Closed {
    failed_calls: 0,
    failed_checks: 0,
};

/// What a fault was a fault of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttemptKind {
    Call,
    HealthCheck,
}

impl Breaker {
    pub(super) fn new(most_faults: u32) -> Self {
        Breaker {
            most_faults,
            state: Mutex::new(CLOSED),
            usable: watch::Sender::new(true),
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        *self.usable.borrow()
    }

    /// Returns when the server is out of use.
    pub(super) async fn opened(&self) {
        // The sender is alive as long as `self`.
        let _ = self.usable.subscribe().wait_for(|usable| !usable).await;
    }

    /// Whether nothing is held against the server that took it out of use before.
    pub(super) fn is_closed(&self) -> bool {
        matches!(*self.state.lock(), BreakerState::Closed { .. })
    }

    /// How long a server that is out of use is left alone from now on.
    pub(super) fn pause_left(&self, now: Instant) -> Option<Duration> {
        match *self.state.lock() {
            BreakerState::Open { until, .. } => Some(until.saturating_duration_since(now)),
            BreakerState::Closed { .. } | BreakerState::HalfOpen { .. } => None,
        }
    }

    /// Whether it is time for a health check.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        match *self.state.lock() {
            BreakerState::Open { until, .. } => until <= now,
            _ => true,
        }
    }

    /// True when this fault takes the server out of use.
    pub(super) fn fail(&self, attempt: AttemptKind, now: Instant) -> bool {
        let mut state = self.state.lock();
        let pause = match &mut *state {
            BreakerState::Closed {
                failed_calls,
                failed_checks,
            } => {
                let failed = match attempt {
                    AttemptKind::Call => failed_calls,
                    AttemptKind::HealthCheck => failed_checks,
                };
                *failed += 1;
                if *failed < self.most_faults {
                    return false;
                }
                SHORTEST_PAUSE
            }
            BreakerState::HalfOpen { pause } => (*pause * 2).min(LONGEST_PAUSE),
            BreakerState::Open { until, pause } => {
                if attempt == AttemptKind::HealthCheck {
                    *pause = (*pause * 2).min(LONGEST_PAUSE);
                    *until = now + *pause;
                }
                return false;
            }
        };
        *state = BreakerState::Open {
            until: now + pause,
            pause,
        };
        drop(state);
        self.usable.send_replace(false);
        true
    }

    /// True when this answer brings the server back into use.
    pub(super) fn succeed(&self, attempt: AttemptKind) -> bool {
        let mut state = self.state.lock();
        match (&mut *state, attempt) {
            (BreakerState::Closed { failed_calls, .. }, AttemptKind::Call) => *failed_calls = 0,
            (BreakerState::Closed { failed_checks, .. }, AttemptKind::HealthCheck) => {
                *failed_checks = 0
            }
            (BreakerState::HalfOpen { .. }, _) => *state = CLOSED,
            // A call that was under way says less than a check that is due.
            (BreakerState::Open { .. }, AttemptKind::Call) => {}
            (BreakerState::Open { pause, .. }, AttemptKind::HealthCheck) => {
                *state = BreakerState::HalfOpen { pause: *pause };
                drop(state);
                self.usable.send_replace(true);
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::{
        AttemptKind::{Call, HealthCheck},
        *,
    };

    #[test]
    fn it_opens_after_faults_in_a_row_and_is_tried_again_by_a_health_check() {
        let (breaker, now) = (Breaker::new(3), Instant::now());
        assert!(!breaker.fail(Call, now) && !breaker.fail(Call, now));
        breaker.succeed(Call);
        assert!(!breaker.fail(Call, now) && !breaker.fail(Call, now));
        // That it says what it can does not mean that it can.
        breaker.succeed(HealthCheck);
        assert!(breaker.is_usable());
        assert!(breaker.fail(Call, now));
        assert!(!breaker.is_usable() && !breaker.is_due(now));
        assert_eq!(breaker.pause_left(now), Some(SHORTEST_PAUSE));
        assert!(!breaker.succeed(Call) && !breaker.is_usable());
        let later = now + SHORTEST_PAUSE;
        assert!(breaker.is_due(later));
        assert_eq!(breaker.pause_left(later), Some(Duration::ZERO));
        assert!(breaker.succeed(HealthCheck) && breaker.is_usable());
        assert!(breaker.pause_left(later).is_none() && !breaker.is_closed());
        // Half open: one fault is enough, and it is left alone for longer.
        assert!(breaker.fail(Call, later));
        assert!(!breaker.is_due(later + SHORTEST_PAUSE));
        assert!(breaker.is_due(later + 2 * SHORTEST_PAUSE));
        breaker.succeed(HealthCheck);
        breaker.succeed(Call);
        assert!(breaker.is_closed() && !breaker.fail(Call, later));
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        let (breaker, mut now) = (Breaker::new(1), Instant::now());
        assert!(breaker.fail(HealthCheck, now));
        for _ in 0..10 {
            now += LONGEST_PAUSE;
            assert!(breaker.is_due(now));
            breaker.fail(HealthCheck, now);
        }
        assert!(breaker.is_due(now + LONGEST_PAUSE));
    }

    #[tokio::test]
    async fn whoever_waits_for_a_call_hears_when_it_opens() {
        let breaker = Breaker::new(1);
        let wait = breaker.opened();
        breaker.fail(Call, Instant::now());
        wait.await;
    }
}
