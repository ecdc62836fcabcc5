//! What all sandboxes have in common: a mount namespace that each sandbox's is a copy of
//! (mount_namespaces(7)).
//!
//! 1. Every file system is read-only but the build directory, the `writable_directories`, /proc, and
//!    what each sandbox has of its own in memory. So an action leaves nothing on the host, whatever
//!    directories there are open to all.
//! 2. Hidden paths are empty; what must be seen below them is mounted there again. The mount point of
//!    control groups is empty, too, until each sandbox mounts its own group there (`pid_namespace`).
//! 3. It is of one moment: when something was mounted on the host since, or the directories that it
//!    is about were made anew, then another must be made, which `HostSnapshot` tells.

use std::{
    ffi::CString,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::sched::unshare;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change};

use super::{
    containment_layer::Layers,
    devices,
    error::SandboxError,
    hidden_paths,
    mount_calls::{
        READ_ONLY, RECURSIVE, attach, c_path, copy_of_tree, make_mount_point, private_tmpfs,
        set_attributes,
    },
    mount_generation::HostSnapshot,
    namespace_fd::{Namespace, NamespaceKind},
    sandbox_context::{SHARED_MEMORY, SandboxContext},
};

/// As the first process of a sandbox has it (`pid_namespace`).
const CGROUPS: &str = "/sys/fs/cgroup";
/// The namespace, and what is to be done in a copy of it.
#[derive(Debug)]
pub(crate) struct MountTemplate {
    pub namespace: Namespace,
    pub snapshot: HostSnapshot,
    pub private: Vec<PrivateDirectory>,
    /// The place of the build directory.
    pub place: CString,
    /// Where the action's temporary directory is to be mounted.
    pub temporary: Vec<CString>,
}

/// A directory that is new and empty in each sandbox, but for those mounts.
#[derive(Debug)]
pub(crate) struct PrivateDirectory {
    pub place: PathBuf,
    pub keeps: Vec<PathBuf>,
}

impl MountTemplate {
    /// On a thread that is in the daemon's own mount namespace; leaves it in the template.
    pub(crate) fn make(
        spec: &SandboxContext,
        kind: NamespaceKind,
        snapshot: HostSnapshot,
    ) -> Result<Self, SandboxError> {
        unshare(kind.flag).map_err(SandboxError::at("unshare"))?;
        let namespace = Namespace::current(kind).map_err(SandboxError::at("mnt"))?;
        // What the host unmounts later is unmounted here too, so that it is not held by sandboxes that wait. What it
        // mounts is seen as well, and writable: hence actions begin with `SetupStep::MakeMountsPrivate`.
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .map_err(SandboxError::at("mounts of its own"))?;

        let mut writable = Vec::new();
        for path in spec.writable.iter().chain([&spec.build_directory]) {
            let named = || SandboxError::at(path.to_string_lossy());
            let path = fs::canonicalize(path).map_err(named())?;
            let tree = copy_of_tree(&path).map_err(named())?;
            writable.push((path, tree));
        }
        if let Some(image) = &spec.image {
            enter_image(image)?;
        }
        set_attributes(c"/", READ_ONLY, 0, RECURSIVE).map_err(SandboxError::at("read-only /"))?;
        if !spec.layers.contains(Layers::PROCESSES) {
            // Processes write to their own files there: uid_map, oom_score_adj, ….
            match set_attributes(c"/proc", 0, READ_ONLY, 0) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => tracing::debug!(%error, "/proc stays read-only for actions"),
            }
        }
        if spec.layers.contains(Layers::DEVICES) {
            devices::prepare_template()?;
        }
        // What is to be seen as a whole cannot be hidden.
        let is_seen = |path: &Path| writable.iter().any(|(seen, _)| path.starts_with(seen));
        let covers = match spec.layers.contains(Layers::HIDDEN) {
            true => hidden_paths::prepare_template(&spec.hidden, is_seen)?,
            false => Vec::new(),
        };
        if spec.cgroups.is_some() && Path::new(CGROUPS).is_dir() {
            private_tmpfs(Path::new(CGROUPS), c"mode=755,size=64k")
                .map_err(SandboxError::at(CGROUPS))?;
            set_attributes(c"/sys/fs/cgroup", READ_ONLY, 0, 0)
                .map_err(SandboxError::at(CGROUPS))?;
        }
        let (private, temporary) = private_directories(spec, &writable)?;
        for (path, tree) in &writable {
            make_mount_point(path)
                .and_then(|()| attach(tree, path))
                .map_err(SandboxError::at(path.to_string_lossy()))?;
        }
        for cover in &covers {
            set_attributes(cover, READ_ONLY, 0, 0)
                .map_err(SandboxError::at(cover.to_string_lossy().into_owned()))?;
        }
        let place = fs::canonicalize(&spec.build_directory)
            .and_then(|place| c_path(&place))
            .map_err(SandboxError::at("build directory"))?;
        Ok(MountTemplate {
            namespace,
            snapshot,
            private,
            place,
            temporary,
        })
    }
}

/// What each sandbox has of its own in memory, and where the action's temporary directory is mounted.
fn private_directories(
    spec: &SandboxContext,
    writable: &[(PathBuf, OwnedFd)],
) -> Result<(Vec<PrivateDirectory>, Vec<CString>), SandboxError> {
    let mut private = Vec::new();
    let mut temporary = Vec::new();
    let below = |place: &Path| -> Vec<PathBuf> {
        let paths = writable.iter().map(|(path, _)| path);
        paths
            .filter(|path| path.starts_with(place))
            .cloned()
            .collect()
    };
    for place in &spec.temporary {
        // The action's temporary directory there would hide it.
        let keeps = below(place);
        if keeps.is_empty() {
            temporary.push(c_path(place).map_err(SandboxError::at("temporary directory"))?);
        } else {
            private.push(PrivateDirectory {
                place: place.clone(),
                keeps,
            });
        }
    }
    let place = PathBuf::from(SHARED_MEMORY);
    if place.is_dir() {
        let keeps = below(&place);
        private.push(PrivateDirectory { place, keeps });
    }
    for PrivateDirectory { place, keeps } in &private {
        if !keeps.is_empty() {
            private_tmpfs(place, c"mode=1777")
                .map_err(SandboxError::at(place.to_string_lossy()))?;
        }
    }
    Ok((private, temporary))
}

/// Makes a tree of files this thread's root, with the host's /proc, /sys and /dev for now.
fn enter_image(image: &Path) -> Result<(), SandboxError> {
    let named = |path: &Path| SandboxError::at(path.to_string_lossy().into_owned());
    let tree = copy_of_tree(image).map_err(named(image))?;
    attach(&tree, image).map_err(named(image))?;
    for directory in ["proc", "sys", "dev"] {
        let place = image.join(directory);
        let tree = copy_of_tree(&Path::new("/").join(directory)).map_err(named(&place))?;
        attach(&tree, &place).map_err(named(&place))?;
    }
    // The new root on top of the old one, which is then taken from below it (pivot_root(2)). The
    // working directory is this thread's own since it left the host's mounts.
    rustix::process::chdir(image).map_err(SandboxError::at(image.to_string_lossy()))?;
    rustix::process::pivot_root(".", ".").map_err(SandboxError::at(image.to_string_lossy()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .map_err(SandboxError::at("the host's root"))?;
    Ok(())
}
