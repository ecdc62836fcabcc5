//! What there is, for those who look at the queue.

use std::{cmp::Reverse, ops::Bound};

use uuid::Uuid;

use super::{
    InvocationFilter, InvocationKey, InvocationKeys, InvocationRow, ListPage, OperationRow,
    PlatformQueueRow, Queue, QueuedCursor, SizeClassQueueKey, SizeClassQueueRow, Stage, StageKind,
    TaskState, UnknownInvocation, WorkerFilter, WorkerId, WorkerRow, WorkerState,
    arena::{InvocationNumber, OperationNumber, QueueNumber, WorkerNumber},
};

impl<C, W: Clone> Queue<C, W> {
    /// By prefix, then by the platform's JSON.
    pub fn platform_queues(&self) -> Vec<PlatformQueueRow> {
        let queues = self
            .platform_queues
            .iter()
            .map(|(_, queue)| PlatformQueueRow {
                prefix: queue.prefix.clone(),
                platform: queue.platform.clone(),
                size_classes: queue
                    .sizes
                    .iter()
                    .map(|(_, size)| self.queue_row(*size))
                    .collect(),
            });
        let mut rows: Vec<PlatformQueueRow> = queues.collect();
        rows.sort_by_cached_key(|row| (row.prefix.clone(), row.platform.to_string()));
        rows
    }

    fn queue_row(&self, number: QueueNumber) -> SizeClassQueueRow {
        let queue = &self.queues[number];
        SizeClassQueueRow {
            key: queue.key.clone(),
            removal: queue.deadline,
            workers: queue.workers.len(),
            drains: self.drains_of(&queue.key).count(),
            root: self.invocation_row(queue.root),
        }
    }

    fn invocation_row(&self, number: InvocationNumber) -> InvocationRow {
        let node = self.invocations.get(number);
        let children = self.invocations.children(number);
        let active = children.values().filter(|child| {
            let child = self.invocations.get(**child);
            child.queued_in_all > 0 || !child.executing.is_empty()
        });
        InvocationRow {
            queued_directly: node.queued.len(),
            queued_indirectly: node.queued_in_all - node.queued.len(),
            executing_workers: node.executing.len(),
            idle_workers: node.idle_workers,
            idle_synchronizing_workers: node.idle_in_all,
            children: children.len(),
            active_children: active.count(),
            queued_children: node.ready_children().count(),
        }
    }

    fn find_invocation(
        &self,
        key: &SizeClassQueueKey,
        keys: &InvocationKeys,
    ) -> Result<InvocationNumber, UnknownInvocation> {
        let root = self.queues[self.find_queue(key)?].root;
        let found = self.invocations.find(root, keys);
        found.ok_or(UnknownInvocation::Invocation)
    }

    /// By their keys; those that have something queued in the order in which they are served.
    pub fn invocation_children(
        &self,
        key: &SizeClassQueueKey,
        parent: &InvocationKeys,
        filter: InvocationFilter,
    ) -> Result<Vec<(InvocationKey, InvocationRow)>, UnknownInvocation> {
        let parent = self.find_invocation(key, parent)?;
        let row = |number: InvocationNumber| {
            let key = self.invocations.get(number).keys.as_slice().last()?;
            Some((key.clone(), self.invocation_row(number)))
        };
        let all = self.invocations.children(parent).values();
        Ok(match filter {
            InvocationFilter::Queued => {
                let ready = self.invocations.get(parent).ready_children();
                ready.filter_map(row).collect()
            }
            InvocationFilter::All => all.filter_map(|child| row(*child)).collect(),
            InvocationFilter::Active => all
                .filter_map(|child| row(*child))
                .filter(|(_, row)| {
                    row.queued_directly + row.queued_indirectly + row.executing_workers > 0
                })
                .collect(),
        })
    }

    /// Those of one invocation itself, in the order in which they are served.
    pub fn queued_operations(
        &self,
        key: &SizeClassQueueKey,
        invocation: &InvocationKeys,
        after: Option<QueuedCursor>,
        page_size: usize,
    ) -> Result<ListPage<OperationRow>, UnknownInvocation> {
        let node = self.find_invocation(key, invocation)?;
        let queued = &self.invocations.get(node).queued;
        let is_after = |number: OperationNumber| {
            let operation = &self.operations[number];
            let task = &self.tasks[operation.task];
            let queued = &task.action.queued_timestamp;
            after.as_ref().is_none_or(|after| {
                let cursor = &after.queued_timestamp;
                (
                    operation.priority,
                    Reverse(task.expected_duration()),
                    (queued.seconds, queued.nanos),
                ) > (
                    after.priority,
                    Reverse(after.expected_duration),
                    (cursor.seconds, cursor.nanos),
                )
            })
        };
        let rest = queued.iter().map(|position| position.operation);
        let rest: Vec<OperationNumber> = rest
            .filter(|operation| is_after(*operation))
            .take(page_size)
            .collect();
        let first = rest.first().map(|first| self.position(*first));
        Ok(ListPage {
            rows: rest
                .into_iter()
                .map(|operation| self.row(operation))
                .collect(),
            start_index: match first {
                Some(first) => queued.range(..first).count(),
                None => queued.len(),
            },
            total: queued.len(),
        })
    }

