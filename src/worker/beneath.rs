//! Opening what lies beneath a directory that an action could write to.
//!
//! No symbolic link is followed, but for telling where it leads, and nothing leaves the directory
//! (openat2(2)); opening a FIFO or a device blocks nobody and sets nothing off.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::path::{Component, RelativePath};

/// So many bytes of path go into one call; PATH_MAX is 4096.
const PATH_PIECE: usize = 2048;

fn resolve(directory: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(directory, path, flags, Mode::empty(), within)
}

/// A directory, as a place (O_PATH). ELOOP or ENOTDIR when something else is on the way.
pub fn open_directory(root: BorrowedFd<'_>, path: &RelativePath) -> Result<OwnedFd, Errno> {
    let mut at: Option<OwnedFd> = None;
    let mut piece = String::new();
    let mut components = path.components().iter().peekable();
    loop {
        match components.next() {
            Some(component) => {
                if !piece.is_empty() {
                    piece.push('/');
                }
                piece.push_str(component.as_str());
            }
            None if piece.is_empty() => piece.push('.'),
            None => {}
        }
        let last = components.peek().is_none();
        if last || piece.len() > PATH_PIECE {
            let from = at.as_ref().map_or(root, |at| at.as_fd());
            let opened = resolve(from, &piece, OFlags::PATH)?;
            if last {
                return Ok(opened);
            }
            at = Some(opened);
            piece.clear();
        }
    }
}

/// Makes the directories of a path that are not there. On error, tells the component at fault.
pub fn make_directories<'p>(
    root: BorrowedFd<'_>,
    path: &'p RelativePath,
) -> Result<(), (&'p Component, Errno)> {
    let mut at: Option<OwnedFd> = None;
    for component in path.components() {
        let from = at.as_ref().map_or(root, |at| at.as_fd());
        let made = rustix::fs::mkdirat(from, component.as_str(), Mode::from_raw_mode(0o777));
        match made {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err((component, error)),
        }
        let opened = resolve(from, component.as_str(), OFlags::PATH);
        at = Some(opened.map_err(|error| (component, error))?);
    }
    Ok(())
}

/// A directory for reading its entries.
pub fn open_listing(parent: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    resolve(parent, path, OFlags::RDONLY)
}

/// A directory in another one, for reading its entries.
pub fn open_child<P: rustix::path::Arg>(parent: impl AsFd, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Whether a symbolic link leads to a directory, for whoever takes `root` for the root directory.
pub fn leads_to_directory(root: BorrowedFd<'_>, link: &RelativePath) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = link.to_string();
    rustix::fs::openat2(root, path.as_str(), flags, Mode::empty(), within).is_ok()
}

/// A regular file for reading. EINVAL when it is something else.
pub fn open_file(parent: BorrowedFd<'_>, name: &str) -> Result<(File, rustix::fs::Stat), Errno> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::RegularFile => Ok((file.into(), stat)),
        _ => Err(Errno::INVAL),
    }
}
