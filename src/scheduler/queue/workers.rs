//! What workers do: synchronize, drop their calls, fall silent.

use std::time::{Duration, Instant};

use super::{
    DesiredWorkerState, Effect, Instruction, Queue, Refusal, ReportedAction, ReportedDigest,
    SizeClassQueueKey, TaskState, Timer, Worker, WorkerActivity, WorkerCaller, WorkerReport,
    WorkerState,
    arena::{QueueNumber, TaskNumber, WorkerNumber},
    report::CallNumber,
    schedule::AssignedFrom,
};

/// The answer to a worker's call.
#[derive(Debug)]
pub enum SynchronizeAnswer {
    Now(Instruction),
    /// It follows as an effect, unless `drop_call` comes first.
    Held(HeldCall),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldCall {
    pub(super) worker: WorkerNumber,
    pub(super) number: CallNumber,
}

impl<C, W: Clone> Queue<C, W> {
    /// One call of a worker. When there is no work for it, `call` is held for up to `idle_wait`; when it
    /// executes, and numbers its calls, until it is to hear something.
    pub fn synchronize(
        &mut self,
        now: Instant,
        key: &SizeClassQueueKey,
        caller: &WorkerCaller,
        report: WorkerReport,
        call: C,
        idle_wait: Duration,
    ) -> Result<SynchronizeAnswer, Refusal> {
        let queue = self.queue_of_worker(key)?;
        let known = self.queues[queue].workers.get(&caller.id).copied();
        let number = match known {
            Some(number) => number,
            None => self.insert_worker(now, queue, caller)?,
        };
        if self.is_outdated(number, caller) {
            // The worker does not wait for the answer any more.
            return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
        }
        let succeeds = self.admit(now, number, caller, &report.activity)?;
        self.answer_former_call(now, number);
        let may_be_held = caller.call.is_some() && !report.prefer_being_idle;
        let prefers_being_idle = report.prefer_being_idle;
        let bare_digest = report.activity.bare_digest();
        match (&self.workers[number].state, report.activity) {
            (WorkerState::IdleSynchronizing { .. }, _) => {
                unreachable!("its former call was answered")
            }
            (WorkerState::Executing { task, .. }, WorkerActivity::Executing(action))
                if self.is_present_attempt(*task, &action) =>
            {
                let held = may_be_held.then_some(call);
                return Ok(self.continue_executing(now, number, held));
            }
            (WorkerState::Executing { task, .. }, WorkerActivity::Completed(action, outcome))
                if self.is_present_attempt(*task, &action) =>
            {
                let task = *task;
                if self.is_worker_fault(task, &outcome) {
                    // Idle workers are offered it; this one only when it calls again.
                    self.lose_worker(now, number);
                    self.expect_call(now, number);
                    return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
                }
                let near = self.common_invocation(task);
                self.invocations.hold(near);
                self.finish(now, task, outcome);
                self.set_last(number, near);
                self.invocations.release(near);
            }
            // It lost the task, or never heard of it.
            (WorkerState::Executing { task, .. }, activity) => {
                let task = *task;
                if succeeds {
                    self.lose_worker(now, number);
                } else if prefers_being_idle && matches!(activity, WorkerActivity::Idle) {
                    self.take_back(now, number);
                } else if let Some(instruction) = self.reassign(now, number, task) {
                    return Ok(SynchronizeAnswer::Now(instruction));
                }
            }
            (WorkerState::Idle, WorkerActivity::Executing(action)) if known.is_none() => {
                let held = may_be_held.then_some(call);
                return Ok(self.adopt_foreign_action(now, queue, number, action, held));
            }
            (WorkerState::Idle, WorkerActivity::Completed(action, outcome)) if known.is_none() => {
                self.accept_foreign_result(now, queue, action, outcome);
            }
            // Nobody wants it any more; the worker knows best when it has stopped.
            (WorkerState::Idle, WorkerActivity::Executing(_)) => {
                self.expect_call(now, number);
                return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
            }
            (WorkerState::Idle, _) => {}
            (
                WorkerState::ExecutingForeign { action, until, .. },
                WorkerActivity::Executing(reported),
            ) if action.is(&reported) && now < *until => {
                let held = may_be_held.then_some(call);
                return Ok(self.continue_executing(now, number, held));
            }
            (WorkerState::ExecutingForeign { .. }, activity) => {
                self.forget_foreign_action(number);
                self.set_idle(number);
                match activity {
                    WorkerActivity::Completed(reported, outcome) => {
                        self.accept_foreign_result(now, queue, reported, outcome);
                    }
                    WorkerActivity::Executing(_) => {
                        self.expect_call(now, number);
                        return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
                    }
                    WorkerActivity::Idle => {}
                }
            }
        }
        if prefers_being_idle {
            self.expect_call(now, number);
            return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
        }
        let picked = self.workers[number]
            .takes_work()
            .then(|| self.pick(now, number))
            .flatten();
        // It may report this once more, where our answer is lost; which must not be taken for the end of
        // the same action of another instance, or of another client.
        if let Some(reported) = bare_digest
            && picked.is_none_or(|task| reported.is(&self.tasks[task].action.digest))
        {
            self.expect_call(now, number);
            return Ok(SynchronizeAnswer::Now(Instruction::GO_IDLE));
        }
        if let Some(task) = picked {
            let instruction = self.assign(now, task, number, None, AssignedFrom::Tree);
            return Ok(SynchronizeAnswer::Now(instruction));
        }
        Ok(SynchronizeAnswer::Held(
            self.hold_call(now, number, call, idle_wait),
        ))
    }

