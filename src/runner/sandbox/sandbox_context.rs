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

/// Where the action's temporary directory appears.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];
pub(super) const SHARED_MEMORY: &str = "/dev/shm";

#[derive(Debug)]
pub(crate) struct SandboxContext {
    pub layers: Layers,
    pub build_directory: PathBuf,
    pub writable: Vec<PathBuf>,
    pub hidden: Vec<PathBuf>,
    /// Existing places of `TEMPORARY`, without symbolic links, each once.
    pub temporary: Vec<PathBuf>,
    /// Another tree in place of the host's.
    pub image: Option<PathBuf>,
    /// Whether /etc/passwd and /etc/group are to tell the action's user.
    pub has_account_files: bool,
    /// The most pseudo-terminals.
    pub terminals: u32,
    pub init: Option<Arc<InitProgram>>,
    pub networks: NetworkNamespacePool,
    pub cgroups: Option<Arc<ActionCgroupParent>>,
    /// Of the host's mounts.
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
