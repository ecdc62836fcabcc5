//! What workers do: synchronize, drop their calls, fall silent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    CallNumber, Caller, DesiredWorkerState, Effect, EncodedResponse, ForeignAction,
    IdleSynchronizingWorkers, Instruction, Queue, QueueNumber, QueuedTasks, Refusal,
    ReportedAction, ReportedDigest, SizeClassQueue, SizeClassQueueKey, TaskNumber, TaskState,
    Timer, Worker, WorkerActivity, WorkerNumber, WorkerReport, WorkerState,
};
use crate::proto::rpc;

/// The answer to a worker's call.
#[derive(Debug)]
pub enum SynchronizeAnswer {
    Now(Instruction),
    /// It follows as an effect, unless `drop_call` comes first.
    Held(HeldCall),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldCall {
    worker: WorkerNumber,
    number: CallNumber,
}

const GO_IDLE: Instruction = Instruction {
    desired: DesiredWorkerState::Idle,
    next: Duration::ZERO,
};

impl<C, W: Clone> Queue<C, W> {
    /// One call of a worker. When there is no work for it, `call` is held for up to `idle_wait`.
    pub fn synchronize(
        &mut self,
        now: Instant,
        key: &SizeClassQueueKey,
        caller: &Caller,
        report: WorkerReport,
        call: C,
        idle_wait: Duration,
    ) -> Result<SynchronizeAnswer, Refusal> {
        let queue = self.size_class_queue(key)?;
        let (number, is_new) = self.worker(now, queue, caller);
        if self.is_outdated(number, caller) {
            // The worker does not wait for the answer any more.
            return Ok(SynchronizeAnswer::Now(GO_IDLE));
        }
        self.admit(now, number, caller, &report.activity)?;
        let Some(worker) = self.workers.get(&number) else {
            return Ok(SynchronizeAnswer::Now(GO_IDLE));
        };
        let held = match (&worker.state, report.activity) {
            // `admit` refuses.
            (WorkerState::IdleSynchronizing { .. }, _) => Some(GO_IDLE),
            (WorkerState::Executing { task, .. }, WorkerActivity::Executing(action))
                if self.is_of(*task, &action) =>
            {
                let (task, given_to) = (*task, None);
                return Ok(self.continue_executing(
                    now,
                    number,
                    WorkerState::Executing { task, given_to },
                ));
            }
            (WorkerState::Executing { task, .. }, WorkerActivity::Completed(action, outcome))
                if self.is_of(*task, &action) =>
            {
                let task = *task;
                self.complete(now, task, outcome);
                None
            }
            // It lost the task, or never heard of it.
            (WorkerState::Executing { task, .. }, activity) => {
                let hands_back =
                    report.prefer_being_idle && matches!(activity, WorkerActivity::Idle);
                let task = *task;
                self.reassign(now, queue, number, task, hands_back)
            }
            (WorkerState::Idle, WorkerActivity::Executing(action)) if is_new => {
                return Ok(self.adopt_foreign_action(now, queue, number, action));
            }
            (WorkerState::Idle, WorkerActivity::Completed(action, outcome)) if is_new => {
                self.accept_foreign_result(now, queue, action, outcome);
                None
            }
            // Nobody wants it any more; the worker knows best when it has stopped.
            (WorkerState::Idle, WorkerActivity::Executing(_)) => Some(GO_IDLE),
            (WorkerState::Idle, _) => None,
            (
                WorkerState::ExecutingForeign { action, until },
                WorkerActivity::Executing(reported),
            ) if action.is(&reported) && now < *until => {
                let (action, until) = (action.clone(), *until);
                return Ok(self.continue_executing(
                    now,
                    number,
                    WorkerState::ExecutingForeign { action, until },
                ));
            }
            (WorkerState::ExecutingForeign { action, .. }, activity) => {
                self.foreign_actions.remove(&(action.clone(), number));
                self.set_idle(number);
                match activity {
                    WorkerActivity::Completed(reported, outcome) => {
                        self.accept_foreign_result(now, queue, reported, outcome);
                        None
                    }
                    WorkerActivity::Executing(_) => Some(GO_IDLE),
                    WorkerActivity::Idle => None,
                }
            }
        };
        if let Some(instruction) = held {
            if instruction.desired == DesiredWorkerState::Idle {
                self.expect_call(now, number);
            }
            return Ok(SynchronizeAnswer::Now(instruction));
        }
        if report.prefer_being_idle {
            self.expect_call(now, number);
            return Ok(SynchronizeAnswer::Now(GO_IDLE));
        }
        let first = self
            .queues
            .get(&queue)
            .and_then(|queue| queue.queued_tasks.first());
        if let Some(task) = first {
            self.withdraw(task);
            if let Some(instruction) = self.assign(now, task, number, None) {
                return Ok(SynchronizeAnswer::Now(instruction));
            }
        }
        Ok(SynchronizeAnswer::Held(
            self.hold_call(now, queue, number, call, idle_wait),
        ))
    }

