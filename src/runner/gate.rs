//! The build directory, and the way into it for one action at a time.
//!
//! The contract with the worker: an action's input root, temporary directory, home directory and logs
//! lie in one directory of its own, the gate, which belongs to the worker and is closed to everybody
//! else (0700). What is behind it may be open to all (0777). A worker that knows of no home directory,
//! as Buildbarn's, finds one made here.
//!
//! 1. While an action runs, and no longer, its gate lets its group pass (0710).
//! 2. The gate is locked exclusively (flock(2)) from before the first process of an action exists
//!    until after the last one is gone: whoever holds the lock knows that nothing stirs inside.
//! 3. Every path is opened beneath the build directory, and through no symbolic link.
//!
//! A gate that others may pass already, as Buildbarn's worker makes it, is locked and left as it is.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{
        AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown,
        flock, fstat, mkdirat, openat2, statat,
    },
    io::Errno,
};

use super::{
    command::{Command, LogPath},
    environment::HOME,
    giving,
    stop::StopSignal,
};
use crate::path::RelativePath;

/// How long a Run waits for the one before it in the same gate to be cleaned up.
const PATIENCE: Duration = Duration::from_secs(30);

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The build directory as it is now: a worker may make it anew.
pub struct BuildDirectory {
    directory: OwnedFd,
}

/// An open way in; closed, and then unlocked, on drop.
pub struct Gate {
    directory: OwnedFd,
    /// Mode and group before; `None` when it had not to be changed.
    closed: Option<(Mode, Gid)>,
}

/// The worker must act, or the administrator.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error("Failed to open build directory {path:?}: {error}")]
    BuildDirectory { path: PathBuf, error: io::Error },
    #[error("Failed to open directory {path:?} in build directory: {error}")]
    Directory { path: String, error: io::Error },
    #[error("Failed to open {} path {:?}: {}", .log.stream, .log.text, log_reason(.error))]
    Log { log: LogPath, error: io::Error },
    #[error("Failed to open directory {path:?} to the action's user: {error}")]
    Change { path: String, error: io::Error },
    #[error("Failed to make the action's home directory in {path:?}: {error}")]
    Home { path: String, error: io::Error },
    #[error(
        "Failed to make the action's user the owner of {path:?}: {error}; the worker must have made \
         all that is in it for this action alone"
    )]
    Give { path: String, error: io::Error },
    #[error(
        "Directory {path:?} in build directory is still locked by another run, or by the worker, \
         after {PATIENCE:?}"
    )]
    Locked { path: String },
    #[error("The call was cancelled")]
    Stopped,
}

impl GateError {
    /// Whether the caller sent a path that leads elsewhere.
    pub fn escapes(&self) -> bool {
        match self {
            GateError::Log { error, .. } | GateError::Directory { error, .. } => leads_away(error),
            _ => false,
        }
    }
}

fn leads_away(error: &io::Error) -> bool {
    // openat2(2): `..` or a mount that leads out, and a symbolic link on the way.
    matches!(error.raw_os_error(), Some(libc::EXDEV | libc::ELOOP))
}

fn log_reason(error: &io::Error) -> String {
    if leads_away(error) {
        "Path resolves to a location outside the build directory".to_owned()
    } else {
        error.to_string()
    }
}

impl BuildDirectory {
    pub fn open(path: &Path) -> Result<Self, GateError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(directory) => Ok(BuildDirectory { directory }),
            Err(error) => Err(GateError::BuildDirectory {
                path: path.to_owned(),
                error: error.into(),
            }),
        }
    }

    /// Device and inode number.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        identity(&self.directory)
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether something is at this path; a symbolic link is something.
    pub fn check(&self, path: &RelativePath) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(
            &self.directory,
            path.to_string(),
            flags,
            Mode::empty(),
            BENEATH,
        )?;
        Ok(())
    }

    pub fn directory(&self, path: &RelativePath, flags: OFlags) -> Result<OwnedFd, GateError> {
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(
            &self.directory,
            path.to_string(),
            flags,
            Mode::empty(),
            BENEATH,
        )
        .map_err(|error| GateError::Directory {
            path: path.to_string(),
            error: error.into(),
        })
    }

    /// Makes a log file. The action may open it again, as /dev/stderr; others are kept out by the
    /// gate.
    pub fn create_log(&self, log: &LogPath) -> Result<OwnedFd, GateError> {
        let create = || -> rustix::io::Result<OwnedFd> {
            let (parent, name) = log.path.split_last().ok_or(rustix::io::Errno::ISDIR)?;
            let parent = openat2(
                &self.directory,
                parent.to_string(),
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                BENEATH,
            )?;
            let file = openat2(
                &parent,
                name.as_str(),
                OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
                Mode::from_raw_mode(0o666),
                BENEATH,
            )?;
            // The umask, or a default ACL, may have taken something away; each change of a file
            // costs as much as making one.
            if fstat(&file)?.st_mode & 0o777 != 0o666 {
                fchmod(&file, Mode::from_raw_mode(0o666))?;
            }
            Ok(file)
        };
        create().map_err(|error| GateError::Log {
            log: log.clone(),
            error: error.into(),
        })
    }
}

