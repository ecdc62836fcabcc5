//! An action's directory in the build directory, locked and open to the action's user while the action runs.
//!
//! The contract with the worker: an action's input root, temporary directory, home directory and logs
//! lie in one directory of its own, which belongs to the worker and is closed to everybody else (0700).
//! What is in it may be open to all (0777). A worker that knows of no home directory, as Buildbarn's,
//! finds one made here.
//!
//! 1. While an action runs, and no longer, its directory lets its group pass (0710).
//! 2. The directory is locked exclusively (flock(2)) from before any process of an action exists
//!    until after the last one is gone: whoever holds the lock knows that nothing stirs inside.
//!
//! A directory that others may pass already, as Buildbarn's worker makes it, keeps its mode and group. It is locked,
//! and has a home directory made in it, like every other one.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{
        AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid, fchmod, fchown, flock, fstat,
        mkdirat, statat,
    },
    io::Errno,
};

use super::{
    build_directory::{BuildDirectory, BuildDirectoryError},
    default_environment::HOME,
    input_ownership,
    run_cancellation::RunCancellation,
    run_spec::RunSpec,
};
use crate::path::RelativePath;

/// How long a Run waits for the one before it in the same directory to be cleaned up.
const PREVIOUS_RUN_TIMEOUT: Duration = Duration::from_secs(30);

/// The directory of an action that runs, open to it; its mode and group are restored, and then it is unlocked, on
/// drop.
pub(super) struct LockedActionDirectory {
    directory: OwnedFd,
    /// The mode that is set again, which has no bits for group and others, and the group; `None` when neither was
    /// changed.
    restore: Option<(Mode, Gid)>,
}

/// Why an action's directory could not be locked and opened to its user; the worker must act, or the administrator.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActionDirectoryError {
    #[error(transparent)]
    Open(#[from] BuildDirectoryError),
    #[error("Failed to open directory {path:?} to the action's user: {error}")]
    Change { path: String, error: io::Error },
    #[error("Failed to make the action's home directory in {path:?}: {error}")]
    Home { path: String, error: io::Error },
    #[error(
        "Failed to make the action's user the owner of {path:?}: {error}; the worker must have made \
         all that is in it for this action alone"
    )]
    Chown { path: String, error: io::Error },
    #[error(
        "Directory {path:?} in build directory is still locked by another run, or by the worker, \
         after {PREVIOUS_RUN_TIMEOUT:?}"
    )]
    Locked { path: String },
    #[error("The call was cancelled")]
    Cancelled,
}

impl LockedActionDirectory {
    /// Locks the directory that holds the input root, makes the input root the user's if nobody else has its files,
    /// makes a home directory, and lets the group `id` pass. Where the input root lies in the build directory itself,
    /// it alone is locked, and nothing around it is changed.
    pub(super) fn open(
        build: &BuildDirectory,
        spec: &RunSpec,
        id: u32,
        cancellation: &RunCancellation,
    ) -> Result<Self, ActionDirectoryError> {
        let parent = match spec.input_root.split_last() {
            Some((parent, _)) if !parent.is_root() => Some(parent),
            // Whatever is in the build directory itself may be others' too.
            _ => None,
        };
        let path = parent.as_ref().unwrap_or(&spec.input_root);
        let directory = build.directory(path, OFlags::RDONLY)?;
        lock(&directory, path, cancellation)?;
        let mut opened = LockedActionDirectory {
            directory,
            restore: None,
        };
        if spec.private_inputs {
            opened
                .chown_inputs(build, &spec.input_root, id)
                .map_err(|error| ActionDirectoryError::Chown {
                    path: spec.input_root.to_string(),
                    error,
                })?;
        }
        if parent.is_some() {
            opened
                .make_home()
                .map_err(|error| ActionDirectoryError::Home {
                    path: path.to_string(),
                    error,
                })?;
            opened
                .grant_group_access(id)
                .map_err(|error| ActionDirectoryError::Change {
                    path: path.to_string(),
                    error,
                })?;
        }
        Ok(opened)
    }

    /// Makes the user `id` the owner of the input root.
    fn chown_inputs(
        &self,
        build: &BuildDirectory,
        input_root: &RelativePath,
        id: u32,
    ) -> io::Result<()> {
        let worker = Uid::from_raw(fstat(&self.directory)?.st_uid);
        let root = build
            .directory(input_root, OFlags::RDONLY)
            .map_err(io::Error::other)?;
        input_ownership::chown_tree(root, worker, id)
    }

    /// Makes the home directory, unless the worker did. Who removes the action's directory removes it, too.
    fn make_home(&self) -> io::Result<()> {
        match mkdirat(&self.directory, HOME, Mode::from_raw_mode(0o777)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let stat = statat(&self.directory, HOME, AtFlags::SYMLINK_NOFOLLOW)?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => Ok(()),
                    _ => Err(Errno::NOTDIR.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the group `id` pass the directory, unless everybody may.
    fn grant_group_access(&mut self, id: u32) -> io::Result<()> {
        let stat = fstat(&self.directory)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        if mode.contains(Mode::XOTH) {
            return Ok(());
        }
        self.restore = Some((
            mode.difference(Mode::RWXG | Mode::RWXO),
            Gid::from_raw(stat.st_gid),
        ));
        fchown(&self.directory, None, Some(Gid::from_raw(id)))?;
        fchmod(&self.directory, mode.difference(Mode::RWXG) | Mode::XGRP)?;
        Ok(())
    }
}

impl Drop for LockedActionDirectory {
    fn drop(&mut self) {
        if let Some((mode, group)) = self.restore {
            // First the mode: the old group may have members.
            let restored = fchmod(&self.directory, mode)
                .and_then(|()| fchown(&self.directory, None, Some(group)));
            if let Err(error) = restored {
                tracing::error!(%error, "could not close the directory of an action again");
            }
        }
        // Explicitly: a process that is being made at this moment may have a copy of the descriptor.
        let _ = flock(&self.directory, FlockOperation::Unlock);
    }
}

/// Waits for the exclusive lock of a directory, for `PREVIOUS_RUN_TIMEOUT` at most.
fn lock(
    directory: &OwnedFd,
    path: &RelativePath,
    cancellation: &RunCancellation,
) -> Result<(), ActionDirectoryError> {
    let deadline = Instant::now() + PREVIOUS_RUN_TIMEOUT;
    let mut pause = Duration::from_micros(200);
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                if cancellation.wait(pause) {
                    return Err(ActionDirectoryError::Cancelled);
                }
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(ActionDirectoryError::Locked {
                    path: path.to_string(),
                });
            }
            Err(error) => {
                return Err(BuildDirectoryError::Directory {
                    path: path.to_string(),
                    error: error.into(),
                }
                .into());
            }
        }
    }
}

/// Closes directories that a runner which was killed left open to users of its range; they keep their groups.
pub(super) fn close_leftovers(build_directory: &Path, range: &std::ops::Range<u32>) {
    let Ok(build) = BuildDirectory::open(build_directory) else {
        return;
    };
    for entry in fs::read_dir(build_directory)
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let Ok(path) = RelativePath::resolve(&RelativePath::root(), &name, "build directory")
        else {
            continue;
        };
        let Ok(directory) = build.directory(&path, OFlags::RDONLY) else {
            continue;
        };
        if let Ok(stat) = fstat(&directory)
            && range.contains(&stat.st_gid)
        {
            drop(LockedActionDirectory {
                directory,
                restore: Some((
                    Mode::from_raw_mode(stat.st_mode & 0o700),
                    Gid::from_raw(stat.st_gid),
                )),
            });
        }
    }
}
