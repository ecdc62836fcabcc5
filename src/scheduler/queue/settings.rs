//! What the administrator decides.

use std::time::Duration;

use super::{Drain, Platform};
use crate::{
    config::{self, scheduler::Config, scheduling::Scheduling},
    instance::InstanceName,
};

/// How long things may take, and how many there may be; see `config::scheduler`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a completed operation can be asked for when nobody waits for it.
    pub operation_with_no_waiters_timeout: Duration,
    /// How long an operation that is not completed goes on when nobody waits for it.
    pub abandoned_operation_timeout: Duration,
    pub busy_worker_interval: Duration,
    /// How long after the start a worker may say that it executes what the scheduler before gave it.
    pub worker_report_timeout: Duration,
    pub worker_silence_timeout: Duration,
    pub platform_queue_with_no_workers_timeout: Duration,
    /// How often a worker may claim to have lost a task before the action is blamed.
    pub worker_task_retry_count: u32,
    /// How often a task is executed again after its worker was lost or was at fault itself.
    pub lost_worker_retry_count: u32,
    pub limits: QueueLimits,
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
pub struct QueueLimits {
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
    /// Of the actions of all tasks, with what their clients sent for workers.
    pub action_bytes: usize,
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

impl Default for QueueLimits {
    fn default() -> Self {
        QueueLimits::from(&config::scheduling::SchedulingLimits::default())
    }
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        let queues = config.predeclared_platform_queues.iter();
        Settings {
            predeclared_queues: queues.filter_map(PredeclaredQueue::new).collect(),
            ..Settings::from(&config.scheduling)
        }
    }
}

/// Without predeclared queues.
impl From<&Scheduling> for Settings {
    fn from(scheduling: &Scheduling) -> Self {
        let default_platform = Platform::from(&scheduling.default_platform);
        Settings {
            operation_with_no_waiters_timeout: scheduling.operation_with_no_waiters_timeout.get(),
            abandoned_operation_timeout: scheduling.abandoned_operation_timeout.get(),
            busy_worker_interval: scheduling.busy_worker_synchronization_interval.get(),
            worker_report_timeout: scheduling.worker_report_timeout.get(),
            worker_silence_timeout: scheduling.worker_with_no_synchronizations_timeout.get(),
            platform_queue_with_no_workers_timeout: scheduling
                .platform_queue_with_no_workers_timeout
                .get(),
            worker_task_retry_count: scheduling.worker_task_retry_count,
            lost_worker_retry_count: scheduling.lost_worker_retry_count,
            limits: QueueLimits::from(&scheduling.limits),
            predeclared_queues: Vec::new(),
            stickiness_limits: lengths(&scheduling.worker_invocation_stickiness_limits),
            drains: Vec::new(),
            first_attempt: 1,
            default_platform: (!default_platform.is_empty()).then_some(default_platform),
        }
    }
}

impl From<&config::scheduling::SchedulingLimits> for QueueLimits {
    fn from(config: &config::scheduling::SchedulingLimits) -> Self {
        QueueLimits {
            queued_operations: config.queued_operations,
            queued_operations_per_instance_name: config.queued_operations_per_instance_name,
            queued_operations_per_invocation: config.queued_operations_per_invocation,
            invocations: config.invocations,
            platform_queues: config.platform_queues,
            workers: config.workers,
            drains: config.drains,
            kept_results: config.kept_results,
            action_bytes: usize::try_from(config.actions_size.get()).unwrap_or(usize::MAX),
            kept_result_bytes: usize::try_from(config.kept_results_size.get())
                .unwrap_or(usize::MAX),
        }
    }
}

impl PredeclaredQueue {
    /// `None` when the instance name is none, which the configuration's check refuses.
    fn new(config: &config::routing::PlatformQueue) -> Option<Self> {
        Some(PredeclaredQueue {
            prefix: InstanceName::parse(&config.instance_name_prefix).ok()?,
            platform: Platform::from(&config.platform),
            size_classes: config.size_classes.clone(),
            stickiness_limits: lengths(&config.worker_invocation_stickiness_limits),
            maximum_queued_background_learning_operations: config
                .maximum_queued_background_learning_operations,
            background_learning_operation_priority: config.background_learning_operation_priority,
        })
    }
}

fn lengths(durations: &[config::Duration]) -> Vec<Duration> {
    durations.iter().map(|duration| duration.get()).collect()
}
