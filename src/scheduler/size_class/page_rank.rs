//! How likely each size class is to be chosen: the stationary distribution of a walk that goes from
//! one size class to another as likely as actions are faster there, which is what PageRank computes
//! for pages and their links.

use std::{sync::Arc, time::Duration};

use super::{
    outcomes::Outcomes,
    statistics::{PreviousExecution, Statistics},
};

/// Beyond that many rounds the probabilities are near enough, whatever error was asked for.
const MAXIMUM_ROUNDS: usize = 1000;

/// How much slower is acceptable on smaller workers.
#[derive(Clone, Debug, PartialEq)]
pub struct PageRank {
    /// With 0, an action must be as fast as on the largest size class; with 1, it may take as many
    /// times longer as the largest size class is larger.
    pub acceptable_execution_time_increase_exponent: f64,
    /// An execution on a smaller size class is given so many times the acceptable time.
    pub smaller_size_class_execution_timeout_multiplier: f64,
    /// But no less than this.
    pub minimum_execution_timeout: Duration,
    /// The computation ends when a round changes the probabilities by less than this together.
    pub maximum_convergence_error: f64,
}

/// How an action is executed if a smaller size class is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Placement {
    /// On that size class, with this timeout.
    Foreground { timeout: Duration },
    /// On the largest; then on that size class, for nobody but us.
    Background,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Strategy {
    pub probability: f64,
    pub placement: Placement,
}

impl Strategy {
    fn certain(placement: Placement) -> Self {
        Strategy {
            probability: 1.0,
            placement,
        }
    }

