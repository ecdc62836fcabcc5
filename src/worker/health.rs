//! Whether the slots of one runner take work, PURE: a host that fails every action must not take the
//! whole queue of a farm.
//!
//! 1. After a fault of this host, which an action does not cause, no slot asks for work for a while,
//!    so that the action can be tried elsewhere first; the while doubles with each fault in a row.
//! 2. Of actions that ran together, only the first fault counts, and no success of one that began
//!    before a fault tells that it is over.
//! 3. After `OUT_OF_SERVICE_FAULTS` faults in a row one slot alone takes an action, and the others when that
//!    went well, or has run for `TRIAL_DURATION`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

/// Faults in a row.
const OUT_OF_SERVICE_FAULTS: u32 = 3;
const INITIAL_PAUSE: Duration = Duration::from_secs(1);
const MAXIMUM_PAUSE: Duration = Duration::from_secs(60);
const TRIAL_DURATION: Duration = Duration::from_secs(60);
/// How often slots ask that wait for the one that tries.
const TRIAL_POLL_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct HostHealth {
    state: ServiceState,
    /// In a row.
    faults: u32,
    /// Why, when there are faults.
    reason: String,
    /// Of the last fault: what began before it says nothing.
    counted: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServiceState {
    Serving,
    Paused { until: Instant },
    Trying { slot: usize, until: Option<Instant> },
}

/// How an execution ended, as far as this host is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActionVerdict {
    /// The command was run.
    Ran,
    /// What the action, its client or its neighbours are to answer for.
    Neither,
    /// This host, or what it needs, is at fault.
    Fault(String),
}

/// What a verdict changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthChange {
    None,
    /// No slot may ask for work before; `out_of_service` when this is no single fault any more.
    Pause {
        until: Instant,
        faults: u32,
        out_of_service: bool,
    },
    /// All slots serve again, after being out of service.
    Recovered,
}

impl Default for HostHealth {
    fn default() -> Self {
        HostHealth {
            state: ServiceState::Serving,
            faults: 0,
            reason: String::new(),
            counted: None,
        }
    }
}

impl HostHealth {
    /// A slot has begun an execution.
    pub fn began(&mut self, now: Instant, slot: usize) {
        if let ServiceState::Trying {
            slot: trying,
            until: until @ None,
        } = &mut self.state
            && *trying == slot
        {
            *until = Some(now + TRIAL_DURATION);
        }
    }

    /// An execution that began at `began` has ended.
    pub fn ended(&mut self, now: Instant, began: Instant, verdict: ActionVerdict) -> HealthChange {
        if self.counted.is_some_and(|counted| began < counted) {
            return HealthChange::None;
        }
        match verdict {
            ActionVerdict::Neither => {
                // The next action of the slot that tries may tell.
                if let ServiceState::Trying { until, .. } = &mut self.state {
                    *until = None;
                }
                HealthChange::None
            }
            ActionVerdict::Ran => {
                let was_out = self.faults >= OUT_OF_SERVICE_FAULTS;
                *self = HostHealth::default();
                match was_out {
                    true => HealthChange::Recovered,
                    false => HealthChange::None,
                }
            }
            ActionVerdict::Fault(reason) => {
                self.faults += 1;
                self.reason = reason;
                self.counted = Some(now);
                let pause = INITIAL_PAUSE.saturating_mul(1 << (self.faults - 1).min(16));
                let until = now + pause.min(MAXIMUM_PAUSE);
                self.state = ServiceState::Paused { until };
                HealthChange::Pause {
                    until,
                    faults: self.faults,
                    out_of_service: self.faults >= OUT_OF_SERVICE_FAULTS,
                }
            }
        }
    }

    /// Whether a slot may ask for work; else when it may ask here again.
    pub fn admit(&mut self, now: Instant, slot: usize) -> Result<(), Instant> {
        match self.state {
            ServiceState::Serving => Ok(()),
            ServiceState::Paused { until } if now < until => Err(until),
            ServiceState::Paused { .. } if self.faults >= OUT_OF_SERVICE_FAULTS => {
                self.state = ServiceState::Trying { slot, until: None };
                Ok(())
            }
            ServiceState::Trying { slot: other, .. } if other == slot => Ok(()),
            ServiceState::Trying { until: None, .. } => Err(now + TRIAL_POLL_INTERVAL),
            ServiceState::Trying {
                until: Some(until), ..
            } if now < until => Err(until.min(now + TRIAL_POLL_INTERVAL)),
            ServiceState::Paused { .. } | ServiceState::Trying { .. } => {
                self.state = ServiceState::Serving;
                Ok(())
            }
        }
    }