    /// By the JSON of their labels.
    pub fn workers(
        &self,
        key: &SizeClassQueueKey,
        filter: &WorkerFilter,
        after: Option<&WorkerId>,
        page_size: usize,
    ) -> Result<ListPage<WorkerRow>, UnknownInvocation> {
        if *filter == WorkerFilter::All {
            let queue = &self.queues[self.find_queue(key)?];
            let from = after.map_or(Bound::Unbounded, Bound::Excluded);
            let rest = queue.workers.range::<WorkerId, _>((from, Bound::Unbounded));
            let start_index = match after {
                Some(after) => queue.workers.range(..=after.clone()).count(),
                None => 0,
            };
            return Ok(ListPage {
                rows: rest
                    .take(page_size)
                    .map(|(_, worker)| self.worker_row(*worker))
                    .collect(),
                start_index,
                total: queue.workers.len(),
            });
        }
        let mut numbers: Vec<WorkerNumber> = match filter {
            WorkerFilter::All => Vec::new(),
            WorkerFilter::Executing(keys) => {
                let node = self.find_invocation(key, keys)?;
                self.invocations
                    .get(node)
                    .executing
                    .keys()
                    .copied()
                    .collect()
            }
            WorkerFilter::IdleSynchronizing(keys) => {
                let node = self.find_invocation(key, keys)?;
                self.invocations
                    .get(node)
                    .idle_synchronizing
                    .values()
                    .copied()
                    .collect()
            }
        };
        numbers.sort_by(|one, other| self.workers[*one].id.cmp(&self.workers[*other].id));
        let start_index = numbers.partition_point(|number| {
            after.is_some_and(|after| self.workers[*number].id <= *after)
        });
        let rest = numbers.iter().skip(start_index).take(page_size);
        Ok(ListPage {
            rows: rest.map(|worker| self.worker_row(*worker)).collect(),
            start_index,
            total: numbers.len(),
        })
    }

    /// The next workers of a size-class queue after one; `None` when there are no more.
    pub fn worker_ids(
        &self,
        key: &SizeClassQueueKey,
        after: Option<&WorkerId>,
        count: usize,
    ) -> Option<Vec<WorkerId>> {
        let queue = &self.queues[self.find_queue(key).ok()?];
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rest = queue.workers.range::<WorkerId, _>((from, Bound::Unbounded));
        let ids: Vec<WorkerId> = rest.take(count).map(|(id, _)| id.clone()).collect();
        (!ids.is_empty()).then_some(ids)
    }

    fn worker_row(&self, number: WorkerNumber) -> WorkerRow {
        let worker = &self.workers[number];
        let (held, task) = match &worker.state {
            WorkerState::IdleSynchronizing { .. } => (true, None),
            WorkerState::Executing { task, held, .. } => (held.is_some(), Some(*task)),
            WorkerState::ExecutingForeign { held, .. } => (held.is_some(), None),
            WorkerState::Idle => (false, None),
        };
        let operation = task.and_then(|task| self.tasks[task].operations.first().copied());
        WorkerRow {
            id: worker.id.clone(),
            key: self.queues[worker.queue].key.clone(),
            removal: worker.deadline.filter(|_| !held),
            operation: operation.map(|operation| self.row(operation)),
            drained: !worker.takes_work(),
        }
    }

    /// `None` when there is no such operation.
    pub fn operation(&self, name: Uuid) -> Option<OperationRow> {
        self.names.get(name).map(|number| self.row(number))
    }

    /// By name, from the first one after `after`.
    pub fn operations(&self, after: Option<Uuid>) -> impl Iterator<Item = OperationRow> {
        self.names.after(after).map(|(_, number)| self.row(number))
    }

    /// The same, as far as their order by age needs: the seconds and nanoseconds at which they were
    /// queued.
    pub fn ages(&self, after: Option<Uuid>) -> impl Iterator<Item = (Uuid, (i64, i32), StageKind)> {
        self.names.after(after).map(|(name, number)| {
            let task = &self.tasks[self.operations[number].task];
            let queued = &task.action.queued_timestamp;
            let stage = match &task.state {
                TaskState::Fresh | TaskState::AwaitingReport | TaskState::Queued => {
                    StageKind::Queued
                }
                TaskState::Executing { .. } => StageKind::Executing,
                TaskState::Completed(_) => StageKind::Completed,
            };
            (name, (queued.seconds, queued.nanos), stage)
        })
    }

    /// How many operations come up to this name, and how many there are.
    pub fn place_of(&self, after: Option<Uuid>) -> (usize, usize) {
        let place = after.map_or(0, |after| self.names.place_after(after));
        (place, self.names.len())
    }

    pub(super) fn row(&self, number: OperationNumber) -> OperationRow {
        let operation = &self.operations[number];
        let task = &self.tasks[operation.task];
        let (stage, worker) = match &task.state {
            TaskState::Fresh | TaskState::AwaitingReport | TaskState::Queued => {
                (Stage::Queued, None)
            }
            TaskState::Executing { worker, .. } => (Stage::Executing, Some(*worker)),
            TaskState::Completed(outcome) => (Stage::Completed(outcome.clone()), None),
        };
        OperationRow {
            name: operation.name,
            action: task.action.clone(),
            key: task.key.clone(),
            suffix: task.suffix(),
            invocation: self.keys_of(number).clone(),
            priority: operation.priority,
            skip_cache_lookup: operation.skip_cache_lookup,
            expected_duration: task.expected_duration(),
            removal: operation.deadline,
            stage,
            worker: worker.map(|worker| self.workers[worker].id.clone()),
        }
    }
}
