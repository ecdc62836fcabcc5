//! What all sandboxes are made from, decided when the daemon starts.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    cgroups::ActionCgroupParent, containment_layer::Layers, devices, init_program::InitProgram,
    mount_generation::MountGenerationCounter, network_namespace::NetworkNamespacePool,
};
use crate::config::runner::{Config, Root};

/// Where the action's temporary directory is mounted.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];
/// Where POSIX shared memory is (shm_overview(7)).
pub(super) const SHARED_MEMORY: &str = "/dev/shm";

/// What all sandboxes of a runner are made from.
#[derive(Debug)]
pub(crate) struct SandboxContext {
    pub layers: Layers,
    pub build_directory: PathBuf,
    /// `writable_directories` of the configuration.
    pub writable: Vec<PathBuf>,
    /// `containment.hidden_paths` of the configuration.
    pub hidden: Vec<PathBuf>,
    /// The directories of `TEMPORARY` that exist, without symbolic links, each once.
    pub temporary: Vec<PathBuf>,
    /// A tree of files that actions see in place of the host's.
    pub image: Option<PathBuf>,
    /// Whether the action's user is in /etc/passwd and /etc/group.
    pub has_account_files: bool,
    /// How many pseudo-terminals each action may have.
    pub terminals: u32,
    /// `None` where actions have no PID namespaces.
    pub init: Option<Arc<InitProgram>>,
    pub networks: NetworkNamespacePool,
    /// `None` where actions have no control groups.
    pub cgroups: Option<Arc<ActionCgroupParent>>,
    /// Tells whether the host's mounts have changed.
    pub mount_generation: MountGenerationCounter,
}

impl SandboxContext {
    pub(crate) fn new(
        config: &Config,
        layers: Layers,
        cgroups: Option<ActionCgroupParent>,
    ) -> io::Result<Self> {
        let image = config.root.image();
        let image = image.map(|path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()));
        let root = image.as_deref().unwrap_or(Path::new("/"));
        let mut temporary: Vec<PathBuf> = TEMPORARY
            .iter()
            .map(|path| root.join(&path[1..]))
            .filter_map(|path| fs::canonicalize(path).ok())
            .filter(|path| path.is_dir())
            .filter_map(|path| Some(Path::new("/").join(path.strip_prefix(root).ok()?)))
            .collect();
        temporary.dedup();
        let init = match layers.contains(Layers::PROCESSES) {
            true => Some(Arc::new(InitProgram::new()?)),
            false => None,
        };
        Ok(SandboxContext {
            layers,
            build_directory: config.build_directory.clone(),
            writable: config.writable_directories.clone(),
            hidden: config.containment.hidden_paths.clone(),
            temporary,
            image,
            has_account_files: config.root != Root::Input,
            terminals: devices::terminals(config.users.count),
            init,
            networks: NetworkNamespacePool::default(),
            cgroups: cgroups.map(Arc::new),
            mount_generation: MountGenerationCounter::start()?,
        })
    }

    /// The directory that actions see as `/`, as this daemon sees it.
    pub(crate) fn root(&self) -> &Path {
        self.image.as_deref().unwrap_or(Path::new("/"))
    }

    /// Directories that all actions share when sandboxes have no mounts of their own.
    pub(crate) fn shared(&self) -> Vec<PathBuf> {
        let mut shared = self.temporary.clone();
        shared.push(PathBuf::from(SHARED_MEMORY));
        shared
    }
}
