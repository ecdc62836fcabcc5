//! An execution that is to be queued, and what follows from how it ends.

use std::{sync::Arc, time::Duration};

use super::{
    feedback::Feedback,
    statistics::{PreviousExecution, StatisticsUpdate},
};

/// One execution that is to be queued.
#[derive(Debug)]
pub struct Selection {
    /// Which of the size classes that the caller named.
    pub index: usize,
    /// Used for the order within an invocation: longer ones go first.
    pub expected_duration: Duration,
    /// The worker's, no longer than the action's own.
    pub timeout: Duration,
    /// To be told how the execution ends.
    pub learner: Learner,
}

/// Waits for the end of one execution.
#[derive(Debug)]
pub struct Learner {
    /// The action's own.
    pub(super) timeout: Duration,
    pub(super) feedback: Option<Arc<Feedback>>,
    /// Of size classes, to start the next computation from.
    pub(super) probabilities: Arc<[(u32, f64)]>,
    pub(super) execution: Execution,
}

/// Which execution it is.
#[derive(Debug)]
pub(super) enum Execution {
    /// On a smaller size class; the largest comes after a failure.
    SmallerFirst { size_class: u32, timeout: Duration },
    /// On the largest, after this one on a smaller.
    LargestAfter {
        size_class: u32,
        execution: PreviousExecution,
    },
    /// On the largest; a smaller one comes after a success, for nobody but us.
    LargestFirst { then: u32 },
    /// On a smaller one, after a success on the largest, for nobody but us.
    Background { size_class: u32, timeout: Duration },
    /// On the largest, and nowhere else.
    Largest,
}

/// What is to be done after an execution has ended.
#[derive(Debug, Default)]
pub struct Completion {
    /// Another execution of the action. After a success it is background learning: the client has
    /// its result, and nobody waits. After a failure it is on the largest size class, and the client
    /// waits for it.
    pub next: Option<Selection>,
    /// What is to be remembered.
    pub update: Option<StatisticsUpdate>,
}

impl Learner {
    /// The execution took `duration` (virtual, where the worker tells that) and succeeded. The size
    /// classes are those that there are now, as for `Selector::select`.
    pub fn succeeded(self, duration: Duration, size_classes: &[u32]) -> Completion {
        let success = PreviousExecution::Succeeded(duration);
        let largest = size_classes.last().copied();
        match self.execution {
            Execution::SmallerFirst { size_class, .. }
            | Execution::Background { size_class, .. } => {
                self.remember(vec![(size_class, success)])
            }
            Execution::LargestAfter {
                size_class,
                execution,
            } => {
                let executions = [(size_class, execution)].into_iter();
                self.remember(
                    executions
                        .chain(largest.map(|largest| (largest, success)))
                        .collect(),
                )
            }
            Execution::LargestFirst { then } => {
                let next = self.background(then, duration, size_classes);
                Completion {
                    next,
                    ..self.remember(
                        largest
                            .map(|largest| (largest, success))
                            .into_iter()
                            .collect(),
                    )
                }
            }
            Execution::Largest => self.remember(
                largest
                    .map(|largest| (largest, success))
                    .into_iter()
                    .collect(),
            ),
        }
    }

    /// The execution failed: for a client's execution, its failure is final unless there is another.
    pub fn failed(self, timed_out: bool, size_classes: &[u32]) -> Completion {
        let failure = |timeout| match timed_out {
            true => PreviousExecution::TimedOut(timeout),
            false => PreviousExecution::Failed,
        };
        match self.execution {
            Execution::SmallerFirst {
                size_class,
                timeout,
            } => Completion {
                next: Some(self.largest_after(size_class, failure(timeout), size_classes)),
                update: None,
            },
            Execution::Background {
                size_class,
                timeout,
            } => self.remember(vec![(size_class, failure(timeout))]),
            Execution::LargestAfter { .. }
            | Execution::LargestFirst { .. }
            | Execution::Largest => Completion {
                next: None,
                update: self.update(Vec::new(), true),
            },
        }
    }

    /// Nobody waits for the execution any more: nothing is learnt.
    pub fn abandoned(self) {}

    /// Whether it is an execution that no client waits for.
    pub fn is_background(&self) -> bool {
        matches!(self.execution, Execution::Background { .. })
    }

    fn remember(&self, executions: Vec<(u32, PreviousExecution)>) -> Completion {
        Completion {
            next: None,
            update: self.update(executions, false),
        }
    }

    fn update(
        &self,
        executions: Vec<(u32, PreviousExecution)>,
        failed_on_largest: bool,
    ) -> Option<StatisticsUpdate> {
        Some(StatisticsUpdate {
            executions,
            failed_on_largest,
            probabilities: self.probabilities.clone(),
            ..self.feedback.as_ref()?.update()
        })
    }

    fn largest_after(
        &self,
        size_class: u32,
        execution: PreviousExecution,
        size_classes: &[u32],
    ) -> Selection {
        let expected_duration = match (&self.feedback, size_classes.last()) {
            (Some(feedback), Some(largest)) => feedback.expected_duration(*largest, self.timeout),
            _ => self.timeout,
        };
        Selection {
            index: size_classes.len().saturating_sub(1),
            expected_duration,
            timeout: self.timeout,
            learner: Learner {
                timeout: self.timeout,
                feedback: self.feedback.clone(),
                probabilities: self.probabilities.clone(),
                execution: Execution::LargestAfter {
                    size_class,
                    execution,
                },
            },
        }
    }

    /// Background learning, if the size class is still there.
    fn background(
        &self,
        size_class: u32,
        duration_on_largest: Duration,
        size_classes: &[u32],
    ) -> Option<Selection> {
        let feedback = self.feedback.as_ref()?;
        let page_rank = feedback.parameters.page_rank.as_ref()?;
        let index = size_classes.iter().position(|class| *class == size_class)?;
        let largest = *size_classes.last()?;
        let mut on_largest = feedback.statistics.executions(largest).to_vec();
        on_largest.push(PreviousExecution::Succeeded(duration_on_largest));
        let timeout = page_rank.background_timeout(&on_largest, size_class, largest, self.timeout);
        Some(Selection {
            index,
            expected_duration: feedback.expected_duration(size_class, timeout),
            timeout,
            learner: Learner {
                timeout: self.timeout,
                feedback: self.feedback.clone(),
                probabilities: Arc::default(),
                execution: Execution::Background {
                    size_class,
                    timeout,
                },
            },
        })
    }
}