    /// A held call died, or its answer could not be sent.
    pub fn drop_call(&mut self, now: Instant, held: HeldCall) {
        let number = held.worker;
        // The worker may be gone, and the call with it.
        let Some(worker) = self.workers.get(number) else {
            return;
        };
        match &worker.state {
            WorkerState::IdleSynchronizing { number: call, .. } if *call == held.number => {
                self.take_call(now, number);
            }
            WorkerState::Executing { task, given_to, .. } if *given_to == Some(held.number) => {
                let task = *task;
                self.withdraw(now, task);
                self.expect_call(now, number);
                self.schedule(now, task);
            }
            WorkerState::Executing {
                held: Some((call, _)),
                ..
            }
            | WorkerState::ExecutingForeign {
                held: Some((call, _)),
                ..
            } if *call == held.number => {
                self.take_executing_call(now, number);
            }
            _ => {}
        }
    }

    /// Whether a later call of the same worker came before this one, or this one came twice.
    fn is_outdated(&self, number: WorkerNumber, caller: &WorkerCaller) -> bool {
        let (latest, call) = (self.workers[number].latest_call, caller.call);
        latest.zip(call).is_some_and(|(latest, call)| {
            latest.is_of_successor(call)
                || (latest.session == call.session && latest.number >= call.number)
        })
    }