    /// Not chosen.
    fn never(placement: Placement) -> Self {
        Strategy {
            probability: 0.0,
            placement,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Strategies {
    /// Of the size classes from the smallest on; the rest of the probability is the largest one's.
    pub smaller: Vec<Strategy>,
    /// Of all size classes, to be remembered; empty when they were not computed.
    pub probabilities: Arc<[(u32, f64)]>,
}

impl Strategies {
    /// Without feedback: the smallest one, with the action's own timeout.
    pub(super) fn smallest_first(size_classes: &[u32], timeout: Duration) -> Self {
        match size_classes.len() {
            0 | 1 => Strategies::default(),
            _ => Strategies::of(vec![Strategy::certain(Placement::Foreground { timeout })]),
        }
    }

    fn of(smaller: Vec<Strategy>) -> Self {
        Strategies {
            smaller,
            ..Default::default()
        }
    }
}

/// What an execution on a smaller size class is measured by.
struct Acceptable {
    /// How many times longer than on the largest it may take.
    factor: f64,
    /// Slower ones count as failures.
    duration: Duration,
    timeout: Duration,
}

impl PageRank {
    pub(super) fn strategies(
        &self,
        statistics: &Statistics,
        size_classes: &[u32],
        timeout: Duration,
    ) -> Strategies {
        let Some((&largest, smaller)) = size_classes.split_last() else {
            return Strategies::default();
        };
        if smaller.is_empty() {
            return Strategies::default();
        }
        let on_largest = statistics.outcomes(largest);
        match on_largest.median() {
            None => Strategies::of(self.first_executions(statistics, smaller, timeout)),
            Some(median) => self.compare(statistics, smaller, largest, on_largest, median, timeout),
        }
    }

    /// The timeout of background learning, from executions on the largest size class.
    pub(super) fn background_timeout(
        &self,
        on_largest: &[PreviousExecution],
        size_class: u32,
        largest: u32,
        timeout: Duration,
    ) -> Duration {
        match PreviousExecution::outcomes(on_largest).median() {
            Some(median) => {
                self.acceptable(size_class, largest, median, timeout)
                    .timeout
            }
            None => timeout,
        }
    }

    /// An action that has never succeeded on the largest size class, so that nobody knows what it
    /// takes: the smallest size class where it was not tried yet, for a short while, since most
    /// actions are small and large workers are dear.
    fn first_executions(
        &self,
        statistics: &Statistics,
        smaller: &[u32],
        timeout: Duration,
    ) -> Vec<Strategy> {
        let untried = smaller
            .iter()
            .position(|class| statistics.executions(*class).is_empty());
        let Some(untried) = untried else {
            return Vec::new();
        };
        let short = self.minimum_execution_timeout.min(timeout);
        let skipped = Strategy::never(Placement::Foreground { timeout: short });
        let mut strategies = vec![skipped; untried];
        strategies.push(Strategy::certain(Placement::Foreground { timeout: short }));
        strategies
    }

    fn acceptable(
        &self,
        size_class: u32,
        largest: u32,
        median_on_largest: Duration,
        timeout: Duration,
    ) -> Acceptable {
        let multiplier = self.smaller_size_class_execution_timeout_multiplier;
        let factor = (f64::from(largest) / f64::from(size_class))
            .powf(self.acceptable_execution_time_increase_exponent);
        let wanted = scale(median_on_largest, factor);
        let timeout = scale(wanted, multiplier)
            .max(self.minimum_execution_timeout)
            .min(timeout);
        Acceptable {
            factor,
            // Not too near the timeout.
            duration: wanted.min(scale(timeout, 1.0 / multiplier)),
            timeout,
        }
    }

    fn compare(
        &self,
        statistics: &Statistics,
        smaller: &[u32],
        largest: u32,
        on_largest: Outcomes,
        median_on_largest: Duration,
        timeout: Duration,
    ) -> Strategies {
        let mut placements = Vec::with_capacity(smaller.len());
        let mut outcomes = Vec::with_capacity(smaller.len() + 1);
        let mut in_background = true;
        for &size_class in smaller {
            let acceptable = self.acceptable(size_class, largest, median_on_largest, timeout);
            let executions = statistics.executions(size_class);
            let (successes, failures) = normalize(executions, &acceptable);
            if successes.is_empty() && failures == 0 {
                if in_background {
                    // It fails on the size class before this one, or was not tried on any: where it
                    // begins to succeed is worth one execution, and makes others unnecessary.
                    let skipped = placements.into_iter().map(Strategy::never);
                    let here = Strategy::certain(Placement::Background);
                    return Strategies::of(skipped.chain([here]).collect());
                }
                // Untried, but what succeeds on smaller workers will succeed here.
            } else {
                // Whoever waits for the action shall not wait for likely failures.
                in_background = failures > successes.len();
            }
            placements.push(match in_background {
                true => Placement::Background,
                false => Placement::Foreground {
                    timeout: acceptable.timeout,
                },
            });
            outcomes.push(Outcomes::new(successes, failures));
        }
        outcomes.push(on_largest);
        let size_classes = || smaller.iter().copied().chain([largest]);
        let start = size_classes().map(|class| statistics.probability(class).unwrap_or(0.5));
        let probabilities =
            stationary_distribution(&outcomes, start.collect(), self.maximum_convergence_error);
        Strategies {
            smaller: placements
                .into_iter()
                .zip(&probabilities)
                .map(|(placement, probability)| Strategy {
                    probability: *probability,
                    placement,
                })
                .collect(),
            probabilities: size_classes().zip(probabilities).collect(),
        }
    }
}

/// What executions would have taken on the largest size class, and how many failed or were too slow.
fn normalize(executions: &[PreviousExecution], acceptable: &Acceptable) -> (Vec<Duration>, usize) {
    let (mut successes, mut failures) = (Vec::new(), 0);
    for execution in executions {
        match *execution {
            PreviousExecution::Succeeded(duration) if duration < acceptable.duration => {
                successes.push(scale(duration, 1.0 / acceptable.factor));
            }
            // It was given less time than is acceptable now: that says nothing.
            PreviousExecution::TimedOut(timeout) if timeout < acceptable.duration => {}
            PreviousExecution::Failed
            | PreviousExecution::TimedOut(_)
            | PreviousExecution::Succeeded(_) => failures += 1,
        }
    }
    (successes, failures)
}

/// By power iteration. The first probability of the start follows from the others, so that rounding
/// errors do not add up from one computation to the next.
fn stationary_distribution(
    outcomes: &[Outcomes],
    start: Vec<f64>,
    maximum_convergence_error: f64,
) -> Vec<f64> {
    let count = outcomes.len();
    // By column: the probabilities of going from one size class to each.
    let mut columns = vec![vec![0.0; count]; count];
    for (column, diagonal) in columns.iter_mut().zip(0..) {
        column[diagonal] = 1.0;
    }
    let pairs = (1..count).flat_map(|i| (0..i).map(move |j| (i, j)));
    for (i, j) in pairs {
        let faster = outcomes[i].is_faster(&outcomes[j]);
        let others = (count - 1) as f64;
        for (from, to, probability) in [(j, i, faster / others), (i, j, (1.0 - faster) / others)] {
            columns[from][to] = probability;
            columns[from][from] -= probability;
        }
    }
    let mut probabilities = start;
    probabilities[0] = 1.0 - probabilities[1..].iter().sum::<f64>();
    for _ in 0..MAXIMUM_ROUNDS {
        let mut next = vec![0.0; count];
        for (column, probability) in columns.iter().zip(&probabilities) {
            for (to, share) in next.iter_mut().zip(column) {
                *to += probability * share;
            }
        }
        let changes = next.iter().zip(&probabilities);
        let error: f64 = changes.map(|(next, last)| (next - last).abs()).sum();
        probabilities = next;
        if error < maximum_convergence_error {
            break;
        }
    }
    probabilities
}

/// What is too long for a duration is its longest.
fn scale(duration: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}
