//! What a worker is made of, from its configuration.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    fencing,
    inputs::{
        WorkerBuildDirectory,
        file_cache::{CacheLimits, FileCache},
    },
    slot_loop::SlotIdentity,
};
use crate::{
    config::worker::{Config, Runner},
    daemon::{self, Credentials, Failure, disk::nearest_directory},
    instance::InstanceName,
    metadata::FencingToken,
    proto::reapi::{Platform, platform::Property},
    storage::{Backend, grpc},
};

pub(super) fn connect_storage(
    config: &Config,
    credentials: Credentials,
) -> Result<Backend, Failure> {
    let options = storage_options(config, credentials);
    // Embedded is nothing here, as the configuration's check says.
    Backend::connect_to(&config.storage.places(), None, &options)
}

pub(super) fn storage_options(config: &Config, credentials: Credentials) -> grpc::Options {
    grpc::Options {
        download_concurrency: config.storage.download_concurrency,
        upload_concurrency: config.storage.upload_concurrency,
        credentials,
        ..Default::default()
    }
}

/// The file cache and the build directory.
pub(super) struct OpenedDirectories {
    pub cache: Arc<FileCache>,
    pub build_directory: Arc<WorkerBuildDirectory>,
    /// `None` when this start could not be counted.
    pub token: Option<FencingToken>,
}

pub(super) async fn open_directories(
    config: &Config,
    slots: usize,
    storage: &Backend,
) -> Result<OpenedDirectories, Failure> {
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
    let open = move || -> Result<OpenedDirectories, Failure> {
        one_file_system(&cache_path, &build_path)?;
        let cache = FileCache::open(&cache_path, limits, storage)
            .map_err(|error| directory_failure("cache.directory", &cache_path, &error))?;
        let cache = Arc::new(cache);
        cache.offer_local_files();
        check_own(&build_path)?;
        let build_directory = WorkerBuildDirectory::open(&build_path, cache.clone(), slots)
            .map_err(|error| directory_failure("build_directory", &build_path, &error))?;
        // A scheduler waits a little longer for the worker before this one, no more.
        let token = fencing::count_start(&cache_path)
            .inspect_err(|error| {
                tracing::warn!(directory = %cache_path.display(), %error, "could not count this start");
            })
            .ok();
        Ok(OpenedDirectories {
            cache,
            build_directory,
            token,
        })
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
pub(super) fn one_file_system(cache: &Path, build: &Path) -> Result<(), Failure> {
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
pub(super) fn group_of(runner: &Runner) -> Result<Option<u32>, Failure> {
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
pub(super) fn identities(runner: &Runner) -> Result<Vec<SlotIdentity>, Failure> {
    let instance_name_prefix =
        InstanceName::parse(&runner.instance_name_prefix).map_err(|error| {
            Failure::Configuration {
                key: "runners.instance_name_prefix",
                message: error.to_string(),
            }
        })?;
    let mut labels = runner.worker_id.clone();
    if labels.is_empty() {
        labels = BTreeMap::from([("hostname".to_owned(), daemon::hostname())]);
    }
    let slots = runner.slots();
    let width = (slots - 1).to_string().len();
    let identity = |slot: usize| {
        let mut worker_id = labels.clone();
        if slots > 1 {
            worker_id.insert("thread".to_owned(), format!("{slot:0width$}"));
        }
        SlotIdentity {
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

/// What a start would remove is a worker's.
pub(super) fn check_own(build: &Path) -> Result<(), Failure> {
    match foreign_entry(build) {
        None => Ok(()),
        Some(entry) => Err(Failure::Configuration {
            key: "build_directory",
            message: format!(
                "it is emptied at start-up, and no worker made {}; move that, or choose a directory of its own",
                entry.display()
            ),
        }),
    }
}

/// Something in the build directory that no worker left there.
fn foreign_entry(build: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(build).ok()?;
    let names: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let is = |path: &PathBuf, name: &str| path.file_name().is_some_and(|known| known == name);
    // Every worker makes it first; older ones called it trash.
    if names
        .iter()
        .any(|path| is(path, "deleted") || is(path, "trash"))
    {
        return None;
    }
    let is_ours = |path: &PathBuf| {
        let number = |name: &str| name.chars().all(|c| c.is_ascii_digit());
        is(path, "lost+found")
            || path.is_dir()
                && path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .is_some_and(number)
    };
    names.into_iter().find(|path| !is_ours(path))
}
