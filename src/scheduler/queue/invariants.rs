//! What must always hold of a queue, for tests; and how much it holds.

use super::{Queue, TaskState, Timer, WorkerState};

/// How many of each thing there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub queues: usize,
    pub workers: usize,
    pub idle_synchronizing_workers: usize,
    pub tasks: usize,
    pub queued: usize,
    pub operations: usize,
    pub timers: usize,
    pub unclaimed: usize,
}

/// What has come and gone in the queue's life. Together with `Counts` it explains every action that
/// a client has sent: none is lost without a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub tasks: u64,
    /// With a result or an error.
    pub completed: u64,
    /// Completed, and nobody can ask for it any more.
    pub forgotten: u64,
    pub operations: u64,
    pub operations_forgotten: u64,
}

impl<C, W: Clone> Queue<C, W> {
    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn counts(&self) -> Counts {
        Counts {
            queues: self.queues.len(),
            workers: self.workers.len(),
            idle_synchronizing_workers: self
                .queues
                .values()
                .map(|queue| queue.idle_synchronizing_workers.len())
                .sum(),
            tasks: self.tasks.len(),
            queued: self
                .queues
                .values()
                .map(|queue| queue.queued_tasks.len())
                .sum(),
            operations: self.operations.len(),
            timers: self.timers.len(),
            unclaimed: self.unclaimed.len(),
        }
    }

    /// Says which invariant of this module, or which index, is broken.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut deadlines = self.unclaimed.len();
        let ensure = |holds: bool, what: &str| match holds {
            true => Ok(()),
            false => Err(what.to_owned()),
        };
        for (number, worker) in &self.workers {
            let queue = self
                .queues
                .get(&worker.queue)
                .ok_or("a worker has no queue")?;
            ensure(
                queue.workers.get(&worker.id) == Some(number),
                "a worker is not in its queue",
            )?;
            ensure(
                self.timers.get(&Timer::Worker(*number)).is_some(),
                "a worker has no deadline",
            )?;
            deadlines += 1;
            match &worker.state {
                WorkerState::IdleSynchronizing { number: call, .. } => ensure(
                    queue.idle_synchronizing_workers.get(call) == Some(*number),
                    "an idle synchronizing worker is not in its queue's list",
                )?,
                WorkerState::Executing { task, .. } => ensure(
                    self.tasks.get(task).is_some_and(
                        |task| matches!(task.state, TaskState::Executing(w) if w == *number),
                    ),
                    "a worker executes what is not its task",
                )?,
                WorkerState::ExecutingForeign { action, .. } => ensure(
                    action.queue == worker.queue
                        && self.foreign_actions.contains(&(action.clone(), *number)),
                    "a foreign action is not in the index",
                )?,
                WorkerState::Idle => {}
            }
        }
        let is =
            |f: fn(&WorkerState<C>) -> bool| self.workers.values().filter(move |w| f(&w.state));
        ensure(
            self.foreign_actions.len()
                == is(|s| matches!(s, WorkerState::ExecutingForeign { .. })).count(),
            "the index of foreign actions has stale entries",
        )?;
        ensure(
            self.counts().idle_synchronizing_workers
                == is(|s| matches!(s, WorkerState::IdleSynchronizing { .. })).count(),
            "a queue's list of idle synchronizing workers has stale entries",
        )?;
        let mut queues = 0;
        for (platform, prefixes) in &self.platforms {
            ensure(!prefixes.is_empty(), "a platform has no queues")?;
            for (prefix, sizes) in prefixes {
                ensure(!sizes.is_empty(), "a platform queue has no size classes")?;
                for (size, number) in sizes {
                    queues += 1;
                    let key = &self.queues.get(number).ok_or("a queue is missing")?.key;
                    ensure(
                        (&key.platform, &key.prefix, key.size_class) == (platform, prefix, *size),
                        "a queue is found under another key",
                    )?;
                }
            }
        }
        ensure(queues == self.queues.len(), "a queue is found under no key")?;
        for (number, queue) in &self.queues {
            ensure(
                queue.idle_synchronizing_workers.is_empty() || queue.queued_tasks.is_empty(),
                "a task waits although a worker does",
            )?;
            let deadline = self.timers.get(&Timer::Queue(*number)).is_some();
            deadlines += usize::from(deadline);
            ensure(
                deadline == queue.workers.is_empty(),
                "a queue has a deadline if and only if it has no workers",
            )?;
        }
        let mut queued = 0;
        for (number, task) in &self.tasks {
            ensure(!task.operations.is_empty(), "a task has no operations")?;
            for (invocation, name) in &task.operations {
                ensure(
                    self.operations.get(name).is_some_and(|operation| {
                        operation.task == *number && operation.invocation == *invocation
                    }),
                    "a task's operation is not its own",
                )?;
            }
            match &task.state {
                TaskState::Queued { queue, position } => {
                    queued += 1;
                    let queue = self
                        .queues
                        .get(queue)
                        .ok_or("a task waits in no queue")?;
                    ensure(
                        queue.queued_tasks.get(position) == Some(*number),
                        "a queued task is not in its queue",
                    )?;
                    ensure(
                        self.position(*number) == Some(*position),
                        "a queued task is not where its operations want it",
                    )?;
                }
                TaskState::Executing(worker) => ensure(
                    self.workers.get(worker).is_some_and(
                        |w| matches!(w.state, WorkerState::Executing { task, .. } if task == *number),
                    ),
                    "a task's worker executes something else",
                )?,
                TaskState::Completed(_) => {}
            }
            let key = (task.action.instance.clone(), task.action.digest);
            let in_flight = self.in_flight.get(&key) == Some(number);
            let completed = matches!(task.state, TaskState::Completed(_));
            ensure(
                in_flight == (!completed && !task.action.do_not_cache),
                "a task is in flight if and only if it is cacheable and not completed",
            )?;
        }
        let completed = self.tasks.values();
        let completed = completed.filter(|task| matches!(task.state, TaskState::Completed(_)));
        let Totals {
            tasks,
            forgotten,
            operations,
            operations_forgotten,
            ..
        } = self.totals;
        ensure(
            tasks == forgotten + self.tasks.len() as u64
                && self.totals.completed == forgotten + completed.count() as u64,
            "a task was neither completed nor is it held",
        )?;
        ensure(
            operations == operations_forgotten + self.operations.len() as u64,
            "an operation was neither forgotten nor is it held",
        )?;
        ensure(
            queued == self.counts().queued,
            "a queue holds a task that is not queued",
        )?;
        ensure(
            self.in_flight.values().all(|t| self.tasks.contains_key(t)),
            "a task that is in flight does not exist",
        )?;
        for (name, operation) in &self.operations {
            let task = self.tasks.get(&operation.task);
            ensure(
                task.is_some_and(|t| t.operations.get(&operation.invocation) == Some(name)),
                "an operation is not its task's",
            )?;
            let deadline = self.timers.get(&Timer::Operation(*name)).is_some();
            deadlines += usize::from(deadline);
            ensure(
                deadline == (operation.waiters == 0),
                "an operation has a deadline if and only if it has no waiters",
            )?;
        }
        ensure(
            self.unclaimed
                .keys()
                .all(|action| self.timers.get(&Timer::Unclaimed(action.clone())).is_some()),
            "an unclaimed result has no deadline",
        )?;
        ensure(
            deadlines == self.timers.len(),
            "a deadline is of something that does not exist",
        )
    }
}
