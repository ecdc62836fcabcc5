//! Which of two size classes an action is faster on, judged by a few executions on each.

use std::time::Duration;

/// Executions on one size class, without their order in time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcomes {
    /// Ascending.
    successes: Vec<Duration>,
    failures: usize,
}

impl Outcomes {
    pub(super) fn new(mut successes: Vec<Duration>, failures: usize) -> Self {
        successes.sort_unstable();
        Outcomes {
            successes,
            failures,
        }
    }

    /// The median of the successes; `None` without any.
    pub(super) fn median(&self) -> Option<Duration> {
        let middle = self.successes.len() / 2;
        let upper = *self.successes.get(middle)?;
        if self.successes.len() % 2 == 1 {
            return Some(upper);
        }
        let lower = *self.successes.get(middle.checked_sub(1)?)?;
        Some(lower + (upper - lower) / 2)
    }

    fn count(&self) -> usize {
        self.successes.len() + self.failures
    }

    /// How likely it is that an execution here is faster than one there, between 0 and 1, never
    /// either: the share of pairs that are (the Mann-Whitney U statistic; equals and pairs of failures
    /// count half; a failure is slower than any success).
    ///
    /// Each side is given 1 and the other's number of executions beforehand. So a few executions
    /// prove little, and a size class that was tried less often is tried again. `x.is_faster(y)` and
    /// `y.is_faster(x)` are 1 together.
    pub(super) fn is_faster(&self, other: &Outcomes) -> f64 {
        let (ours, theirs) = (self.count(), other.count());
        let mut score = 1 + theirs + self.failures * other.failures;
        for success in &self.successes {
            let faster = other.successes.partition_point(|their| their < success);
            let not_slower = other.successes.partition_point(|their| their <= success);
            score += 2 * (theirs - not_slower) + (not_slower - faster);
        }
        score as f64 / (2 + ours + theirs + 2 * ours * theirs) as f64
    }
}
