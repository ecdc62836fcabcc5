//! Whether input roots are kept. They are not for a while after an action that ran as root or as the
//! worker, which may have changed anything in place (I2 Credentials); what was kept until then is gone. When no
//! such action comes for that while, roots are kept again.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// After the last action that could have changed anything.
const RETENTION_PAUSE: Duration = Duration::from_secs(10 * 60);

pub(super) struct Retention {
    /// Never, where changes of directories do not show.
    possible: bool,
    suspension: Mutex<Suspension>,
}

#[derive(Clone, Copy, Default)]
struct Suspension {
    /// Since the start.
    actions: u64,
    until: Option<Instant>,
}

impl Retention {
    pub(super) fn new(possible: bool) -> Self {
        Retention {
            possible,
            suspension: Mutex::default(),
        }
    }

    pub(super) fn is_active(&self, now: Instant) -> bool {
        let mut suspension = self.suspension.lock();
        match suspension.until {
            Some(until) if now < until => false,
            Some(_) => {
                suspension.until = None;
                drop(suspension);
                tracing::info!("input roots are kept again");
                self.possible
            }
            None => self.possible,
        }
    }

    /// An action could have changed anything.
    pub(super) fn suspend(&self, now: Instant) {
        let mut suspension = self.suspension.lock();
        suspension.actions += 1;
        let actions = suspension.actions;
        if suspension.until.replace(now + RETENTION_PAUSE).is_none() {
            drop(suspension);
            tracing::error!(
                actions,
                "an action ran as root or as the worker's own user: until {} after the last such action each input root is made anew; let the runner use other users",
                humantime::format_duration(RETENTION_PAUSE)
            );
        }
    }

    /// For the status line; `None` while roots are kept, or never are.
    pub(super) fn suspension(&self, now: Instant) -> Option<String> {
        let suspension = *self.suspension.lock();
        let left = suspension.until?.checked_duration_since(now)?;
        Some(format!(
            "input roots are made anew for {} more, as {} actions ran as root or as the worker's own user",
            humantime::format_duration(Duration::from_secs(left.as_secs())),
            suspension.actions
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_kept_again_a_while_after_the_last_action_that_ran_as_root() {
        let now = Instant::now();
        let retention = Retention::new(true);
        assert!(retention.is_active(now));
        assert_eq!(retention.suspension(now), None);
        retention.suspend(now);
        retention.suspend(now + RETENTION_PAUSE / 2);
        assert!(!retention.is_active(now + RETENTION_PAUSE));
        assert!(
            retention
                .suspension(now + RETENTION_PAUSE)
                .unwrap()
                .contains("2 actions")
        );
        assert!(retention.is_active(now + RETENTION_PAUSE / 2 + RETENTION_PAUSE));
        assert_eq!(retention.suspension(now + 2 * RETENTION_PAUSE), None);
        assert!(!Retention::new(false).is_active(now));
    }
}
