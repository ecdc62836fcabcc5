//! The worker: lays out input roots, has a runner run commands in them, uploads their outputs.

use std::{collections::BTreeMap, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use self::{
    availability::Availability,
    inputs::{
        InputRootBuilder,
        directories::DirectoryCache,
        file_cache::{self, CacheLimits, FileCache, LinkMode},
    },
};
use crate::{
    config::worker::{Config, Inputs, Runner},
    daemon::{self, Failure, Lifecycle, Program, disk::nearest_directory},
    instance::InstanceName,
    proto::{
        reapi::{Platform, platform::Property},
        runner::runner_client::RunnerClient,
    },
    storage::grpc,
};

pub mod availability;
pub mod beneath;
pub mod command;
mod completion_log;
pub mod execute;
pub mod fault;
pub mod health;
pub mod inputs;
pub mod lru;
pub mod outputs;
mod probe;
pub mod removal;
pub mod response_size;
mod runner_client;
pub mod slot;
pub mod slot_loop;
mod status_line;
pub mod task;

pub use probe::{probe, warnings};

pub const PROGRAM: Program = Program {
    name: "bb_worker",
    about: "Lays out input roots, has a runner run build actions in them, and uploads their outputs",
};

/// How long a slot may take until its loop runs.
const START_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Runs until told to stop, then until the actions that are running have ended.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    daemon::raise_file_limit();
    let slots: usize = config.runners.iter().map(Runner::slots).sum();
    let storage = connect_storage(&config);
    let (cache, roots) = open_directories(&config, slots, &storage).await?;
    let (files, bytes) = cache.usage();
    tracing::info!(files, bytes, directory = %cache.path().display(), "opened the cache");
    let rate = config.cache.verification_rate.get();
    if rate > 0 {
        let started = file_cache::Verifier::new(&cache).start(rate);
        started.map_err(|error| Failure::Environment {
            message: format!("could not start a thread that verifies the cache: {error}"),
        })?;
    }
    lifecycle.liveness_check("the cache", {
        let cache = cache.clone();
        move || {
            cache.usage();
        }
    });
    let directories = Arc::new(DirectoryCache::new(
        storage.clone(),
        config.storage.maximum_message_size.get(),
        config.cache.maximum_directories_size.get(),
    ));
    let scheduler = daemon::connect(&config.scheduler.endpoint);
    let mut executors = Vec::new();
    let status_line = Arc::new(status_line::StatusLine::new(
        &config.scheduler.endpoint,
        slots,
    ));
    let mut clients = tokio::task::JoinSet::new();
    for runner in &config.runners {
        let identities = identities(runner)?;
        let how = match (runner.inputs, cache.link_mode(runner.inputs)) {
            (_, LinkMode::Reflink) => "input files are reflinks of cached ones",
            (Inputs::Shared, _) => {
                "input files are hard links to cached ones, since the file system has no reflinks; flock(2) on one waits for other actions that have the same file"
            }
            (Inputs::HardLinks, _) => {
                "input files are hard links to cached ones; flock(2) on one waits for other actions that have the same file"
            }
            (Inputs::Private, _) => {
                "input files are the actions' own, and each input root is made anew"
            }
        };
        tracing::info!(
            runner = %runner.endpoint,
            inputs = ?runner.inputs,
            shares_blocks = cache.shares_blocks(),
            "{how}"
        );
        let executor = Arc::new(execute::Executor {
            storage: storage.clone(),
            cache: cache.clone(),
            directories: directories.clone(),
            roots: roots.clone(),
            runner: RunnerClient::new(daemon::connect(&runner.endpoint)),
            availability: Availability::new(&runner.endpoint),
            workers: identities
                .iter()
                .map(|identity| serde_json::to_string(&identity.worker_id).unwrap_or_default())
                .collect(),
            environment_variables: runner.environment_variables.clone(),
            force_upload_trees_and_directories: config.storage.force_upload_trees_and_directories,
            inputs: runner.inputs,
            group: group_of(runner)?,
            outputs: config.outputs.clone(),
            browser_url: Some(config.storage.browser_url.clone()).filter(|url| !url.is_empty()),
        });
        executors.push(executor.clone());
        for (slot, identity) in identities.into_iter().enumerate() {
            clients.spawn(slot_loop::run(
                scheduler.clone(),
                identity,
                executor.clone(),
                slot,
                lifecycle.stopping(),
                config.shutdown.drain_timeout.get(),
                lifecycle.heartbeat(format!("slot {slot}"), START_TIMEOUT),
                status_line.clone(),
            ));
        }
    }
    lifecycle.ready(&format!(
        "Serving {slots} slots of scheduler {}",
        config.scheduler.endpoint
    ));
    let stopping = lifecycle.stopping();
    let line = || {
        let line = status_line.line(stopping.is_cancelled());
        let troubles = executors
            .iter()
            .filter_map(|executor| executor.availability.trouble())
            .chain(roots.retention_suspension(std::time::Instant::now()));
        troubles.fold(line, |line, trouble| format!("{line}; {trouble}"))
    };
    tokio::select! {
        () = async { while clients.join_next().await.is_some() {} } => {}
        () = lifecycle.keep_status(line) => {}
    }
    tracing::info!("laid out {}", roots.counts());
    tracing::info!("verified {}", cache.verified());
    Ok(())
}

