//! The layer `containment.mounts`: the host's files read-only, and directories of an action's own
//! (mount_namespaces(7)).
//!
//! 1. What all sandboxes have in common is copied from a template (`mount_template`); what an action may write
//!    is made anew: shared memory, terminals, temporary directories, /proc.
//! 2. The action's user has a name in it (`account_files`), as soon as there is a user.
//! 3. An action's directory is mounted on the build directory when it starts, so that its paths are the
//!    same in every slot and it sees nobody else's.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sched::CloneFlags;
use rustix::{
    fs::{Mode, OFlags},
    thread::LinkNameSpaceType,
};

use super::{
    account_files::AccountFiles,
    containment_layer::{Layer, Layers, Probe},
    devices,
    error::SandboxError,
    mount_calls::{attach, clone_tree_recursive, make_mount_point, mount_tmpfs},
    mount_generation::{DirectoryId, HostSnapshot},
    mount_template::{MountTemplate, TmpfsDirectory},
    namespace_fd::{NamespaceFd, NamespaceKind},
    sandbox_context::{SHARED_MEMORY, SandboxContext},
};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::MOUNTS,
    key: "containment.mounts",
    demand: |containment| containment.mounts,
    needs: Layers::empty(),
    probe: Probe::Sandbox,
    unshared_namespace: Some(KIND),
    on: "actions see the host's files read-only, and have their own directories at constant paths",
    off: "actions share /tmp, /var/tmp and /dev/shm, where what they leave is removed, and write \
          wherever the host lets every user write",
};

const KIND: NamespaceKind = NamespaceKind {
    flag: CloneFlags::CLONE_NEWNS,
    name: "mnt",
    link: LinkNameSpaceType::Mount,
};

/// What one sandbox has mounted.
#[derive(Debug)]
pub(crate) struct SandboxMounts {
    /// The build directory as it is in the sandbox.
    pub build_directory: OwnedFd,
    /// Where the build directory is mounted in the sandbox.
    pub mount_point: CString,
    identity: DirectoryId,
    /// The host at the moment when the template was made.
    snapshot: HostSnapshot,
    /// Where the action's temporary directory must be mounted.
    pub temporary: Vec<CString>,
    pub account_files: AccountFiles,
}

/// Moves a thread to and fro between the host's mounts and their template.
#[derive(Debug)]
pub(super) struct MountNamespaceSwitcher {
    host: NamespaceFd,
    template: Option<MountTemplate>,
}

impl MountNamespaceSwitcher {
    /// For a thread that is in the daemon's own mount namespace.
    pub(super) fn new() -> io::Result<Self> {
        Ok(MountNamespaceSwitcher {
            host: NamespaceFd::current(KIND)?,
            template: None,
        })
    }

    /// Moves this thread back to the host's mounts.
    pub(super) fn enter_host(&self) -> Result<(), SandboxError> {
        let entered = self.host.enter();
        entered.map_err(SandboxError::at("the host's mounts"))
    }

    /// Moves this thread from the host's mounts to their template, which is made anew when the host has
    /// changed.
    pub(super) fn enter_template(
        &mut self,
        context: &SandboxContext,
    ) -> Result<&MountTemplate, SandboxError> {
        let hidden: Vec<PathBuf> = context
            .hidden
            .iter()
            .map(|path| context.root().join(path.strip_prefix("/").unwrap_or(path)))
            .collect();
        let directories = [&context.build_directory]
            .into_iter()
            .chain(&context.writable)
            .chain(&hidden)
            .map(PathBuf::as_path);
        let now = HostSnapshot::now(&context.mount_generation, directories);
        let template = match self.template.take() {
            Some(template) if template.snapshot == now => template,
            _ => MountTemplate::make(context, KIND, now)?,
        };
        let entered = template.namespace.enter();
        entered.map_err(SandboxError::at("template"))?;
        Ok(self.template.insert(template))
    }
}

impl SandboxMounts {
    /// Mounts what each sandbox has of its own, on a thread that is in a copy of the template.
    pub(crate) fn prepare(
        context: &SandboxContext,
        template: &MountTemplate,
    ) -> Result<Self, SandboxError> {
        for directory in &template.tmpfs_directories {
            let step = directory.mount_point.to_string_lossy();
            mount_tmpfs_directory(directory).map_err(SandboxError::at(step))?;
        }
        if context.layers.contains(Layers::DEVICES) {
            devices::prepare(context.terminals)?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let build_directory = rustix::fs::open(&*template.build_mount_point, flags, Mode::empty())
            .map_err(SandboxError::at("build directory"))?;
        let scratch = Path::new(SHARED_MEMORY);
        let has_scratch = template
            .tmpfs_directories
            .iter()
            .any(|it| it.mount_point == scratch);
        let account_files = match context.has_account_files && has_scratch {
            true => AccountFiles::prepare(context.root(), scratch)
                .map_err(SandboxError::at("/etc/passwd and /etc/group"))?,
            false => AccountFiles::default(),
        };
        Ok(SandboxMounts {
            account_files,
            identity: DirectoryId::of_descriptor(build_directory.as_fd())
                .map_err(SandboxError::at("build directory"))?,
            snapshot: template.snapshot.clone(),
            build_directory,
            mount_point: template.build_mount_point.clone(),
            temporary: template.temporary.clone(),
        })
    }

    /// Whether these mounts are of the host as it is: of this build directory, of this generation of its mounts or a
    /// later one (`MountGenerationCounter`), and on the files of users and groups that it has now.
    pub(crate) fn is_current(&self, build_directory: DirectoryId, mount_generation: u64) -> bool {
        self.identity == build_directory
            && self.snapshot.is_at_least(mount_generation)
            && self.account_files.is_current()
    }
}

/// Mounts a new file system on a directory, and in it what must be writable there.
fn mount_tmpfs_directory(directory: &TmpfsDirectory) -> io::Result<()> {
    let trees: Vec<OwnedFd> = directory
        .writable_mounts
        .iter()
        .map(|path| clone_tree_recursive(path))
        .collect::<io::Result<_>>()?;
    mount_tmpfs(&directory.mount_point, c"mode=1777")?;
    for (path, tree) in directory.writable_mounts.iter().zip(&trees) {
        make_mount_point(path)?;
        attach(tree, path)?;
    }
    Ok(())
}
