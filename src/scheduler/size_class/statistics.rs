//! What is remembered of executions: buildbarn.iscc.PreviousExecutionStats, parsed.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost::Message;

use super::outcomes::Outcomes;
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{self, iscc, reapi},
};

/// Actions of one key are alike: equal commands on equal platforms, whatever their inputs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StatisticsKey {
    /// Of the action.
    pub instance: InstanceName,
    /// Of an Action that has the command's digest and the platform only.
    pub reduced_action: Digest,
}

impl StatisticsKey {
    /// The key of an action whose digests are of this function.
    pub fn new(instance: &InstanceName, function: DigestFunction, action: &reapi::Action) -> Self {
        let reduced = reapi::Action {
            command_digest: action.command_digest.clone(),
            platform: action.platform.clone(),
            ..Default::default()
        };
        StatisticsKey {
            instance: instance.clone(),
            reduced_action: function.digest_of(&reduced.encode_to_vec()),
        }
    }
}

/// What an execution came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreviousExecution {
    /// It failed by itself.
    Failed,
    /// It took longer than this timeout.
    TimedOut(Duration),
    /// It took so long.
    Succeeded(Duration),
}

impl PreviousExecution {
    /// Successes alone.
    pub(super) fn outcomes(executions: &[PreviousExecution]) -> Outcomes {
        let durations = executions.iter().filter_map(|execution| match execution {
            PreviousExecution::Succeeded(duration) => Some(*duration),
            PreviousExecution::Failed | PreviousExecution::TimedOut(_) => None,
        });
        Outcomes::new(durations.collect(), 0)
    }
}

/// What executions of actions of one key came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    size_classes: BTreeMap<u32, SizeClassStatistics>,
    /// On the largest size class.
    last_failure: Option<SystemTime>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct SizeClassStatistics {
    /// Oldest first.
    executions: Vec<PreviousExecution>,
    /// That the last selection computed; zero when none did.
    probability: f64,
}

/// Why statistics cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StatisticsError {
    /// The bytes are no PreviousExecutionStats.
    #[error("they cannot be parsed: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// Something newer than this scheduler wrote it.
    #[error("size class {size_class} has an outcome of a kind that this version does not know")]
    UnknownOutcome {
        /// Where it is.
        size_class: u32,
    },
}

/// What is to be changed in the statistics of one key.
#[derive(Clone, Debug, PartialEq)]
pub struct StatisticsUpdate {
    /// Whose they are.
    pub key: StatisticsKey,
    /// By size class, in the order in which they ended.
    pub executions: Vec<(u32, PreviousExecution)>,
    /// The action failed on the largest size class.
    pub failed_on_largest: bool,
    /// Those of the selection, in place of those of an earlier one; empty when none were computed.
    pub probabilities: Arc<[(u32, f64)]>,
    /// How many executions of a size class are kept.
    pub history_size: usize,
}

impl StatisticsUpdate {
    pub(super) fn new(key: StatisticsKey, history_size: usize) -> Self {
        StatisticsUpdate {
            key,
            executions: Vec::new(),
            failed_on_largest: false,
            probabilities: Arc::default(),
            history_size,
        }
    }
}

impl Statistics {
    /// Parses an encoded PreviousExecutionStats.
    pub fn decode(content: &[u8]) -> Result<Self, StatisticsError> {
        Statistics::from_proto(&iscc::PreviousExecutionStats::decode(content)?)
    }

