//! What clients want: to execute, to wait, to cancel, to leave.

use std::{sync::Arc, time::Instant};

use smallvec::smallvec;
use uuid::Uuid;

use super::{
    Effect, EncodedResponse, ExecuteRefusal, KillRefusal, Operation, OperationPlace, Progress,
    Queue, QueuedAction, Request, SizeClassQueueKey, Task, TaskState, Timer, UnknownOperation,
    arena::{OperationNumber, TaskNumber},
};
use crate::proto::rpc;

/// A stream that waits for an operation, from this progress on. To be ended with `detach`.
#[derive(Debug)]
pub struct AttachedWaiter<W> {
    pub operation: Uuid,
    pub action: Arc<QueuedAction>,
    pub watch: W,
    pub progress: Progress,
}

/// What those hear who wait for an operation that somebody killed: unlike ABORTED, CANCELLED and
/// others, no client takes it for a reason to try again.
pub const KILLED: rpc::Code = rpc::Code::PermissionDenied;

/// Operations that are named to who killed them.
const MOST_NAMED: usize = 1_000;

impl<C, W: Clone> Queue<C, W> {
    /// Queues an action, or joins its task that is under way. The request's name and `watch` are used
    /// where there is no operation to join.
    pub fn execute(
        &mut self,
        now: Instant,
        request: Request,
        watch: W,
    ) -> Result<AttachedWaiter<W>, ExecuteRefusal> {
        if request.resumes && self.names.get(request.name).is_some() {
            // Somebody else took it up.
            if let Some(attached) = self.wait(request.name) {
                return Ok(attached);
            }
        }
        let (task, operation) = self.find_or_insert_task(now, &request, watch)?;
        if matches!(self.tasks[task].state, TaskState::Fresh) && !self.take_up(now, task, &request)
        {
            match request.resumes && self.may_be_reported(now) {
                true => self.await_report(now, task),
                false => self.schedule(now, task),
            }
        }
        Ok(self.attach(operation))
    }

    /// Ends an operation of the scheduler before this one, which nobody has taken up: what a worker
    /// executes for it ends, or its report is awaited in vain. Nothing is queued for it.
    pub fn cancel_unknown(
        &mut self,
        now: Instant,
        request: Request,
        watch: W,
    ) -> Result<(), ExecuteRefusal> {
        let name = request.name;
        if self.names.get(name).is_none() {
            let (task, _) = self.find_or_insert_task(now, &request, watch)?;
            // Only a worker that executes it is taken from it.
            if matches!(self.tasks[task].state, TaskState::Fresh) {
                self.take_up(now, task, &request);
            }
            // What joined another one's task leaves it again.
            let _ = self.cancel(now, name);
            self.detach(now, name);
            return Ok(());
        }
        let _ = self.cancel(now, name);
        Ok(())
    }

    /// The task that is under way for an action, or a new one that is in no tree, with the request's
    /// operation.
    fn find_or_insert_task(
        &mut self,
        now: Instant,
        request: &Request,
        watch: W,
    ) -> Result<(TaskNumber, OperationNumber), ExecuteRefusal> {
        let action = &request.action;
        let cacheable = !action.do_not_cache;
        if cacheable && let Some(task) = self.find_in_flight(&action.instance, &action.digest) {
            let operations = self.tasks[task].operations.len();
            let operation = self.join(task, request, watch);
            self.tasks[task].skips_cache_lookup |= request.skip_cache_lookup;
            let own = self.tasks[task].operations.len() == operations;
            self.count_joined(task, own);
            return Ok((task, operation));
        }
        let platform_queue = self
            .route(&request.platform, &action.instance)
            .or_else(|| {
                let default = self.settings.default_platform.as_ref()?;
                let asks_for_none = request.platform.is_empty();
                asks_for_none
                    .then(|| self.route(default, &action.instance))
                    .flatten()
            })
            .ok_or_else(|| self.no_workers(now, request))?;
        self.admit_operation(request)?;
        let sizes = self.platform_queues[platform_queue].size_classes();
        let selection = request
            .selector
            .select(&sizes, self.random_of(request.name));
        let queue = self.platform_queues[platform_queue].sizes[selection.index].1;
        let task = self.insert_task(
            action.clone(),
            queue,
            request.selector.clone(),
            selection,
            false,
            request.skip_cache_lookup,
        );
        if cacheable {
            let hash = self.action_hash(action);
            self.in_flight.insert(hash, task);
        }
        let operation = self.insert_operation(task, request, Some(watch));
        Ok((task, operation))
    }

