//! The worker: lays out input roots, has a runner run commands in them, uploads their outputs.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::process::{Resource, Rlimit};

use self::availability::Availability;
use crate::{
    config::worker::{Config, Inputs, Runner},
    daemon::{self, Failure, Life, Program},
    instance::InstanceName,
    proto::{
        reapi::{Platform, platform::Property},
        runner::runner_client::RunnerClient,
    },
    storage::remote,
};

pub mod availability;
pub mod beneath;
pub mod cache;
pub mod client;
pub mod command;
pub mod directories;
pub mod execute;
pub mod fault;
pub mod health;
pub mod input_root;
pub mod lru;
pub mod outputs;
mod probe;
pub mod removal;
pub mod report;
pub mod slot;
mod story;
pub mod task;
pub mod tree;

pub use probe::probe;

pub const PROGRAM: Program = Program {
    name: "bb_worker",
    about: "Lays out input roots, has a runner run build actions in them, and uploads their outputs",
};

/// How soon the status line tells of a change.
const STATUS_INTERVAL: std::time::Duration = std::time::Duration::from_secs(2);
/// How long a slot may take until its loop runs.
const A_START: std::time::Duration = std::time::Duration::from_secs(60);

/// Runs until told to stop, then until the actions that are running have ended.
pub async fn run(config: Config, life: Life) -> Result<(), Failure> {
    raise_file_limit();
    let slots: usize = config.runners.iter().map(slots).sum();
    let storage = connect_storage(&config);
    let (cache, roots) = open_directories(&config, slots, &storage).await?;
    let (files, bytes) = cache.usage();
    tracing::info!(files, bytes, directory = %cache.path().display(), "opened the cache");
    life.vital("the cache", {
        let cache = cache.clone();
        move || {
            cache.usage();
        }
    });
    let directories = Arc::new(directories::Directories::new(
        storage.clone(),
        config.storage.maximum_message_size.get(),
        config.cache.maximum_directories_size.get(),
    ));
    refuse_equal_slots(&config)?;
    let scheduler = daemon::connect(&config.scheduler.endpoint);
    let mut executors = Vec::new();
    let mut clients = tokio::task::JoinSet::new();
    for runner in &config.runners {
        let identities = identities(runner)?;
        if runner.inputs == Inputs::Private {
            tracing::info!(
                runner = %runner.endpoint,
                shares_blocks = cache.shares_blocks(),
                "input files are the actions' own, and each input root is made anew"
            );
        }
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
            clients.spawn(client::run(
                scheduler.clone(),
                identity,
                executor.clone(),
                slot,
                life.stopping(),
                config.shutdown.drain_timeout.get(),
                life.heart(format!("slot {slot}"), A_START),
            ));
        }
    }
    let serving = format!(
        "Serving {slots} slots of scheduler {}",
        config.scheduler.endpoint
    );
    life.ready(&serving);
    let telling = tokio::spawn(tell_status(life.clone(), serving, executors, roots.clone()));
    while clients.join_next().await.is_some() {}
    telling.abort();
    tracing::info!("laid out {}", roots.counts());
    Ok(())
}

/// Keeps the status line true: what does not go as it should comes first.
async fn tell_status(
    life: Life,
    serving: String,
    executors: Vec<Arc<execute::Executor>>,
    roots: Arc<input_root::Roots>,
) {
    let mut told = serving.clone();
    let mut interval = tokio::time::interval(STATUS_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let mut parts: Vec<String> = executors
            .iter()
            .filter_map(|executor| executor.availability.trouble())
            .collect();
        parts.extend(roots.why_not_kept(std::time::Instant::now()));
        parts.push(serving.clone());
        let status = parts.join("; ");
        if status != told {
            life.status(&status);
            told = status;
        }
    }
}

fn connect_storage(config: &Config) -> remote::Client {
    remote::Client::connect(
        &config.storage.cas,
        &config.storage.action_cache,
        remote::Options {
            download_concurrency: config.storage.download_concurrency,
            upload_concurrency: config.storage.upload_concurrency,
        },
    )
}

type Opened = (Arc<cache::Cache>, Arc<input_root::Roots>);

async fn open_directories(
    config: &Config,
    slots: usize,
    storage: &remote::Client,
) -> Result<Opened, Failure> {
    let limits = cache::Limits {
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
        let cache = cache::Cache::open(&cache_path, limits, storage)
            .map_err(|error| directory_failure("cache.directory", &cache_path, &error))?;
        let cache = Arc::new(cache);
        let roots = input_root::Roots::open(&build_path, cache.clone(), slots)
            .map_err(|error| directory_failure("build_directory", &build_path, &error))?;
        one_file_system(&cache_path, &build_path)?;
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
        _ => {
            return Failure::Environment {
                message: format!("could not open {path} ({key}): {error}"),
            };
        }
    };
    Failure::Configuration { key, message }
}

/// Files of the cache are linked into build directories.
fn one_file_system(cache: &Path, build: &Path) -> Result<(), Failure> {
    let device = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.dev());
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

fn slots(runner: &Runner) -> usize {
    match runner.concurrency {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        concurrency => concurrency,
    }
}

/// One for each slot. Their labels differ in `thread`, as with Buildbarn's worker.
fn identities(runner: &Runner) -> Result<Vec<client::Identity>, Failure> {
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
    let slots = slots(runner);
    let width = (slots - 1).to_string().len();
    let identity = |slot: usize| {
        let mut worker_id = labels.clone();
        if slots > 1 {
            worker_id.insert("thread".to_owned(), format!("{slot:0width$}"));
        }
        client::Identity {
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

/// Two slots that a scheduler cannot tell from one another would both be given each other's actions.
fn refuse_equal_slots(config: &Config) -> Result<(), Failure> {
    let mut seen: Vec<(usize, client::Identity)> = Vec::new();
    for (number, runner) in config.runners.iter().enumerate() {
        for identity in identities(runner)? {
            if let Some((other, _)) = seen.iter().find(|(_, known)| *known == identity) {
                return Err(Failure::Configuration {
                    key: "runners.worker_id",
                    message: format!(
                        "[[runners]] sections {} and {} ({} and {}) have equal labels {} and serve the same platform, so that a scheduler could not tell their slots apart and would run each action twice; give each a worker_id of its own, such as {{ hostname = \"…\", runner = \"{}\" }}",
                        other + 1,
                        number + 1,
                        config.runners[*other].endpoint,
                        runner.endpoint,
                        serde_json::to_string(&identity.worker_id).unwrap_or_default(),
                        number + 1,
                    ),
                });
            }
            // Slots of one runner differ in `thread`.
            seen.push((number, identity));
        }
    }
    Ok(())
}

/// Deep trees need many open directories; systemd leaves it to daemons to raise their limit.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "could not raise the limit of open files");
    }
}

/// The closest directory above `path`, or `path` itself, that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|ancestor| ancestor.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}
