//! What there is, for those who look at the queue.

use std::{sync::Arc, time::Instant};

use uuid::Uuid;

use super::{
    Invocation, Queue, QueuedAction, SizeClassQueueKey, Stage, TaskState, Timer, Worker, WorkerId,
    WorkerState,
};

/// A size-class queue.
#[derive(Clone, Debug)]
pub struct QueueRow {
    pub key: Arc<SizeClassQueueKey>,
    pub workers: usize,
    pub idle_synchronizing_workers: usize,
    pub queued: usize,
    /// Without workers it goes then.
    pub removal: Option<Instant>,
}

#[derive(Clone, Debug)]
pub struct WorkerRow {
    pub id: WorkerId,
    pub key: Arc<SizeClassQueueKey>,
    /// Unless its call is held, it is gone when it is silent until then.
    pub removal: Option<Instant>,
    /// Those that wait for what it executes.
    pub operations: Vec<Uuid>,
}

#[derive(Clone, Debug)]
pub struct OperationRow {
    pub name: Uuid,
    pub action: Arc<QueuedAction>,
    pub key: Arc<SizeClassQueueKey>,
    pub invocation: Invocation,
    pub priority: i32,
    /// When nobody waits for it, it goes then.
    pub removal: Option<Instant>,
    pub stage: Stage,
    pub worker: Option<WorkerId>,
}

impl<C, W: Clone> Queue<C, W> {
    /// By platform, prefix and size class.
    pub fn queues(&self) -> impl Iterator<Item = QueueRow> {
        let numbers = self
            .platforms
            .values()
            .flat_map(|prefixes| prefixes.values().flat_map(|sizes| sizes.values().copied()));
        numbers.filter_map(|number| {
            let queue = self.queues.get(&number)?;
            Some(QueueRow {
                key: queue.key.clone(),
                workers: queue.workers.len(),
                idle_synchronizing_workers: queue.idle_synchronizing_workers.len(),
                queued: queue.queued_tasks.len(),
                removal: self.timers.get(&Timer::Queue(number)),
            })
        })
    }

    /// Of one size-class queue, by their labels.
    pub fn workers_of(&self, key: &SizeClassQueueKey) -> impl Iterator<Item = WorkerRow> {
        let queue = self.queues.values().find(|queue| *queue.key == *key);
        queue.into_iter().flat_map(move |queue| {
            queue.workers.values().filter_map(move |number| {
                let worker: &Worker<C> = self.workers.get(number)?;
                let deadline = self.timers.get(&Timer::Worker(*number));
                let (removal, task) = match &worker.state {
                    WorkerState::IdleSynchronizing { .. } => (None, None),
                    WorkerState::Executing { task, .. } => (deadline, self.tasks.get(task)),
                    WorkerState::Idle | WorkerState::ExecutingForeign { .. } => (deadline, None),
                };
                Some(WorkerRow {
                    id: worker.id.clone(),
                    key: queue.key.clone(),
                    removal,
                    operations: task
                        .map(|task| task.operations.values().copied().collect())
                        .unwrap_or_default(),
                })
            })
        })
    }

    /// By name, from the first one after `after`.
    pub fn operations(&self, after: Option<Uuid>) -> impl Iterator<Item = OperationRow> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.operations
            .range((from, Bound::Unbounded))
            .filter_map(|(name, operation)| {
                let task = self.tasks.get(&operation.task)?;
                let worker = match &task.state {
                    TaskState::Executing(worker) => self.workers.get(worker),
                    TaskState::Queued { .. } | TaskState::Completed(_) => None,
                };
                Some(OperationRow {
                    name: *name,
                    action: task.action.clone(),
                    key: task.key.clone(),
                    invocation: operation.invocation.clone(),
                    priority: operation.priority,
                    removal: self.timers.get(&Timer::Operation(*name)),
                    stage: task.progress().stage,
                    worker: worker.map(|worker| worker.id.clone()),
                })
            })
    }
}
