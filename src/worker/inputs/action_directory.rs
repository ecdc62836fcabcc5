//! The directory around an action's input root, in which the runner finds all that is the action's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, FlockOperation, Gid, Mode, fstat, statat},
    io::Errno,
};

use super::{directory_message::Directory, root_record};
use crate::{
    removal,
    worker::{attributes, beneath::open_child},
};

/// How long the runner may take until the last process of an action is gone.
pub const LAST_PROCESS_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest time between two attempts to take the lock.
const MAXIMUM_PAUSE: Duration = Duration::from_millis(100);

pub(super) const INPUT_ROOT: &str = "root";
const PARTS: [&str; 4] = [INPUT_ROOT, "tmp", "server_logs", "home"];

/// The directory of one action, open.
pub(super) struct ActionDirectory {
    /// Its name in the build directory.
    pub name: String,
    pub directory: OwnedFd,
    pub root: OwnedFd,
}

impl ActionDirectory {
    /// Creates it in the build directory. After an error some of it may be there.
    pub(super) fn create(build_directory: BorrowedFd<'_>, name: String) -> io::Result<Self> {
        rustix::fs::mkdirat(build_directory, &name, Mode::from_raw_mode(0o700))?;
        let directory = open_child(build_directory, &name)?;
        for part in PARTS {
            rustix::fs::mkdirat(&directory, part, Mode::from_raw_mode(0o777))?;
        }
        let root = open_child(&directory, INPUT_ROOT)?;
        Ok(ActionDirectory {
            name,
            directory,
            root,
        })
    }

    /// Whether neither the directory nor the input root in it was removed or replaced.
    pub(super) fn is_in_place(&self) -> bool {
        let same = || {
            let (directory, root) = (fstat(&self.directory)?, fstat(&self.root)?);
            let named = statat(&self.directory, INPUT_ROOT, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_same = (named.st_dev, named.st_ino) == (root.st_dev, root.st_ino);
            Ok::<bool, Errno>(is_same && directory.st_nlink > 0)
        };
        same().unwrap_or(false)
    }

    /// Gives it another name, so that a call that arrives late at the runner finds nothing.
    pub(super) fn rename(&mut self, build_directory: BorrowedFd<'_>, name: String) {
        let renamed = rustix::fs::renameat(build_directory, &self.name, build_directory, &name);
        if renamed.is_ok() {
            self.name = name;
        }
    }

    /// Opens the directory to a group.
    pub(super) fn grant_group_access(&self, group: u32) -> Result<(), Errno> {
        rustix::fs::fchown(&self.directory, None, Some(Gid::from_raw(group)))?;
        rustix::fs::fchmod(&self.directory, Mode::from_raw_mode(0o770))
    }

    /// Empties `tmp`, `home` and `server_logs`, and removes all else but the input root. `false` when
    /// what is left differs from a new action directory.
    pub(super) fn empty(&self) -> io::Result<bool> {
        let mut entries = Dir::read_from(&self.directory)?;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = entry.file_name();
            let known = |part: &str| name.to_bytes() == part.as_bytes();
            if name == c"." || name == c".." || PARTS.iter().any(|part| known(part)) {
                continue;
            }
            match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR) => {
                    removal::empty(open_child(&self.directory, name)?.as_fd())?;
                    rustix::fs::unlinkat(&self.directory, name, AtFlags::REMOVEDIR)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        for part in &PARTS[1..] {
            let directory = open_child(&self.directory, *part)?;
            removal::empty(directory.as_fd())?;
            if !is_unchanged(directory.as_fd(), 0o777)? {
                return Ok(false);
            }
        }
        is_unchanged(self.directory.as_fd(), 0o700)
    }
}

/// Takes the lock of an action's directory, which the runner holds for as long as a process of the action
/// lives (I5 No process). `false` when that takes longer than `LAST_PROCESS_TIMEOUT`.
pub(super) fn lock(directory: BorrowedFd<'_>) -> bool {
    let (began, mut pause) = (Instant::now(), Duration::from_millis(1));
    while rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive).is_err() {
        if began.elapsed() > LAST_PROCESS_TIMEOUT {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(MAXIMUM_PAUSE);
    }
    true
}

/// Lets go of the lock of an action's directory.
pub(super) fn unlock(directory: BorrowedFd<'_>) {
    let _ = rustix::fs::flock(directory, FlockOperation::Unlock);
}

/// Whether owner, mode, attributes and size of a directory are those of a new one.
fn is_unchanged(directory: BorrowedFd<'_>, mode: u32) -> io::Result<bool> {
    let stat = rustix::fs::fstat(directory)?;
    let plain = attributes::has_none(directory);
    let empty = Directory::default();
    Ok(plain
        && root_record::has_owner_and_mode(&stat, mode)
        && !root_record::is_oversized(&stat, &empty))
}