    /// One more stream for an operation that exists.
    pub fn wait(&mut self, operation: Uuid) -> Option<AttachedWaiter<W>> {
        let number = self.names.get(operation)?;
        self.operations[number].watch.as_ref()?;
        self.add_waiter(number);
        Some(self.attach(number))
    }

    fn add_waiter(&mut self, number: OperationNumber) {
        let operation = &mut self.operations[number];
        operation.waiters += 1;
        self.timers
            .clear(&mut operation.deadline, Timer::Operation(number));
    }

    /// A stream ended, for whatever reason.
    pub fn detach(&mut self, now: Instant, operation: Uuid) {
        // An operation has no end while it has waiters.
        let Some(number) = self.names.get(operation) else {
            return;
        };
        let operation = &mut self.operations[number];
        operation.waiters = operation.waiters.saturating_sub(1);
        if operation.waiters == 0 {
            let timeout = match self.tasks[operation.task].is_completed() {
                true => self.settings.operation_with_no_waiters_timeout,
                false => self.settings.abandoned_operation_timeout,
            };
            self.timers.set(
                &mut operation.deadline,
                Timer::Operation(number),
                now + timeout,
            );
        }
    }

    /// Ends an operation that nobody waits for at once: its client does not want it any more.
    pub fn give_up(&mut self, now: Instant, operation: Uuid) {
        let Some(number) = self.names.get(operation) else {
            return;
        };
        let operation = &mut self.operations[number];
        let is_completed = self.tasks[operation.task].is_completed();
        if operation.waiters == 0 && operation.deadline.is_some() && !is_completed {
            self.timers
                .clear(&mut operation.deadline, Timer::Operation(number));
            self.drop_operation(now, number);
        }
    }

    /// The client's operation ends at once with CANCELLED; others of the task go on.
    pub fn cancel(&mut self, now: Instant, operation: Uuid) -> Result<(), UnknownOperation> {
        let number = self.names.get(operation).ok_or(UnknownOperation)?;
        let task = self.operations[number].task;
        if self.tasks[task].is_completed() {
            return Ok(());
        }
        let response = Arc::new(EncodedResponse::failure(
            rpc::Code::Cancelled,
            "The operation was cancelled".to_owned(),
        ));
        match self.tasks[task].operations.len() {
            1 => self.complete(now, task, response),
            _ => self.separate(now, number, response),
        }
        Ok(())
    }

    /// Takes an operation out of its task, into one of its own that is completed.
    fn separate(&mut self, now: Instant, number: OperationNumber, response: Arc<EncodedResponse>) {
        let from = self.operations[number].task;
        self.leave(from, number);
        let task = &self.tasks[from];
        self.action_bytes += task.action.size();
        let alone = self.tasks.insert(Task {
            action: task.action.clone(),
            key: task.key.clone(),
            queue: task.queue,
            arrival: task.arrival,
            retries: 0,
            lost: None,
            operations: smallvec![number],
            timeout: task.timeout,
            expected_milliseconds: task.expected_milliseconds,
            learner: None,
            selector: task.selector.clone(),
            background: false,
            skips_cache_lookup: false,
            state: TaskState::Completed(response),
            in_state_since: Some(now),
            version: task.version + 1,
        });
        self.totals.tasks += 1;
        self.totals.completed += 1;
        self.operations[number].task = alone;
        self.end_operation(now, number);
        self.tell(alone);
    }

    /// All who wait for the operation's task get this response, unless it is completed. These are
    /// returned, up to `MOST_NAMED` of them, with how many there are.
    pub fn kill_operation(
        &mut self,
        now: Instant,
        operation: Uuid,
        response: Arc<EncodedResponse>,
    ) -> Result<(Vec<Uuid>, usize), UnknownOperation> {
        let number = self.names.get(operation).ok_or(UnknownOperation)?;
        let task = self.operations[number].task;
        if self.tasks[task].is_completed() {
            return Ok((Vec::new(), 0));
        }
        let killed = self.tasks[task].operations.iter();
        let names = killed.map(|operation| self.operations[*operation].name);
        let names = names.take(MOST_NAMED).collect();
        let count = self.tasks[task].operations.len();
        self.complete(now, task, response);
        Ok((names, count))
    }