    /// Durations and times that no clock has made are left out.
    pub fn from_proto(message: &iscc::PreviousExecutionStats) -> Result<Self, StatisticsError> {
        use iscc::previous_execution::Outcome;
        let mut size_classes = BTreeMap::new();
        for (size_class, statistics) in &message.size_classes {
            let mut executions = Vec::with_capacity(statistics.previous_executions.len());
            for execution in &statistics.previous_executions {
                executions.extend(match &execution.outcome {
                    Some(Outcome::Failed(())) => Some(PreviousExecution::Failed),
                    Some(Outcome::TimedOut(timeout)) => {
                        proto::duration(timeout).map(PreviousExecution::TimedOut)
                    }
                    Some(Outcome::Succeeded(duration)) => {
                        proto::duration(duration).map(PreviousExecution::Succeeded)
                    }
                    None => {
                        return Err(StatisticsError::UnknownOutcome {
                            size_class: *size_class,
                        });
                    }
                });
            }
            let probability = statistics.initial_page_rank_probability;
            size_classes.insert(
                *size_class,
                SizeClassStatistics {
                    executions,
                    probability,
                },
            );
        }
        Ok(Statistics {
            size_classes,
            last_failure: message
                .last_seen_failure
                .as_ref()
                .and_then(proto::system_time),
        })
    }

    /// The message that others read.
    pub fn to_proto(&self) -> iscc::PreviousExecutionStats {
        use iscc::previous_execution::Outcome;
        let size_classes = self.size_classes.iter().map(|(size_class, statistics)| {
            let executions = statistics.executions.iter().map(|execution| {
                let outcome = match execution {
                    PreviousExecution::Failed => Outcome::Failed(()),
                    PreviousExecution::TimedOut(timeout) => {
                        Outcome::TimedOut(proto::proto_duration(*timeout))
                    }
                    PreviousExecution::Succeeded(duration) => {
                        Outcome::Succeeded(proto::proto_duration(*duration))
                    }
                };
                iscc::PreviousExecution {
                    outcome: Some(outcome),
                }
            });
            let statistics = iscc::PerSizeClassStats {
                previous_executions: executions.collect(),
                initial_page_rank_probability: statistics.probability,
            };
            (*size_class, statistics)
        });
        iscc::PreviousExecutionStats {
            size_classes: size_classes.collect(),
            last_seen_failure: self.last_failure.map(proto::timestamp),
        }
    }

    /// Adds what an execution that has just ended came to.
    pub fn apply(&mut self, update: &StatisticsUpdate, now: SystemTime) {
        for (size_class, execution) in &update.executions {
            let executions = &mut self.size_classes.entry(*size_class).or_default().executions;
            executions.push(*execution);
            let excess = executions.len().saturating_sub(update.history_size);
            executions.drain(..excess);
        }
        if update.failed_on_largest {
            self.last_failure = Some(now);
        }
        if !update.probabilities.is_empty() {
            for statistics in self.size_classes.values_mut() {
                statistics.probability = 0.0;
            }
            for (size_class, probability) in update.probabilities.iter() {
                self.size_classes
                    .entry(*size_class)
                    .or_default()
                    .probability = *probability;
            }
        }
    }

    /// Nothing is known.
    pub fn is_empty(&self) -> bool {
        *self == Statistics::default()
    }

    /// Oldest first.
    pub fn executions(&self, size_class: u32) -> &[PreviousExecution] {
        match self.size_classes.get(&size_class) {
            Some(statistics) => &statistics.executions,
            None => &[],
        }
    }

    /// Whether an execution on the largest size class failed so recently. A failure that lies in the
    /// future is none: some clock was wrong.
    pub(super) fn failed_within(&self, duration: Duration, now: SystemTime) -> bool {
        let since = |failure| now.duration_since(failure).ok();
        self.last_failure
            .and_then(since)
            .is_some_and(|since| since <= duration)
    }

    /// Successes on a size class.
    pub(super) fn outcomes(&self, size_class: u32) -> Outcomes {
        PreviousExecution::outcomes(self.executions(size_class))
    }

    /// That an earlier selection computed, if it is one.
    pub(super) fn probability(&self, size_class: u32) -> Option<f64> {
        let probability = self.size_classes.get(&size_class)?.probability;
        (probability > 0.0 && probability < 1.0).then_some(probability)
    }
}
