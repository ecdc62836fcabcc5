//! Tells whether the host is still as it was when mounts were prepared: whether its mounts have no later generation,
//! and the directories that these are about are the same. It is asked before each use; there is no thread.

use std::{
    fs, io,
    os::{fd::BorrowedFd, unix::fs::MetadataExt},
    path::Path,
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::fstat,
};

/// Gives the mounts of this daemon's namespace a generation number, which is another one after they have changed.
#[derive(Debug)]
pub(crate) struct MountGenerationCounter(Mutex<(fs::File, u64)>);

/// The host at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostSnapshot {
    mount_generation: u64,
    /// `None` for one that is not there.
    directories: Vec<Option<DirectoryId>>,
}

/// Which directory this is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryId {
    pub device: u64,
    pub inode: u64,
}

impl DirectoryId {
    /// The directory that is open.
    pub(crate) fn of_descriptor(directory: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = fstat(directory)?;
        Ok(DirectoryId {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    /// The directory at a path, if there is one.
    fn of_path(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| DirectoryId {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl MountGenerationCounter {
    /// Begins to count, on a thread that is in the daemon's own mount namespace.
    pub(crate) fn start() -> io::Result<Self> {
        let table = fs::File::open("/proc/thread-self/mountinfo")?;
        Ok(MountGenerationCounter(Mutex::new((table, 0))))
    }

    /// The generation that the mounts have now.
    pub(crate) fn current(&self) -> u64 {
        let (table, generation) = &mut *self.0.lock();
        // proc_pid_mountinfo(5): an open table is an exceptional condition once after each change.
        let mut fds = [PollFd::new(&*table, PollFlags::PRI)];
        if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
            *generation += 1;
        }
        *generation
    }
}

impl HostSnapshot {
    /// The host as it is now, on a thread that is in the daemon's own mount namespace.
    pub(crate) fn now<'a>(
        counter: &MountGenerationCounter,
        directories: impl Iterator<Item = &'a Path>,
    ) -> Self {
        // First: what changes meanwhile is a change.
        let mount_generation = counter.current();
        HostSnapshot {
            mount_generation,
            directories: directories.map(DirectoryId::of_path).collect(),
        }
    }

    /// Whether its mounts are of this generation, or a later one.
    pub(crate) fn is_at_least(&self, mount_generation: u64) -> bool {
        self.mount_generation >= mount_generation
    }
}