    /// All that is queued in a size-class queue without workers gets this response, piece by piece.
    pub fn kill_queued(
        &mut self,
        now: Instant,
        key: &SizeClassQueueKey,
        response: Arc<EncodedResponse>,
    ) -> Result<(), KillRefusal> {
        let number = self.find_queue(key)?;
        let queue = &mut self.queues[number];
        if !queue.workers.is_empty() {
            return Err(KillRefusal::HasWorkers);
        }
        queue.killing = Some(response);
        self.kill_piece(now, number);
        Ok(())
    }

    /// The invocation's operation on a task, with one more waiter.
    fn join(&mut self, task: TaskNumber, request: &Request, watch: W) -> OperationNumber {
        let same = self.tasks[task].operations.iter().copied();
        let same = same.filter(|number| self.operations[*number].watch.is_some());
        let joined = same
            .filter(|_| !request.resumes)
            .find(|number| *self.keys_of(*number) == request.invocation);
        let Some(number) = joined else {
            return self.insert_operation(task, request, Some(watch));
        };
        if request.priority < self.operations[number].priority {
            let queued = matches!(self.tasks[task].state, TaskState::Queued);
            if queued {
                self.dequeue_operation(number);
            }
            self.operations[number].priority = request.priority;
            if queued {
                self.enqueue_operation(number);
            }
        }
        self.add_waiter(number);
        number
    }

    /// A new operation of a task, wherever that is.
    pub(super) fn insert_operation(
        &mut self,
        task: TaskNumber,
        request: &Request,
        watch: Option<W>,
    ) -> OperationNumber {
        let queue = self.tasks[task].queue;
        let root = self.queues[queue].root;
        let limit = self.settings.limits.invocations;
        let node = self
            .invocations
            .find_or_insert(root, &request.invocation, limit);
        self.invocations.hold(node);
        let waiters = u32::from(watch.is_some());
        let number = self.operations.insert(Operation {
            name: request.name,
            task,
            place: OperationPlace::Invocation(node),
            priority: request.priority,
            waiters,
            skip_cache_lookup: request.skip_cache_lookup,
            deadline: None,
            watch,
        });
        self.totals.operations += 1;
        self.names.insert(request.name, number);
        self.tasks[task].operations.push(number);
        match self.tasks[task].state {
            TaskState::Queued => self.enqueue_operation(number),
            TaskState::Executing { worker, .. } => self.invocations.start(node, worker),
            TaskState::Fresh | TaskState::AwaitingReport | TaskState::Completed(_) => {}
        }
        number
    }

    fn attach(&self, number: OperationNumber) -> AttachedWaiter<W> {
        let operation = &self.operations[number];
        let task = &self.tasks[operation.task];
        let Some(watch) = &operation.watch else {
            unreachable!("a client waits for what nobody may wait for");
        };
        AttachedWaiter {
            operation: operation.name,
            action: task.action.clone(),
            watch: watch.clone(),
            progress: task.progress(),
        }
    }

    /// Takes an operation off its task, which has others.
    fn leave(&mut self, task: TaskNumber, number: OperationNumber) {
        match self.tasks[task].state {
            TaskState::Queued => self.dequeue_operation(number),
            TaskState::Executing { worker, .. } => {
                let node = self.node_of(number);
                self.invocations.stop(node, worker);
            }
            TaskState::Fresh | TaskState::AwaitingReport | TaskState::Completed(_) => {}
        }
        let operations = &mut self.tasks[task].operations;
        operations.retain(|other| *other != number);
    }

    /// Nobody waits for it, and nobody came back in time.
    pub(super) fn drop_operation(&mut self, now: Instant, number: OperationNumber) {
        let task = self.operations[number].task;
        if self.tasks[task].operations.len() > 1 {
            self.leave(task, number);
            if let OperationPlace::Invocation(node) = self.operations[number].place {
                self.invocations.release(node);
            }
            self.forget(number);
            return;
        }
        if !self.tasks[task].is_completed() {
            let response = EncodedResponse::failure(
                rpc::Code::Cancelled,
                "Task no longer has any waiting clients".to_owned(),
            );
            let outcome = Arc::new(response);
            self.effects.push(Effect::Abandoned {
                operation: self.operations[number].name,
                action: self.tasks[task].action.clone(),
                outcome: outcome.clone(),
            });
            self.complete(now, task, outcome);
        }
        self.forget(number);
        self.remove_task(now, task);
        self.totals.forgotten += 1;
    }

    pub(super) fn forget(&mut self, number: OperationNumber) {
        let mut operation = self.operations.remove(number);
        self.timers
            .clear(&mut operation.deadline, Timer::Operation(number));
        self.names.remove(operation.name);
        self.totals.operations_forgotten += 1;
    }
}