    /// Refuses a call that is not of the worker whose name it bears, as far as that can be told: one
    /// that waits does not call, and one that executes something says so. `true` when it is another
    /// process that took the worker's place.
    fn admit(
        &mut self,
        now: Instant,
        number: WorkerNumber,
        caller: &WorkerCaller,
        activity: &WorkerActivity,
    ) -> Result<bool, Refusal> {
        let worker = &self.workers[number];
        let reported = match activity {
            WorkerActivity::Idle => None,
            WorkerActivity::Executing(action) | WorkerActivity::Completed(action, _) => {
                Some(action)
            }
        };
        let same_session = worker
            .latest_call
            .zip(caller.call)
            .map(|(latest, call)| latest.session == call.session);
        // The process before it is gone, whether it is overdue or not.
        let is_successor = worker
            .latest_call
            .zip(caller.call)
            .is_some_and(|(latest, call)| call.is_of_successor(latest));
        let its_own = same_session == Some(true)
            || match &worker.state {
                WorkerState::IdleSynchronizing { .. } | WorkerState::Idle => false,
                WorkerState::Executing { task, .. } => {
                    reported.is_some_and(|action| self.is_present_attempt(*task, action))
                }
                WorkerState::ExecutingForeign { action, .. } => {
                    reported.is_some_and(|reported| action.is(reported))
                }
            };
        let waits = matches!(worker.state, WorkerState::IdleSynchronizing { .. });
        let rests = matches!(worker.state, WorkerState::Idle);
        let same = worker.peer == caller.peer;
        let admitted = is_successor
            || match waits {
                true => same_session == Some(true),
                false => rests || same || its_own || worker.overdue <= now,
            };
        let worker = &mut self.workers[number];
        if admitted {
            let succeeds = same_session == Some(false) && !its_own;
            worker.peer = caller.peer.clone();
            worker.latest_call = caller.call;
            // Whoever was told to terminate has.
            worker.terminating &= !succeeds;
            return Ok(succeeds);
        }
        let news = !same && worker.refused.as_ref() != Some(&caller.peer);
        worker.refused = Some(caller.peer.clone());
        let (id, holder) = (worker.id.clone(), worker.peer.clone());
        let caller = caller.peer.clone();
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

    /// A worker's newer call takes the older one's place.
    fn answer_former_call(&mut self, now: Instant, number: WorkerNumber) {
        let answer = match &self.workers[number].state {
            WorkerState::IdleSynchronizing { .. } => self
                .take_call(now, number)
                .map(|(_, call)| (call, Instruction::GO_IDLE)),
            WorkerState::Executing { .. } | WorkerState::ExecutingForeign { .. } => self
                .take_executing_call(now, number)
                .map(|(_, call)| (call, Instruction::GO_ON)),
            WorkerState::Idle => None,
        };
        if let Some((call, instruction)) = answer {
            self.effects.push(Effect::Answer { call, instruction });
        }
    }

    fn insert_worker(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        caller: &WorkerCaller,
    ) -> Result<WorkerNumber, Refusal> {
        let limit = self.settings.limits.workers;
        if self.workers.len() >= limit {
            return Err(Refusal::TooMany {
                what: "workers",
                key: "workers",
                limit,
            });
        }
        let found = &mut self.queues[queue];
        self.timers.clear(&mut found.deadline, Timer::Queue(queue));
        found.killing = None;
        let root = found.root;
        let drained = self.is_drained(queue, &caller.id);
        let number = self.workers.insert(Worker {
            queue,
            id: caller.id.clone(),
            peer: caller.peer.clone(),
            latest_call: None,
            overdue: now,
            refused: None,
            deadline: None,
            terminating: false,
            drained,
            last: root,
            sticks_to: Vec::new(),
            state: WorkerState::Idle,
        });
        self.invocations.hold(root);
        self.invocations.count_idle(root, true);
        self.queues[queue].workers.insert(caller.id.clone(), number);
        self.count_worker_created(queue);
        self.expect_call(now, number);
        Ok(number)
    }

    /// Whether it is the task's present attempt that a worker speaks of, as far as it says.
    fn is_present_attempt(&self, task: TaskNumber, action: &ReportedAction) -> bool {
        let task = &self.tasks[task];
        let TaskState::Executing { attempt, .. } = &task.state else {
            return false;
        };
        let instance = action.instance.as_ref();
        ReportedDigest::from(&task.action.digest) == action.digest
            && instance.is_none_or(|instance| *instance == task.action.instance)
            && action.attempt.is_none_or(|said| said.number == *attempt)
    }

    /// The worker goes on with what it executes. `call` is held, if there is one.
    pub(super) fn continue_executing(
        &mut self,
        now: Instant,
        number: WorkerNumber,
        call: Option<C>,
    ) -> SynchronizeAnswer {
        let fresh = CallNumber(self.number());
        let (WorkerState::Executing { held, .. } | WorkerState::ExecutingForeign { held, .. }) =
            &mut self.workers[number].state
        else {
            unreachable!("a worker goes on with nothing");
        };
        let holds = call.is_some();
        *held = call.map(|call| (fresh, call));
        if let WorkerState::Executing { given_to, .. } = &mut self.workers[number].state {
            *given_to = None;
        }
        if holds {
            self.expect_held(now, number);
            return SynchronizeAnswer::Held(HeldCall {
                worker: number,
                number: fresh,
            });
        }
        SynchronizeAnswer::Now(Instruction {
            desired: DesiredWorkerState::Unchanged,
            next: self.expect_busy(now, number),
        })
    }

    fn hold_call(
        &mut self,
        now: Instant,
        number: WorkerNumber,
        call: C,
        idle_wait: Duration,
    ) -> HeldCall {
        let fresh = CallNumber(self.number());
        let worker = &mut self.workers[number];
        worker.state = WorkerState::IdleSynchronizing {
            number: fresh,
            call,
        };
        let deadline = now + idle_wait;
        self.timers
            .set(&mut worker.deadline, Timer::Worker(number), deadline);
        if worker.takes_work() {
            self.invocations.insert_idle(worker.last, fresh, number);
        }
        HeldCall {
            worker: number,
            number: fresh,
        }
    }

    /// Takes an idle worker's held call. The worker is expected to call again at once.
    pub(super) fn take_call(
        &mut self,
        now: Instant,
        number: WorkerNumber,
    ) -> Option<(CallNumber, C)> {
        let worker = &mut self.workers[number];
        let taken = match std::mem::replace(&mut worker.state, WorkerState::Idle) {
            WorkerState::IdleSynchronizing { number: held, call } => {
                if worker.takes_work() {
                    self.invocations.remove_idle(worker.last, held);
                }
                (held, call)
            }
            other => {
                worker.state = other;
                return None;
            }
        };
        self.expect_call(now, number);
        Some(taken)
    }

    /// Takes the held call of a worker that executes, which is expected to call again at once.
    fn take_executing_call(
        &mut self,
        now: Instant,
        number: WorkerNumber,
    ) -> Option<(CallNumber, C)> {
        let (WorkerState::Executing { held, .. } | WorkerState::ExecutingForeign { held, .. }) =
            &mut self.workers[number].state
        else {
            return None;
        };
        let taken = held.take()?;
        self.expect_call(now, number);
        Some(taken)
    }

    /// Its call has been held for long enough; or it has been silent for too long, and is gone.
    pub(super) fn expire_worker(&mut self, now: Instant, number: WorkerNumber) {
        let held = match &self.workers[number].state {
            WorkerState::IdleSynchronizing { .. } => true,
            WorkerState::Executing { held, .. } | WorkerState::ExecutingForeign { held, .. } => {
                held.is_some()
            }
            WorkerState::Idle => false,
        };
        if held {
            self.answer_former_call(now, number);
            return;
        }
        let (queue, id) = (self.workers[number].queue, self.workers[number].id.clone());
        self.count_worker_removed(queue, self.workers[number].is_busy());
        match &self.workers[number].state {
            WorkerState::Executing { .. } => self.lose_worker(now, number),
            WorkerState::ExecutingForeign { .. } => {
                self.forget_foreign_action(number);
                self.set_idle(number);
            }
            WorkerState::Idle | WorkerState::IdleSynchronizing { .. } => {}
        }
        let mut worker = self.workers.remove(number);
        self.timers
            .clear(&mut worker.deadline, Timer::Worker(number));
        self.invocations.count_idle(worker.last, false);
        self.invocations.release(worker.last);
        self.queues[queue].workers.remove(&id);
        if self.queues[queue].workers.is_empty() {
            self.expect_workers(now, queue);
        }
    }
}
