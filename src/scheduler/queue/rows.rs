//! What those who look at the queue are shown.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost_types::Timestamp;
use uuid::Uuid;

use super::{
    InvocationKey, InvocationKeys, Platform, QueuedAction, SizeClassQueueKey, Stage, WorkerId,
};
use crate::instance::InstanceName;

/// A part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct ListPage<T> {
    pub rows: Vec<T>,
    /// Of the first row, in the whole list.
    pub start_index: usize,
    /// Rows of the whole list.
    pub total: usize,
}

#[derive(Clone, Debug)]
pub struct PlatformQueueRow {
    pub prefix: InstanceName,
    pub platform: Platform,
    /// Ascending.
    pub size_classes: Vec<SizeClassQueueRow>,
}

#[derive(Clone, Debug)]
pub struct SizeClassQueueRow {
    pub key: Arc<SizeClassQueueKey>,
    /// Without workers it goes then.
    pub removal: Option<Instant>,
    pub workers: usize,
    pub drains: usize,
    /// Of all that is in it.
    pub root: InvocationRow,
}

/// A node of an invocation tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InvocationRow {
    pub queued_directly: usize,
    pub queued_indirectly: usize,
    /// Workers that execute something of it or of those below it.
    pub executing_workers: usize,
    /// Idle workers that last worked for it or for those below it.
    pub idle_workers: usize,
    /// Of those, the ones whose calls are held.
    pub idle_synchronizing_workers: usize,
    pub children: usize,
    /// Children that have something queued or executing.
    pub active_children: usize,
    /// Children that have something queued.
    pub queued_children: usize,
}

/// Which children of an invocation are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvocationFilter {
    All,
    /// With something queued or executing.
    Active,
    /// With something queued, in the order in which they are served.
    Queued,
}

/// Which workers of a size-class queue are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerFilter {
    All,
    /// Those that execute something of this invocation, or of one below it.
    Executing(InvocationKeys),
    /// Those whose calls are held, and that last worked for exactly this invocation.
    IdleSynchronizing(InvocationKeys),
}

/// A place in the order within an invocation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueuedCursor {
    pub priority: i32,
    pub expected_duration: Duration,
    pub queued_timestamp: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageKind {
    Queued,
    Executing,
    Completed,
}

/// Which operations are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationFilter {
    /// With this key anywhere among theirs.
    pub invocation: Option<InvocationKey>,
    pub stage: Option<StageKind>,
}

#[derive(Clone, Debug)]
pub struct WorkerRow {
    pub id: WorkerId,
    pub key: Arc<SizeClassQueueKey>,
    /// Unless its call is held, it is gone when it is silent until then.
    pub removal: Option<Instant>,
    /// One of those that wait for what it executes.
    pub operation: Option<OperationRow>,
    /// It gets no new work.
    pub drained: bool,
}

#[derive(Clone, Debug)]
pub struct OperationRow {
    pub name: Uuid,
    pub action: Arc<QueuedAction>,
    pub key: Arc<SizeClassQueueKey>,
    /// The rest of the instance name, beyond the queue's prefix.
    pub suffix: InstanceName,
    pub invocation: InvocationKeys,
    pub priority: i32,
    /// Its client wants no result of before it asked.
    pub skip_cache_lookup: bool,
    pub expected_duration: Duration,
    /// When nobody waits for it, it goes then.
    pub removal: Option<Instant>,
    pub stage: Stage,
    pub worker: Option<WorkerId>,
}

impl StageKind {
    pub fn of(stage: &Stage) -> Self {
        match stage {
            Stage::Queued => StageKind::Queued,
            Stage::Executing => StageKind::Executing,
            Stage::Completed(_) => StageKind::Completed,
        }
    }
}

impl OperationRow {
    /// The slot that executes it: the prefix of its queue, and its labels as JSON.
    pub fn live_slot(&self) -> Option<(String, String)> {
        let worker = self.worker.as_ref()?.to_string();
        Some((self.key.prefix.as_str().to_owned(), worker))
    }
}

impl OperationFilter {
    /// Whether an operation is listed.
    pub fn admits(&self, row: &OperationRow) -> bool {
        let stage = StageKind::of(&row.stage);
        let keys = row.invocation.as_slice();
        self.stage.is_none_or(|wanted| wanted == stage)
            && self
                .invocation
                .as_ref()
                .is_none_or(|key| keys.contains(key))
    }
}
