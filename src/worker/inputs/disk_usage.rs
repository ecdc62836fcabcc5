//! What an action has on the disk of what it made itself, found by walking its directory.
//!
//! 1. The tree is hostile, and changes meanwhile: every call is relative to an open directory, no symbolic link is
//!    followed, and nothing is opened but directories.
//! 2. Time, memory and open files are bounded: what lies deeper or comes later than the bounds is not counted, so that
//!    the answer is too little rather than too much.
//! 3. What is the worker's, such as cached input files, does not count; nor do files that have no name any more.

use std::{collections::HashSet, ffi::CStr, os::fd::BorrowedFd};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
    process::Uid,
};

/// Directories open at a time.
const MAXIMUM_DEPTH: usize = 64;
const MAXIMUM_ENTRIES: u64 = 1_000_000;
/// The unit of `st_blocks` (stat(3type)); bytes.
const BLOCK: u64 = 512;

/// Bytes and inodes on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskUsage {
    pub bytes: u64,
    pub inodes: u64,
}

/// Adds up what is beneath a directory and does not belong to `worker`. `on_entry` is called for each entry that is
/// looked at; the walk ends early when it says false.
pub(super) fn measure(
    directory: BorrowedFd<'_>,
    worker: Uid,
    mut on_entry: impl FnMut() -> bool,
) -> DiskUsage {
    let mut usage = DiskUsage::default();
    // Files of several names count once.
    let mut seen = HashSet::new();
    let mut entries = 0;
    let mut open: Vec<Dir> = open_entries(directory, c".").into_iter().collect();
    loop {
        let depth = open.len();
        let Some(level) = open.last_mut() else { break };
        let Some(Ok(entry)) = level.read() else {
            open.pop();
            continue;
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        entries += 1;
        if entries > MAXIMUM_ENTRIES || !on_entry() {
            break;
        }
        let Ok(parent) = level.fd() else { continue };
        let Ok(stat) = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let is_counted = is_directory || stat.st_nlink == 1 || seen.insert(stat.st_ino);
        if stat.st_uid != worker.as_raw() && is_counted {
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            usage.bytes = usage.bytes.saturating_add(blocks.saturating_mul(BLOCK));
            usage.inodes += 1;
        }
        if is_directory && depth < MAXIMUM_DEPTH {
            let deeper = open_entries(parent, name);
            open.extend(deeper);
        }
    }
    usage
}

/// `None` where there is no directory any more, or it cannot be read.
fn open_entries(parent: BorrowedFd<'_>, name: &CStr) -> Option<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened: Result<_, Errno> = rustix::fs::openat(parent, name, flags, Mode::empty());
    Dir::new(opened.ok()?).ok()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::{fd::AsFd, unix::fs::symlink},
    };

    use super::*;

    /// The worker, to whom nothing belongs here.
    fn stranger() -> Uid {
        Uid::from_raw(54_321)
    }

    #[test]
    fn files_count_once_whatever_their_names_and_links_lead_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("large"), vec![1; 1 << 20]).unwrap();
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/one"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(at("a/b/one"), at("two")).unwrap();
        symlink(outside.path(), at("away")).unwrap();
        let directory = fs::File::open(place.path()).unwrap();
        let usage = measure(directory.as_fd(), stranger(), || true);
        assert!((1 << 20..3 << 19).contains(&usage.bytes), "{usage:?}");
        // Two directories, a file and a link.
        assert_eq!(usage.inodes, 4);
        let owner = rustix::process::geteuid();
        let of_worker = measure(directory.as_fd(), owner, || true);
        assert_eq!(of_worker, DiskUsage::default());
        let mut left = 2;
        let ended = measure(directory.as_fd(), stranger(), || {
            left -= 1;
            left > 0
        });
        assert!(ended.inodes <= 2, "{ended:?}");
    }

    #[test]
    fn a_tree_of_any_depth_takes_a_bounded_number_of_descriptors() {
        let place = tempfile::tempdir().unwrap();
        let depth = MAXIMUM_DEPTH + 20;
        fs::create_dir_all(place.path().join(vec!["d"; depth].join("/"))).unwrap();
        let directory = fs::File::open(place.path()).unwrap();
        let usage = measure(directory.as_fd(), stranger(), || true);
        assert_eq!(usage.inodes, MAXIMUM_DEPTH as u64);
    }
}
