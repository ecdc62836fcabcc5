//! Outputs of actions change hands: they become the worker's, so that they can enter the cache as they are.

#![expect(unsafe_code, reason = "it calls what has no safe wrapper")]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use super::worker_files::set_mode_and_mtime;
use crate::worker::attributes;

/// Takes a file away from the action that wrote it, so that it can enter the cache as it is.
/// `false` when that is not possible: then only a copy can.
///
/// It is `true` only if nobody else has the file: no other name leads to it, no extended attribute or ACL
/// is on it, no process has it open for writing or mapped writable.
pub fn take_ownership(file: &File, executable: bool) -> bool {
    let fd = file.as_fd();
    let alone = |fd| rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_nlink == 1);
    // Before anything is changed: an input that the action linked elsewhere stays as it is.
    if !alone(fd) || !attributes::has_none(fd) {
        return false;
    }
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(fd, Some(user), Some(group)).is_ok()
        && set_mode_and_mtime(fd, executable).is_ok()
        && alone(fd)
        && has_no_writer(fd)
}

/// Whether nobody has a file open for writing: only then a read lease is granted (fcntl(2), F_SETLEASE).
fn has_no_writer(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: these commands take an integer, and touch no memory of ours.
    unsafe {
        let leased = libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0;
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK);
        leased
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_somebody_can_still_write_is_not_taken_from_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let writer = File::create(&path).unwrap();
        let file = File::open(&path).unwrap();
        assert!(!take_ownership(&file, false));
        drop(writer);
        assert!(take_ownership(&file, false));
        std::fs::hard_link(&path, directory.path().join("g")).unwrap();
        assert!(!take_ownership(&file, false));
    }
}
