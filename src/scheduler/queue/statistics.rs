//! What has happened in each size-class queue, for metrics: counts that only grow, while there is the queue.
//!
//! So many queues have counts of their own; what happens in others is counted for all of them together, so
//! that whoever makes platforms up makes no more of them.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    EncodedResponse, Queue, SizeClassQueueKey,
    arena::{Arena, QueueNumber, TaskNumber},
    state::{SizeClassQueue, TaskState},
};
use crate::daemon::Durations;

/// Queues with counts of their own.
const COUNTED_QUEUES: usize = 100;

/// How an execution ended; the names are Buildbarn's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExecutionResult {
    Success,
    NonZeroExitCode,
    Failure,
}

/// What has happened in one size-class queue, or in several.
#[derive(Clone, Debug, Default)]
pub struct QueueStatistics {
    /// Tasks that found a worker at once.
    pub assigned_at_once: u64,
    /// Tasks that had to be queued.
    pub queued: u64,
    /// Executions that joined one that was there.
    pub joined: u64,
    pub workers_created: u64,
    pub idle_workers_removed: u64,
    pub executing_workers_removed: u64,
    /// Until an execution began.
    pub queued_durations: Durations,
    /// Until it ended, by how it did, with its gRPC code.
    pub executing_durations: BTreeMap<(ExecutionResult, i32), Durations>,
}

#[derive(Default)]
pub(super) struct Statistics {
    by_queue: BTreeMap<QueueNumber, QueueStatistics>,
    others: QueueStatistics,
}

impl Statistics {
    fn of(
        &mut self,
        number: QueueNumber,
        queues: &Arena<QueueNumber, SizeClassQueue>,
    ) -> &mut QueueStatistics {
        if !self.by_queue.contains_key(&number) {
            if self.by_queue.len() >= COUNTED_QUEUES {
                self.by_queue
                    .retain(|number, _| queues.get(*number).is_some());
            }
            if self.by_queue.len() >= COUNTED_QUEUES {
                return &mut self.others;
            }
        }
        self.by_queue.entry(number).or_default()
    }
}

impl ExecutionResult {
    fn of(outcome: &EncodedResponse) -> Self {
        match (outcome.code, outcome.exit_code) {
            (0, 0) => ExecutionResult::Success,
            (0, _) => ExecutionResult::NonZeroExitCode,
            _ => ExecutionResult::Failure,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            ExecutionResult::Success => "Success",
            ExecutionResult::NonZeroExitCode => "NonZeroExitCode",
            ExecutionResult::Failure => "Failure",
        }
    }
}

impl<C, W: Clone> Queue<C, W> {
    /// A task is about to be in another state.
    pub(super) fn count_transition(&mut self, now: Instant, number: TaskNumber, next: &TaskState) {
        let task = &mut self.tasks[number];
        let elapsed = task
            .in_state_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let statistics = self.statistics.of(task.queue, &self.queues);
        match (&task.state, next) {
            (TaskState::Fresh | TaskState::AwaitingReport, TaskState::Executing { .. }) => {
                statistics.assigned_at_once += 1;
                statistics.queued_durations.observe(Duration::ZERO);
            }
            (TaskState::Queued, TaskState::Executing { .. }) => {
                statistics.queued_durations.observe(elapsed);
            }
            (TaskState::Fresh | TaskState::AwaitingReport, TaskState::Queued) => {
                statistics.queued += 1;
            }
            (TaskState::Executing { .. }, TaskState::Completed(outcome)) => {
                let key = (ExecutionResult::of(outcome), outcome.code);
                // Codes that are none of gRPC's come from workers.
                let key = match key {
                    (result, 0..=16) => (result, key.1),
                    (result, _) => (result, 2),
                };
                let durations = statistics.executing_durations.entry(key).or_default();
                durations.observe(elapsed);
            }
            _ => {}
        }
        task.in_state_since = Some(now);
    }

    pub(super) fn count_joined(&mut self, task: TaskNumber) {
        let queue = self.tasks[task].queue;
        self.statistics.of(queue, &self.queues).joined += 1;
    }

    pub(super) fn count_worker_created(&mut self, queue: QueueNumber) {
        self.statistics.of(queue, &self.queues).workers_created += 1;
    }

    pub(super) fn count_worker_removed(&mut self, queue: QueueNumber, was_executing: bool) {
        let statistics = self.statistics.of(queue, &self.queues);
        match was_executing {
            true => statistics.executing_workers_removed += 1,
            false => statistics.idle_workers_removed += 1,
        }
    }

    #[cfg(test)]
    pub fn count_worker_in_each_queue(&mut self) {
        let all: Vec<QueueNumber> = self.queues.iter().map(|(number, _)| number).collect();
        for queue in all {
            self.count_worker_created(queue);
        }
    }

    /// Of each queue that has counts of its own, and of all others together, if there are any.
    pub fn statistics(&self) -> Vec<(Option<Arc<SizeClassQueueKey>>, QueueStatistics)> {
        let by_queue = self.statistics.by_queue.iter().filter_map(|(number, of)| {
            let queue = self.queues.get(*number)?;
            Some((Some(queue.key.clone()), of.clone()))
        });
        let mut all: Vec<_> = by_queue.collect();
        all.push((None, self.statistics.others.clone()));
        all
    }
}
