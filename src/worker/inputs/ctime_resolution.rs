//! What the file system's ctime can be trusted for; found out at start, by trying.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::fs::{AtFlags, Mode};

use crate::worker::beneath::open_child;

/// How many changes are tried, one right after the other.
const CHANGES: u32 = 1_000;

/// Whether the ctime of a directory tells of every change of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CtimeResolution {
    /// Every change after a look gives another ctime.
    Fine,
    /// Changes within one tick may give the same ctime, so that a directory that was changed just before an action is
    /// read after it, whatever its ctime is.
    Coarse,
    /// Nothing is known of this file system, so that no root is used twice.
    Unknown,
}

/// Finds out what ctime can be trusted for, by trying in a directory that is made for it.
pub(super) fn probe(build: BorrowedFd<'_>) -> io::Result<CtimeResolution> {
    // statfs(2): ext4, xfs, btrfs, tmpfs.
    const KNOWN: [u32; 4] = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994];
    let kind = rustix::fs::fstatfs(build)?.f_type as u32;
    if !KNOWN.contains(&kind) {
        return Ok(CtimeResolution::Unknown);
    }
    const NAME: &str = "clock";
    match rustix::fs::mkdirat(build, NAME, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let directory = open_child(build, NAME)?;
    let resolution = try_changes(directory.as_fd());
    let _ = rustix::fs::unlinkat(build, NAME, AtFlags::REMOVEDIR);
    resolution
}

fn try_changes(directory: BorrowedFd<'_>) -> io::Result<CtimeResolution> {
    let look = || -> io::Result<(i64, i64)> {
        let stat = rustix::fs::fstat(directory)?;
        Ok((stat.st_ctime, stat.st_ctime_nsec as i64))
    };
    let mut resolution = CtimeResolution::Fine;
    for _ in 0..CHANGES / 2 {
        let before = look()?;
        rustix::fs::symlinkat("x", directory, "x")?;
        let between = look()?;
        rustix::fs::unlinkat(directory, "x", AtFlags::empty())?;
        if before == between || between == look()? {
            resolution = CtimeResolution::Coarse;
        }
    }
    Ok(resolution)
}
