//! No root is kept for ten minutes after an action that ran as root or as the worker, which may have changed
//! anything in place (I2 Credentials); what was kept until then is thrown away by whoever suspends. When no such
//! action comes for that while, roots are kept again.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long no root is kept after the last action that could have changed anything.
const SUSPENSION_PERIOD: Duration = Duration::from_secs(10 * 60);

pub(super) struct ReuseSuspension {
    /// `false` where changes of directories do not show, so that no root is ever kept.
    reuse_is_possible: bool,
    privileged_actions: Mutex<PrivilegedActions>,
}

/// The actions that ran as root or as the worker.
#[derive(Clone, Copy, Default)]
struct PrivilegedActions {
    /// How many such actions there were since the start.
    count: u64,
    suspended_until: Option<Instant>,
}

impl ReuseSuspension {
    pub(super) fn new(reuse_is_possible: bool) -> Self {
        ReuseSuspension {
            reuse_is_possible,
            privileged_actions: Mutex::default(),
        }
    }

    /// Whether roots are kept now.
    pub(super) fn allows_reuse(&self, now: Instant) -> bool {
        if !self.reuse_is_possible {
            return false;
        }
        let mut actions = self.privileged_actions.lock();
        match actions.suspended_until {
            Some(until) if now < until => false,
            Some(_) => {
                actions.suspended_until = None;
                drop(actions);
                tracing::info!("input roots are kept again");
                true
            }
            None => true,
        }
    }

    /// Has no root kept from now on, since an action could have changed anything.
    pub(super) fn suspend(&self, now: Instant) {
        let mut actions = self.privileged_actions.lock();
        actions.count += 1;
        let count = actions.count;
        let until = now + SUSPENSION_PERIOD;
        if actions.suspended_until.replace(until).is_none() {
            drop(actions);
            tracing::error!(
                actions = count,
                "an action ran as root or as the worker's own user: until {} after the last such action each input root is made anew; let the runner use other users",
                humantime::format_duration(SUSPENSION_PERIOD)
            );
        }
    }

    /// Why roots are not kept now, for the status line; `None` while they are kept, or never are.
    pub(super) fn describe(&self, now: Instant) -> Option<String> {
        if !self.reuse_is_possible {
            return None;
        }
        let actions = *self.privileged_actions.lock();
        let left = actions.suspended_until?.checked_duration_since(now)?;
        Some(format!(
            "input roots are made anew for {} more, as {} actions ran as root or as the worker's own user",
            humantime::format_duration(Duration::from_secs(left.as_secs())),
            actions.count
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_kept_again_a_while_after_the_last_action_that_ran_as_root() {
        let now = Instant::now();
        let suspension = ReuseSuspension::new(true);
        assert!(suspension.allows_reuse(now));
        assert_eq!(suspension.describe(now), None);
        suspension.suspend(now);
        suspension.suspend(now + SUSPENSION_PERIOD / 2);
        assert!(!suspension.allows_reuse(now + SUSPENSION_PERIOD));
        assert!(
            suspension
                .describe(now + SUSPENSION_PERIOD)
                .unwrap()
                .contains("2 actions")
        );
        assert!(suspension.allows_reuse(now + SUSPENSION_PERIOD / 2 + SUSPENSION_PERIOD));
        assert_eq!(suspension.describe(now + 2 * SUSPENSION_PERIOD), None);
        assert!(!ReuseSuspension::new(false).allows_reuse(now));
    }
}
