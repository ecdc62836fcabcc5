//! bb_scheduler.toml, see bb_scheduler.toml(5).

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::path::PathBuf;

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
        ActionRouter, ActionRouterBackend, PlatformQueue, validate_backends,
        validate_platform_queues,
    },
    scheduling::Scheduling,
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
            self.embedded.instance_limits.is_empty() || self.places().counts_for_instances(),
            "storage.embedded.instance_limits",
            "neither storage.cas nor storage.action_cache is \"embedded\", so that nothing is stored for an instance name here: what is kept of another storage's blobs counts for nobody; leave it out",
        );
        validate_instance_limits(
            &self.embedded.instance_limits,
            self.embedded.maximum_size,
            diagnostics,
        );
    }
}
