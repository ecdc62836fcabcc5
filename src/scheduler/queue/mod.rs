//! Every scheduling decision, PURE: verbs that take the time, fresh names and random numbers, and
//! leave effects for the shell to perform.
//!
//! Terms: a *platform queue* serves one (instance-name prefix, platform), and has a *size-class
//! queue* for each size of worker. A *task* is one execution of an action; an *operation* is one
//! client run's interest in a task, known to the client by name; *waiters* are the streams that
//! hang on an operation. An *invocation* is a node of a size-class queue's tree, in which operations
//! are queued. An *attempt* is one handing-out of a task.
//!
//! In the order to read it: `settings`, `platform`, `action` and `report` are what goes in and comes
//! out, with `refusal`; `arena`, `state`, `names`, `in_flight` and `timers` hold the objects. `fairness` has their
//! order. The verbs are in `clients`, `workers` and `drains`, over `schedule`, `execution_end`, `adoption`, `resumption`,
//! `background`, `platform_queues` and `limits`; `clock` has their time. Those who look are shown `rows`
//! by `listing` and `browse`, reasons by `explain`, what waits for longest by `gauges`, and what has
//! happened by `statistics`.
//!
//! 1. A task waits for a worker's report, or is queued, or executing on exactly one worker, or
//!    completed. A worker executes at most one task.
//! 2. While a task is queued, no worker of its size-class queue that takes work has its call held.
//! 3. A cacheable action (instance name, digest) has at most one task that is not completed.
//! 4. An operation without waiters, and nothing else of a client, has a deadline; a task goes with
//!    its last operation.
//! 5. Each worker has a deadline: the end of its held call, or that of `worker_silence_timeout`.
//! 6. What a worker executes is given to another caller of its name only when that worker is overdue,
//!    or has given it back. Two hosts of one name so never run an action both.
//! 7. A size-class queue that was not declared has a deadline exactly while it has no workers.
//! 8. A report of an attempt that is not the task's present one changes nothing of the task.
//! 9. No verb takes time in proportion to what there is: what ends many tasks, or looks at all workers,
//!    does so a few at a time.
//! 10. An object that another one names is there; else the verb panics.
//!
//! The time that the verbs take is that of a `Clock`, which leaves out what the scheduler slept
//! through.
//!
//! `C` is a worker's held call, `W` that by which waiters are told: both are the shell's, given
//! back in effects.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use prost_types::Timestamp;
use uuid::Uuid;

mod action;
mod adoption;
mod arena;
mod background;
mod browse;
mod clients;
mod clock;
mod drains;
mod execution_end;
mod explain;
mod fairness;
mod gauges;
mod in_flight;
mod invariants;
mod limits;
mod listing;
mod names;
mod platform;
mod platform_queues;
mod refusal;
mod report;
mod resumption;
mod rows;
mod schedule;
mod settings;
mod state;
mod statistics;
#[cfg(test)]
mod tests;
mod timers;
mod workers;

pub use crate::metadata::Attempt;
pub use action::{
    ActionTrace, EncodedResponse, InvocationKey, InvocationKeys, Progress, QueuedAction, Request,
    Stage,
};
pub use browse::{Load, QueueLoad, WorkerSight, WorkerSightActivity};
pub use clients::{AttachedWaiter, KILLED};
pub use clock::{Clock, TICK};
pub use drains::{Drain, ExecutingWorker, NextWorker};
pub use explain::{Explanation, MatchingWorkers, QueuedExplanation};
pub use fairness::InvocationCounts;
pub use invariants::{QueueCounts, Totals};
pub use platform::{Platform, SizeClassQueueKey, UnsortedPlatform};
pub use refusal::{
    DrainRefusal, ExecuteRefusal, KillRefusal, NoWorkers, QueueFull, Refusal, UnknownInvocation,
    UnknownOperation, UnknownQueue,
};
pub use report::{
    DesiredWorkerState, Instruction, ReportedAction, ReportedDigest, WorkerActivity, WorkerCaller,
    WorkerId, WorkerPattern, WorkerReport,
};
pub use rows::{
    InvocationFilter, InvocationRow, ListPage, OperationFilter, OperationRow, PlatformQueueRow,
    QueuedCursor, SizeClassQueueRow, StageKind, WorkerFilter, WorkerRow,
};
pub use settings::{PredeclaredQueue, QueueLimits, Settings};
pub use statistics::{ExecutionResult, QueueStatistics};
pub use workers::{HeldCall, SynchronizeAnswer};

use super::size_class::StatisticsUpdate;
use crate::{digest::Digest, instance::InstanceName};
use adoption::{ForeignActions, KeptResults};
use arena::{Arena, OperationNumber, PlatformQueueNumber, QueueNumber, TaskNumber, WorkerNumber};
use fairness::Invocations;
use gauges::QueuedByAge;
use in_flight::InFlight;
use limits::QueuedCounts;
use names::Names;
use resumption::AwaitedReports;
use state::{
    Operation, OperationPlace, PlatformQueue, SizeClassQueue, Task, TaskState, Worker, WorkerState,
};
use statistics::StatisticsByQueue;
use timers::{Timer, Timers};

/// How many deadlines pass under one lock; a worker's, whose task is queued again, counts as several: where
/// much was freed before, malloc(3) may take a quarter of a millisecond for what that needs.
const EXPIRED_AT_ONCE: usize = 64;
const WORKER_EXPIRES_AS: usize = 32;

