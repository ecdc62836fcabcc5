//! The objects of the queue, and which of them name which.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;
use uuid::Uuid;

use super::{
    EncodedResponse, InvocationKeys, Platform, Progress, QueuedAction, ReportedAction,
    SizeClassQueueKey, Stage, WorkerId,
    arena::{
        InvocationNumber, OperationNumber, PlatformQueueNumber, QueueNumber, TaskNumber,
        WorkerNumber,
    },
    report::CallNumber,
    timers::Deadline,
};
use crate::{
    instance::InstanceName,
    metadata::WorkerCall,
    scheduler::size_class::{Learner, Selector},
};

pub(super) struct PlatformQueue {
    pub prefix: InstanceName,
    pub platform: Platform,
    /// Ascending; one at least.
    pub sizes: Vec<(u32, QueueNumber)>,
    /// The largest that was declared; `None` where a worker made the queue.
    pub largest_predeclared: Option<u32>,
    pub stickiness_limits: Arc<[Duration]>,
    pub maximum_queued_background_operations: usize,
    pub background_priority: i32,
    pub background_queued: usize,
}

impl PlatformQueue {
    pub(super) fn size_classes(&self) -> Vec<u32> {
        self.sizes.iter().map(|(size, _)| *size).collect()
    }

    pub(super) fn is_largest(&self, queue: QueueNumber) -> bool {
        self.sizes
            .last()
            .is_some_and(|(_, largest)| *largest == queue)
    }
}

pub(super) struct SizeClassQueue {
    pub key: Arc<SizeClassQueueKey>,
    pub platform_queue: PlatformQueueNumber,
    pub predeclared: bool,
    pub root: InvocationNumber,
    pub workers: BTreeMap<WorkerId, WorkerNumber>,
    /// While it has no workers, or `killing`.
    pub deadline: Deadline,
    /// How long its tasks executed lately: a moving mean; `None` before the first one.
    pub mean_duration: Option<Duration>,
    /// What is queued in it gets this response, piece by piece.
    pub killing: Option<Arc<EncodedResponse>>,
}

pub(super) struct Worker<C> {
    pub queue: QueueNumber,
    pub id: WorkerId,
    /// Whom its last call that was not refused came from.
    pub peer: Arc<str>,
    /// The latest of its calls, if it numbers them.
    pub latest_call: Option<WorkerCall>,
    /// While it is busy: by then it has called again, if it is still there.
    pub overdue: Instant,
    /// Who was refused last, since it was not that one.
    pub refused: Option<Arc<str>>,
    pub deadline: Deadline,
    /// Until it is gone it gets no new work.
    pub terminating: bool,
    /// It matches a drain.
    pub drained: bool,
    /// The invocation that it last worked for.
    pub last: InvocationNumber,
    /// For each level, the invocation that it works for, and since when.
    pub sticks_to: Vec<(InvocationNumber, Instant)>,
    pub state: WorkerState<C>,
}

pub(super) enum WorkerState<C> {
    /// Nothing of ours, and not in a call.
    Idle,
    /// Its call is held until there is work.
    IdleSynchronizing { number: CallNumber, call: C },
    Executing {
        task: TaskNumber,
        /// The held call that the task was given to, until the worker is heard of again: a call
        /// that dies before it is answered gives the task back.
        given_to: Option<CallNumber>,
        /// Its call is held until there is something to say.
        held: Option<(CallNumber, C)>,
    },
    /// It executes what we did not hand it: its scheduler has restarted, and its client will ask again.
    ExecutingForeign {
        action: ReportedAction,
        until: Instant,
        held: Option<(CallNumber, C)>,
    },
}

impl<C> Worker<C> {
    pub(super) fn takes_work(&self) -> bool {
        !self.drained && !self.terminating
    }

    pub(super) fn is_busy(&self) -> bool {
        matches!(
            self.state,
            WorkerState::Executing { .. } | WorkerState::ExecutingForeign { .. }
        )
    }
}

pub(super) struct Task {
    pub action: Arc<QueuedAction>,
    pub key: Arc<SizeClassQueueKey>,
    pub queue: QueueNumber,
    pub arrival: u64,
    /// How often a worker that had it claimed not to have it.
    pub retries: u32,
    /// Workers that were lost with it; few tasks have any.
    pub lost: Option<Box<LostWorkers>>,
    /// One at least.
    pub operations: SmallVec<[OperationNumber; 1]>,
    pub timeout: Duration,
    /// As the order knows it; 49 days at most.
    pub expected_milliseconds: u32,
    /// Is told how the execution ends; `None` when it is on a size class that it did not choose.
    pub learner: Option<Learner>,
    pub selector: Selector,
    /// Nobody waits for it.
    pub background: bool,
    /// Somebody who waits for it wants no result of before it was asked for.
    pub skips_cache_lookup: bool,
    pub state: TaskState,
    /// `None` while it is fresh.
    pub in_state_since: Option<Instant>,
    pub version: u64,
}

/// In the order in which they were lost.
#[derive(Default)]
pub(super) struct LostWorkers(Vec<WorkerId>);

pub(super) enum TaskState {
    /// In no tree yet: within the verb that makes it.
    Fresh,
    /// A worker may execute it already, and has not said so yet.
    AwaitingReport,
    Queued,
    Executing {
        worker: WorkerNumber,
        attempt: u64,
        since: Instant,
    },
    Completed(Arc<EncodedResponse>),
}

pub(super) struct Operation<W> {
    pub name: Uuid,
    pub task: TaskNumber,
    pub place: OperationPlace,
    pub priority: i32,
    pub waiters: u32,
    /// Its client wants no result of before it asked.
    pub skip_cache_lookup: bool,
    pub deadline: Deadline,
    /// `None` when no client ever waits.
    pub watch: Option<W>,
}

pub(super) enum OperationPlace {
    /// Until its task is completed.
    Invocation(InvocationNumber),
    /// The node may be gone.
    Completed(InvocationKeys),
}

impl Task {
    pub(super) fn progress(&self) -> Progress {
        Progress {
            version: self.version,
            stage: match &self.state {
                TaskState::Fresh | TaskState::AwaitingReport | TaskState::Queued => Stage::Queued,
                TaskState::Executing { .. } => Stage::Executing,
                TaskState::Completed(outcome) => Stage::Completed(outcome.clone()),
            },
        }
    }

    pub(super) fn expected_duration(&self) -> Duration {
        Duration::from_millis(self.expected_milliseconds.into())
    }

    /// The rest of the instance name, beyond the queue's prefix.
    pub(super) fn suffix(&self) -> InstanceName {
        let suffix = self.action.instance.strip_prefix(&self.key.prefix);
        suffix.unwrap_or_else(InstanceName::empty)
    }

    pub(super) fn lost(&self) -> &[WorkerId] {
        self.lost.as_ref().map_or(&[], |lost| &lost.0)
    }

    pub(super) fn lose(&mut self, worker: WorkerId) {
        self.lost.get_or_insert_default().0.push(worker);
    }

    pub(super) fn is_completed(&self) -> bool {
        matches!(self.state, TaskState::Completed(_))
    }
}