fn connect_storage(config: &Config) -> grpc::Client {
    grpc::Client::connect(
        &config.storage.cas,
        &config.storage.action_cache,
        grpc::Options {
            download_concurrency: config.storage.download_concurrency,
            upload_concurrency: config.storage.upload_concurrency,
            ..Default::default()
        },
    )
}

type Opened = (Arc<FileCache>, Arc<InputRootBuilder>);

async fn open_directories(
    config: &Config,
    slots: usize,
    storage: &grpc::Client,
) -> Result<Opened, Failure> {
    let limits = CacheLimits {
        bytes: config.cache.maximum_size.get(),
        files: config.cache.maximum_files,
        minimum_free: config.cache.minimum_free.get(),
    };
    let (cache_path, build_path) = (
        config.cache.directory.clone(),
        config.build_directory.clone(),
    );
    let storage = storage.clone();
    let open = move || -> Result<Opened, Failure> {
        one_file_system(&cache_path, &build_path)?;
        let cache = FileCache::open(&cache_path, limits, storage)
            .map_err(|error| directory_failure("cache.directory", &cache_path, &error))?;
        let cache = Arc::new(cache);
        probe::check_own(&build_path)?;
        let roots = InputRootBuilder::open(&build_path, cache.clone(), slots)
            .map_err(|error| directory_failure("build_directory", &build_path, &error))?;
        Ok((cache, Arc::new(roots)))
    };
    tokio::task::spawn_blocking(open)
        .await
        .map_err(|error| Failure::Environment {
            message: error.to_string(),
        })?
}

fn directory_failure(key: &'static str, path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    let message = match error.kind() {
        io::ErrorKind::WouldBlock => {
            format!("{path} is used by another bb_worker; give each its own directory")
        }
        io::ErrorKind::PermissionDenied => {
            format!("{path} cannot be made or written to ({error}); let the worker's user own it")
        }
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            format!("{path} is no directory, or a file is in its way; choose another path")
        }
        _ => {
            return Failure::Environment {
                message: format!("could not open {path} ({key}): {error}"),
            };
        }
    };
    Failure::Configuration { key, message }
}

/// Files of the cache are linked into build directories. Neither needs to be there yet.
fn one_file_system(cache: &Path, build: &Path) -> Result<(), Failure> {
    let device = |path| std::fs::metadata(nearest_directory(path)).map(|metadata| metadata.dev());
    match (device(cache), device(build)) {
        (Ok(a), Ok(b)) if a != b => Err(Failure::Configuration {
            key: "build_directory",
            message: format!(
                "{} and cache.directory {} are on different file systems, but input files are hard \
                 links from one to the other; move one of them",
                build.display(),
                cache.display()
            ),
        }),
        _ => Ok(()),
    }
}

/// The number of `runners.group`.
fn group_of(runner: &Runner) -> Result<Option<u32>, Failure> {
    let name = runner.group.as_str();
    if name.is_empty() {
        return Ok(None);
    }
    if let Ok(number) = name.parse() {
        return Ok(Some(number));
    }
    let unknown = |why: String| Failure::Configuration {
        key: "runners.group",
        message: format!(
            "group {name:?} is not known on this host{why}; name one of the runner's user"
        ),
    };
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group.gid.as_raw())),
        Ok(None) => Err(unknown(String::new())),
        Err(error) => Err(unknown(format!(" ({error})"))),
    }
}

/// One for each slot. Their labels differ in `thread`, as with Buildbarn's worker.
fn identities(runner: &Runner) -> Result<Vec<slot_loop::Identity>, Failure> {
    let instance_name_prefix =
        InstanceName::parse(&runner.instance_name_prefix).map_err(|error| {
            Failure::Configuration {
                key: "runners.instance_name_prefix",
                message: error.to_string(),
            }
        })?;
    let mut labels = runner.worker_id.clone();
    if labels.is_empty() {
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        let hostname = hostname.to_string_lossy().into_owned();
        labels = BTreeMap::from([("hostname".to_owned(), hostname)]);
    }
    let slots = runner.slots();
    let width = (slots - 1).to_string().len();
    let identity = |slot: usize| {
        let mut worker_id = labels.clone();
        if slots > 1 {
            worker_id.insert("thread".to_owned(), format!("{slot:0width$}"));
        }
        slot_loop::Identity {
            worker_id,
            instance_name_prefix: instance_name_prefix.clone(),
            platform: Platform {
                properties: runner
                    .platform
                    .iter()
                    .map(|(name, value)| Property {
                        name: name.clone(),
                        value: value.clone(),
                    })
                    .collect(),
            },
            size_class: runner.size_class,
        }
    };
    Ok((0..slots).map(identity).collect())
}
