//! What there is, for those who look at the queue.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost_types::Timestamp;
use uuid::Uuid;

use super::{
    InvocationKey, InvocationKeys, Operation, Platform, Queue, QueuedAction, SizeClassQueue,
    SizeClassQueueKey, Stage, TaskState, Timer, UnknownInvocation, UnknownQueue, Worker, WorkerId,
    WorkerState,
};
use crate::instance::InstanceName;

/// A part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    pub rows: Vec<T>,
    /// Of the first row, in the whole list.
    pub start_index: usize,
    /// Rows of the whole list.
    pub total: usize,
}

#[derive(Clone, Debug)]
pub struct PlatformQueueRow {
    pub prefix: InstanceName,
    pub platform: Platform,
    /// Ascending.
    pub size_classes: Vec<SizeClassQueueRow>,
}

#[derive(Clone, Debug)]
pub struct SizeClassQueueRow {
    pub key: Arc<SizeClassQueueKey>,
    /// Without workers it goes then.
    pub removal: Option<Instant>,
    pub workers: usize,
    pub drains: usize,
    /// Of all that is in it.
    pub root: InvocationRow,
}

/// A node of an invocation tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InvocationRow {
    pub queued_directly: usize,
    pub queued_indirectly: usize,
    /// Workers that execute something of it or of those below it.
    pub executing_workers: usize,
    /// Idle workers that last worked for it or for those below it.
    pub idle_workers: usize,
    /// Of those, the ones whose calls are held.
    pub idle_synchronizing_workers: usize,
    pub children: usize,
    /// Children that have something queued or executing.
    pub active_children: usize,
    /// Children that have something queued.
    pub queued_children: usize,
}

/// Which children of an invocation are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvocationFilter {
    All,
    /// With something queued or executing.
    Active,
    /// With something queued, in the order in which they are served.
    Queued,
}

/// Which workers of a size-class queue are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerFilter {
    All,
    /// Those that execute something of this invocation, or of one below it.
    Executing(InvocationKeys),
    /// Those whose calls are held, and that last worked for exactly this invocation.
    IdleSynchronizing(InvocationKeys),
}

/// A place in the order within an invocation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueuedCursor {
    pub priority: i32,
    pub expected_duration: Duration,
    pub queued_timestamp: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageKind {
    Queued,
    Executing,
    Completed,
}

/// Which operations are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationFilter {
    /// With this key anywhere among theirs.
    pub invocation: Option<InvocationKey>,
    pub stage: Option<StageKind>,
}

#[derive(Clone, Debug)]
pub struct WorkerRow {
    pub id: WorkerId,
    pub key: Arc<SizeClassQueueKey>,
    /// Unless its call is held, it is gone when it is silent until then.
    pub removal: Option<Instant>,
    /// One of those that wait for what it executes.
    pub operation: Option<OperationRow>,
    /// It gets no new work.
    pub drained: bool,
}

#[derive(Clone, Debug)]
pub struct OperationRow {
    pub name: Uuid,
    pub action: Arc<QueuedAction>,
    pub key: Arc<SizeClassQueueKey>,
    /// The rest of the instance name, beyond the queue's prefix.
    pub suffix: InstanceName,
    pub invocation: InvocationKeys,
    pub priority: i32,
    pub expected_duration: Duration,
    /// When nobody waits for it, it goes then.
    pub removal: Option<Instant>,
    pub stage: Stage,
    pub worker: Option<WorkerId>,
}

impl OperationFilter {
    /// Whether an operation is listed.
    pub fn admits(&self, row: &OperationRow) -> bool {
        let stage = match row.stage {
            Stage::Queued => StageKind::Queued,
            Stage::Executing => StageKind::Executing,
            Stage::Completed(_) => StageKind::Completed,
        };
        let keys = row.invocation.as_slice();
        self.stage.is_none_or(|wanted| wanted == stage)
            && self
                .invocation
                .as_ref()
                .is_none_or(|key| keys.contains(key))
    }
}

impl<C, W: Clone> Queue<C, W> {
    /// By prefix, then by the platform's JSON.
    pub fn platform_queues(&self) -> Vec<PlatformQueueRow> {
        let mut rows: Vec<PlatformQueueRow> = Vec::new();
        for (platform, prefixes) in &self.platforms {
            for (prefix, sizes) in prefixes {
                let sizes = sizes.values().filter_map(|number| {
                    let queue = self.queues.get(number)?;
                    Some(SizeClassQueueRow {
                        key: queue.key.clone(),
                        removal: self.timers.get(&Timer::Queue(*number)),
                        workers: queue.workers.len(),
                        drains: self
                            .drains
                            .keys()
                            .filter(|(key, _)| *key == *queue.key)
                            .count(),
                        root: Self::root(queue),
                    })
                });
                rows.push(PlatformQueueRow {
                    prefix: prefix.clone(),
                    platform: platform.clone(),
                    size_classes: sizes.collect(),
                });
            }
        }
        rows.sort_by_cached_key(|row| (row.prefix.clone(), row.platform.to_string()));
        rows
    }

