//! Why the queue does not do what it is asked to.

use std::{sync::Arc, time::Duration};

use super::{Platform, WorkerId};

/// Why an action cannot be queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecuteRefusal {
    #[error(transparent)]
    NoWorkers(#[from] NoWorkers),
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
}

/// No platform queue takes the action.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("No workers exist for instance name prefix {instance:?} platform {platform}; {known}")]
pub struct NoWorkers {
    pub instance: String,
    pub platform: Platform,
    /// The scheduler is young, and the workers may yet come.
    pub transient: bool,
    /// Which ones there are.
    pub known: String,
}

/// As much is queued as may be. The client is to try again later.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{scope} already has {limit} {what}, which is the limit scheduling.limits.{key}")]
pub struct QueueFull {
    /// Whose limit it is.
    pub scope: String,
    pub what: &'static str,
    pub key: &'static str,
    pub limit: usize,
    /// When it is worth trying again, from now.
    pub retry_after: Duration,
}

/// There is no such size-class queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("No workers for this instance name, platform and size class exist")]
pub struct UnknownQueue;

/// There is no such invocation, or it is in no queue of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownInvocation {
    #[error(transparent)]
    Queue(#[from] UnknownQueue),
    #[error("Invocation not found")]
    Invocation,
}

/// There is no such operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Operation not found")]
pub struct UnknownOperation;

/// Why the queued operations of a size-class queue are not killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KillRefusal {
    #[error(transparent)]
    UnknownQueue(#[from] UnknownQueue),
    #[error(
        "Cannot kill operations, as workers for this instance name, platform and size class exist"
    )]
    HasWorkers,
}

/// Why a drain is not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainRefusal {
    #[error("There are {limit} drains already, as many as may be")]
    TooMany { limit: usize },
}

/// Why a worker's call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "A worker with the same worker ID is already synchronizing with the scheduler: {id}; it calls from {holder}, and this call comes from {caller}"
    )]
    AlreadySynchronizing {
        id: WorkerId,
        holder: Arc<str>,
        caller: Arc<str>,
        /// Not told before.
        news: bool,
    },
    #[error(
        "A worker with the same worker ID executes an action: {id}; it calls from {holder}, and this call comes from {caller}. Two hosts, or two workers of one host, must not have equal labels: change worker_id of one of them. If it is the same worker that was started again, it is let in as soon as its former calls are overdue"
    )]
    Executing {
        id: WorkerId,
        holder: Arc<str>,
        caller: Arc<str>,
        /// Not told before.
        news: bool,
    },
    #[error(
        "Workers of size class {known} exist for this instance name prefix and platform; a worker of size class {offered} cannot join them"
    )]
    SizeClass { known: u32, offered: u32 },
    /// As many as may be are known.
    #[error("There are {limit} {what} already, which is the limit scheduling.limits.{key}")]
    TooMany {
        what: &'static str,
        key: &'static str,
        limit: usize,
    },
}
