//! Removing what actions leave behind, which is hostile: of any depth, mode, owner and name.
//!
//! 1. Nothing outside of the directory is touched: every call is relative to an open directory, and
//!    no symbolic link is followed.
//! 2. Memory and open files are bounded whatever the depth: what lies too deep is first moved up.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

/// Directories open at a time.
const DEPTH: usize = 32;
/// A directory that is read this often and still not empty is being written to.
const ROUNDS: u32 = 16;

struct OpenLevel {
    entries: Dir,
    /// In the level above.
    name: CString,
    rounds: u32,
}

/// Makes a directory empty. On error it went on with the rest, and tells the first error.
pub fn empty(directory: BorrowedFd<'_>) -> io::Result<()> {
    let mut first_error = None;
    // What is moved up comes to lie in the directory itself. Each round that moves removes the
    // levels above, so this ends.
    loop {
        let mut moved = false;
        if let Err(error) = sweep(directory, &mut moved) {
            first_error.get_or_insert(error);
        }
        if !moved {
            break;
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Removes a directory, also one that its owner closed to everybody.
pub fn remove(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let directory = match open(parent, name) {
        Err(Errno::ACCESS) => {
            make_accessible(parent, name)?;
            open(parent, name)?
        }
        opened => opened?,
    };
    empty(directory.as_fd())?;
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(())
}

fn sweep(root: BorrowedFd<'_>, moved: &mut bool) -> io::Result<()> {
    let mut first_error: Option<io::Error> = None;
    let mut stack = vec![OpenLevel {
        entries: Dir::new(open(root, c".")?)?,
        name: CString::default(),
        rounds: 0,
    }];
    loop {
        let depth = stack.len();
        let Some(level) = stack.last_mut() else { break };
        match level.entries.read() {
            Some(Ok(entry)) => {
                let name = entry.file_name();
                if name == c"." || name == c".." {
                    continue;
                }
                let name = name.to_owned();
                match remove_entry(root, level.entries.fd()?, &name, entry.file_type(), depth) {
                    Ok(Removed::Gone) => {}
                    Ok(Removed::MovedUp) => *moved = true,
                    Ok(Removed::Opened(directory)) => stack.push(OpenLevel {
                        entries: Dir::new(directory)?,
                        name,
                        rounds: 0,
                    }),
                    Err(error) => {
                        first_error.get_or_insert(error);
                    }
                }
            }
            Some(Err(error)) => {
                first_error.get_or_insert(error.into());
                stack.pop();
            }
            None => {
                let Some(level) = stack.pop() else { break };
                let Some(above) = stack.last() else { break };
                match rustix::fs::unlinkat(above.entries.fd()?, &level.name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    // Some file systems skip entries of a directory that changes as it is read.
                    Err(Errno::NOTEMPTY | Errno::EXIST) if level.rounds < ROUNDS => {
                        let mut level = level;
                        level.entries.rewind();
                        level.rounds += 1;
                        stack.push(level);
                    }
                    Err(error) => {
                        first_error.get_or_insert(error.into());
                    }
                }
            }
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

enum Removed {
    Gone,
    MovedUp,
    Opened(OwnedFd),
}

fn remove_entry(
    root: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    name: &CString,
    kind: FileType,
    depth: usize,
) -> io::Result<Removed> {
    if kind != FileType::Directory {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(Removed::Gone),
            // The file system did not tell the type, and it is a directory.
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if depth >= DEPTH {
        static SEQUENCE: AtomicU64 = AtomicU64::new(0);
        let number = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let up = format!(
            ".deep.{}.{number}",
            rustix::process::getpid().as_raw_nonzero()
        );
        let no_replace = rustix::fs::RenameFlags::NOREPLACE;
        let rename = || rustix::fs::renameat_with(parent, name, root, up.as_str(), no_replace);
        match rename() {
            Ok(()) => return Ok(Removed::MovedUp),
            Err(Errno::ACCESS) => {
                make_accessible(parent, name)?;
                rename()?;
                return Ok(Removed::MovedUp);
            }
            Err(error) => return Err(error.into()),
        }
    }
    match open(parent, name) {
        Ok(directory) => Ok(Removed::Opened(directory)),
        Err(Errno::ACCESS) => {
            make_accessible(parent, name)?;
            Ok(Removed::Opened(open(parent, name)?))
        }
        Err(Errno::NOENT) => Ok(Removed::Gone),
        Err(error) => Err(error.into()),
    }
}

/// A directory without permissions; that helps when it is this process's own, or with CAP_FOWNER.
fn make_accessible(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // Not a symbolic link: it was a directory, and nobody else is here any more. Should it be one
    // nevertheless, O_PATH | O_NOFOLLOW opens the link, and the check stops.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&directory.as_fd())
    );
    rustix::fs::chmod(path, Mode::from_raw_mode(0o700))?;
    Ok(())
}

fn open(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn hostile_leftovers_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "precious").unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), FileType::Fifo, mode, 0).unwrap();
        fs::create_dir_all(root.join("closed/inner")).unwrap();
        fs::write(root.join("closed/inner/file"), "").unwrap();
        fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
        let strange = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff\n \x01");
        fs::write(root.join::<&std::ffi::OsStr>(strange), "").unwrap();
        // Deeper than any path can name, and than files can be open.
        let opened = fs::File::open(&root).unwrap();
        let mut deep: OwnedFd = opened.try_clone().unwrap().into();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&deep, "d", Mode::from_raw_mode(0o700)).unwrap();
            deep = open(deep.as_fd(), c"d").unwrap();
        }
        drop(deep);
        empty(opened.as_fd()).unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"precious");
    }
}