impl Gate {
    /// Locks the directory that holds the input root, and lets the group `id` pass.
    pub fn open(
        build: &BuildDirectory,
        command: &Command,
        id: u32,
        stop: &StopSignal,
    ) -> Result<Self, GateError> {
        let parent = match command.input_root.split_last() {
            Some((parent, _)) if !parent.is_root() => Some(parent),
            // No directory around this action alone: only the input root can be locked.
            _ => None,
        };
        let path = parent.as_ref().unwrap_or(&command.input_root);
        let directory = build.directory(path, OFlags::RDONLY)?;
        lock(&directory, path, stop)?;
        let mut gate = Gate {
            directory,
            closed: None,
        };
        if command.owns_inputs {
            gate.give_inputs(build, &command.input_root, id)
                .map_err(|error| GateError::Give {
                    path: command.input_root.to_string(),
                    error,
                })?;
        }
        if parent.is_some() {
            gate.make_home().map_err(|error| GateError::Home {
                path: path.to_string(),
                error,
            })?;
            gate.let_pass(id).map_err(|error| GateError::Change {
                path: path.to_string(),
                error,
            })?;
        }
        Ok(gate)
    }

    fn give_inputs(
        &self,
        build: &BuildDirectory,
        input_root: &RelativePath,
        id: u32,
    ) -> io::Result<()> {
        let worker = Uid::from_raw(fstat(&self.directory)?.st_uid);
        let root = build
            .directory(input_root, OFlags::RDONLY)
            .map_err(io::Error::other)?;
        giving::give(root, worker, id)
    }

    /// Unless the worker made it, who removes what is in there with everything else.
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

    fn let_pass(&mut self, id: u32) -> io::Result<()> {
        let stat = fstat(&self.directory)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        if mode.contains(Mode::XOTH) {
            return Ok(());
        }
        self.closed = Some((
            mode.difference(Mode::RWXG | Mode::RWXO),
            Gid::from_raw(stat.st_gid),
        ));
        fchown(&self.directory, None, Some(Gid::from_raw(id)))?;
        fchmod(&self.directory, mode.difference(Mode::RWXG) | Mode::XGRP)?;
        Ok(())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some((mode, group)) = self.closed {
            // First the mode: the old group may have members.
            let closed = fchmod(&self.directory, mode)
                .and_then(|()| fchown(&self.directory, None, Some(group)));
            if let Err(error) = closed {
                tracing::error!(%error, "could not close the directory of an action again");
            }
        }
        // Explicitly: a process that is being made at this moment may have a copy of the descriptor.
        let _ = flock(&self.directory, FlockOperation::Unlock);
    }
}

fn lock(directory: &OwnedFd, path: &RelativePath, stop: &StopSignal) -> Result<(), GateError> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                if stop.wait(pause) {
                    return Err(GateError::Stopped);
                }
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(GateError::Locked {
                    path: path.to_string(),
                });
            }
            Err(error) => {
                return Err(GateError::Directory {
                    path: path.to_string(),
                    error: error.into(),
                });
            }
        }
    }
}

/// Device and inode number.
pub fn identity(directory: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = fstat(directory)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Closes gates that a runner which was killed left open to users of its range.
pub fn close_all(build_directory: &Path, range: &std::ops::Range<u32>) {
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
            drop(Gate {
                directory,
                closed: Some((
                    Mode::from_raw_mode(stat.st_mode & 0o700),
                    Gid::from_raw(stat.st_gid),
                )),
            });
        }
    }
}

/// The first directory on the way to the build directory, or itself, that actions cannot pass.
pub fn barrier(build_directory: &Path) -> Option<PathBuf> {
    let mut ancestors: Vec<_> = build_directory.ancestors().collect();
    ancestors.reverse();
    ancestors
        .into_iter()
        .find(|directory| {
            fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 == 0)
        })
        .map(Path::to_owned)
}