    /// For the status line: how many faults in a row, and the last one; `None` while in service.
    pub fn out_of_service(&self) -> Option<(u32, &str)> {
        (self.faults >= OUT_OF_SERVICE_FAULTS && self.state != ServiceState::Serving)
            .then_some((self.faults, self.reason.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn fault() -> ActionVerdict {
        ActionVerdict::Fault("no sandbox".to_owned())
    }

    #[expect(clippy::disallowed_methods, reason = "tests are not pure")]
    fn start() -> (HostHealth, Instant) {
        (HostHealth::default(), Instant::now())
    }

    #[test]
    fn a_host_that_fails_everything_takes_ever_fewer_actions() {
        let (mut health, start) = start();
        let (mut now, mut taken) = (start, 0);
        while now < start + 600 * SECOND {
            for slot in 0..64 {
                if health.admit(now, slot).is_ok() {
                    taken += 1;
                    health.ended(now, now, fault());
                }
            }
            now += SECOND / 10;
        }
        assert!(taken < 20, "{taken}");
        assert_eq!(health.out_of_service().unwrap().1, "no sandbox");
    }

    #[test]
    fn actions_that_fail_together_are_one_fault() {
        let (mut health, now) = start();
        let first = health.ended(now + SECOND, now, fault());
        let until = now + 2 * SECOND;
        let pause = HealthChange::Pause {
            until,
            faults: 1,
            out_of_service: false,
        };
        assert_eq!(first, pause);
        for _ in 0..63 {
            assert_eq!(health.ended(now + SECOND, now, fault()), HealthChange::None);
        }
        assert_eq!(health.admit(now + SECOND, 5), Err(until));
        // One fault is no reason to doubt the host for longer.
        for slot in 0..64 {
            assert_eq!(health.admit(until, slot), Ok(()));
        }
        assert_eq!(health.out_of_service(), None);
    }

    #[test]
    fn out_of_service_one_slot_tries_and_the_others_follow_when_it_went_well() {
        let (mut health, mut now) = start();
        for _ in 0..OUT_OF_SERVICE_FAULTS {
            health.ended(now, now, fault());
            now += MAXIMUM_PAUSE;
        }
        assert!(health.out_of_service().is_some());
        assert_eq!(health.admit(now, 7), Ok(()));
        assert_eq!(health.admit(now, 8), Err(now + TRIAL_POLL_INTERVAL));
        assert_eq!(health.admit(now, 7), Ok(()));
        // What began long ago is no news, what a client is to answer for neither.
        let before = now - 600 * SECOND;
        assert_eq!(
            health.ended(now, before, ActionVerdict::Ran),
            HealthChange::None
        );
        assert_eq!(
            health.ended(now, now, ActionVerdict::Neither),
            HealthChange::None
        );
        assert_eq!(health.admit(now, 8), Err(now + TRIAL_POLL_INTERVAL));
        assert_eq!(
            health.ended(now, now, ActionVerdict::Ran),
            HealthChange::Recovered
        );
        assert_eq!(health.admit(now, 8), Ok(()));
        assert_eq!(health.out_of_service(), None);
    }

    #[test]
    fn a_trial_that_runs_for_long_keeps_no_other_slot_waiting() {
        let (mut health, mut now) = start();
        for _ in 0..OUT_OF_SERVICE_FAULTS {
            health.ended(now, now, fault());
            now += MAXIMUM_PAUSE;
        }
        assert_eq!(health.admit(now, 7), Ok(()));
        // It may get nothing to do for long.
        now += 600 * SECOND;
        assert!(health.admit(now, 8).is_err());
        health.began(now, 6);
        assert!(health.admit(now + TRIAL_DURATION, 8).is_err());
        health.began(now, 7);
        assert!(health.admit(now + TRIAL_DURATION - SECOND, 8).is_err());
        assert_eq!(health.admit(now + TRIAL_DURATION, 8), Ok(()));
        // Yet the next fault finds that it was never well.
        let change = health.ended(now + TRIAL_DURATION, now + TRIAL_DURATION, fault());
        assert!(matches!(
            change,
            HealthChange::Pause {
                out_of_service: true,
                ..
            }
        ));
    }
}
