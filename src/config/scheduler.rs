//! bb_scheduler.toml, see bb_scheduler.toml(5).

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Diagnostics, DirectoryKind, Duration, ListenAddress, Log, Size, Validate,
    call_headers::{CallHeaders, MetadataHeader},
    callers::Callers,
    control::SchedulerControl,
    directory_kind,
    grants::{self, Grant},
    object_storage::{Azure, Gcs, ObjectStores, Redis, S3},
    path_error,
    routing::{
        ActionRouter, ActionRouterBackend, PlatformQueue, validate_backends, validate_patterns,
        validate_platform_queues,
    },
    size_classes::SizeClasses,
    storage::{Health, InstanceLimit, Places, Shard, validate_instance_limits},
    tls::{ClientTls, ServerTls},
    tokens::Tokens,
    traces::SchedulerTraces,
    web::Web,
};

pub use super::storage::StorageLocation;

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub clients: Clients,
    pub workers: Workers,
    /// Who may do what; empty for everybody and everything.
    pub grants: Vec<Grant>,
    pub tokens: Tokens,
    pub callers: Callers,
    pub state: State,
    pub control: SchedulerControl,
    pub web: Web,
    pub storage: Storage,
    pub scheduling: Scheduling,
    pub action_router: ActionRouter,
    /// Routers of some instance names and platforms; `action_router` is all others'.
    pub action_router_backends: Vec<ActionRouterBackend>,
    pub predeclared_platform_queues: Vec<PlatformQueue>,
    pub shutdown: Shutdown,
    pub traces: SchedulerTraces,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Clients {
    /// Ignored for a socket that systemd passes under the name `clients`.
    pub listen: ListenAddress,
    pub tls: ServerTls,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Workers {
    /// Ignored for a socket that systemd passes under the name `workers`.
    pub listen: ListenAddress,
    pub tls: ServerTls,
}

/// What operators look at, and what of it outlives the scheduler.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Of BuildQueueState. Ignored for a socket that systemd passes under the name `state`.
    pub listen: ListenAddress,
    pub tls: ServerTls,
    /// Of files that are read at the next start.
    pub directory: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    pub cas: StorageLocation,
    pub action_cache: StorageLocation,
    /// Used where size classes are feedback-driven.
    pub initial_size_class_cache: StorageLocation,
    pub shards: Vec<Shard>,
    pub health: Health,
    pub s3: S3,
    pub gcs: Gcs,
    pub azure: Azure,
    pub redis: Redis,
    /// For endpoints that speak TLS.
    pub tls: ClientTls,
    /// A file with a token that the storage knows this daemon by; empty for none.
    pub authorization_file: PathBuf,
    /// What else it is shown in each call.
    pub add_metadata: Vec<MetadataHeader>,
    pub embedded: Embedded,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Embedded {
    pub directory: PathBuf,
    /// Of all blobs and action results; least recently used ones are evicted.
    pub maximum_size: Size,
    /// What of the file system stays free, whoever else writes to it.
    pub minimum_free: Size,
    /// Of what is uploaded with some instance names.
    pub instance_limits: Vec<InstanceLimit>,
}

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
    pub limits: Limits,
}

/// How much the queue keeps, whoever asks. Beyond it is RESOURCE_EXHAUSTED.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
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

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    /// How long running calls may go on after SIGTERM.
    pub drain_timeout: Duration,
}

impl Default for Clients {
    fn default() -> Self {
        Clients {
            listen: ListenAddress::Tcp(([127, 0, 0, 1], 8980).into()),
            tls: ServerTls::default(),
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            listen: ListenAddress::Tcp(([127, 0, 0, 1], 8983).into()),
            tls: ServerTls::default(),
        }
    }
}

