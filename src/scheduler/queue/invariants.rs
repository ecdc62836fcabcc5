//! What must always hold of a queue, for tests; and how much it holds.

use std::collections::BTreeSet;

use super::{
    OperationPlace, Queue, TaskState, Timer, WorkerState,
    arena::{InvocationNumber, WorkerNumber},
};

/// How many of each thing there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    pub queues: usize,
    pub workers: usize,
    pub idle_synchronizing_workers: usize,
    pub executing_workers: usize,
    pub tasks: usize,
    pub queued: usize,
    pub operations: usize,
    pub invocations: usize,
    pub timers: usize,
    pub kept_results: usize,
}

/// What has come and gone in the queue's life. Together with `QueueCounts` it explains every action that
/// a client has sent: none is lost without a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub tasks: u64,
    /// With a result or an error.
    pub completed: u64,
    /// Of those, the ones with an error or another exit code than 0.
    pub failed: u64,
    /// Completed, and nobody can ask for it any more.
    pub forgotten: u64,
    pub operations: u64,
    pub operations_forgotten: u64,
}

fn ensure(holds: bool, what: &str) -> Result<(), String> {
    match holds {
        true => Ok(()),
        false => Err(what.to_owned()),
    }
}

impl<C, W: Clone> Queue<C, W> {
    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn counts(&self) -> QueueCounts {
        let idle = |queue: &super::SizeClassQueue| self.invocations.get(queue.root).idle_in_all;
        let executing =
            |queue: &super::SizeClassQueue| self.invocations.get(queue.root).executing.len();
        QueueCounts {
            queues: self.queues.len(),
            workers: self.workers.len(),
            idle_synchronizing_workers: self.queues.iter().map(|(_, queue)| idle(queue)).sum(),
            executing_workers: self.queues.iter().map(|(_, queue)| executing(queue)).sum(),
            tasks: self.tasks.len(),
            queued: self.queued.all,
            operations: self.operations.len(),
            invocations: self.invocations.len(),
            timers: self.timers.len(),
            kept_results: self.kept_results.len(),
        }
    }

