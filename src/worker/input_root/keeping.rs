//! Whether input roots are kept. They are not for a while after an action that ran as root or as the
//! worker, which may have changed anything in place (I2); what was kept until then is gone. When no
//! such action comes for that while, roots are kept again.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// After the last action that could have changed anything.
const PAUSE: Duration = Duration::from_secs(10 * 60);

pub struct Keeping {
    /// Never, where changes of directories do not show.
    possible: bool,
    distrust: Mutex<Distrust>,
}

#[derive(Clone, Copy, Default)]
struct Distrust {
    /// Since the start.
    actions: u64,
    until: Option<Instant>,
}

impl Keeping {
    pub fn new(possible: bool) -> Self {
        Keeping {
            possible,
            distrust: Mutex::default(),
        }
    }

    pub fn is_on(&self, now: Instant) -> bool {
        let mut distrust = self.distrust.lock();
        match distrust.until {
            Some(until) if now < until => false,
            Some(_) => {
                distrust.until = None;
                drop(distrust);
                tracing::info!("input roots are kept again");
                self.possible
            }
            None => self.possible,
        }
    }

    /// An action could have changed anything.
    pub fn distrust(&self, now: Instant) {
        let mut distrust = self.distrust.lock();
        distrust.actions += 1;
        let actions = distrust.actions;
        if distrust.until.replace(now + PAUSE).is_none() {
            drop(distrust);
            tracing::error!(
                actions,
                "an action ran as root or as the worker's own user: until {} after the last such action each input root is made anew; let the runner use other users",
                humantime::format_duration(PAUSE)
            );
        }
    }

    /// For the status line; `None` while roots are kept, or never are.
    pub fn why_not(&self, now: Instant) -> Option<String> {
        let distrust = *self.distrust.lock();
        let left = distrust.until?.checked_duration_since(now)?;
        Some(format!(
            "input roots are made anew for {} more, as {} actions ran as root or as the worker's own user",
            humantime::format_duration(Duration::from_secs(left.as_secs())),
            distrust.actions
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_kept_again_a_while_after_the_last_action_that_ran_as_root() {
        let now = Instant::now();
        let keeping = Keeping::new(true);
        assert!(keeping.is_on(now));
        assert_eq!(keeping.why_not(now), None);
        keeping.distrust(now);
        keeping.distrust(now + PAUSE / 2);
        assert!(!keeping.is_on(now + PAUSE));
        assert!(keeping.why_not(now + PAUSE).unwrap().contains("2 actions"));
        assert!(keeping.is_on(now + PAUSE / 2 + PAUSE));
        assert_eq!(keeping.why_not(now + 2 * PAUSE), None);
        assert!(!Keeping::new(false).is_on(now));
    }
}
