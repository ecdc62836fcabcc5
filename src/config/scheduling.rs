//! Of bb_scheduler.toml: how actions are queued and handed to workers, and how much is queued.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Duration, Size, routing::validate_patterns, size_classes::SizeClasses};

/// Buildbarn compiles most of these in; the defaults are its own unless a line says otherwise.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduling {
    /// For actions without a timeout.
    pub default_execution_timeout: Duration,
    /// Longer ones are INVALID_ARGUMENT.
    pub maximum_execution_timeout: Duration,
    /// A waiting client hears at least this often (Buildbarn: 60 s; clients that sit behind
    /// proxies, and BuildStream, lose patience earlier).
    pub execution_update_interval: Duration,
    /// How long a completed operation can be asked for when nobody waits for it.
    pub operation_with_no_waiters_timeout: Duration,
    /// How long an operation that is not completed goes on when nobody waits for it (Buildbarn: 60 s).
    pub abandoned_operation_timeout: Duration,
    /// How long one goes on whose client ended its call and keeps its connection (Buildbarn: as above).
    pub ended_call_timeout: Duration,
    /// How soon a busy worker calls again, and so hears of a cancellation.
    pub busy_worker_synchronization_interval: Duration,
    /// An idle worker's call is held for a random time up to this.
    pub idle_worker_synchronization_interval: Duration,
    /// How long after its start the scheduler waits for workers to say that they execute an operation
    /// of the scheduler before it, until it hands it to another one.
    pub worker_report_timeout: Duration,
    /// How long after the start an action is held whose platform no worker has registered yet; after
    /// that it is refused.
    pub worker_registration_timeout: Duration,
    /// A worker that has been silent for this long past its due time is gone.
    pub worker_with_no_synchronizations_timeout: Duration,
    /// How long a platform queue without workers lives, and how long after start-up an unknown
    /// platform is UNAVAILABLE rather than FAILED_PRECONDITION.
    pub platform_queue_with_no_workers_timeout: Duration,
    /// How often a worker may claim to have lost an action before the action is blamed.
    pub worker_task_retry_count: u32,
    /// How often an action is executed again after its worker was lost or was at fault itself (Buildbarn:
    /// never).
    pub lost_worker_retry_count: u32,
    /// For each level of the invocation tree, for how long a worker prefers the invocation that it
    /// worked for; of platform queues that are not predeclared.
    pub worker_invocation_stickiness_limits: Vec<Duration>,
    /// More urgent ones that clients ask for are taken for this one (Buildbarn: none are).
    pub minimum_priority: i32,
    /// Less urgent ones likewise.
    pub maximum_priority: i32,
    /// Whether Execute answers with what the Action Cache has (Buildbarn: no).
    pub action_cache_lookup: bool,
    /// Largest Action that is read from the CAS.
    pub maximum_message_size: Size,
    /// For actions that ask for no platform property, where no worker offers the empty platform.
    pub default_platform: BTreeMap<String, String>,
    pub size_classes: SizeClasses,
    /// Properties that neither actions nor workers are told apart by; a final `*` stands for anything.
    pub ignored_platform_properties: Vec<String>,
    pub limits: SchedulingLimits,
}

/// How much the queue keeps, whoever asks. Beyond it is RESOURCE_EXHAUSTED.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulingLimits {
    pub queued_operations: usize,
    pub queued_operations_per_instance_name: usize,
    /// For each outermost invocation key.
    pub queued_operations_per_invocation: usize,
    /// Nodes of the invocation trees.
    pub invocations: usize,
    pub platform_queues: usize,
    pub workers: usize,
    pub drains: usize,
    /// Results of workers that were handed the action by a scheduler before this one.
    pub kept_results: usize,
    pub kept_results_size: Size,
    /// Of actions that are queued, executing, or completed a moment ago.
    pub actions_size: Size,
}

impl Default for Scheduling {
    fn default() -> Self {
        Scheduling {
            default_execution_timeout: Duration::seconds(30 * 60),
            maximum_execution_timeout: Duration::seconds(4 * 60 * 60),
            execution_update_interval: Duration::seconds(20),
            operation_with_no_waiters_timeout: Duration::seconds(60),
            abandoned_operation_timeout: Duration::seconds(10),
            ended_call_timeout: Duration::seconds(2),
            busy_worker_synchronization_interval: Duration::seconds(10),
            idle_worker_synchronization_interval: Duration::seconds(120),
            worker_report_timeout: Duration::seconds(2),
            worker_registration_timeout: Duration::seconds(10),
            worker_with_no_synchronizations_timeout: Duration::seconds(60),
            platform_queue_with_no_workers_timeout: Duration::seconds(15 * 60),
            worker_task_retry_count: 9,
            lost_worker_retry_count: 3,
            worker_invocation_stickiness_limits: Vec::new(),
            minimum_priority: -300,
            maximum_priority: 1000,
            action_cache_lookup: true,
            maximum_message_size: Size::mib(2),
            default_platform: BTreeMap::from([("OSFamily".to_owned(), "linux".to_owned())]),
            size_classes: SizeClasses::default(),
            ignored_platform_properties: DEFAULT_IGNORED.map(str::to_owned).into(),
            limits: SchedulingLimits::default(),
        }
    }
}

