//! Every scheduling decision, PURE: verbs that take the time, fresh names and random numbers, and
//! leave effects for the shell to perform.
//!
//! Terms: a *platform queue* serves one (instance-name prefix, platform), and has a *size-class
//! queue* for each size of worker. A *task* is one execution of an action; an *operation* is one
//! client run's interest in a task, known to the client by name; *waiters* are the streams that
//! hang on an operation.
//!
//! 1. A task is queued, or executing on exactly one worker, or completed. A worker executes at most
//!    one task.
//! 2. While a task is queued, no worker of its size-class queue has its call held.
//! 3. A cacheable action (instance name, digest) has at most one task that is not completed.
//! 4. An operation without waiters, and nothing else of a client, has a deadline; a task goes with
//!    its last operation.
//! 5. Each worker has a deadline: the end of its held call, or that of `worker_silence_timeout`.
//! 6. What a worker executes is given to another caller of its name only when that worker is overdue,
//!    or has given it back. Two hosts of one name so never run an action both.
//! 7. A size-class queue has a deadline exactly while it has no workers.
//!
//! The time that the verbs take is that of a `Clock`, which leaves out what the scheduler slept
//! through.
//!
//! `C` is a worker's held call, `W` that by which waiters are told: both are the shell's, given
//! back in effects.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

mod action;
mod clients;
mod clock;
mod drains;
mod explain;
mod invariants;
mod listing;
mod order;
mod platform;
mod refusal;
mod report;
mod settings;
#[cfg(test)]
mod tests;
mod timers;
mod workers;

pub use crate::metadata::Attempt;
pub use action::{
    EncodedResponse, InvocationKey, InvocationKeys, Progress, QueuedAction, Request, Stage,
};
pub use clients::AttachedWaiter;
pub use clock::{Clock, TICK};
pub use drains::{Drain, ExecutingWorker};
pub use explain::Explanation;
pub use invariants::{Counts, Totals};
pub use listing::{
    InvocationFilter, InvocationRow, OperationFilter, OperationRow, Page, PlatformQueueRow,
    QueuedCursor, SizeClassQueueRow, StageKind, WorkerFilter, WorkerRow,
};
pub use platform::{Platform, SizeClassQueueKey, UnsortedPlatform};
pub use refusal::{
    DrainRefusal, ExecuteRefusal, KillRefusal, NoWorkers, QueueFull, Refusal, UnknownInvocation,
    UnknownOperation, UnknownQueue,
};
pub use report::{
    Caller, DesiredWorkerState, Instruction, ReportedAction, ReportedDigest, WorkerActivity,
    WorkerId, WorkerPattern, WorkerReport,
};
pub use settings::{Limits, PredeclaredQueue, Settings};
pub use workers::{HeldCall, SynchronizeAnswer};

use super::size_class::StatisticsUpdate;
use crate::{digest::Digest, instance::InstanceName, metadata::WorkerCall, proto::rpc};
use order::{IdleSynchronizingWorkers, Position, QueuedTasks};
use timers::{Timer, Timers};

/// So much later than it was asked to a busy worker may call, on a busy host or network, before
/// another caller of its name is believed to be its successor.
const CALL_DELAY_TOLERANCE: Duration = Duration::from_secs(5);

macro_rules! numbers {
    ($($name:ident),*) => {$(
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(u64);
    )*};
}
numbers!(QueueNumber, WorkerNumber, TaskNumber, CallNumber);

