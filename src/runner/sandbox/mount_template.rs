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
        READ_ONLY, RECURSIVE, attach, c_path, clone_tree_recursive, make_mount_point, mount_tmpfs,
        set_attributes,
    },
    mount_generation::HostSnapshot,
    namespace_fd::{NamespaceFd, NamespaceKind},
    sandbox_context::{SHARED_MEMORY, SandboxContext},
};

/// Where the init process of a sandbox mounts its control group (`pid_namespace`).
const CGROUPS: &str = "/sys/fs/cgroup";

/// The namespace, and what is to be done in a copy of it.
#[derive(Debug)]
pub(crate) struct MountTemplate {
    pub namespace: NamespaceFd,
    /// The host at the moment when it was made.
    pub snapshot: HostSnapshot,
    pub tmpfs_directories: Vec<TmpfsDirectory>,
    /// Where the build directory is mounted.
    pub build_mount_point: CString,
    /// Where the action's temporary directory is to be mounted.
    pub temporary: Vec<CString>,
}

/// A directory that is new and empty in each sandbox, but for what is mounted below it.
#[derive(Debug)]
pub(crate) struct TmpfsDirectory {
    pub mount_point: PathBuf,
    /// Where writable directories of the host are mounted below it.
    pub writable_mounts: Vec<PathBuf>,
}

impl MountTemplate {
    /// Makes a template, on a thread that is in the daemon's own mount namespace; leaves the thread in the template.
    pub(crate) fn make(
        context: &SandboxContext,
        kind: NamespaceKind,
        snapshot: HostSnapshot,
    ) -> Result<Self, SandboxError> {
        unshare(kind.flag).map_err(SandboxError::at("unshare"))?;
        let namespace = NamespaceFd::current(kind).map_err(SandboxError::at("mnt"))?;
        // What the host unmounts later is unmounted here too, so that it is not held by sandboxes that wait. What it
        // mounts is seen as well, and writable: hence actions begin with `SetupStep::MakeMountsPrivate`.
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .map_err(SandboxError::at("mounts of its own"))?;

        let mut writable = Vec::new();
        for path in context.writable.iter().chain([&context.build_directory]) {
            let named = || SandboxError::at(path.to_string_lossy());
            let path = fs::canonicalize(path).map_err(named())?;
            let tree = clone_tree_recursive(&path).map_err(named())?;
            writable.push((path, tree));
        }
        if let Some(image) = &context.image {
            enter_image(image)?;
        }
        set_attributes(c"/", READ_ONLY, 0, RECURSIVE).map_err(SandboxError::at("read-only /"))?;
        if !context.layers.contains(Layers::PROCESSES) {
            // Processes write to their own files there: uid_map, oom_score_adj, ….
            match set_attributes(c"/proc", 0, READ_ONLY, 0) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => tracing::debug!(%error, "/proc stays read-only for actions"),
            }
        }
        if context.layers.contains(Layers::DEVICES) {
            devices::prepare_template()?;
        }
        // What is writable is there as a whole, and cannot be hidden.
        let is_writable = |path: &Path| {
            writable
                .iter()
                .any(|(mounted, _)| path.starts_with(mounted))
        };
        let hiding_tmpfs = match context.layers.contains(Layers::HIDDEN) {
            true => hidden_paths::prepare_template(&context.hidden, is_writable)?,
            false => Vec::new(),
        };
        if context.cgroups.is_some() && Path::new(CGROUPS).is_dir() {
            mount_tmpfs(Path::new(CGROUPS), c"mode=755,size=64k")
                .map_err(SandboxError::at(CGROUPS))?;
            set_attributes(c"/sys/fs/cgroup", READ_ONLY, 0, 0)
                .map_err(SandboxError::at(CGROUPS))?;
        }
        let (tmpfs_directories, temporary) = tmpfs_directories(context, &writable)?;
        for (path, tree) in &writable {
            make_mount_point(path)
                .and_then(|()| attach(tree, path))
                .map_err(SandboxError::at(path.to_string_lossy()))?;
        }
        for mount_point in &hiding_tmpfs {
            set_attributes(mount_point, READ_ONLY, 0, 0)
                .map_err(SandboxError::at(mount_point.to_string_lossy().into_owned()))?;
        }
        let build_mount_point = fs::canonicalize(&context.build_directory)
            .and_then(|path| c_path(&path))
            .map_err(SandboxError::at("build directory"))?;
        Ok(MountTemplate {
            namespace,
            snapshot,
            tmpfs_directories,
            build_mount_point,
            temporary,
        })
    }
}

/// Decides which directories each sandbox has of its own in memory, and where the action's temporary directory is
/// mounted.
fn tmpfs_directories(
    context: &SandboxContext,
    writable: &[(PathBuf, OwnedFd)],
) -> Result<(Vec<TmpfsDirectory>, Vec<CString>), SandboxError> {
    let mut directories = Vec::new();
    let mut temporary = Vec::new();
    let writable_below = |mount_point: &Path| -> Vec<PathBuf> {
        let paths = writable.iter().map(|(path, _)| path);
        paths
            .filter(|path| path.starts_with(mount_point))
            .cloned()
            .collect()
    };
    for mount_point in &context.temporary {
        // The action's temporary directory there would hide it.
        let writable_mounts = writable_below(mount_point);
        if writable_mounts.is_empty() {
            temporary.push(c_path(mount_point).map_err(SandboxError::at("temporary directory"))?);
        } else {
            directories.push(TmpfsDirectory {
                mount_point: mount_point.clone(),
                writable_mounts,
            });
        }
    }
    let mount_point = PathBuf::from(SHARED_MEMORY);
    if mount_point.is_dir() {
        let writable_mounts = writable_below(&mount_point);
        directories.push(TmpfsDirectory {
            mount_point,
            writable_mounts,
        });
    }
    for TmpfsDirectory {
        mount_point,
        writable_mounts,
    } in &directories
    {
        if !writable_mounts.is_empty() {
            mount_tmpfs(mount_point, c"mode=1777")
                .map_err(SandboxError::at(mount_point.to_string_lossy()))?;
        }
    }
    Ok((directories, temporary))
}

/// Makes an image's tree of files this thread's root, with the host's /proc, /sys and /dev for now.
fn enter_image(image: &Path) -> Result<(), SandboxError> {
    let named = |path: &Path| SandboxError::at(path.to_string_lossy().into_owned());
    let tree = clone_tree_recursive(image).map_err(named(image))?;
    attach(&tree, image).map_err(named(image))?;
    for directory in ["proc", "sys", "dev"] {
        let mount_point = image.join(directory);
        let tree =
            clone_tree_recursive(&Path::new("/").join(directory)).map_err(named(&mount_point))?;
        attach(&tree, &mount_point).map_err(named(&mount_point))?;
    }
    // The new root on top of the old one, which is then taken from below it (pivot_root(2)). The
    // working directory is this thread's own since it left the host's mounts.
    rustix::process::chdir(image).map_err(SandboxError::at(image.to_string_lossy()))?;
    rustix::process::pivot_root(".", ".").map_err(SandboxError::at(image.to_string_lossy()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .map_err(SandboxError::at("the host's root"))?;
    Ok(())
}
