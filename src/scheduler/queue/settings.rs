//! What the administrator decides.

use std::time::Duration;

use super::{Drain, Platform};
use crate::{config::scheduler::Scheduling, instance::InstanceName};

/// How long things may take, and how many there may be; see `config::scheduler::Scheduling`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a completed operation can be asked for when nobody waits for it.
    pub operation_with_no_waiters_timeout: Duration,
    /// How long an operation that is not completed goes on when nobody waits for it.
    pub abandoned_operation_timeout: Duration,
    pub busy_worker_interval: Duration,
    pub worker_silence_timeout: Duration,
    pub platform_queue_with_no_workers_timeout: Duration,
    /// How often a worker may claim to have lost a task before the action is blamed.
    pub worker_task_retry_count: u32,
    /// How often a task is executed again after its worker was lost.
    pub lost_worker_retry_count: u32,
    pub limits: Limits,
    /// Platform queues that there are without workers, too.
    pub predeclared_queues: Vec<PredeclaredQueue>,
    /// For each level of the invocation tree, how long a worker prefers the invocation that it worked
    /// for; of platform queues that are not predeclared.
    pub stickiness_limits: Vec<Duration>,
    /// What was drained when the scheduler before this one ended.
    pub drains: Vec<Drain>,
    /// Random, so that no attempt is taken for one of the scheduler before this one.
    pub first_attempt: u64,
    /// `None` where it is empty.
    pub default_platform: Option<Platform>,
}

/// How much the queue keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub queued_operations: usize,
    pub queued_operations_per_instance_name: usize,
    /// For each outermost invocation key: a user, where users are a level.
    pub queued_operations_per_invocation: usize,
    /// Nodes of the invocation trees.
    pub invocations: usize,
    pub platform_queues: usize,
    pub workers: usize,
    pub drains: usize,
    /// Results of workers that this scheduler did not hand the action to, for clients to ask for.
    pub kept_results: usize,
    pub kept_result_bytes: usize,
}

/// A platform queue that is never removed.
#[derive(Clone, Debug, PartialEq)]
pub struct PredeclaredQueue {
    pub prefix: InstanceName,
    pub platform: Platform,
    /// Ascending; one at least. All are above zero where there are several.
    pub size_classes: Vec<u32>,
    /// As in `Settings`.
    pub stickiness_limits: Vec<Duration>,
    /// Zero: no background learning.
    pub maximum_queued_background_learning_operations: usize,
    pub background_learning_operation_priority: i32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            queued_operations: 1_000_000,
            queued_operations_per_instance_name: 1_000_000,
            queued_operations_per_invocation: 500_000,
            invocations: 100_000,
            platform_queues: 10_000,
            workers: 100_000,
            drains: 10_000,
            kept_results: 10_000,
            kept_result_bytes: 256 << 20,
        }
    }
}

impl From<&Scheduling> for Settings {
    fn from(config: &Scheduling) -> Self {
        let default_platform = Platform::from(&config.default_platform);
        Settings {
            operation_with_no_waiters_timeout: config.operation_with_no_waiters_timeout.get(),
            abandoned_operation_timeout: Duration::from_secs(10),
            busy_worker_interval: config.busy_worker_synchronization_interval.get(),
            worker_silence_timeout: config.worker_with_no_synchronizations_timeout.get(),
            platform_queue_with_no_workers_timeout: config
                .platform_queue_with_no_workers_timeout
                .get(),
            worker_task_retry_count: config.worker_task_retry_count,
            lost_worker_retry_count: 3,
            limits: Limits::default(),
            predeclared_queues: Vec::new(),
            stickiness_limits: Vec::new(),
            drains: Vec::new(),
            first_attempt: 1,
            default_platform: (!default_platform.is_empty()).then_some(default_platform),
        }
    }
}
