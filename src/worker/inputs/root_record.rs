//! What the worker records of a root that it keeps: for each directory an open descriptor, a baseline (I6), and the
//! inodes of its entries.

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

use super::{
    directory_message::Directory,
    file_cache::{CreateMode, InputFileKind, InputFiles, MTIME},
    inode_allocator::InodeAllocator,
    merkle_tree::Tree,
};

/// How many bytes a directory may take whatever is in it.
const DIRECTORY_SIZE: u64 = 256 << 10;
/// How many bytes an entry may take besides its name: those of ext4 take 8 and padding, in blocks of which
/// half may be empty; of xfs 24 in all that is not its name; of btrfs and tmpfs fewer.
const ENTRY_SIZE: u64 = 24;

/// An open directory (O_PATH), counted as long as it is open.
pub(super) struct DirectoryFd {
    fd: OwnedFd,
    /// How many of them are open.
    open: Arc<AtomicU64>,
}

impl DirectoryFd {
    pub(super) fn new(fd: OwnedFd, open: &Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        DirectoryFd {
            fd,
            open: open.clone(),
        }
    }

    pub(super) fn open(
        parent: impl AsFd,
        name: &str,
        open: &Arc<AtomicU64>,
    ) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        Ok(Self::new(fd, open))
    }
}

impl AsFd for DirectoryFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for DirectoryFd {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The ctime and the link count of a directory after the worker's last change to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Baseline {
    seconds: i64,
    nanoseconds: i64,
    nlink: u64,
}

impl Baseline {
    /// Whether the ctime is before that second.
    pub(super) fn is_before(&self, seconds: i64) -> bool {
        self.seconds < seconds
    }
}

/// What the worker knows of a whole root, as it left it.
pub(super) struct RootRecord {
    pub top: DirectoryRecord,
    /// Which inodes of cached files the root links.
    pub inodes: InodeAllocator,
    /// How the files of the root were created.
    pub create_mode: CreateMode,
}

/// What the worker knows of a directory and all beneath it, as it left them.
pub(super) struct DirectoryRecord {
    pub node: Tree,
    pub fd: Arc<DirectoryFd>,
    /// The inode number of the directory.
    pub inode: u64,
    /// `None` when the directory must be read after the action, whatever its ctime is.
    pub baseline: Option<Baseline>,
    /// One for each file of `node.directory`.
    pub files: InputFiles,
    /// The inode number of each symbolic link of `node.directory`.
    pub symlinks: Box<[u64]>,
    /// One for each of `node.children`.
    pub children: Vec<DirectoryRecord>,
}

/// Whether a directory has this mode, and the owner of those that the worker makes.
pub(super) fn has_owner_and_mode(stat: &Stat, mode: u32) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o7777 == mode
}

/// Whether somebody had far more entries in a directory than it is to have. Directories never shrink
/// on ext4, so that whoever lists it would read all that room.
pub(super) fn is_oversized(stat: &Stat, wanted: &Directory) -> bool {
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    // Few are larger, so that the names of few are summed up.
    size > DIRECTORY_SIZE && size > DIRECTORY_SIZE + wanted.size_on_disk(ENTRY_SIZE) * 2
}

/// The baseline of a directory; ESTALE when it has not the owner and mode that the worker gives directories of roots.
fn baseline(stat: &Stat) -> Result<Baseline, Errno> {
    match has_owner_and_mode(stat, 0o777) {
        true => Ok(Baseline {
            seconds: stat.st_ctime,
            nanoseconds: stat.st_ctime_nsec as i64,
            nlink: stat.st_nlink,
        }),
        false => Err(Errno::STALE),
    }
}

/// Ends the worker's changes to a directory: sets its mtime, then looks at it (I6 Baseline). Returns inode
/// number and baseline.
pub(super) fn finalize_directory(directory: BorrowedFd<'_>) -> Result<(u64, Baseline), Errno> {
    set_mtime(directory)?;
    read_baseline(directory)
}

/// Sets the times of a directory to those that every directory of a root has.
pub(super) fn set_mtime(directory: BorrowedFd<'_>) -> Result<(), Errno> {
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

/// The inode number and the baseline of a directory; ESTALE when the worker made no such directory.
pub(super) fn read_baseline(directory: BorrowedFd<'_>) -> Result<(u64, Baseline), Errno> {
    let stat = rustix::fs::fstat(directory)?;
    Ok((stat.st_ino, baseline(&stat)?))
}

impl InodeAllocator {
    /// Frees the inodes of all files in a directory and beneath it, which are not in the root any more.
    pub(super) fn free_all(&mut self, record: &DirectoryRecord) {
        for file in &record.files.list {
            if let InputFileKind::HardLink(handle, inode_index) = file.kind() {
                self.free(handle, inode_index);
            }
        }
        for child in &record.children {
            self.free_all(child);
        }
    }
}

impl DirectoryRecord {
    /// Whether nobody changed the list of entries since the worker did (I6 Baseline), as far as a look tells.
    pub(super) fn is_untouched(&self) -> bool {
        let looked = read_baseline(self.fd.as_fd());
        looked.is_ok_and(|(inode, now)| inode == self.inode && Some(now) == self.baseline)
    }
}
