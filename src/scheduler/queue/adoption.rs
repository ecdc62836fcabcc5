//! What workers do, or have done, for a scheduler before this one.
//!
//! A worker that says which attempt it executes is adopted by that attempt's operation; another one by
//! the instance name and digest that it says. Both are indexed. What a worker does not say whose it is
//! is given to nobody: clients of another instance could not read its blobs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use uuid::Uuid;

use super::{
    EncodedResponse, Instruction, Queue, ReportedAction, ReportedDigest, Request,
    SynchronizeAnswer, TaskState, Timer, WorkerState,
    arena::{Number, PlatformQueueNumber, QueueNumber, TaskNumber, WorkerNumber},
    report::CallNumber,
    schedule::AssignedFrom,
    timers::Deadline,
};
use crate::{instance::InstanceName, proto::rpc};

/// An action as workers of a platform queue name it.
type ReportedActionKey = (PlatformQueueNumber, InstanceName, ReportedDigest);

/// Which workers execute what we did not hand them.
#[derive(Default)]
pub(super) struct ForeignActions {
    by_operation: BTreeMap<Uuid, WorkerNumber>,
    by_action: BTreeSet<(ReportedActionKey, WorkerNumber)>,
}

impl ForeignActions {
    fn insert(
        &mut self,
        queue: PlatformQueueNumber,
        action: &ReportedAction,
        worker: WorkerNumber,
    ) {
        if let Some(attempt) = action.attempt {
            self.by_operation.insert(attempt.operation, worker);
        }
        if let Some(instance) = &action.instance {
            let name = (queue, instance.clone(), action.digest);
            self.by_action.insert((name, worker));
        }
    }

    fn remove(
        &mut self,
        queue: PlatformQueueNumber,
        action: &ReportedAction,
        worker: WorkerNumber,
    ) {
        if let Some(attempt) = action.attempt
            && self.by_operation.get(&attempt.operation) == Some(&worker)
        {
            self.by_operation.remove(&attempt.operation);
        }
        if let Some(instance) = &action.instance {
            let name = (queue, instance.clone(), action.digest);
            self.by_action.remove(&(name, worker));
        }
    }

    fn of_action(&self, name: ReportedActionKey) -> Option<WorkerNumber> {
        let least = Number::new(0, 0);
        let (found, worker) = self.by_action.range((name.clone(), least)..).next()?;
        (*found == name).then_some(*worker)
    }

    pub(super) fn holds(
        &self,
        queue: PlatformQueueNumber,
        action: &ReportedAction,
        worker: WorkerNumber,
    ) -> bool {
        action.instance.as_ref().is_none_or(|instance| {
            let name = (queue, instance.clone(), action.digest);
            self.by_action.contains(&(name, worker))
        })
    }

    pub(super) fn workers(&self) -> BTreeSet<WorkerNumber> {
        let by_action = self.by_action.iter().map(|(_, worker)| *worker);
        by_action
            .chain(self.by_operation.values().copied())
            .collect()
    }
}

/// Results of workers that came before their client, for some time.
#[derive(Default)]
pub(super) struct KeptResults {
    results: BTreeMap<u64, KeptResult>,
    by_operation: BTreeMap<Uuid, u64>,
    by_action: BTreeMap<ReportedActionKey, u64>,
    bytes: usize,
}

struct KeptResult {
    queue: PlatformQueueNumber,
    action: ReportedAction,
    outcome: Arc<EncodedResponse>,
    deadline: Deadline,
}

impl KeptResults {
    fn name(kept: &KeptResult) -> Option<ReportedActionKey> {
        let instance = kept.action.instance.clone()?;
        Some((kept.queue, instance, kept.action.digest))
    }

    pub(super) fn len(&self) -> usize {
        self.results.len()
    }

    pub(super) fn deadlines(&self) -> impl Iterator<Item = (u64, Deadline)> {
        self.results
            .iter()
            .map(|(number, kept)| (*number, kept.deadline))
    }

    /// Its time is over: its timer is gone.
    pub(super) fn expire(&mut self, number: u64) {
        self.remove(number);
    }

    fn remove(&mut self, number: u64) -> Option<KeptResult> {
        let kept = self.results.remove(&number)?;
        self.bytes -= kept.outcome.response.len();
        if let Some(attempt) = kept.action.attempt
            && self.by_operation.get(&attempt.operation) == Some(&number)
        {
            self.by_operation.remove(&attempt.operation);
        }
        if let Some(name) = Self::name(&kept)
            && self.by_action.get(&name) == Some(&number)
        {
            self.by_action.remove(&name);
        }
        Some(kept)
    }
}

