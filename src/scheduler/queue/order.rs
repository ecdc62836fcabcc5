//! Who comes first: the only place where the order of tasks, and of workers, is decided.

use std::collections::BTreeMap;

use super::{CallNumber, TaskNumber, WorkerNumber};

/// A task's place in the queue: most urgent priority first, then the one that came first. It keeps
/// its arrival when it is queued again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub priority: i32,
    pub arrival: u64,
}

/// Tasks that wait for a worker. Fairness among invocations belongs here.
#[derive(Debug, Default)]
pub(super) struct QueuedTasks(BTreeMap<Position, TaskNumber>);

impl QueuedTasks {
    pub(super) fn insert(&mut self, position: Position, task: TaskNumber) {
        self.0.insert(position, task);
    }

    pub(super) fn remove(&mut self, position: Position) {
        self.0.remove(&position);
    }

    /// The task that a free worker takes.
    pub(super) fn first(&self) -> Option<TaskNumber> {
        self.0.first_key_value().map(|(_, task)| *task)
    }

    pub(super) fn get(&self, position: &Position) -> Option<TaskNumber> {
        self.0.get(position).copied()
    }

    /// In the order in which they will be handed out.
    pub(super) fn iter(&self) -> impl Iterator<Item = TaskNumber> {
        self.0.values().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Workers whose calls are held. The one that called last gets the next task: its caches are
/// warmest, and workers that a farm does not need stay idle, and can be taken away.
#[derive(Debug, Default)]
pub(super) struct IdleSynchronizingWorkers(BTreeMap<CallNumber, WorkerNumber>);

impl IdleSynchronizingWorkers {
    pub(super) fn insert(&mut self, call: CallNumber, worker: WorkerNumber) {
        self.0.insert(call, worker);
    }

    pub(super) fn remove(&mut self, call: CallNumber) {
        self.0.remove(&call);
    }

    /// The worker that takes a new task.
    pub(super) fn first(&self) -> Option<WorkerNumber> {
        self.0.last_key_value().map(|(_, worker)| *worker)
    }

    pub(super) fn get(&self, call: &CallNumber) -> Option<WorkerNumber> {
        self.0.get(call).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
