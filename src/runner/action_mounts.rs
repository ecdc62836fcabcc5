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
    sandbox::{SandboxMounts, copy_of_directory},
    spawn::SetupStep,
};
use crate::{config::runner::Root, path::RelativePath};

#[derive(Debug)]
pub(super) struct ActionMounts {
    /// Where the input root's path starts; `None`: at the build directory.
    pub base: Option<CString>,
    /// Below `base`.
    pub input_root: CString,
    pub steps: Vec<SetupStep<'static>>,
    /// What was made in an input root that becomes `/`; removed on drop.
    _root: Option<InputRootChroot>,
}

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
    /// In a sandbox without mounts, everything is where the host has it.
    pub(super) fn prepare(
        run: &RunSpec,
        root: &Root,
        build: &BuildDirectory,
        sandbox: Option<&SandboxMounts>,
    ) -> Result<Self, ActionMountsError> {
        let mut mounts = ActionMounts {
            base: None,
            input_root: c_string(run.input_root.to_string()),
            steps: Vec::new(),
            _root: None,
        };
        let Some(sandbox) = sandbox else {
            return Ok(mounts);
        };
        let copy = |path: &RelativePath, what| {
            let directory = build.directory(path, OFlags::PATH)?;
            copy_of_directory(directory.as_fd())
                .map_err(|error| ActionMountsError::Mount { what, error })
        };
        let temporary = |places: &[CString]| -> Result<Vec<_>, ActionMountsError> {
            let Some(path) = &run.temporary_directory else {
                return Ok(Vec::new());
            };
            places
                .iter()
                .map(|place| Ok(attach(copy(path, "mount the temporary directory")?, place)))
                .collect()
        };
        if *root == Root::Input {
            let directory = build.directory(&run.input_root, OFlags::PATH)?;
            let root = InputRootChroot::prepare(directory, &sandbox.place)?;
            let tree = copy(&run.input_root, "mount the input root")?;
            mounts.steps.push(attach(tree, &sandbox.place));
            mounts.steps.extend(temporary(&[root.temporary()])?);
            mounts.steps.extend(root.steps());
            mounts.base = Some(c"/".to_owned());
            mounts.input_root = c".".to_owned();
            mounts._root = Some(root);
            return Ok(mounts);
        }
        mounts.steps.extend(temporary(&sandbox.temporary)?);
        if let Some((directory, name)) = run.input_root.split_last()
            && !directory.is_root()
        {
            let tree = copy(&directory, "mount the action's directory")?;
            mounts.steps.push(attach(tree, &sandbox.place));
            mounts.base = Some(sandbox.place.clone());
            mounts.input_root = c_string(name.to_string());
        }
        Ok(mounts)
    }
}

fn attach(tree: OwnedFd, place: &CStr) -> SetupStep<'static> {
    SetupStep::AttachMount {
        tree,
        place: place.to_owned(),
    }
}

/// Of a path that was parsed, and so has no NUL.
pub(super) fn c_string(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}