    /// Says which invariant of this module, or which index, is broken.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut deadlines = 0;
        self.check_queues(&mut deadlines)?;
        self.check_workers(&mut deadlines)?;
        self.check_tasks()?;
        self.check_operations(&mut deadlines)?;
        self.check_invocations()?;
        for (number, deadline) in self.kept_results.deadlines() {
            let kept = deadline.is_some() && self.timers.has(deadline, Timer::KeptResult(number));
            ensure(kept, "a kept result has no deadline")?;
            deadlines += 1;
        }
        let awaited = self.awaited_reports.deadline();
        ensure(
            awaited.is_some() == (self.awaited_reports.len() > 0)
                && self.timers.has(awaited, Timer::AwaitedReports),
            "there is a deadline for reports if and only if one is awaited",
        )?;
        deadlines += usize::from(awaited.is_some());
        ensure(
            deadlines == self.timers.len(),
            "a deadline is of something that does not exist",
        )
    }

    fn check_queues(&self, deadlines: &mut usize) -> Result<(), String> {
        let mut sizes = 0;
        for (platform, prefixes) in &self.platforms {
            for (prefix, number) in prefixes {
                let queue = &self.platform_queues[*number];
                ensure(
                    queue.platform == *platform && queue.prefix == *prefix,
                    "a platform queue is found under another key",
                )?;
                ensure(
                    !queue.sizes.is_empty(),
                    "a platform queue has no size classes",
                )?;
                ensure(queue.sizes.is_sorted(), "size classes are out of order")?;
                for (size, number) in &queue.sizes {
                    sizes += 1;
                    let key = &self.queues[*number].key;
                    ensure(
                        (&key.platform, &key.prefix, key.size_class) == (platform, prefix, *size),
                        "a queue is found under another key",
                    )?;
                }
            }
        }
        ensure(sizes == self.queues.len(), "a queue is found under no key")?;
        for (number, queue) in self.queues.iter() {
            let root = self.invocations.get(queue.root);
            ensure(
                root.idle_in_all == 0 || root.queued_in_all == 0,
                "a task waits although a worker does",
            )?;
            ensure(
                self.timers.has(queue.deadline, Timer::Queue(number)),
                "a queue's deadline is not kept",
            )?;
            *deadlines += usize::from(queue.deadline.is_some());
            let without = queue.workers.is_empty() && !queue.predeclared;
            ensure(
                queue.deadline.is_some() == (without || queue.killing.is_some()),
                "a queue has a deadline if and only if it has no workers, or is killed",
            )?;
        }
        Ok(())
    }

    fn check_workers(&self, deadlines: &mut usize) -> Result<(), String> {
        let (mut idle, mut foreign) = (0, BTreeSet::new());
        for (number, worker) in self.workers.iter() {
            let queue = &self.queues[worker.queue];
            ensure(
                queue.workers.get(&worker.id) == Some(&number),
                "a worker is not in its queue",
            )?;
            ensure(
                worker.deadline.is_some()
                    && self.timers.has(worker.deadline, Timer::Worker(number)),
                "a worker has no deadline",
            )?;
            *deadlines += 1;
            let last = self.invocations.get(worker.last);
            ensure(
                last.queue == worker.queue,
                "a worker's last invocation is elsewhere",
            )?;
            match &worker.state {
                WorkerState::IdleSynchronizing { number: call, .. } => {
                    let listed = last.idle_synchronizing.get(call) == Some(&number);
                    ensure(
                        listed == worker.takes_work(),
                        "an idle synchronizing worker is listed if and only if it takes work",
                    )?;
                    idle += usize::from(listed);
                }
                WorkerState::Executing { task, .. } => ensure(
                    matches!(
                        self.tasks[*task].state,
                        TaskState::Executing { worker, .. } if worker == number
                    ) && self.tasks[*task].queue == worker.queue,
                    "a worker executes what is not its task",
                )?,
                WorkerState::ExecutingForeign { action, .. } => {
                    foreign.insert(number);
                    ensure(
                        self.foreign_actions
                            .holds(queue.platform_queue, action, number),
                        "a foreign action is not in the index",
                    )?;
                }
                WorkerState::Idle => {}
            }
        }
        let listed: BTreeSet<WorkerNumber> = self.foreign_actions.workers();
        ensure(
            listed.is_subset(&foreign),
            "the index of foreign actions has stale entries",
        )?;
        ensure(
            self.counts().idle_synchronizing_workers == idle,
            "a queue's list of idle synchronizing workers has stale entries",
        )
    }

    fn check_tasks(&self) -> Result<(), String> {
        let (mut completed, mut cacheable, mut awaiting) = (0, 0, 0);
        for (number, task) in self.tasks.iter() {
            ensure(!task.operations.is_empty(), "a task has no operations")?;
            let own =
                |operation: &super::OperationNumber| self.operations[*operation].task == number;
            ensure(
                task.operations.iter().all(own),
                "a task's operation is not its own",
            )?;
            match &task.state {
                TaskState::Fresh => return Err("a task is nowhere".to_owned()),
                TaskState::Queued => {}
                TaskState::AwaitingReport => {
                    awaiting += 1;
                    ensure(
                        self.awaited_reports.contains(task.queue, number),
                        "a task that waits for a report is not listed",
                    )?;
                }
                TaskState::Executing { worker, .. } => ensure(
                    matches!(
                        self.workers[*worker].state,
                        WorkerState::Executing { task, .. } if task == number
                    ),
                    "a task's worker executes something else",
                )?,
                TaskState::Completed(_) => completed += 1,
            }
            let hash = self.action_hash(&task.action);
            let in_flight = self.in_flight.contains(hash, number);
            cacheable += usize::from(in_flight);
            ensure(
                in_flight == (!task.is_completed() && !task.action.do_not_cache),
                "a task is in flight if and only if it is cacheable and not completed",
            )?;
        }
        ensure(
            cacheable == self.in_flight.len(),
            "a task that is in flight does not exist",
        )?;
        let bytes: usize = self.tasks.iter().map(|(_, task)| task.action.size()).sum();
        ensure(
            bytes == self.action_bytes,
            "the bytes of actions are miscounted",
        )?;
        ensure(
            awaiting == self.awaited_reports.len(),
            "a task is listed that waits for no report",
        )?;
        let Totals {
            tasks,
            forgotten,
            operations,
            operations_forgotten,
            ..
        } = self.totals;
        ensure(
            tasks == forgotten + self.tasks.len() as u64
                && self.totals.completed == forgotten + completed,
            "a task was neither completed nor is it held",
        )?;
        ensure(
            operations == operations_forgotten + self.operations.len() as u64,
            "an operation was neither forgotten nor is it held",
        )
    }

    fn check_operations(&self, deadlines: &mut usize) -> Result<(), String> {
        let mut queued = 0;
        for (number, operation) in self.operations.iter() {
            let task = &self.tasks[operation.task];
            ensure(
                task.operations.contains(&number),
                "an operation is not its task's",
            )?;
            ensure(
                self.names.get(operation.name) == Some(number),
                "an operation is not found by its name",
            )?;
            ensure(
                self.timers
                    .has(operation.deadline, Timer::Operation(number)),
                "an operation's deadline is not kept",
            )?;
            *deadlines += usize::from(operation.deadline.is_some());
            ensure(
                operation.deadline.is_some()
                    == (operation.waiters == 0 && operation.watch.is_some()),
                "an operation has a deadline if and only if it has no waiters",
            )?;
            match &operation.place {
                OperationPlace::Invocation(node) => {
                    let node = self.invocations.get(*node);
                    ensure(
                        !task.is_completed(),
                        "a completed operation is in an invocation",
                    )?;
                    ensure(node.queue == task.queue, "an operation is in another queue")?;
                    let is_queued = matches!(task.state, TaskState::Queued);
                    queued += usize::from(is_queued);
                    ensure(
                        node.queued.contains(&self.position(number)) == is_queued,
                        "an operation is not where its task is",
                    )?;
                    if let TaskState::Executing { worker, .. } = task.state {
                        ensure(
                            node.executing.contains_key(&worker),
                            "an invocation does not know who executes for it",
                        )?;
                    }
                }
                OperationPlace::Completed(_) => {
                    ensure(task.is_completed(), "an operation is in no invocation")?;
                }
            }
        }
        ensure(
            self.names.len() == self.operations.len(),
            "a name is of no operation",
        )?;
        ensure(
            queued == self.queued.all,
            "queued operations are miscounted",
        )
    }

    fn check_invocations(&self) -> Result<(), String> {
        let (mut queued, mut idle) = (0, 0);
        for (number, node) in self.invocations.iter() {
            node.check()?;
            queued += node.queued.len();
            let workers = self
                .workers
                .iter()
                .filter(|(_, worker)| !worker.is_busy() && self.is_within(worker.last, number));
            ensure(
                workers.count() == node.idle_workers,
                "idle workers are miscounted",
            )?;
            idle += node.idle_synchronizing.len();
        }
        ensure(
            queued == self.queued.all,
            "an invocation has what is not queued",
        )?;
        ensure(
            idle == self.counts().idle_synchronizing_workers,
            "idle synchronizing workers are miscounted",
        )
    }

    fn is_within(&self, node: InvocationNumber, above: InvocationNumber) -> bool {
        self.invocations.get(node).queue == self.invocations.get(above).queue
            && self.invocations.common(node, above) == above
    }
}