pub struct Queue<C, W> {
    settings: Settings,
    started: Instant,
    /// By platform, prefix and size class.
    platforms: BTreeMap<Platform, BTreeMap<InstanceName, BTreeMap<u32, QueueNumber>>>,
    queues: BTreeMap<QueueNumber, SizeClassQueue>,
    workers: BTreeMap<WorkerNumber, Worker<C>>,
    tasks: BTreeMap<TaskNumber, Task<W>>,
    operations: BTreeMap<Uuid, Operation>,
    /// Cacheable tasks that are not completed.
    in_flight: BTreeMap<(InstanceName, Digest), TaskNumber>,
    /// Results of workers that we did not know, for clients that will ask again.
    unclaimed: BTreeMap<ForeignAction, Arc<EncodedResponse>>,
    foreign_actions: BTreeSet<(ForeignAction, WorkerNumber)>,
    /// When each was added.
    drains: BTreeMap<(SizeClassQueueKey, WorkerPattern), prost_types::Timestamp>,
    drains_version: u64,
    timers: Timers,
    effects: Vec<Effect<C, W>>,
    last_number: u64,
    totals: Totals,
}

/// What the shell is to do, after it has unlocked.
#[derive(Debug)]
pub enum Effect<C, W> {
    /// Answer a call that was held.
    Answer { call: C, instruction: Instruction },
    /// Tell those who wait for a task.
    Tell { watch: W, progress: Progress },
    /// What is to be remembered of an action.
    Learned(StatisticsUpdate),
    /// What is drained is to be the same after a restart. A higher version is later.
    KeepDrains { version: u64, drains: Vec<Drain> },
}

struct SizeClassQueue {
    key: Arc<SizeClassQueueKey>,
    workers: BTreeMap<WorkerId, WorkerNumber>,
    idle_synchronizing_workers: IdleSynchronizingWorkers,
    queued_tasks: QueuedTasks,
}

struct Worker<C> {
    queue: QueueNumber,
    id: WorkerId,
    /// Whom its last call that was not refused came from.
    peer: Arc<str>,
    /// The latest of its calls, if it numbers them.
    latest_call: Option<WorkerCall>,
    /// While it is busy: by then it has called again, if it is still there.
    overdue: Instant,
    /// Who was refused last, since it was not that one.
    refused: Option<Arc<str>>,
    state: WorkerState<C>,
}

enum WorkerState<C> {
    /// Its call is held until there is work.
    IdleSynchronizing { number: CallNumber, call: C },
    /// Nothing of ours, and not in a call.
    Idle,
    Executing {
        task: TaskNumber,
        /// The held call that the task was given to, until the worker is heard of again: a call
        /// that dies before it is answered gives the task back.
        given_to: Option<CallNumber>,
    },
    /// It was executing this when it first called. Lost connections and scheduler restarts do that;
    /// its client will ask again.
    ExecutingForeign {
        action: ForeignAction,
        until: Instant,
    },
}

/// What a worker does that we did not hand it. Its blobs lie in this instance: a client of another
/// one could not read them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ForeignAction {
    queue: QueueNumber,
    instance: InstanceName,
    digest: ReportedDigest,
}

struct Task<W> {
    action: Arc<QueuedAction>,
    key: Arc<SizeClassQueueKey>,
    suffix: InstanceName,
    arrival: u64,
    /// How often a worker that had it claimed not to have it.
    retries: u32,
    operations: BTreeMap<InvocationKeys, Uuid>,
    state: TaskState,
    version: u64,
    watch: W,
}

enum TaskState {
    Queued {
        queue: QueueNumber,
        position: Position,
    },
    Executing(WorkerNumber),
    Completed(Arc<EncodedResponse>),
}

struct Operation {
    task: TaskNumber,
    invocation: InvocationKeys,
    priority: i32,
    waiters: u32,
}

impl<C, W: Clone> Queue<C, W> {
    pub fn new(settings: Settings, now: Instant) -> Self {
        Queue {
            settings,
            started: now,
            platforms: BTreeMap::new(),
            queues: BTreeMap::new(),
            workers: BTreeMap::new(),
            tasks: BTreeMap::new(),
            operations: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            unclaimed: BTreeMap::new(),
            foreign_actions: BTreeSet::new(),
            drains: BTreeMap::new(),
            drains_version: 0,
            timers: Timers::default(),
            effects: Vec::new(),
            last_number: 0,
            totals: Totals::default(),
        }
    }

