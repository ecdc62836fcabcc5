//! What is mounted for one action beside what its sandbox has, and where its input root is then.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::OFlags;

use super::{
    build_directory::{BuildDirectory, BuildDirectoryError},
    input_root_chroot::{InputRootChroot, InputRootChrootError},
    run_spec::RunSpec,
    sandbox::{SandboxMounts, clone_mount_restricted},
    spawn::SetupStep,
};
use crate::{config::runner::Root, path::RelativePath};

/// What is mounted for one action when its process starts.
#[derive(Debug)]
pub(super) struct ActionMounts {
    /// The directory, as the action sees it, at which the input root's path starts; `None` for the build directory.
    pub base: Option<CString>,
    /// The path of the input root below `base`.
    pub input_root: CString,
    /// What the new process does to mount it.
    pub steps: Vec<SetupStep<'static>>,
    /// Removes, on drop, what was made in an input root that becomes `/`.
    _chroot_guard: Option<InputRootChroot>,
}

/// Why what one action needs could not be mounted.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActionMountsError {
    #[error(transparent)]
    Open(#[from] BuildDirectoryError),
    #[error("Failed to start process: could not {what}: {error}")]
    Mount {
        what: &'static str,
        error: io::Error,
    },
    #[error("Failed to start process: could not make the input root a root directory: {0}")]
    Root(#[from] InputRootChrootError),
}

impl ActionMounts {
    /// Prepares what an action has mounted. In a sandbox without mounts, everything is where the host has it.
    pub(super) fn prepare(
        spec: &RunSpec,
        root_kind: &Root,
        build: &BuildDirectory,
        sandbox: Option<&SandboxMounts>,
    ) -> Result<Self, ActionMountsError> {
        let mut mounts = ActionMounts {
            base: None,
            input_root: c_string(spec.input_root.to_string()),
            steps: Vec::new(),
            _chroot_guard: None,
        };
        let Some(sandbox) = sandbox else {
            return Ok(mounts);
        };
        let clone_mount = |path: &RelativePath, what| {
            let directory = build.directory(path, OFlags::PATH)?;
            clone_mount_restricted(directory.as_fd())
                .map_err(|error| ActionMountsError::Mount { what, error })
        };
        let temporary = |mount_points: &[CString]| -> Result<Vec<_>, ActionMountsError> {
            let Some(path) = &spec.temporary_directory else {
                return Ok(Vec::new());
            };
            mount_points
                .iter()
                .map(|mount_point| {
                    let tree = clone_mount(path, "mount the temporary directory")?;
                    Ok(attach(tree, mount_point))
                })
                .collect()
        };
        if *root_kind == Root::Input {
            let directory = build.directory(&spec.input_root, OFlags::PATH)?;
            let chroot = InputRootChroot::prepare(directory, &sandbox.mount_point)?;
            let tree = clone_mount(&spec.input_root, "mount the input root")?;
            mounts.steps.push(attach(tree, &sandbox.mount_point));
            mounts
                .steps
                .extend(temporary(&[chroot.temporary_mount_point()])?);
            mounts.steps.extend(chroot.steps());
            mounts.base = Some(c"/".to_owned());
            mounts.input_root = c".".to_owned();
            mounts._chroot_guard = Some(chroot);
            return Ok(mounts);
        }
        mounts.steps.extend(temporary(&sandbox.temporary)?);
        if let Some((directory, name)) = spec.input_root.split_last()
            && !directory.is_root()
        {
            let tree = clone_mount(&directory, "mount the action's directory")?;
            mounts.steps.push(attach(tree, &sandbox.mount_point));
            mounts.base = Some(sandbox.mount_point.clone());
            mounts.input_root = c_string(name.to_string());
        }
        Ok(mounts)
    }
}

/// The step that mounts a tree which is attached nowhere.
fn attach(tree: OwnedFd, mount_point: &CStr) -> SetupStep<'static> {
    SetupStep::AttachMount {
        tree,
        mount_point: mount_point.to_owned(),
    }
}

/// The C string of a path that was parsed, and so has no NUL.
pub(super) fn c_string(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}
