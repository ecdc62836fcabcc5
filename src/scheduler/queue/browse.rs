//! What there is, in pieces, for pages that people leaf through.
//!
//! What each of these does under the lock is bounded by the number of rows that are asked for.

use std::{ops::Bound, sync::Arc, time::Instant};

use super::{
    InvocationKey, InvocationKeys, OperationRow, Queue, SizeClassQueueKey, TaskState,
    UnknownInvocation, WorkerId, WorkerState,
    arena::{InvocationNumber, QueueNumber, WorkerNumber},
};

/// A size-class queue, or a node of its invocation tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub queued: usize,
    /// Workers that execute something of it.
    pub executing: usize,
    /// Workers that wait, and last worked for it.
    pub idle: usize,
    /// Nodes right below it.
    pub children: usize,
}

#[derive(Clone, Debug)]
pub struct QueueLoad {
    pub key: Arc<SizeClassQueueKey>,
    pub workers: usize,
    pub load: Load,
    /// Without workers it goes then.
    pub removal: Option<Instant>,
}

#[derive(Clone, Debug)]
pub struct WorkerSight {
    pub id: WorkerId,
    pub key: Arc<SizeClassQueueKey>,
    /// The other end of its connection.
    pub peer: Arc<str>,
    pub activity: WorkerSightActivity,
    pub drained: bool,
    pub terminating: bool,
    /// In no call although one is due.
    pub silent: bool,
}

#[derive(Clone, Debug)]
pub enum WorkerSightActivity {
    Idle,
    Executing {
        since: Instant,
        /// One of those that wait for it.
        operation: Option<Box<OperationRow>>,
    },
    /// What a scheduler before this one handed it.
    Foreign,
}

impl<C, W: Clone> Queue<C, W> {
    /// Size-class queues after one, in the order of their keys.
    pub fn queue_loads(&self, after: Option<&SizeClassQueueKey>, count: usize) -> Vec<QueueLoad> {
        let from = after.map_or(Bound::Unbounded, |after| Bound::Included(&after.platform));
        let platforms = self
            .platforms
            .range::<super::Platform, _>((from, Bound::Unbounded));
        let all = platforms.flat_map(|(_, prefixes)| prefixes.values());
        let sizes = all.flat_map(|number| &self.platform_queues[*number].sizes);
        sizes
            .map(|(_, number)| *number)
            .filter(|number| after.is_none_or(|after| *self.queues[*number].key > *after))
            .take(count)
            .map(|number| self.queue_load_of(number))
            .collect()
    }

    /// `None` when there is no such queue.
    pub fn queue_load(&self, key: &SizeClassQueueKey) -> Option<QueueLoad> {
        let number = self.find_queue(key).ok()?;
        Some(self.queue_load_of(number))
    }

    fn queue_load_of(&self, number: QueueNumber) -> QueueLoad {
        let queue = &self.queues[number];
        QueueLoad {
            key: queue.key.clone(),
            workers: queue.workers.len(),
            load: self.load(queue.root),
            removal: queue.deadline,
        }
    }

    fn load(&self, number: InvocationNumber) -> Load {
        let node = self.invocations.get(number);
        Load {
            queued: node.queued_in_all,
            executing: node.executing.len(),
            idle: node.idle_in_all,
            children: self.invocations.children(number).len(),
        }
    }

    /// Children of an invocation after one, by their keys.
    pub fn invocation_loads(
        &self,
        key: &SizeClassQueueKey,
        parent: &InvocationKeys,
        after: Option<&InvocationKey>,
        count: usize,
    ) -> Result<Vec<(InvocationKey, Load)>, UnknownInvocation> {
        let root = self.queues[self.find_queue(key)?].root;
        let found = self.invocations.find(root, parent);
        let parent = found.ok_or(UnknownInvocation::Invocation)?;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let children = self.invocations.children(parent);
        let rest = children.range::<InvocationKey, _>((from, Bound::Unbounded));
        Ok(rest
            .take(count)
            .map(|(key, number)| (key.clone(), self.load(*number)))
            .collect())
    }

    /// Workers of a size-class queue after one, by the JSON of their labels.
    pub fn worker_sights(
        &self,
        now: Instant,
        key: &SizeClassQueueKey,
        after: Option<&WorkerId>,
        count: usize,
    ) -> Vec<WorkerSight> {
        let Ok(number) = self.find_queue(key) else {
            return Vec::new();
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let workers = &self.queues[number].workers;
        let rest = workers.range::<WorkerId, _>((from, Bound::Unbounded));
        rest.take(count)
            .map(|(_, worker)| self.worker_sight(now, *worker))
            .collect()
    }

    fn worker_sight(&self, now: Instant, number: WorkerNumber) -> WorkerSight {
        let worker = &self.workers[number];
        let is_held = match &worker.state {
            WorkerState::IdleSynchronizing { .. } => true,
            WorkerState::Executing { held, .. } | WorkerState::ExecutingForeign { held, .. } => {
                held.is_some()
            }
            WorkerState::Idle => false,
        };
        let activity = match &worker.state {
            WorkerState::Executing { task, .. } => {
                let task = &self.tasks[*task];
                let operation = task.operations.first().map(|first| self.row(*first));
                match &task.state {
                    TaskState::Executing { since, .. } => WorkerSightActivity::Executing {
                        since: *since,
                        operation: operation.map(Box::new),
                    },
                    _ => WorkerSightActivity::Idle,
                }
            }
            WorkerState::ExecutingForeign { .. } => WorkerSightActivity::Foreign,
            WorkerState::Idle | WorkerState::IdleSynchronizing { .. } => WorkerSightActivity::Idle,
        };
        WorkerSight {
            id: worker.id.clone(),
            key: self.queues[worker.queue].key.clone(),
            peer: worker.peer.clone(),
            activity,
            drained: worker.drained,
            terminating: worker.terminating,
            silent: !is_held && worker.overdue < now,
        }
    }
}