    fn root(queue: &SizeClassQueue) -> InvocationRow {
        InvocationRow {
            queued_directly: queue.queued_tasks.len(),
            idle_synchronizing_workers: queue.idle_synchronizing_workers.len(),
            ..Default::default()
        }
    }

    fn queue_of(&self, key: &SizeClassQueueKey) -> Result<&SizeClassQueue, UnknownQueue> {
        let mut queues = self.queues.values();
        queues.find(|queue| *queue.key == *key).ok_or(UnknownQueue)
    }

    pub fn invocation_children(
        &self,
        key: &SizeClassQueueKey,
        _parent: &InvocationKeys,
        _filter: InvocationFilter,
    ) -> Result<Vec<(InvocationKey, InvocationRow)>, UnknownInvocation> {
        self.queue_of(key)?;
        Ok(Vec::new())
    }

    /// Those of one invocation itself, in the order in which they are served.
    pub fn queued_operations(
        &self,
        key: &SizeClassQueueKey,
        _invocation: &InvocationKeys,
        _after: Option<QueuedCursor>,
        page_size: usize,
    ) -> Result<Page<OperationRow>, UnknownInvocation> {
        let queue = self.queue_of(key)?;
        let tasks = queue
            .queued_tasks
            .iter()
            .filter_map(|task| self.tasks.get(&task));
        let names = tasks.flat_map(|task| task.operations.values());
        Ok(Page {
            rows: names
                .filter_map(|name| self.operation(*name))
                .take(page_size)
                .collect(),
            start_index: 0,
            total: queue.queued_tasks.len(),
        })
    }

    /// By the JSON of their labels.
    pub fn workers(
        &self,
        key: &SizeClassQueueKey,
        filter: &WorkerFilter,
        after: Option<&WorkerId>,
        page_size: usize,
    ) -> Result<Page<WorkerRow>, UnknownInvocation> {
        let queue = self.queue_of(key)?;
        let rows = queue.workers.values().filter_map(|number| {
            let worker: &Worker<C> = self.workers.get(number)?;
            let deadline = self.timers.get(&Timer::Worker(*number));
            let (removal, task) = match &worker.state {
                WorkerState::IdleSynchronizing { .. } => (None, None),
                WorkerState::Executing { task, .. } => (deadline, self.tasks.get(task)),
                WorkerState::Idle | WorkerState::ExecutingForeign { .. } => (deadline, None),
            };
            let operation = task.and_then(|task| self.operation(*task.operations.values().next()?));
            let admitted = match filter {
                WorkerFilter::All => true,
                WorkerFilter::Executing(_) => operation.is_some(),
                WorkerFilter::IdleSynchronizing(_) => removal.is_none(),
            };
            admitted.then(|| WorkerRow {
                id: worker.id.clone(),
                key: queue.key.clone(),
                removal,
                operation,
                drained: false,
            })
        });
        let rows: Vec<WorkerRow> = rows.collect();
        let start_index = rows.partition_point(|row| after.is_some_and(|after| row.id <= *after));
        Ok(Page {
            start_index,
            total: rows.len(),
            rows: rows.into_iter().skip(start_index).take(page_size).collect(),
        })
    }

    /// `None` when there is no such operation.
    pub fn operation(&self, name: Uuid) -> Option<OperationRow> {
        self.row(name, self.operations.get(&name)?)
    }

    /// By name, from the first one after `after`.
    pub fn operations(&self, after: Option<Uuid>) -> impl Iterator<Item = OperationRow> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.operations
            .range((from, Bound::Unbounded))
            .filter_map(|(name, operation)| self.row(*name, operation))
    }

    fn row(&self, name: Uuid, operation: &Operation) -> Option<OperationRow> {
        let task = self.tasks.get(&operation.task)?;
        let worker = match &task.state {
            TaskState::Executing(worker) => self.workers.get(worker),
            TaskState::Queued { .. } | TaskState::Completed(_) => None,
        };
        Some(OperationRow {
            name,
            action: task.action.clone(),
            key: task.key.clone(),
            suffix: task.suffix.clone(),
            invocation: operation.invocation.clone(),
            priority: operation.priority,
            expected_duration: task.action.timeout,
            removal: self.timers.get(&Timer::Operation(name)),
            stage: task.progress().stage,
            worker: worker.map(|worker| worker.id.clone()),
        })
    }
}
