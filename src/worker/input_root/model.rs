//! What the worker knows of a directory tree that it keeps on disk.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, Stat, Timespec, Timestamps},
    io::Errno,
};

use crate::worker::{cache::Links, tree::Tree};

/// Of every directory in an input root, and of every input file: 2000-01-01T00:00:00Z.
pub const MTIME: i64 = 946_684_800;
/// Directories never shrink on ext4; one that grew beyond this is not used again.
const LARGEST_DIRECTORY: i64 = 256 << 10;

/// An open directory (O_PATH), counted as long as it is open.
pub struct Place {
    fd: OwnedFd,
    open: Arc<AtomicU64>,
}

impl Place {
    pub fn new(fd: OwnedFd, open: &Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Place {
            fd,
            open: open.clone(),
        }
    }

    pub fn open(parent: impl AsFd, name: &str, open: &Arc<AtomicU64>) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        Ok(Self::new(fd, open))
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When a directory was last changed, by the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Baseline {
    seconds: i64,
    nanoseconds: i64,
    links: u64,
}

impl Baseline {
    /// Whether it is so old that even a clock that moves in steps has moved since.
    pub fn is_before(&self, seconds: i64) -> bool {
        self.seconds < seconds
    }
}

/// A directory as the worker left it.
pub struct Kept {
    pub node: Tree,
    pub place: Arc<Place>,
    pub inode: u64,
    /// `None` when it must be read, whatever its ctime is.
    pub baseline: Option<Baseline>,
    /// For each file of `node.directory`, likewise for each symbolic link its inode.
    pub links: Links,
    pub symlinks: Box<[u64]>,
    /// For each of `node.children`.
    pub children: Vec<Kept>,
}

/// Owner, mode and size of a directory that the worker made.
pub fn is_as_made(stat: &Stat, mode: u32) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_mode & 0o7777 == mode
        && stat.st_size <= LARGEST_DIRECTORY
}

/// What can be told of a directory without reading it; an error when it is not as the worker makes
/// directories.
fn baseline(stat: &Stat) -> Result<Baseline, Errno> {
    match is_as_made(stat, 0o777) {
        true => Ok(Baseline {
            seconds: stat.st_ctime,
            nanoseconds: stat.st_ctime_nsec as i64,
            links: stat.st_nlink,
        }),
        false => Err(Errno::STALE),
    }
}

/// Ends the worker's changes to a directory: sets its mtime, then looks at it (I6). Returns inode
/// number and baseline.
pub fn settle(directory: BorrowedFd<'_>) -> Result<(u64, Baseline), Errno> {
    set_mtime(directory)?;
    look(directory)
}

pub fn set_mtime(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    let time = Timespec {
        tv_sec: MTIME,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(directory, ".", &times, AtFlags::empty())
}

pub fn look(directory: BorrowedFd<'_>) -> Result<(u64, Baseline), Errno> {
    let stat = rustix::fs::fstat(directory)?;
    Ok((stat.st_ino, baseline(&stat)?))
}

impl Kept {
    /// Whether nobody changed the list of entries since the worker did (I6), as far as a look tells.
    pub fn is_untouched(&self) -> bool {
        let looked = look(self.place.as_fd());
        looked.is_ok_and(|(inode, now)| inode == self.inode && Some(now) == self.baseline)
    }
}