    /// A held call died, or its answer could not be sent.
    pub fn drop_call(&mut self, now: Instant, held: HeldCall) {
        let Some(worker) = self.workers.get(&held.worker) else {
            return;
        };
        let queue = worker.queue;
        match &worker.state {
            WorkerState::IdleSynchronizing { number, .. } if *number == held.number => {
                self.take_call(held.worker);
                self.expect_call(now, held.worker);
            }
            WorkerState::Executing { task, given_to } if *given_to == Some(held.number) => {
                let task = *task;
                self.set_idle(held.worker);
                self.expect_call(now, held.worker);
                self.enqueue(now, task, queue);
            }
            _ => {}
        }
    }

    /// Whether a later call of the same worker came before this one, or this one came twice.
    fn is_outdated(&self, number: WorkerNumber, caller: &Caller) -> bool {
        let (Some(worker), Some(call)) = (self.workers.get(&number), caller.call) else {
            return false;
        };
        worker
            .latest_call
            .is_some_and(|latest| latest.session == call.session && latest.number >= call.number)
    }

    /// Refuses a call that is not of the worker whose name it bears, as far as that can be told: one
    /// that waits does not call, and one that executes something says so.
    fn admit(
        &mut self,
        now: Instant,
        number: WorkerNumber,
        caller: &Caller,
        activity: &WorkerActivity,
    ) -> Result<(), Refusal> {
        let Some(worker) = self.workers.get(&number) else {
            return Ok(());
        };
        let reported = match activity {
            WorkerActivity::Idle => None,
            WorkerActivity::Executing(action) | WorkerActivity::Completed(action, _) => {
                Some(action)
            }
        };
        let its_own = match &worker.state {
            WorkerState::IdleSynchronizing { .. } | WorkerState::Idle => false,
            WorkerState::Executing { task, .. } => {
                reported.is_some_and(|action| self.is_of(*task, action))
            }
            WorkerState::ExecutingForeign { action, .. } => {
                reported.is_some_and(|reported| action.is(reported))
            }
        };
        let waits = matches!(worker.state, WorkerState::IdleSynchronizing { .. });
        let rests = matches!(worker.state, WorkerState::Idle);
        let same = worker.peer == caller.peer;
        let admitted = !waits && (rests || same || its_own || worker.overdue <= now);
        let (id, holder) = (worker.id.clone(), worker.peer.clone());
        let news = !same && worker.refused.as_ref() != Some(&caller.peer);
        let Some(worker) = self.workers.get_mut(&number) else {
            return Ok(());
        };
        if admitted {
            worker.peer = caller.peer.clone();
            worker.latest_call = caller.call;
            return Ok(());
        }
        let caller = caller.peer.clone();
        worker.refused = Some(caller.clone());
        Err(match waits {
            true => Refusal::AlreadySynchronizing {
                id,
                holder,
                caller,
                news,
            },
            false => Refusal::Executing {
                id,
                holder,
                caller,
                news,
            },
        })
    }