impl Default for State {
    fn default() -> Self {
        State {
            listen: ListenAddress::Tcp(([127, 0, 0, 1], 8984).into()),
            tls: ServerTls::default(),
            directory: PathBuf::from("/var/lib/bb-scheduler/state"),
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Storage {
            cas: StorageLocation::Embedded,
            action_cache: StorageLocation::Embedded,
            initial_size_class_cache: StorageLocation::Embedded,
            shards: Vec::new(),
            health: Health::default(),
            s3: S3::default(),
            gcs: Gcs::default(),
            azure: Azure::default(),
            redis: Redis::default(),
            tls: ClientTls::default(),
            authorization_file: PathBuf::new(),
            add_metadata: Vec::new(),
            embedded: Embedded::default(),
        }
    }
}

impl Default for Embedded {
    fn default() -> Self {
        Embedded {
            directory: PathBuf::from("/var/lib/bb-scheduler/storage"),
            maximum_size: Size::gib(20),
            minimum_free: Size::gib(1),
            instance_limits: Vec::new(),
        }
    }
}

impl Default for Scheduling {
    fn default() -> Self {
        Scheduling {
            default_execution_timeout: Duration::seconds(30 * 60),
            maximum_execution_timeout: Duration::seconds(4 * 60 * 60),
            execution_update_interval: Duration::seconds(20),
            operation_with_no_waiters_timeout: Duration::seconds(60),
            abandoned_operation_timeout: Duration::seconds(10),
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
            limits: Limits::default(),
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
            kept_results_size: Size::mib(256),
            actions_size: Size::gib(1),
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown {
            drain_timeout: Duration::seconds(10),
        }
    }
}

impl Validate for Config {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        let listen: [(&str, &ListenAddress); 4] = [
            ("clients.listen", &self.clients.listen),
            ("workers.listen", &self.workers.listen),
            ("state.listen", &self.state.listen),
            ("web.listen", &self.web.listen),
        ];
        for (number, (key, address)) in listen.iter().enumerate() {
            for (other, taken) in &listen[..number] {
                let default = [8980, 8983, 8984, 7982][number];
                diagnostics.require(
                    !address.meets(taken),
                    key,
                    format!(
                        "{other} has the same port, {taken}; give each a port of its own, such as 127.0.0.1:{default} here"
                    ),
                );
            }
        }
        self.clients.tls.validate("clients.tls", diagnostics);
        self.workers.tls.validate("workers.tls", diagnostics);
        self.state.tls.validate("state.tls", diagnostics);
        self.control.validate(diagnostics);
        self.traces.validate(diagnostics);
        self.web.check(diagnostics);
        self.state.check(&self.storage.embedded, diagnostics);
        let asks = |tls: &ServerTls| !tls.client_ca.as_os_str().is_empty();
        let [clients, workers] = [&self.clients.tls, &self.workers.tls];
        let listeners = [clients, workers, &self.state.tls, &self.web.tls];
        let has_certificates = listeners.into_iter().any(asks);
        grants::validate(
            &self.grants,
            has_certificates,
            self.tokens.are_on(),
            diagnostics,
        );
        self.tokens.validate(diagnostics);
        self.callers.validate(diagnostics);
        self.storage.check(&self.clients.listen, diagnostics);
        self.scheduling.validate(diagnostics);
        self.action_router.validate("action_router", diagnostics);
        validate_backends(&self.action_router_backends, diagnostics);
        validate_platform_queues(
            &self.predeclared_platform_queues,
            &self.scheduling.ignored_platform_properties,
            diagnostics,
        );
        let embedded = |place: &StorageLocation| *place == StorageLocation::Embedded;
        diagnostics.require(
            !self.scheduling.size_classes.feedback_driven
                || !embedded(&self.storage.initial_size_class_cache)
                || self.storage.places().has_embedded(),
            "storage.initial_size_class_cache",
            "there is no embedded store, since neither storage.cas nor storage.action_cache needs one, and scheduling.size_classes.feedback_driven needs one of the two; write where the storage is, such as \"grpc://storage.example:8981\"",
        );
    }
}

impl State {
    fn check(&self, embedded: &Embedded, diagnostics: &mut Diagnostics) {
        let key = "state.directory";
        if let Some(reason) = path_error(&self.directory) {
            diagnostics.add(key, reason);
            return;
        }
        diagnostics.require(
            directory_kind(&self.directory) == DirectoryKind::Ordinary,
            key,
            "others have files there; choose a directory of its own, such as /var/lib/bb-scheduler/state",
        );
        diagnostics.require(
            !self.directory.starts_with(&embedded.directory)
                && !embedded.directory.starts_with(&self.directory),
            key,
            "storage.embedded.directory is the same, or one of them is in the other; choose a directory of its own, such as /var/lib/bb-scheduler/state",
        );
    }
}

impl Storage {
    /// Where blobs and results are.
    pub fn places(&self) -> Places<'_> {
        Places {
            cas: &self.cas,
            action_cache: &self.action_cache,
            shards: &self.shards,
            health: &self.health,
            objects: ObjectStores {
                s3: &self.s3,
                gcs: &self.gcs,
                azure: &self.azure,
                redis: &self.redis,
            },
        }
    }

    /// What the storage is shown in each call.
    pub fn call_headers(&self) -> CallHeaders<'_> {
        CallHeaders {
            keys: ["storage.add_metadata", "storage.authorization_file"],
            add_metadata: &self.add_metadata,
            authorization_file: &self.authorization_file,
        }
    }

    fn check(&self, clients: &ListenAddress, diagnostics: &mut Diagnostics) {
        self.places().validate(Some(clients), diagnostics);
        let cache = &self.initial_size_class_cache;
        let key = "storage.initial_size_class_cache";
        diagnostics.require(
            *cache != StorageLocation::Shards && cache.service().is_none(),
            key,
            "it is in one place; write \"embedded\", or an endpoint",
        );
        let mut endpoints = self.places().endpoints();
        if let Some(endpoint) = cache.endpoint() {
            diagnostics.require(
                !endpoint.is_at(clients),
                key,
                "that is this scheduler's own port, so that it would ask itself; write \"embedded\", or where the storage is",
            );
            endpoints.push(endpoint);
        }
        self.tls.validate("storage.tls", &endpoints, diagnostics);
        self.call_headers().validate(diagnostics);
        let directory = &self.embedded.directory;
        if let Some(reason) = path_error(directory) {
            diagnostics.add("storage.embedded.directory", reason);
        } else {
            diagnostics.require(
                directory_kind(directory) == DirectoryKind::Ordinary,
                "storage.embedded.directory",
                "others have files there; choose a directory of its own, such as /var/lib/bb-scheduler/storage",
            );
        }
        diagnostics.require(
            self.embedded.maximum_size >= Size::mib(16),
            "storage.embedded.maximum_size",
            "less than 16MiB cannot hold the outputs of a build; 20GiB is a good start",
        );
        diagnostics.require(
            self.embedded.instance_limits.is_empty() || self.places().has_embedded(),
            "storage.embedded.instance_limits",
            "neither storage.cas nor storage.action_cache is \"embedded\", so that there is no store to limit; leave it out",
        );
        validate_instance_limits(
            &self.embedded.instance_limits,
            self.embedded.maximum_size,
            diagnostics,
        );
    }
}

impl Scheduling {
    /// The priority that is given to one that a client asks for.
    pub fn priority(&self, asked: i32) -> i32 {
        asked.min(self.maximum_priority).max(self.minimum_priority)
    }

    fn validate(&self, diagnostics: &mut Diagnostics) {
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

impl Limits {
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
