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
    fairness::InvocationCounts,
    state::{SizeClassQueue, TaskState},
};
use crate::daemon::{Counts, Durations};

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
    pub assigned_at_once: CountsByCaching,
    /// Tasks that had to be queued.
    pub queued: CountsByCaching,
    /// Executions that joined one of the same invocation that was there.
    pub joined_own: u64,
    /// Executions that joined one of another invocation.
    pub joined_others: u64,
    pub workers_created: u64,
    pub workers_terminating: u64,
    pub idle_workers_removed: u64,
    pub executing_workers_removed: u64,
    /// Until an execution began.
    pub queued_durations: Durations,
    /// Until it ended, by how it did, with its gRPC code.
    pub executing_durations: BTreeMap<(ExecutionResult, i32), Durations>,
    /// How often a worker came back without a task's result, by how its execution ended.
    pub executing_retries: BTreeMap<(ExecutionResult, i32), Counts>,
    /// For how long the result was there for clients to fetch.
    pub completed_durations: Durations,
    /// At how many levels of the tree a worker stayed with the invocation that it had worked for.
    pub stickiness_retained: Counts,
    /// By depth of the tree.
    pub invocations: Vec<InvocationCounts>,
}

/// By whether the action's result may be cached (REAPI: Action.do_not_cache).
#[derive(Clone, Copy, Debug, Default)]
pub struct CountsByCaching {
    pub cacheable: u64,
    pub not_cacheable: u64,
}

impl CountsByCaching {
    fn count(&mut self, do_not_cache: bool) {
        match do_not_cache {
            true => self.not_cacheable += 1,
            false => self.cacheable += 1,
        }
    }
}

#[derive(Default)]
pub(super) struct StatisticsByQueue {
    by_queue: BTreeMap<QueueNumber, QueueStatistics>,
    others: QueueStatistics,
}

impl StatisticsByQueue {
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
        let do_not_cache = task.action.do_not_cache;
        let statistics = self.statistics.of(task.queue, &self.queues);
        match (&task.state, next) {
            (TaskState::Fresh | TaskState::AwaitingReport, TaskState::Executing { .. }) => {
                statistics.assigned_at_once.count(do_not_cache);
                statistics.queued_durations.observe(Duration::ZERO);
            }
            (TaskState::Queued, TaskState::Executing { .. }) => {
                statistics.queued_durations.observe(elapsed);
            }
            (TaskState::Fresh | TaskState::AwaitingReport, TaskState::Queued) => {
                statistics.queued.count(do_not_cache);
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
                let retries = statistics.executing_retries.entry(key).or_default();
                retries.observe(task.retries);
            }
            _ => {}
        }
        task.in_state_since = Some(now);
    }

    /// An execution joined one that is under way: of its own invocation, or of another one.
    pub(super) fn count_joined(&mut self, task: TaskNumber, own: bool) {
        let queue = self.tasks[task].queue;
        let statistics = self.statistics.of(queue, &self.queues);
        match own {
            true => statistics.joined_own += 1,
            false => statistics.joined_others += 1,
        }
    }

    /// Nobody asks for a task any more.
    pub(super) fn count_task_removed(&mut self, now: Instant, number: TaskNumber) {
        let task = &self.tasks[number];
        if let (TaskState::Completed(_), Some(since)) = (&task.state, task.in_state_since) {
            let elapsed = now.saturating_duration_since(since);
            let statistics = self.statistics.of(task.queue, &self.queues);
            statistics.completed_durations.observe(elapsed);
        }
    }

    /// A worker was given a task of the invocation that it worked for before, down to so many levels.
    pub(super) fn count_stickiness(&mut self, queue: QueueNumber, levels: usize) {
        let statistics = self.statistics.of(queue, &self.queues);
        let levels = u32::try_from(levels).unwrap_or(u32::MAX);
        statistics.stickiness_retained.observe(levels);
    }

    pub(super) fn count_worker_terminating(&mut self, queue: QueueNumber) {
        self.statistics.of(queue, &self.queues).workers_terminating += 1;
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
            let mut of = of.clone();
            of.invocations = self.invocations.counts(*number).to_vec();
            Some((Some(queue.key.clone()), of))
        });
        let mut all: Vec<_> = by_queue.collect();
        let mut others = self.statistics.others.clone();
        for (queue, counts) in self.invocations.all_counts() {
            if !self.statistics.by_queue.contains_key(&queue) {
                InvocationCounts::add_each(&mut others.invocations, counts);
            }
        }
        all.push((None, others));
        all
    }
}
