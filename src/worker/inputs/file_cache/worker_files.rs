//! The files that the worker makes, in the cache and in input roots: owner, mode and mtime by which they are known, and
//! the way that content gets into them.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::fs::{FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT};

use super::key::FileKey;

/// The mtime of every input file, and of every directory in an input root: 2000-01-01T00:00:00Z.
pub const MTIME: i64 = 946_684_800;

fn mode(executable: bool) -> Mode {
    Mode::from_raw_mode(if executable { 0o555 } else { 0o444 })
}

/// Who may write to a file of an input root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteAccess {
    Nobody,
    Everybody,
}

/// Creates a file of an input root, whose mtime is still the present time.
fn create(
    directory: BorrowedFd<'_>,
    name: &str,
    executable: bool,
    access: WriteAccess,
) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = match access {
        WriteAccess::Nobody => mode(executable),
        WriteAccess::Everybody => mode(executable) | Mode::from_raw_mode(0o222),
    };
    Ok(rustix::fs::openat(directory, name, flags, mode)?.into())
}

/// Creates a file in a directory, with the content of a cached one, whose blocks it shares where the file system can;
/// returns its inode number. Whoever `access` says may write to it.
pub(super) fn create_copy(
    source: &File,
    key: &FileKey,
    directory: BorrowedFd<'_>,
    name: &str,
    access: WriteAccess,
) -> io::Result<u64> {
    let file = create(directory, name, key.executable, access)?;
    copy_content(source, &file, key.digest.size())?;
    set_mtime(file.as_fd())?;
    Ok(rustix::fs::fstat(&file)?.st_ino)
}

/// Creates an empty file in a directory; returns its inode number. Whoever `access` says may write to it.
pub(super) fn create_empty(
    directory: BorrowedFd<'_>,
    name: &str,
    executable: bool,
    access: WriteAccess,
) -> io::Result<u64> {
    let file = create(directory, name, executable, access)?;
    set_mtime(file.as_fd())?;
    Ok(rustix::fs::fstat(&file)?.st_ino)
}

/// Whether a file has owner, mode and mtime of those that the worker makes, for the cache or for an input root, or has
/// adopted from an action. Says nothing of its size and content.
pub fn has_worker_attributes(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && matches!(stat.st_mode & 0o7777, 0o444 | 0o555)
        && (stat.st_mtime, stat.st_mtime_nsec) == (MTIME, 0)
        && stat.st_uid == rustix::process::geteuid().as_raw()
}

/// Whether a file has the owner, mode, mtime and size of a cached one with this key. Says nothing of its content.
pub(super) fn has_expected_attributes(stat: &Stat, key: &FileKey, owner: u32) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(key.digest.size())
        && stat.st_mode & 0o7777 == mode(key.executable).as_raw_mode()
        && stat.st_mtime == MTIME
        && stat.st_uid == owner
}

/// Gives a file the content of another one, whose blocks it shares where the file system can.
pub(super) fn copy_content(source: &File, to: &File, size: u64) -> io::Result<()> {
    if reflink_copy::reflink_file(source, to).is_ok() {
        return Ok(());
    }
    let (mut from, mut at) = (0, 0);
    while from < size {
        let rest = usize::try_from(size - from).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(source, Some(&mut from), to, Some(&mut at), rest)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Gives a file its final mode and mtime.
pub(super) fn set_mode_and_mtime(file: BorrowedFd<'_>, executable: bool) -> io::Result<()> {
    rustix::fs::fchmod(file, mode(executable))?;
    set_mtime(file)
}

fn set_mtime(file: BorrowedFd<'_>) -> io::Result<()> {
    rustix::fs::futimens(
        file,
        &Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: MTIME,
                tv_nsec: 0,
            },
        },
    )?;
    Ok(())
}
