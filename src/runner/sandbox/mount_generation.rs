//! Whether the host is as it was when mounts were prepared: its mounts, and the directories that these
//! are about. It is asked before each use; there is no thread.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Counts changes of this daemon's mounts.
#[derive(Debug)]
pub(crate) struct MountWatch(Mutex<(fs::File, u64)>);

/// The host at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostSnapshot {
    changes: u64,
    directories: Vec<Option<DirectoryId>>,
}

/// Which directory this is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryId {
    pub device: u64,
    pub inode: u64,
}

impl DirectoryId {
    fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| DirectoryId {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl MountWatch {
    /// On a thread that is in the daemon's own mount namespace.
    pub(crate) fn start() -> io::Result<Self> {
        let table = fs::File::open("/proc/thread-self/mountinfo")?;
        Ok(MountWatch(Mutex::new((table, 0))))
    }

    pub(crate) fn count(&self) -> u64 {
        let (table, count) = &mut *self.0.lock();
        // proc_pid_mountinfo(5): an open table is an exceptional condition once after each change.
        let mut fds = [PollFd::new(&*table, PollFlags::PRI)];
        if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
            *count += 1;
        }
        *count
    }
}

impl HostSnapshot {
    /// On a thread that is in the daemon's own mount namespace.
    pub(crate) fn now<'a>(watch: &MountWatch, directories: impl Iterator<Item = &'a Path>) -> Self {
        // First: what changes meanwhile is a change.
        let changes = watch.count();
        HostSnapshot {
            changes,
            directories: directories.map(DirectoryId::of).collect(),
        }
    }

    /// Whether nothing was mounted since, by the watch's count.
    pub(crate) fn has_mounts_of(&self, changes: u64) -> bool {
        self.changes >= changes
    }
}
