//! bb_worker.toml, see bb_worker.toml(5).

#![expect(
    missing_docs,
    reason = "keys are described in bb_worker.toml(5), as a test sees to"
)]

use std::{collections::BTreeMap, num::NonZeroUsize, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Diagnostics, DirectoryKind, Duration, Endpoint, Log, Size, Validate,
    call_headers::{CallHeaders, MetadataHeader},
    control::{WorkerControl, WorkerMetrics},
    directory_kind,
    object_storage::{Azure, Gcs, ObjectStores, Redis, S3},
    path_error,
    storage::{Health, Places, Shard, StorageLocation},
    tls::ClientTls,
    traces::Traces,
    web::is_base_url,
};

/// As many as a runner has users for.
const MOST_SLOTS: usize = super::runner::MAX_USERS as usize;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub scheduler: Scheduler,
    pub storage: Storage,
    pub cache: Cache,
    /// Emptied at start-up. On the same file system as `cache.directory`, because of hardlinks.
    pub build_directory: PathBuf,
    pub outputs: Outputs,
    pub runners: Vec<Runner>,
    pub metrics: WorkerMetrics,
    pub control: WorkerControl,
    pub shutdown: Shutdown,
    pub traces: Traces,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduler {
    pub endpoint: Endpoint,
    pub tls: ClientTls,
    /// A file with a token that the scheduler knows this worker by; empty for none.
    pub authorization_file: PathBuf,
    /// What else it is shown in each call.
    pub add_metadata: Vec<MetadataHeader>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    pub cas: StorageLocation,
    pub action_cache: StorageLocation,
    pub shards: Vec<Shard>,
    pub health: Health,
    pub s3: S3,
    pub gcs: Gcs,
    pub azure: Azure,
    pub redis: Redis,
    pub tls: ClientTls,
    /// The same for the storage.
    pub authorization_file: PathBuf,
    pub add_metadata: Vec<MetadataHeader>,
    /// Of all slots together.
    pub download_concurrency: NonZeroUsize,
    pub upload_concurrency: NonZeroUsize,
    /// Largest Command, Directory or Tree.
    pub maximum_message_size: Size,
    /// For links in messages; empty for none.
    pub browser_url: String,
    /// As if every Command asked for TREE_AND_DIRECTORY.
    pub force_upload_trees_and_directories: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    pub directory: PathBuf,
    pub maximum_size: Size,
    pub maximum_files: u64,
    /// Left free on the file system of the cache.
    pub minimum_free: Size,
    /// Bytes a second that are read again in the background; 0 for none.
    pub verification_rate: Size,
    /// Parsed Directory messages, in memory.
    pub maximum_directories_size: Size,
}

/// What the outputs of one action may come to.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Outputs {
    /// Of all files together.
    pub maximum_size: Size,
    /// For reading and uploading them.
    pub timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runner {
    pub endpoint: Endpoint,
    /// Actions at a time; 0 for one per processor.
    pub concurrency: usize,
    pub instance_name_prefix: String,
    pub platform: BTreeMap<String, String>,
    pub size_class: u32,
    /// Labels that tell this worker from all others; a `hostname` label is added when empty.
    pub worker_id: BTreeMap<String, String>,
    /// The action's own values win.
    pub environment_variables: BTreeMap<String, String>,
    pub inputs: Inputs,
    /// That a runner of another kind belongs to, and its actions; empty for this project's, which lets
    /// actions in by itself.
    pub group: String,
}

