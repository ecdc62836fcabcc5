//! Input files of an action's own: its user becomes the owner of everything in its input root, so that
//! it may change modes and times too.
//!
//! 1. Only what belongs to the owner of the action's directory, who is the worker, changes hands, and
//!    no file that has another name: a file of the worker's cache would be everybody's.
//! 2. Each entry is opened first, and then asked and changed through its descriptor, so that nobody
//!    can put another one in its place.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Uid},
    io::Errno,
};

/// How many directories may lie in one another; each is open meanwhile.
const MAXIMUM_DEPTH: usize = 1_100;

/// Makes `user` the owner of `root` and of all that is in it. No process of the action may exist yet.
pub(super) fn chown_tree(root: OwnedFd, worker: Uid, user: u32) -> io::Result<()> {
    let user = Some(Uid::from_raw(user));
    let mut above = vec![(Dir::read_from(&root)?, root)];
    while let Some((entries, directory)) = above.last_mut() {
        let Some(entry) = entries.read() else {
            rustix::fs::fchown(&*directory, user, None)?;
            above.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::openat(&*directory, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&found)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if stat.st_uid != worker.as_raw() || kind != FileType::Directory && stat.st_nlink != 1 {
            return Err(Errno::PERM.into());
        }
        if kind != FileType::Directory {
            rustix::fs::chownat(&found, "", user, None, AtFlags::EMPTY_PATH)?;
            continue;
        }
        if above.len() > MAXIMUM_DEPTH {
            return Err(Errno::NAMETOOLONG.into());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let below = rustix::fs::openat(found.as_fd(), ".", flags, Mode::empty())?;
        above.push((Dir::read_from(&below)?, below));
    }
    Ok(())
}