impl<C, W: Clone> Queue<C, W> {
    /// Gives a task that is in no tree what a worker has done or does of it. `false` when there is
    /// nothing.
    pub(super) fn take_up(&mut self, now: Instant, task: TaskNumber, request: &Request) -> bool {
        let platform_queue = self.queues[self.tasks[task].queue].platform_queue;
        let action = &request.action;
        let name = (!action.do_not_cache).then(|| {
            let digest = ReportedDigest::from(&action.digest);
            (platform_queue, action.instance.clone(), digest)
        });
        let own = request.resumes.then_some(request.name);
        // A name gives no right to what another action came to.
        let is_of = |reported: &ReportedAction| {
            let instance = reported.instance.as_ref();
            reported.digest == ReportedDigest::from(&action.digest)
                && instance.is_none_or(|instance| *instance == action.instance)
        };
        let kept = own
            .and_then(|own| self.kept_results.by_operation.get(&own))
            .filter(|number| is_of(&self.kept_results.results[number].action))
            .or_else(|| {
                let name = name.as_ref().filter(|_| !request.skip_cache_lookup)?;
                self.kept_results.by_action.get(name)
            });
        if let Some(number) = kept.copied()
            && let Some(mut kept) = self.kept_results.remove(number)
        {
            self.timers
                .clear(&mut kept.deadline, Timer::KeptResult(number));
            self.complete(now, task, kept.outcome);
            return true;
        }
        let worker = own
            .and_then(|own| self.foreign_actions.by_operation.get(&own).copied())
            .filter(|worker| match &self.workers[*worker].state {
                WorkerState::ExecutingForeign { action, .. } => is_of(action),
                _ => false,
            })
            .or_else(|| self.foreign_actions.of_action(name?));
        let Some(worker) = worker else {
            return false;
        };
        let WorkerState::ExecutingForeign { action, .. } = &self.workers[worker].state else {
            unreachable!("a worker is listed that executes nothing of others");
        };
        let action = action.clone();
        if self.queues[self.workers[worker].queue].platform_queue != platform_queue {
            return false;
        }
        self.foreign_actions.remove(platform_queue, &action, worker);
        let held = self.take_foreign_call(worker);
        self.adopt(
            now,
            task,
            worker,
            action.attempt.map(|attempt| attempt.number),
        );
        if let WorkerState::Executing { held: place, .. } = &mut self.workers[worker].state
            && held.is_some()
        {
            *place = held;
            self.expect_held(now, worker);
        }
        true
    }

    /// Makes a worker that executes something of ours without our doing idle, for a moment.
    fn take_foreign_call(&mut self, worker: WorkerNumber) -> Option<(CallNumber, C)> {
        let found = &mut self.workers[worker];
        let last = found.last;
        match std::mem::replace(&mut found.state, WorkerState::Idle) {
            WorkerState::ExecutingForeign { held, .. } => {
                self.invocations.count_idle(last, true);
                held
            }
            _ => unreachable!("a worker executes nothing of others"),
        }
    }

    /// The worker executes the task already.
    fn adopt(
        &mut self,
        now: Instant,
        task: TaskNumber,
        worker: WorkerNumber,
        attempt: Option<u64>,
    ) {
        let queue = self.workers[worker].queue;
        if self.tasks[task].queue != queue {
            self.move_to(task, queue);
            self.tasks[task].learner = None;
        }
        self.assign(now, task, worker, None, AssignedFrom::Report(attempt));
    }

    /// Whether this scheduler has given the attempt out: what is not its task's present one is late.
    pub(super) fn is_own_attempt(&self, number: u64) -> bool {
        number.wrapping_sub(self.settings.first_attempt) <= self.last_number
    }

    /// A queued or executing task that a worker's report is of, if it is adoptable.
    fn task_of_report(&self, queue: QueueNumber, action: &ReportedAction) -> Option<TaskNumber> {
        let platform_queue = self.queues[queue].platform_queue;
        let by_operation = action.attempt.and_then(|attempt| {
            let operation = self.names.get(attempt.operation)?;
            let task = self.operations[operation].task;
            let found = &self.tasks[task];
            let same = ReportedDigest::from(&found.action.digest) == action.digest;
            (same && !found.is_completed()).then_some(task)
        });
        let by_action = || {
            let instance = action.instance.as_ref()?;
            let mut candidates = action.digest.candidates();
            candidates.find_map(|digest| self.find_in_flight(instance, &digest))
        };
        let task = by_operation.or_else(by_action)?;
        let of = self.queues[self.tasks[task].queue].platform_queue;
        (of == platform_queue).then_some(task)
    }

    /// Whether the operation that a worker reports is known, and completed: by its cancellation, or
    /// with another one's result.
    fn has_ended(&self, action: &ReportedAction) -> bool {
        let operation = action
            .attempt
            .and_then(|attempt| self.names.get(attempt.operation));
        operation.is_some_and(|operation| {
            let task = &self.tasks[self.operations[operation].task];
            task.is_completed() && action.digest.is(&task.action.digest)
        })
    }