    /// To be taken and performed after each verb.
    pub fn effects(&mut self) -> Vec<Effect<C, W>> {
        std::mem::take(&mut self.effects)
    }

    /// When to call `expire`.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Does what is due by now.
    pub fn expire(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop(now) {
            match timer {
                Timer::Worker(worker) => self.expire_worker(now, worker),
                Timer::Operation(operation) => self.drop_operation(now, operation),
                Timer::Queue(queue) => self.drop_queue(now, queue),
                Timer::Unclaimed(action) => {
                    self.unclaimed.remove(&action);
                }
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// The size-class queue of an action: of the longest prefix of its instance name.
    fn route(&self, platform: &Platform, instance: &InstanceName) -> Option<QueueNumber> {
        let prefixes = self.platforms.get(platform)?;
        let mut name = instance.clone();
        loop {
            // One size class each, for now.
            if let Some(sizes) = prefixes.get(&name) {
                return sizes.values().next().copied();
            }
            name = name.parent()?;
        }
    }

    /// Hands a task to a free worker, or queues it.
    fn enqueue(&mut self, now: Instant, task: TaskNumber, queue: QueueNumber) {
        let free = self
            .queues
            .get(&queue)
            .and_then(|queue| queue.idle_synchronizing_workers.first());
        let Some(worker) = free else {
            let Some(position) = self.position(task) else {
                return;
            };
            if let Some(queue) = self.queues.get_mut(&queue) {
                queue.queued_tasks.insert(position, task);
            }
            self.advance(task, TaskState::Queued { queue, position });
            return;
        };
        let Some((number, call)) = self.take_call(worker) else {
            return;
        };
        if let Some(instruction) = self.assign(now, task, worker, Some(number)) {
            self.effects.push(Effect::Answer { call, instruction });
        }
    }

    /// Makes a task that is in no queue the worker's. The worker has no call that is held.
    fn assign(
        &mut self,
        now: Instant,
        task: TaskNumber,
        worker: WorkerNumber,
        given_to: Option<CallNumber>,
    ) -> Option<Instruction> {
        self.workers.get_mut(&worker)?.state = WorkerState::Executing { task, given_to };
        self.advance(task, TaskState::Executing(worker));
        let next = self.expect_busy(now, worker);
        let number = self
            .settings
            .first_attempt
            .wrapping_add(self.number())
            .max(1);
        let task = self.tasks.get(&task)?;
        Some(Instruction {
            desired: DesiredWorkerState::Execute {
                action: task.action.clone(),
                suffix: task.suffix.clone(),
                attempt: Attempt {
                    operation: task.operations.values().next().copied().unwrap_or_default(),
                    number,
                },
                timeout: task.action.timeout,
            },
            next,
        })
    }

    /// Takes a task out of its queue, or from its worker, which hears of it at its next call.
    fn withdraw(&mut self, task: TaskNumber) {
        match self.tasks.get(&task).map(|task| &task.state) {
            Some(TaskState::Queued { queue, position }) => {
                if let Some(queue) = self.queues.get_mut(queue) {
                    queue.queued_tasks.remove(*position);
                }
            }
            Some(TaskState::Executing(worker)) => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.state = WorkerState::Idle;
                }
            }
            Some(TaskState::Completed(_)) | None => {}
        }
    }

    /// Ends a task, wherever it is.
    fn complete(&mut self, now: Instant, number: TaskNumber, outcome: Arc<EncodedResponse>) {
        self.withdraw(number);
        let Some(task) = self.tasks.get(&number) else {
            return;
        };
        let key = (task.action.instance.clone(), task.action.digest);
        if self.in_flight.get(&key) == Some(&number) {
            self.in_flight.remove(&key);
        }
        // Those who lost their connection shall find the result, even if they lost it long ago.
        for operation in task.operations.values() {
            if self.timers.get(&Timer::Operation(*operation)).is_some() {
                self.timers.set(
                    Timer::Operation(*operation),
                    now + self.settings.operation_with_no_waiters_timeout,
                );
            }
        }
        self.totals.completed += 1;
        self.advance(number, TaskState::Completed(outcome));
    }

    fn fail(&mut self, now: Instant, task: TaskNumber, code: rpc::Code, message: String) {
        self.complete(now, task, Arc::new(EncodedResponse::failure(code, message)));
    }

    /// Changes a task's state, and tells those who wait for it when that is news to them.
    fn advance(&mut self, task: TaskNumber, state: TaskState) {
        let Some(task) = self.tasks.get_mut(&task) else {
            return;
        };
        let before = task.progress().stage;
        task.state = state;
        if task.progress().stage != before {
            task.version += 1;
            self.effects.push(Effect::Tell {
                watch: task.watch.clone(),
                progress: task.progress(),
            });
        }
    }

    /// Where a task belongs in a queue: as urgent as the most urgent operation wants it.
    fn position(&self, task: TaskNumber) -> Option<Position> {
        let task = self.tasks.get(&task)?;
        let priority = task
            .operations
            .values()
            .filter_map(|name| self.operations.get(name))
            .map(|operation| operation.priority)
            .min()?;
        Some(Position {
            priority,
            arrival: task.arrival,
        })
    }

    /// Moves a queued task to where its operations now want it.
    fn reposition(&mut self, number: TaskNumber) {
        let Some(wanted) = self.position(number) else {
            return;
        };
        let Some(task) = self.tasks.get_mut(&number) else {
            return;
        };
        if let TaskState::Queued { queue, position } = &mut task.state
            && let Some(queue) = self.queues.get_mut(queue)
        {
            queue.queued_tasks.remove(*position);
            queue.queued_tasks.insert(wanted, number);
            *position = wanted;
        }
    }

    fn drop_queue(&mut self, now: Instant, number: QueueNumber) {
        let Some(queue) = self.queues.get(&number) else {
            return;
        };
        let key = queue.key.clone();
        let waiting: Vec<TaskNumber> = queue.queued_tasks.iter().collect();
        for task in waiting {
            self.fail(
                now,
                task,
                rpc::Code::Unavailable,
                "Workers for this instance name, platform and size class disappeared while task was queued".to_owned(),
            );
        }
        self.queues.remove(&number);
        if let Some(prefixes) = self.platforms.get_mut(&key.platform) {
            if let Some(sizes) = prefixes.get_mut(&key.prefix) {
                sizes.remove(&key.size_class);
                if sizes.is_empty() {
                    prefixes.remove(&key.prefix);
                }
            }
            if prefixes.is_empty() {
                self.platforms.remove(&key.platform);
            }
        }
    }

    /// When a busy worker is to call again; it is gone `worker_silence_timeout` after that.
    fn expect_busy(&mut self, now: Instant, worker: WorkerNumber) -> Duration {
        let next = self.settings.busy_worker_interval;
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.overdue = now + next + CALL_DELAY_TOLERANCE;
        }
        self.timers.set(
            Timer::Worker(worker),
            now + next + self.settings.worker_silence_timeout,
        );
        next
    }

    /// A worker that is in no call, and may call again at once.
    fn expect_call(&mut self, now: Instant, worker: WorkerNumber) {
        self.timers.set(
            Timer::Worker(worker),
            now + self.settings.worker_silence_timeout,
        );
    }
}

impl<W> Task<W> {
    fn progress(&self) -> Progress {
        Progress {
            version: self.version,
            stage: match &self.state {
                TaskState::Queued { .. } => Stage::Queued,
                TaskState::Executing(_) => Stage::Executing,
                TaskState::Completed(outcome) => Stage::Completed(outcome.clone()),
            },
        }
    }
}