/// Whose an action's input files are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Inputs {
    /// The worker's, and read-only: reflinks of cached files where the file system has them, else hard
    /// links.
    #[default]
    Shared,
    /// The worker's, and read-only: hard links everywhere.
    HardLinks,
    /// The action's: copies that it may change, made anew for each action.
    Private,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    /// How long running actions may go on after SIGTERM.
    pub drain_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            scheduler: Scheduler::default(),
            storage: Storage::default(),
            cache: Cache::default(),
            build_directory: PathBuf::from("/var/lib/bb-worker/build"),
            outputs: Outputs::default(),
            runners: vec![Runner::default()],
            metrics: WorkerMetrics::default(),
            control: WorkerControl::default(),
            shutdown: Shutdown::default(),
            traces: Traces::default(),
            log: Log::default(),
        }
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Scheduler {
            endpoint: Endpoint::Tcp("127.0.0.1:8983".to_owned()),
            tls: ClientTls::default(),
            authorization_file: PathBuf::new(),
            add_metadata: Vec::new(),
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        let embedded = StorageLocation::from(Endpoint::Tcp("127.0.0.1:8980".to_owned()));
        Storage {
            cas: embedded.clone(),
            action_cache: embedded,
            shards: Vec::new(),
            health: Health::default(),
            s3: S3::default(),
            gcs: Gcs::default(),
            azure: Azure::default(),
            redis: Redis::default(),
            tls: ClientTls::default(),
            authorization_file: PathBuf::new(),
            add_metadata: Vec::new(),
            download_concurrency: NonZeroUsize::new(32).expect("not zero"),
            upload_concurrency: NonZeroUsize::new(32).expect("not zero"),
            maximum_message_size: Size::mib(16),
            browser_url: String::new(),
            force_upload_trees_and_directories: false,
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Cache {
            directory: PathBuf::from("/var/lib/bb-worker/cache"),
            maximum_size: Size::gib(20),
            maximum_files: 1_000_000,
            minimum_free: Size::gib(1),
            verification_rate: Size::mib(4),
            maximum_directories_size: Size::mib(256),
        }
    }
}

impl Default for Outputs {
    fn default() -> Self {
        Outputs {
            maximum_size: Size::gib(32),
            timeout: Duration::seconds(30 * 60),
        }
    }
}

impl Default for Runner {
    fn default() -> Self {
        Runner {
            endpoint: Endpoint::Unix(PathBuf::from("/run/bb-runner/runner.sock")),
            concurrency: 0,
            instance_name_prefix: String::new(),
            platform: BTreeMap::from([("OSFamily".to_owned(), "linux".to_owned())]),
            size_class: 0,
            worker_id: BTreeMap::new(),
            environment_variables: BTreeMap::new(),
            inputs: Inputs::Shared,
            group: String::new(),
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown {
            drain_timeout: Duration::seconds(60),
        }
    }
}

impl Validate for Config {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        self.control.validate(diagnostics);
        self.traces.validate(diagnostics);
        for (key, path) in [
            ("build_directory", &self.build_directory),
            ("cache.directory", &self.cache.directory),
        ] {
            if let Some(reason) = path_error(path) {
                diagnostics.add(key, reason);
            } else {
                diagnostics.require(
                    directory_kind(path) == DirectoryKind::Ordinary,
                    key,
                    format!(
                        "the worker removes what it does not know there, and others have files in {}; choose a directory of its own",
                        path.display()
                    ),
                );
            }
        }
        diagnostics.require(
            !self.build_directory.starts_with(&self.cache.directory)
                && !self.cache.directory.starts_with(&self.build_directory),
            "build_directory",
            "it must be neither inside nor around cache.directory, since it is emptied at start-up",
        );
        self.scheduler
            .tls
            .validate("scheduler.tls", &[&self.scheduler.endpoint], diagnostics);
        self.cache.validate(diagnostics);
        self.storage.validate(diagnostics);
        diagnostics.require(
            self.outputs.maximum_size.get() > 0,
            "outputs.maximum_size",
            "no action could have any output; write a size, and \"32GiB\" is a good start",
        );
        diagnostics.require(
            !self.outputs.timeout.get().is_zero(),
            "outputs.timeout",
            "no output could be read; write a duration, and \"30m\" is a good start",
        );
        diagnostics.require(
            !self.runners.is_empty(),
            "runners",
            "there must be at least one [[runners]] section",
        );
        for (number, runner) in self.runners.iter().enumerate() {
            runner.validate(number, diagnostics);
            let twin = self.runners[..number].iter().position(|other| {
                let labels = |runner: &Runner| {
                    (
                        runner.instance_name_prefix.clone(),
                        runner.platform.clone(),
                        runner.size_class,
                        runner.worker_id.clone(),
                    )
                };
                labels(other) == labels(runner)
            });
            if let Some(twin) = twin {
                diagnostics.add(
                    format!("runners.{number}"),
                    format!(
                        "this section and [[runners]] number {} are the same worker to the scheduler, so that every action would run twice; give them different platforms, or worker_id = {{ ... }}",
                        twin + 1
                    ),
                );
            }
        }
    }
}