pub struct Queue<C, W> {
    settings: Settings,
    started: Instant,
    platforms: BTreeMap<Platform, BTreeMap<InstanceName, PlatformQueueNumber>>,
    platform_queues: Arena<PlatformQueueNumber, PlatformQueue>,
    queues: Arena<QueueNumber, SizeClassQueue>,
    invocations: Invocations,
    workers: Arena<WorkerNumber, Worker<C>>,
    tasks: Arena<TaskNumber, Task>,
    operations: Arena<OperationNumber, Operation<W>>,
    names: Names,
    in_flight: InFlight,
    foreign_actions: ForeignActions,
    kept_results: KeptResults,
    awaited_reports: AwaitedReports,
    /// When each was added.
    drains: BTreeMap<(SizeClassQueueKey, WorkerPattern), Timestamp>,
    drains_version: u64,
    queued: QueuedCounts,
    queued_by_age: QueuedByAge,
    statistics: StatisticsByQueue,
    timers: Timers,
    effects: Vec<Effect<C, W>>,
    last_number: u64,
    platform_queues_made: u64,
    /// Of the tasks that there are.
    action_bytes: usize,
    totals: Totals,
}

/// What the shell is to do, after it has unlocked.
#[derive(Debug)]
pub enum Effect<C, W> {
    /// Answer a call that was held.
    Answer { call: C, instruction: Instruction },
    /// Tell those who wait for an operation.
    Tell { watch: W, progress: Progress },
    /// What is to be remembered of an action.
    Learned(StatisticsUpdate),
    /// What is drained is to be the same after a restart. A higher version is later.
    KeepDrains { version: u64, drains: Vec<Drain> },
    /// An operation ended that nobody waits for.
    Abandoned {
        operation: Uuid,
        action: Arc<QueuedAction>,
        outcome: Arc<EncodedResponse>,
    },
}

impl<C, W: Clone> Queue<C, W> {
    pub fn new(settings: Settings, now: Instant) -> Self {
        let drains = settings.drains.iter().map(|drain| {
            let key = (drain.key.clone(), drain.pattern.clone());
            (key, drain.created)
        });
        let mut queue = Queue {
            started: now,
            platforms: BTreeMap::new(),
            platform_queues: Arena::default(),
            queues: Arena::default(),
            invocations: Invocations::default(),
            workers: Arena::default(),
            tasks: Arena::default(),
            operations: Arena::default(),
            names: Names::new(),
            in_flight: InFlight::new(),
            foreign_actions: ForeignActions::default(),
            kept_results: KeptResults::default(),
            awaited_reports: AwaitedReports::default(),
            drains: drains.collect(),
            drains_version: 0,
            queued: QueuedCounts::default(),
            queued_by_age: QueuedByAge::default(),
            statistics: StatisticsByQueue::default(),
            timers: Timers::default(),
            effects: Vec::new(),
            last_number: 0,
            platform_queues_made: 0,
            action_bytes: 0,
            totals: Totals::default(),
            settings,
        };
        queue.declare_platform_queues();
        queue
    }

    /// To be taken and performed after each verb.
    pub fn effects(&mut self) -> Vec<Effect<C, W>> {
        std::mem::take(&mut self.effects)
    }

    /// When to call `expire`.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Does some of what is due by now. There is more when `poll_timeout` is not later than now.
    pub fn expire(&mut self, now: Instant) {
        let mut done = 0;
        while done < EXPIRED_AT_ONCE {
            done += 1;
            match self.timers.pop(now) {
                Some(Timer::Worker(worker)) => {
                    done += WORKER_EXPIRES_AS - 1;
                    self.workers[worker].deadline = None;
                    self.expire_worker(now, worker);
                }
                Some(Timer::Operation(operation)) => {
                    self.operations[operation].deadline = None;
                    self.drop_operation(now, operation);
                }
                Some(Timer::Queue(queue)) => {
                    self.queues[queue].deadline = None;
                    self.expire_queue(now, queue);
                    return;
                }
                Some(Timer::AwaitedReports) => self.expire_awaited_report(now),
                Some(Timer::KeptResult(number)) => self.kept_results.expire(number),
                None => return,
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// How many platform queues there have been.
    pub fn platform_queues_made(&self) -> u64 {
        self.platform_queues_made
    }

    /// Whether there is a platform queue for these actions.
    pub fn serves(&self, platform: &Platform, instance: &InstanceName) -> bool {
        self.route(platform, instance).is_some()
    }

    /// The platform queue of the longest prefix of an instance name.
    fn route(&self, platform: &Platform, instance: &InstanceName) -> Option<PlatformQueueNumber> {
        let prefixes = self.platforms.get(platform)?;
        let mut name = instance.clone();
        loop {
            if let Some(queue) = prefixes.get(&name) {
                return Some(*queue);
            }
            name = name.parent()?;
        }
    }

    /// By the digest and the instance name; a client cannot choose it, as the number of the first
    /// attempt is random.
    fn action_hash(&self, action: &QueuedAction) -> u64 {
        self.hash_of(&action.instance, &action.digest)
    }

    fn hash_of(&self, instance: &InstanceName, digest: &Digest) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        (self.settings.first_attempt, instance, digest).hash(&mut hasher);
        hasher.finish()
    }

    /// A number that is as random as that of the first attempt.
    fn random_of(&self, operation: Uuid) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        (self.settings.first_attempt, operation).hash(&mut hasher);
        hasher.finish()
    }

    fn find_in_flight(&self, instance: &InstanceName, digest: &Digest) -> Option<TaskNumber> {
        let hash = self.hash_of(instance, digest);
        self.in_flight.of_hash(hash).find(|task| {
            let action = &self.tasks[*task].action;
            action.digest == *digest && action.instance == *instance
        })
    }
}