    fn size_class_queue(&mut self, key: &SizeClassQueueKey) -> Result<QueueNumber, Refusal> {
        let fresh = QueueNumber(self.number());
        let sizes = self
            .platforms
            .entry(key.platform.clone())
            .or_default()
            .entry(key.prefix.clone())
            .or_default();
        match sizes.first_key_value() {
            Some((size, number)) if *size == key.size_class => return Ok(*number),
            // Several need an order of sizes that the administrator declares.
            Some((size, _)) => {
                return Err(Refusal::SizeClass {
                    known: *size,
                    offered: key.size_class,
                });
            }
            None => {}
        }
        sizes.insert(key.size_class, fresh);
        self.queues.insert(
            fresh,
            SizeClassQueue {
                key: Arc::new(key.clone()),
                workers: Default::default(),
                idle_synchronizing_workers: IdleSynchronizingWorkers::default(),
                queued_tasks: QueuedTasks::default(),
            },
        );
        Ok(fresh)
    }

    /// The worker of this name, and whether it is new to us.
    fn worker(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        caller: &Caller,
    ) -> (WorkerNumber, bool) {
        let id = &caller.id;
        let fresh = WorkerNumber(self.number());
        let known = self
            .queues
            .get_mut(&queue)
            .map(|queue| *queue.workers.entry(id.clone()).or_insert(fresh));
        match known {
            Some(known) if known != fresh => (known, false),
            _ => {
                self.timers.clear(&Timer::Queue(queue));
                self.workers.insert(
                    fresh,
                    Worker {
                        queue,
                        id: id.clone(),
                        peer: caller.peer.clone(),
                        latest_call: None,
                        overdue: now,
                        refused: None,
                        state: WorkerState::Idle,
                    },
                );
                (fresh, true)
            }
        }
    }

    /// Whether it is this task's action that a worker speaks of, as far as it says.
    fn is_of(&self, task: TaskNumber, action: &ReportedAction) -> bool {
        self.tasks.get(&task).is_some_and(|task| {
            let instance = action.instance.as_ref();
            ReportedDigest::from(&task.action.digest) == action.digest
                && instance.is_none_or(|instance| *instance == task.action.instance)
        })
    }

    fn continue_executing(
        &mut self,
        now: Instant,
        worker: WorkerNumber,
        state: WorkerState<C>,
    ) -> SynchronizeAnswer {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.state = state;
        }
        let next = self.expect_busy(now, worker);
        SynchronizeAnswer::Now(Instruction {
            desired: DesiredWorkerState::Unchanged,
            next,
        })
    }

    /// A worker does not do what we gave it: once more, there or elsewhere, but not for ever.
    /// `None` when the worker is free.
    fn reassign(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        worker: WorkerNumber,
        number: TaskNumber,
        hands_back: bool,
    ) -> Option<Instruction> {
        let task = self.tasks.get_mut(&number)?;
        if task.retries >= self.settings.worker_task_retry_count {
            let attempts = task.retries.saturating_add(1);
            let id = self.workers.get(&worker).map(|w| w.id.to_string());
            self.fail(
                now,
                number,
                rpc::Code::Internal,
                format!(
                    "The action was handed out {attempts} times, and each time the worker came back without a result, last worker {}; the action may crash the worker",
                    id.unwrap_or_default()
                ),
            );
            return None;
        }
        task.retries += 1;
        if hands_back {
            self.set_idle(worker);
            self.enqueue(now, number, queue);
            return None;
        }
        self.assign(now, number, worker, None)
    }

    /// A worker that we did not know executes something: a task of ours, or perhaps of a client
    /// that will ask for it.
    fn adopt_foreign_action(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        worker: WorkerNumber,
        action: ReportedAction,
    ) -> SynchronizeAnswer {
        // Of no use to anybody: a client could not be told from those of another instance.
        let Some(action) = ForeignAction::new(queue, action) else {
            self.expect_call(now, worker);
            return SynchronizeAnswer::Now(GO_IDLE);
        };
        match self.find_in_flight(&action) {
            Some((task, true)) => {
                self.withdraw(task);
                self.assign(now, task, worker, None);
                let task = WorkerState::Executing {
                    task,
                    given_to: None,
                };
                self.continue_executing(now, worker, task)
            }
            // Another worker has it.
            Some((_, false)) => {
                self.expect_call(now, worker);
                SynchronizeAnswer::Now(GO_IDLE)
            }
            None => {
                self.foreign_actions.insert((action.clone(), worker));
                let until = now + self.settings.operation_with_no_waiters_timeout;
                self.continue_executing(
                    now,
                    worker,
                    WorkerState::ExecutingForeign { action, until },
                )
            }
        }
    }