    /// A worker that we did not know executes something: a task of ours, or perhaps of a client
    /// that will ask for it.
    pub(super) fn adopt_foreign_action(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        worker: WorkerNumber,
        action: ReportedAction,
        call: Option<C>,
    ) -> SynchronizeAnswer {
        let late = action
            .attempt
            .is_some_and(|a| self.is_own_attempt(a.number));
        let unknown = action.attempt.is_none() && action.instance.is_none();
        if late || unknown {
            self.expect_call(now, worker);
            return SynchronizeAnswer::Now(Instruction::GO_IDLE);
        }
        match self.task_of_report(queue, &action) {
            Some(task) => {
                let found = &self.tasks[task];
                let lost_it = found.lost().contains(&self.workers[worker].id);
                // Another worker has it; or it is this one's lost attempt.
                let free = matches!(found.state, TaskState::Queued | TaskState::AwaitingReport);
                if !free || lost_it {
                    self.expect_call(now, worker);
                    return SynchronizeAnswer::Now(Instruction::GO_IDLE);
                }
                self.withdraw(now, task);
                self.adopt(now, task, worker, action.attempt.map(|a| a.number));
            }
            None if self.has_ended(&action) => {
                self.expect_call(now, worker);
                return SynchronizeAnswer::Now(Instruction::GO_IDLE);
            }
            None => {
                let platform_queue = self.queues[queue].platform_queue;
                self.foreign_actions.insert(platform_queue, &action, worker);
                let last = self.workers[worker].last;
                self.invocations.count_idle(last, false);
                self.workers[worker].state = WorkerState::ExecutingForeign {
                    action,
                    until: now + self.settings.operation_with_no_waiters_timeout,
                    held: None,
                };
            }
        }
        self.continue_executing(now, worker, call)
    }

    /// A worker ends what nobody asked for.
    pub(super) fn forget_foreign_action(&mut self, worker: WorkerNumber) {
        let platform_queue = self.queues[self.workers[worker].queue].platform_queue;
        if let WorkerState::ExecutingForeign { action, .. } = &self.workers[worker].state {
            self.foreign_actions.remove(platform_queue, action, worker);
        }
    }

    /// A worker that we did not hand this action brings a result. Good ones are of use to whoever
    /// asks; failures are better tried again.
    pub(super) fn accept_foreign_result(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        action: ReportedAction,
        outcome: Arc<EncodedResponse>,
    ) {
        let platform_queue = self.queues[queue].platform_queue;
        let late = action
            .attempt
            .is_some_and(|a| self.is_own_attempt(a.number));
        let unknown = action.attempt.is_none() && action.instance.is_none();
        // A larger worker is to try what a smaller one failed at.
        let is_largest = self.platform_queues[platform_queue].is_largest(queue);
        let is_final = is_largest || outcome.exit_code == 0;
        if outcome.code != rpc::Code::Ok as i32 || !is_final || late || unknown {
            return;
        }
        if let Some(task) = self.task_of_report(queue, &action) {
            let own = action.attempt.is_some_and(|attempt| {
                let operation = self.names.get(attempt.operation);
                operation.is_some_and(|operation| self.operations[operation].task == task)
            });
            // One that asked for no result of before it asked has it executed.
            if own || !self.tasks[task].skips_cache_lookup {
                self.complete(now, task, outcome);
            }
            return;
        }
        self.keep_result(
            now,
            KeptResult {
                queue: platform_queue,
                action,
                outcome,
                deadline: None,
            },
        );
    }

    fn keep_result(&mut self, now: Instant, mut kept: KeptResult) {
        let limits = self.settings.limits;
        let size = kept.outcome.response.len();
        if size > limits.kept_result_bytes || limits.kept_results == 0 {
            return;
        }
        while self.kept_results.len() >= limits.kept_results
            || self.kept_results.bytes + size > limits.kept_result_bytes
        {
            let Some((oldest, _)) = self.kept_results.results.first_key_value() else {
                return;
            };
            let oldest = *oldest;
            if let Some(mut gone) = self.kept_results.remove(oldest) {
                self.timers
                    .clear(&mut gone.deadline, Timer::KeptResult(oldest));
            }
        }
        let number = self.number();
        let end = now + self.settings.operation_with_no_waiters_timeout;
        self.timers
            .set(&mut kept.deadline, Timer::KeptResult(number), end);
        let kept_results = &mut self.kept_results;
        kept_results.bytes += size;
        if let Some(attempt) = kept.action.attempt {
            kept_results.by_operation.insert(attempt.operation, number);
        }
        if let Some(name) = KeptResults::name(&kept) {
            kept_results.by_action.insert(name, number);
        }
        kept_results.results.insert(number, kept);
    }

    /// The held call of one that executes ends in good time.
    pub(super) fn expect_held(&mut self, now: Instant, worker: WorkerNumber) {
        let end = now + self.settings.busy_worker_interval;
        let found = &mut self.workers[worker];
        found.overdue = end + super::schedule::CALL_DELAY_TOLERANCE;
        self.timers
            .set(&mut found.deadline, Timer::Worker(worker), end);
    }
}
