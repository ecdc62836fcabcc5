//! bb_worker.toml, see bb_worker.toml(5).

use std::{collections::BTreeMap, num::NonZeroUsize, path::PathBuf};

use serde::Deserialize;

use super::{Check, Duration, Endpoint, Log, Size};

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub scheduler: Scheduler,
    pub storage: Storage,
    pub cache: Cache,
    /// Emptied at start-up. On the same file system as `cache.directory`, because of hardlinks.
    pub build_directory: PathBuf,
    pub runners: Vec<Runner>,
    pub shutdown: Shutdown,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduler {
    pub endpoint: Endpoint,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    pub cas: Endpoint,
    pub action_cache: Endpoint,
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

#[derive(Clone, Debug, PartialEq, Deserialize)]
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

#[derive(Clone, Debug, PartialEq, Deserialize)]
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
}

/// Whose an action's input files are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
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

#[derive(Clone, Debug, PartialEq, Deserialize)]
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
            runners: vec![Runner::default()],
            shutdown: Shutdown::default(),
            log: Log::default(),
        }
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Scheduler {
            endpoint: Endpoint::Tcp("127.0.0.1:8983".to_owned()),
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        let embedded = Endpoint::Tcp("127.0.0.1:8980".to_owned());
        Storage {
            cas: embedded.clone(),
            action_cache: embedded,
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

impl Check for Config {
    fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, path) in [
            ("build_directory", &self.build_directory),
            ("cache.directory", &self.cache.directory),
        ] {
            if !path.is_absolute() {
                return Err((key, "the directory must be an absolute path".to_owned()));
            }
        }
        if self.build_directory.starts_with(&self.cache.directory)
            || self.cache.directory.starts_with(&self.build_directory)
        {
            return Err((
                "build_directory",
                "it must be neither inside nor around cache.directory, since it is emptied at start-up".to_owned(),
            ));
        }
        if self.runners.is_empty() {
            return Err((
                "runners",
                "there must be at least one [[runners]] section".to_owned(),
            ));
        }
        for runner in &self.runners {
            if let Err(error) = crate::instance::InstanceName::parse(&runner.instance_name_prefix) {
                return Err(("runners.instance_name_prefix", error.to_string()));
            }
        }
        Ok(())
    }
}
