//! How a task gets to a worker, or into the tree; and how it ends.

use std::{
    cmp::Reverse,
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;

use super::{
    Attempt, DesiredWorkerState, Effect, EncodedResponse, Instruction, InvocationKeys,
    OperationPlace, Queue, QueuedAction, Task, TaskState, Timer, WorkerState,
    arena::{InvocationNumber, OperationNumber, QueueNumber, TaskNumber, WorkerNumber},
    fairness::Position,
    report::CallNumber,
};
use crate::{
    proto::rpc,
    scheduler::size_class::{Selection, Selector},
};

/// After so long a busy worker makes the call by which it hears of a cancellation at once. Actions that
/// end sooner do not need it.
const HELD_CALL_DELAY: Duration = Duration::from_millis(500);

/// So much later than it was asked to a busy worker may call, on a busy host or network, before
/// another caller of its name is believed to be its successor.
pub(super) const CALL_DELAY_TOLERANCE: Duration = Duration::from_secs(5);

/// 49 days at most.
pub(super) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Where a task is that a worker is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AssignedFrom {
    /// It is queued.
    Tree,
    Nowhere,
    /// Nowhere, too, and the worker reports that it executes it, by this attempt if it knows one.
    Report(Option<u64>),
}

impl<C, W: Clone> Queue<C, W> {
    /// A task that has no operation yet, and is nowhere.
    pub(super) fn insert_task(
        &mut self,
        action: Arc<QueuedAction>,
        queue: QueueNumber,
        selector: Selector,
        selection: Selection,
        background: bool,
        skips_cache_lookup: bool,
    ) -> TaskNumber {
        let arrival = self.number();
        self.totals.tasks += 1;
        self.action_bytes += action.size();
        self.tasks.insert(Task {
            action,
            key: self.queues[queue].key.clone(),
            queue,
            arrival,
            retries: 0,
            lost: None,
            operations: SmallVec::new(),
            timeout: selection.timeout,
            expected_milliseconds: milliseconds(selection.expected_duration),
            learner: Some(selection.learner),
            selector,
            background,
            skips_cache_lookup,
            state: TaskState::Fresh,
            in_state_since: None,
            version: 0,
        })
    }

    pub(super) fn remove_task(&mut self, now: Instant, number: TaskNumber) -> Task {
        self.count_task_removed(now, number);
        let task = self.tasks.remove(number);
        self.action_bytes -= task.action.size();
        task
    }

    /// Hands a task that is in no tree to an idle worker, or puts it into the tree.
    pub(super) fn schedule(&mut self, now: Instant, task: TaskNumber) {
        let free = self.tasks[task].operations.first().and_then(|operation| {
            let node = self.node_of(*operation);
            self.invocations.idle_worker(node)
        });
        if let Some(worker) = free
            && let Some((number, call)) = self.take_call(now, worker)
        {
            let instruction = self.assign(now, task, worker, Some(number), AssignedFrom::Nowhere);
            self.effects.push(Effect::Answer { call, instruction });
            return;
        }
        for i in 0..self.tasks[task].operations.len() {
            let operation = self.tasks[task].operations[i];
            self.enqueue_operation(operation);
        }
        self.advance(now, task, TaskState::Queued);
    }

    /// Makes a task the worker's, whose call is not held.
    pub(super) fn assign(
        &mut self,
        now: Instant,
        task: TaskNumber,
        worker: WorkerNumber,
        given_to: Option<CallNumber>,
        from: AssignedFrom,
    ) -> Instruction {
        debug_assert!(matches!(self.workers[worker].state, WorkerState::Idle));
        let attempt = match from {
            AssignedFrom::Report(Some(number)) => number,
            AssignedFrom::Tree | AssignedFrom::Nowhere | AssignedFrom::Report(None) => {
                let number = self.number();
                self.settings.first_attempt.wrapping_add(number).max(1)
            }
        };
        for i in 0..self.tasks[task].operations.len() {
            let node = self.node_of(self.tasks[task].operations[i]);
            self.invocations.start(node, worker);
        }
        // Only now, so that its invocations do not become inactive in between.
        if from == AssignedFrom::Tree {
            self.withdraw(now, task);
        }
        let first = self.tasks[task].operations[0];
        let path = self.invocations.path(self.node_of(first));
        let last = self.workers[worker].last;
        self.invocations.count_idle(last, false);
        let found = &mut self.workers[worker];
        let same = path
            .iter()
            .zip(&found.sticks_to)
            .take_while(|(now, (before, _))| *now == before)
            .count();
        found.sticks_to.truncate(same);
        let rest = path.into_iter().skip(same).map(|node| (node, now));
        found.sticks_to.extend(rest);
        let queue = found.queue;
        found.state = WorkerState::Executing {
            task,
            given_to,
            held: None,
        };
        self.count_stickiness(queue, same);
        self.advance(
            now,
            task,
            TaskState::Executing {
                worker,
                attempt,
                since: now,
            },
        );
        let next = self.expect_busy(now, worker);
        let task = &self.tasks[task];
        Instruction {
            desired: DesiredWorkerState::Execute {
                action: task.action.clone(),
                suffix: task.suffix(),
                attempt: Attempt {
                    operation: self.operations[first].name,
                    number: attempt,
                },
                timeout: task.timeout,
            },
            next,
        }
    }

    /// Takes a task out of the tree, or from those that wait for a report, or from its worker, which
    /// hears of it at once if its call is held, and at its next call otherwise. It is to be put
    /// somewhere else at once.
    pub(super) fn withdraw(&mut self, now: Instant, task: TaskNumber) {
        match self.tasks[task].state {
            TaskState::Queued => {
                for i in 0..self.tasks[task].operations.len() {
                    self.dequeue_operation(self.tasks[task].operations[i]);
                }
            }
            TaskState::Executing { worker, .. } => {
                for i in 0..self.tasks[task].operations.len() {
                    let node = self.node_of(self.tasks[task].operations[i]);
                    self.invocations.stop(node, worker);
                }
                if let Some(call) = self.set_idle(worker) {
                    self.effects.push(Effect::Answer {
                        call,
                        instruction: Instruction::GO_IDLE,
                    });
                    self.expect_call(now, worker);
                }
            }
            TaskState::AwaitingReport => self.withdraw_awaiting(task),
            TaskState::Fresh | TaskState::Completed(_) => {}
        }
    }

    /// Makes a busy worker idle, and takes its held call.
    pub(super) fn set_idle(&mut self, worker: WorkerNumber) -> Option<C> {
        let root = self.queues[self.workers[worker].queue].root;
        let found = &mut self.workers[worker];
        let held = match std::mem::replace(&mut found.state, WorkerState::Idle) {
            WorkerState::Executing { held, .. } | WorkerState::ExecutingForeign { held, .. } => {
                held
            }
            WorkerState::Idle | WorkerState::IdleSynchronizing { .. } => {
                unreachable!("a worker that is not busy becomes idle")
            }
        };
        // Until its task is known to have ended by itself.
        let last = std::mem::replace(&mut found.last, root);
        self.invocations.hold(root);
        self.invocations.count_idle(root, true);
        self.invocations.release(last);
        held.map(|(_, call)| call)
    }

    /// A worker that ended its task by itself is near the invocation that it worked for.
    pub(super) fn set_last(&mut self, worker: WorkerNumber, node: InvocationNumber) {
        let last = std::mem::replace(&mut self.workers[worker].last, node);
        self.invocations.hold(node);
        self.invocations.count_idle(last, false);
        self.invocations.count_idle(node, true);
        self.invocations.release(last);
    }

    /// The innermost invocation that all operations of a task are in.
    pub(super) fn common_invocation(&self, task: TaskNumber) -> InvocationNumber {
        let mut nodes = self.tasks[task].operations.iter().map(|o| self.node_of(*o));
        let first = nodes
            .next()
            .unwrap_or_else(|| unreachable!("a task has an operation"));
        nodes.fold(first, |one, other| self.invocations.common(one, other))
    }

    /// Ends a task, wherever it is.
    pub(super) fn complete(
        &mut self,
        now: Instant,
        number: TaskNumber,
        outcome: Arc<EncodedResponse>,
    ) {
        if let TaskState::Executing { since, .. } = self.tasks[number].state {
            let took = now.saturating_duration_since(since);
            let queue = self.tasks[number].queue;
            let mean = &mut self.queues[queue].mean_duration;
            *mean = Some(mean.map_or(took, |mean| (mean * 7 + took) / 8));
        }
        self.withdraw(now, number);
        let hash = self.action_hash(&self.tasks[number].action);
        self.in_flight.remove(hash, number);
        self.totals.completed += 1;
        self.totals.failed += u64::from(outcome.code != 0 || outcome.exit_code != 0);
        self.advance(now, number, TaskState::Completed(outcome));
        for i in 0..self.tasks[number].operations.len() {
            self.end_operation(now, self.tasks[number].operations[i]);
        }
        if self.tasks[number].background {
            let task = self.remove_task(now, number);
            self.totals.forgotten += 1;
            for operation in task.operations {
                self.forget(operation);
            }
        }
    }

    /// An operation of a completed task leaves its invocation. Those who lost their connection shall find
    /// the result, even if they lost it long ago.
    pub(super) fn end_operation(&mut self, now: Instant, number: OperationNumber) {
        let keys = self.keys_of(number).clone();
        let operation = &mut self.operations[number];
        let place = std::mem::replace(&mut operation.place, OperationPlace::Completed(keys));
        if operation.deadline.is_some() {
            let end = now + self.settings.operation_with_no_waiters_timeout;
            self.timers
                .set(&mut operation.deadline, Timer::Operation(number), end);
        }
        if let OperationPlace::Invocation(node) = place {
            self.invocations.release(node);
        }
    }

    pub(super) fn fail(
        &mut self,
        now: Instant,
        task: TaskNumber,
        code: rpc::Code,
        message: String,
    ) {
        self.complete(now, task, Arc::new(EncodedResponse::failure(code, message)));
    }

    /// Changes a task's state, and tells those who wait for it when that is news.
    pub(super) fn advance(&mut self, now: Instant, number: TaskNumber, state: TaskState) {
        self.count_transition(now, number, &state);
        let task = &mut self.tasks[number];
        let news = match (&task.state, &state) {
            (TaskState::Fresh, TaskState::AwaitingReport)
            | (
                TaskState::Fresh | TaskState::AwaitingReport | TaskState::Queued,
                TaskState::Queued,
            ) => false,
            (TaskState::Executing { worker, .. }, TaskState::Executing { worker: next, .. }) => {
                worker != next
            }
            _ => true,
        };
        task.state = state;
        if news {
            task.version += 1;
            self.tell(number);
        }
    }

    pub(super) fn tell(&mut self, number: TaskNumber) {
        let task = &self.tasks[number];
        let progress = task.progress();
        for operation in &task.operations {
            if let Some(watch) = &self.operations[*operation].watch {
                self.effects.push(Effect::Tell {
                    watch: watch.clone(),
                    progress: progress.clone(),
                });
            }
        }
    }

    /// The invocation of an operation that is not completed.
    pub(super) fn node_of(&self, operation: OperationNumber) -> InvocationNumber {
        match self.operations[operation].place {
            OperationPlace::Invocation(node) => node,
            OperationPlace::Completed(_) => {
                unreachable!("a completed operation is in no invocation")
            }
        }
    }

    pub(super) fn keys_of(&self, operation: OperationNumber) -> &InvocationKeys {
        match &self.operations[operation].place {
            OperationPlace::Invocation(node) => &self.invocations.get(*node).keys,
            OperationPlace::Completed(keys) => keys,
        }
    }

    pub(super) fn position(&self, number: OperationNumber) -> Position {
        let operation = &self.operations[number];
        let task = &self.tasks[operation.task];
        Position {
            priority: operation.priority,
            expected_milliseconds: Reverse(task.expected_milliseconds),
            arrival: task.arrival,
            operation: number,
        }
    }

    pub(super) fn enqueue_operation(&mut self, number: OperationNumber) {
        let (node, position) = (self.node_of(number), self.position(number));
        self.invocations.enqueue(node, position);
        self.count_queued(number, true);
    }

    pub(super) fn dequeue_operation(&mut self, number: OperationNumber) {
        let (node, position) = (self.node_of(number), self.position(number));
        self.invocations.dequeue(node, position);
        self.count_queued(number, false);
    }

    /// What a free worker takes.
    pub(super) fn pick(&self, now: Instant, worker: WorkerNumber) -> Option<TaskNumber> {
        let worker = &self.workers[worker];
        let queue = &self.queues[worker.queue];
        let limits = &self.platform_queues[queue.platform_queue].stickiness_limits;
        let operation = if limits.is_empty() || worker.sticks_to.is_empty() {
            self.invocations.pick(queue.root, &[])
        } else {
            let levels = worker.sticks_to.iter().zip(limits.iter());
            let sticks_to: Vec<_> = levels
                .map(|((node, since), limit)| (*node, now < *since + *limit))
                .collect();
            self.invocations.pick(queue.root, &sticks_to)
        };
        operation.map(|operation| self.operations[operation].task)
    }

    /// Moves a task that is in no tree and with no worker to another size-class queue.
    pub(super) fn move_to(&mut self, task: TaskNumber, queue: QueueNumber) {
        if self.tasks[task].queue == queue {
            return;
        }
        self.tasks[task].queue = queue;
        self.tasks[task].key = self.queues[queue].key.clone();
        let (root, limit) = (self.queues[queue].root, self.settings.limits.invocations);
        for i in 0..self.tasks[task].operations.len() {
            let operation = self.tasks[task].operations[i];
            let keys = self.keys_of(operation).clone();
            let node = self.invocations.find_or_insert(root, &keys, limit);
            self.invocations.hold(node);
            let before = std::mem::replace(
                &mut self.operations[operation].place,
                OperationPlace::Invocation(node),
            );
            if let OperationPlace::Invocation(before) = before {
                self.invocations.release(before);
            }
        }
    }

    /// When a busy worker is to call again. It is gone `worker_silence_timeout` after
    /// `busy_worker_interval`, even where it is to call sooner, so that its call can be held.
    pub(super) fn expect_busy(&mut self, now: Instant, worker: WorkerNumber) -> Duration {
        let next = self.settings.busy_worker_interval;
        self.expect_within(now, worker, next);
        match self.workers[worker].latest_call {
            Some(_) => next.min(HELD_CALL_DELAY),
            None => next,
        }
    }

    /// A worker that may call again at once, and is in no call.
    pub(super) fn expect_call(&mut self, now: Instant, worker: WorkerNumber) {
        self.expect_within(now, worker, Duration::ZERO);
    }

    fn expect_within(&mut self, now: Instant, number: WorkerNumber, next: Duration) {
        let worker = &mut self.workers[number];
        worker.overdue = now + next + CALL_DELAY_TOLERANCE;
        let gone = now + next + self.settings.worker_silence_timeout;
        self.timers
            .set(&mut worker.deadline, Timer::Worker(number), gone);
    }
}