/// What Bazel sends though nobody asked for it: estimates of resources, and hints for persistent
/// workers.
const DEFAULT_IGNORED: [&str; 3] = [
    "resources:*",
    "persistentWorker*",
    "requires-worker-protocol",
];

impl Default for SchedulingLimits {
    fn default() -> Self {
        SchedulingLimits {
            queued_operations: 1_000_000,
            queued_operations_per_instance_name: 1_000_000,
            queued_operations_per_invocation: 500_000,
            invocations: 100_000,
            platform_queues: 10_000,
            workers: 100_000,
            drains: 10_000,
            kept_results: 10_000,
            kept_results_size: Size::mib(256),
            actions_size: Size::gib(1),
        }
    }
}

impl Scheduling {
    /// The priority that is given to one that a client asks for.
    pub fn priority(&self, asked: i32) -> i32 {
        asked.min(self.maximum_priority).max(self.minimum_priority)
    }

    pub(super) fn validate(&self, diagnostics: &mut Diagnostics) {
        const MILLISECOND: std::time::Duration = std::time::Duration::from_millis(1);
        const SECOND: std::time::Duration = std::time::Duration::from_secs(1);
        for (key, duration, least, otherwise) in [
            (
                "default_execution_timeout",
                self.default_execution_timeout,
                MILLISECOND,
                "every action without a timeout would fail at once",
            ),
            (
                "maximum_execution_timeout",
                self.maximum_execution_timeout,
                MILLISECOND,
                "every action would be refused",
            ),
            (
                "execution_update_interval",
                self.execution_update_interval,
                SECOND,
                "clients would be written to without end",
            ),
            (
                "operation_with_no_waiters_timeout",
                self.operation_with_no_waiters_timeout,
                SECOND,
                "a client that reconnects would not find its result",
            ),
            (
                "abandoned_operation_timeout",
                self.abandoned_operation_timeout,
                SECOND,
                "a client that reconnects would find its action cancelled",
            ),
            (
                "busy_worker_synchronization_interval",
                self.busy_worker_synchronization_interval,
                SECOND,
                "workers would call without end",
            ),
            (
                "idle_worker_synchronization_interval",
                self.idle_worker_synchronization_interval,
                SECOND,
                "workers would call without end",
            ),
            (
                "worker_with_no_synchronizations_timeout",
                self.worker_with_no_synchronizations_timeout,
                SECOND,
                "every worker would be taken for dead",
            ),
            (
                "platform_queue_with_no_workers_timeout",
                self.platform_queue_with_no_workers_timeout,
                SECOND,
                "actions would fail as soon as the last worker of their platform restarts",
            ),
        ] {
            diagnostics.require(
                duration.get() >= least,
                &format!("scheduling.{key}"),
                format!("with {duration}, {otherwise}; write a length of time, such as \"1m\""),
            );
        }
        diagnostics.require(
            self.default_execution_timeout <= self.maximum_execution_timeout,
            "scheduling.default_execution_timeout",
            format!(
                "it exceeds scheduling.maximum_execution_timeout, which is {}",
                self.maximum_execution_timeout
            ),
        );
        for (key, is_beyond, bound) in [
            ("minimum_priority", self.minimum_priority > 0, "0 or below"),
            ("maximum_priority", self.maximum_priority < 0, "0 or above"),
        ] {
            diagnostics.require(
                !is_beyond,
                &format!("scheduling.{key}"),
                format!(
                    "clients that say nothing have priority 0, which is to be within; write {bound}"
                ),
            );
        }
        diagnostics.require(
            self.maximum_message_size <= Size::mib(64),
            "scheduling.maximum_message_size",
            "an Action of more than 64MiB is a mistake of its client",
        );
        diagnostics.require(
            self.maximum_message_size >= Size(4096),
            "scheduling.maximum_message_size",
            "Actions would not fit; write at least \"4KiB\", and \"2MiB\" is a good start",
        );
        diagnostics.require(
            !self.default_platform.contains_key(""),
            "scheduling.default_platform",
            "a property needs a name, as in { OSFamily = \"linux\" }",
        );
        self.size_classes.validate(diagnostics);
        validate_patterns(
            "scheduling.ignored_platform_properties",
            &self.ignored_platform_properties,
            diagnostics,
        );
        self.limits.validate(diagnostics);
    }
}

impl SchedulingLimits {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        for (key, limit) in [
            ("queued_operations", self.queued_operations),
            (
                "queued_operations_per_instance_name",
                self.queued_operations_per_instance_name,
            ),
            (
                "queued_operations_per_invocation",
                self.queued_operations_per_invocation,
            ),
            ("invocations", self.invocations),
            ("platform_queues", self.platform_queues),
            ("workers", self.workers),
        ] {
            diagnostics.require(
                limit > 0,
                &format!("scheduling.limits.{key}"),
                "with 0, nothing would be let in; write how many there may be at a time",
            );
        }
    }
}