impl Cache {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        diagnostics.require(
            self.maximum_size >= Size::mib(1),
            "cache.maximum_size",
            "the inputs of no action would fit; write at least \"1MiB\", and \"20GiB\" is a good start",
        );
        diagnostics.require(
            self.maximum_files >= 1,
            "cache.maximum_files",
            "the inputs of no action would fit; write a number such as 1000000",
        );
        diagnostics.require(
            self.maximum_directories_size >= Size(64 << 10),
            "cache.maximum_directories_size",
            "the input root of no action would fit; write at least \"64KiB\", and \"256MiB\" is a good start",
        );
    }
}

impl Scheduler {
    /// What the scheduler is shown in each call.
    pub fn call_headers(&self) -> CallHeaders<'_> {
        CallHeaders {
            keys: ["scheduler.add_metadata", "scheduler.authorization_file"],
            add_metadata: &self.add_metadata,
            authorization_file: &self.authorization_file,
        }
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

    fn validate(&self, diagnostics: &mut Diagnostics) {
        for (key, place) in [
            ("storage.cas", &self.cas),
            ("storage.action_cache", &self.action_cache),
        ] {
            diagnostics.require(
                *place != StorageLocation::Embedded,
                key,
                "the embedded store is bb_scheduler's, and is reached at its port for clients; write that, such as \"grpc://127.0.0.1:8980\"",
            );
        }
        self.places().validate(None, diagnostics);
        let endpoints = self.places().endpoints();
        self.tls.validate("storage.tls", &endpoints, diagnostics);
        self.call_headers().validate(diagnostics);
        for (key, concurrency) in [
            ("storage.download_concurrency", self.download_concurrency),
            ("storage.upload_concurrency", self.upload_concurrency),
        ] {
            diagnostics.require(
                concurrency.get() <= 10_000,
                key,
                "no storage serves more than 10000 transfers at a time; 32 is a good start",
            );
        }
        diagnostics.require(
            (Size(64 << 10)..=Size::gib(1)).contains(&self.maximum_message_size),
            "storage.maximum_message_size",
            "it is for Commands, Directories and Trees; write a size from \"64KiB\" to \"1GiB\", and \"16MiB\" is a good start",
        );
        diagnostics.require(
            self.browser_url.is_empty() || is_base_url(&self.browser_url),
            "storage.browser_url",
            "it must begin with http:// or https://, or be empty for no links",
        );
    }
}

impl Runner {
    /// Actions at a time.
    pub fn slots(&self) -> usize {
        match self.concurrency {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            concurrency => concurrency,
        }
    }

    fn validate(&self, number: usize, diagnostics: &mut Diagnostics) {
        let key = |name: &str| format!("runners.{number}.{name}");
        if let Err(error) = crate::instance::InstanceName::parse(&self.instance_name_prefix) {
            diagnostics.add(key("instance_name_prefix"), error.to_string());
        }
        diagnostics.require(
            self.concurrency <= MOST_SLOTS,
            &key("concurrency"),
            "a runner has at most 500 actions at a time; 0 is one for each processor",
        );
        diagnostics.require(
            !self.platform.contains_key(""),
            &key("platform"),
            "a property needs a name, as in { OSFamily = \"linux\" }",
        );
        diagnostics.require(
            !self.worker_id.contains_key(""),
            &key("worker_id"),
            "a label needs a name, as in { hostname = \"build7\" }",
        );
        for (name, value) in &self.environment_variables {
            diagnostics.require(
                !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'),
                &key("environment_variables"),
                format!(
                    "{name:?} cannot be a variable: names are neither empty nor have = in them"
                ),
            );
        }
    }
}
