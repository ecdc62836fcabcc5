//! Which size class an action is executed on first.

use std::{sync::Arc, time::Duration};

use super::{
    feedback::Feedback,
    learner::{Execution, Learner, Selection},
    page_rank::{Placement, Strategies, Strategy},
};

/// Chooses a size class for one action. What is abandoned before it was selected for is dropped.
#[derive(Clone, Debug)]
pub struct Selector {
    /// The action's own.
    timeout: Duration,
    /// `None` where nothing is remembered of executions.
    feedback: Option<Arc<Feedback>>,
}

impl Selector {
    pub(super) fn new(timeout: Duration, feedback: Option<Arc<Feedback>>) -> Self {
        Selector { timeout, feedback }
    }

    /// The action's own timeout.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Chooses among the size classes that there are, which are ascending and not none. All values
    /// of `random` are equally likely.
    pub fn select(&self, size_classes: &[u32], random: u64) -> Selection {
        debug_assert!(size_classes.is_sorted() && !size_classes.is_empty());
        let Strategies {
            smaller,
            probabilities,
        } = self.strategies(size_classes);
        let learner = |execution| Learner {
            timeout: self.timeout,
            feedback: self.feedback.clone(),
            probabilities: probabilities.clone(),
            execution,
        };
        let largest = size_classes.len().saturating_sub(1);
        match choose(&smaller, random) {
            Some((index, Placement::Foreground { timeout })) if index < largest => {
                let size_class = size_classes[index];
                Selection {
                    index,
                    expected_duration: self.expected_duration(size_class, timeout),
                    timeout,
                    learner: learner(Execution::SmallerFirst {
                        size_class,
                        timeout,
                    }),
                }
            }
            chosen => Selection {
                index: largest,
                expected_duration: size_classes.last().map_or(self.timeout, |class| {
                    self.expected_duration(*class, self.timeout)
                }),
                timeout: self.timeout,
                learner: learner(match chosen {
                    Some((index, Placement::Background)) if index < largest => {
                        Execution::LargestFirst {
                            then: size_classes[index],
                        }
                    }
                    _ => Execution::Largest,
                }),
            },
        }
    }

    fn strategies(&self, size_classes: &[u32]) -> Strategies {
        match &self.feedback {
            Some(feedback) => feedback.strategies(size_classes, self.timeout),
            None => Strategies::smallest_first(size_classes, self.timeout),
        }
    }

    fn expected_duration(&self, size_class: u32, timeout: Duration) -> Duration {
        match &self.feedback {
            Some(feedback) => feedback.expected_duration(size_class, timeout),
            None => timeout,
        }
    }
}

/// Which strategy a random number stands for; `None` for what they leave to the largest size class.
fn choose(strategies: &[Strategy], random: u64) -> Option<(usize, Placement)> {
    /// As many bits as an f64 holds.
    const BITS: u32 = 53;
    let mut rest = (random >> (u64::BITS - BITS)) as f64 / (1_u64 << BITS) as f64;
    for (index, strategy) in strategies.iter().enumerate() {
        if rest < strategy.probability {
            return Some((index, strategy.placement));
        }
        rest -= strategy.probability;
    }
    None
}