    /// A worker that we did not hand this action brings a result. Good ones are of use to whoever
    /// asks; failures are better tried again.
    fn accept_foreign_result(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        action: ReportedAction,
        outcome: Arc<EncodedResponse>,
    ) {
        if outcome.code != rpc::Code::Ok as i32 {
            return;
        }
        let Some(action) = ForeignAction::new(queue, action) else {
            return;
        };
        match self.find_in_flight(&action) {
            Some((task, _)) => self.complete(now, task, outcome),
            None => {
                self.unclaimed.insert(action.clone(), outcome);
                self.timers.set(
                    Timer::Unclaimed(action),
                    now + self.settings.operation_with_no_waiters_timeout,
                );
            }
        }
    }

    /// A cacheable task for this action, and whether it is queued.
    fn find_in_flight(&self, action: &ForeignAction) -> Option<(TaskNumber, bool)> {
        action.digest.candidates().find_map(|digest| {
            let number = self.in_flight.get(&(action.instance.clone(), digest))?;
            match &self.tasks.get(number)?.state {
                TaskState::Queued { queue, .. } if *queue == action.queue => Some((*number, true)),
                TaskState::Executing(worker) if self.workers.get(worker)?.queue == action.queue => {
                    Some((*number, false))
                }
                _ => None,
            }
        })
    }

    fn set_idle(&mut self, worker: WorkerNumber) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.state = WorkerState::Idle;
        }
    }

    fn hold_call(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        worker: WorkerNumber,
        call: C,
        idle_wait: Duration,
    ) -> HeldCall {
        let number = CallNumber(self.number());
        if let Some(queue) = self.queues.get_mut(&queue) {
            queue.idle_synchronizing_workers.insert(number, worker);
        }
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.state = WorkerState::IdleSynchronizing { number, call };
        }
        self.timers.set(Timer::Worker(worker), now + idle_wait);
        HeldCall { worker, number }
    }

    /// Takes a worker's held call. The worker is idle afterwards, and without a deadline.
    pub(super) fn take_call(&mut self, number: WorkerNumber) -> Option<(CallNumber, C)> {
        let worker = self.workers.get_mut(&number)?;
        match std::mem::replace(&mut worker.state, WorkerState::Idle) {
            WorkerState::IdleSynchronizing { number, call } => {
                if let Some(queue) = self.queues.get_mut(&worker.queue) {
                    queue.idle_synchronizing_workers.remove(number);
                }
                Some((number, call))
            }
            other => {
                worker.state = other;
                None
            }
        }
    }

    /// Its call has been held for long enough; or it has been silent for too long, and is gone.
    pub(super) fn expire_worker(&mut self, now: Instant, number: WorkerNumber) {
        if let Some((_, call)) = self.take_call(number) {
            self.effects.push(Effect::Answer {
                call,
                instruction: GO_IDLE,
            });
            self.expect_call(now, number);
            return;
        }
        let Some(worker) = self.workers.get(&number) else {
            return;
        };
        let (queue, id) = (worker.queue, worker.id.clone());
        match &worker.state {
            WorkerState::Executing { task, .. } => self.fail(
                now,
                *task,
                rpc::Code::Unavailable,
                format!("Worker {id} disappeared while task was executing"),
            ),
            WorkerState::ExecutingForeign { action, .. } => {
                self.foreign_actions.remove(&(action.clone(), number));
            }
            WorkerState::Idle | WorkerState::IdleSynchronizing { .. } => {}
        }
        self.workers.remove(&number);
        if let Some(found) = self.queues.get_mut(&queue) {
            found.workers.remove(&id);
            if found.workers.is_empty() {
                self.timers.set(
                    Timer::Queue(queue),
                    now + self.settings.platform_queue_with_no_workers_timeout,
                );
            }
        }
    }
}

impl ForeignAction {
    /// `None` when the worker does not say whose blobs it works with.
    fn new(queue: QueueNumber, action: ReportedAction) -> Option<Self> {
        Some(ForeignAction {
            queue,
            instance: action.instance?,
            digest: action.digest,
        })
    }

    fn is(&self, action: &ReportedAction) -> bool {
        action.digest == self.digest && action.instance.as_ref() == Some(&self.instance)
    }
}
