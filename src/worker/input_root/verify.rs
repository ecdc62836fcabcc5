//! Making a used root what it was: after the action, off the next one's way.
//!
//! The kernel keeps a directory's ctime, which no action can set (I2): it changes with every change
//! of the entries, and with every change of the directory itself. So a directory whose ctime is the
//! baseline has the entries that the worker left (I6): the same names lead to the same inodes. Files
//! cannot have changed, since they are read-only and the worker's (I1); symbolic links cannot change
//! at all; subdirectories are looked at in turn. Where ctime tells of a change, the directory is
//! read: what is foreign goes (I4), what is missing comes again. Inode numbers suffice to know
//! entries by: the cache holds every inode that is linked from a kept root, so that no other file
//! can have its number.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType},
    io::Errno,
};

use super::{
    Shared, lay_out,
    lay_out::LayOutError,
    listing,
    model::{self, Kept},
};
use crate::worker::{cache::LinkError, removal};

/// A directory that is read so often and still has foreign entries is being written to.
const ROUNDS: u32 = 16;

/// Which entries of a directory were found as they should be.
struct Seen {
    files: Vec<bool>,
    symlinks: Vec<bool>,
    children: Vec<bool>,
}

impl Shared {
    /// Repairs a root. `started` is when the action could begin (seconds since the epoch): baselines
    /// from about then are not trusted on kernels whose clock is coarse. On error nothing is known of
    /// the root (I7). Returns how many directories were read.
    pub(super) fn verify(&self, kept: &mut Kept, started: i64) -> io::Result<u64> {
        let mut read = 0;
        let trusted = self.fine_clock
            || kept
                .baseline
                .is_some_and(|baseline| baseline.is_before(started - 1));
        if !trusted || !kept.is_untouched() {
            self.repair(kept)?;
            read += 1;
        }
        for child in &mut kept.children {
            read += self.verify(child, started)?;
        }
        Ok(read)
    }

    fn repair(&self, kept: &mut Kept) -> io::Result<()> {
        let place = kept.place.clone();
        let stat = rustix::fs::fstat(&*place)?;
        if stat.st_ino != kept.inode || stat.st_nlink == 0 {
            return Err(Errno::STALE.into());
        }
        let directory = listing(&*place, ".")?;
        let mut entries = Dir::read_from(&directory)?;
        let mut rounds = 0;
        let seen = loop {
            let (seen, foreign) = self.sweep(kept, &mut entries, directory.as_fd())?;
            if !foreign {
                break seen;
            }
            rounds += 1;
            if rounds > ROUNDS {
                return Err(Errno::BUSY.into());
            }
            entries.rewind();
        };
        self.add_missing(kept, &seen)?;
        remove_attributes(directory.as_fd())?;
        let (inode, baseline) = model::settle(place.as_fd())?;
        if inode != kept.inode {
            return Err(Errno::STALE.into());
        }
        kept.baseline = Some(baseline);
        Ok(())
    }

    /// Reads a directory once and removes what is foreign; tells whether there was any.
    fn sweep(
        &self,
        kept: &Kept,
        entries: &mut Dir,
        fd: BorrowedFd<'_>,
    ) -> io::Result<(Seen, bool)> {
        let directory = &kept.node.directory;
        let mut seen = Seen {
            files: vec![false; directory.files.len()],
            symlinks: vec![false; directory.symlinks.len()],
            children: vec![false; directory.directories.len()],
        };
        let mut foreign = false;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
                kind = FileType::from_raw_mode(stat.st_mode);
            }
            // A name that is not UTF-8 is none of ours.
            let known = name.to_str().ok().is_some_and(|name| {
                let mark = |at: Result<usize, usize>,
                            inode: &dyn Fn(usize) -> u64,
                            seen: &mut Vec<bool>| {
                    at.is_ok_and(|at| {
                        let same = inode(at) == entry.ino();
                        seen[at] |= same;
                        same
                    })
                };
                match kind {
                    FileType::RegularFile => mark(
                        directory
                            .files
                            .binary_search_by(|file| file.name.as_str().cmp(name)),
                        &|at| kept.links.of[at].inode,
                        &mut seen.files,
                    ),
                    FileType::Symlink => mark(
                        directory
                            .symlinks
                            .binary_search_by(|link| link.0.as_str().cmp(name)),
                        &|at| kept.symlinks[at],
                        &mut seen.symlinks,
                    ),
                    FileType::Directory => mark(
                        directory
                            .directories
                            .binary_search_by(|entry| entry.0.as_str().cmp(name)),
                        &|at| kept.children[at].inode,
                        &mut seen.children,
                    ),
                    _ => false,
                }
            });
            if known {
                // The numbers of symbolic links are held by nobody: an action's may have one.
                let is_ours = kind != FileType::Symlink || is_the_workers(fd, name)?;
                if is_ours {
                    continue;
                }
            }
            foreign = true;
            self.remove_foreign(fd, name, kind)?;
        }
        // An action's symbolic link was marked before it was removed; the next round marks right.
        Ok((seen, foreign))
    }

    fn remove_foreign(
        &self,
        fd: BorrowedFd<'_>,
        name: &std::ffi::CStr,
        kind: FileType,
    ) -> io::Result<()> {
        if kind != FileType::Directory {
            match rustix::fs::unlinkat(fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::ISDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(_) => {}
        }
        match self.trash.try_throw(fd, name) {
            Ok(()) => Ok(()),
            // Without privileges another user's directory cannot be moved, but perhaps emptied.
            Err(Errno::ACCESS | Errno::PERM) => {
                removal::empty(listing(fd, name)?.as_fd())?;
                Ok(rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn add_missing(&self, kept: &mut Kept, seen: &Seen) -> io::Result<()> {
        let directory = kept.node.directory.clone();
        let place = kept.place.clone();
        let mut buffer = String::new();
        for (at, file) in directory.files.iter().enumerate() {
            if seen.files[at] {
                continue;
            }
            let (name, link) = (file.name.as_str(), &mut kept.links.of[at]);
            let linked = self
                .cache
                .link(&file.key, link, place.as_fd(), name, &mut buffer);
            linked.map_err(|error| match error {
                LinkError::Vanished => io::ErrorKind::NotFound.into(),
                LinkError::Other(error) => error,
            })?;
        }
        let disk = |error: LayOutError| match error {
            LayOutError::Vanished(_) => io::ErrorKind::NotFound.into(),
            LayOutError::Disk(_, error) => error,
        };
        for (at, (name, target)) in directory.symlinks.iter().enumerate() {
            if !seen.symlinks[at] {
                let made = lay_out::make_symlink(place.as_fd(), name.as_str(), target);
                kept.symlinks[at] = made.map_err(disk)?;
            }
        }
        for (at, (name, _)) in directory.directories.iter().enumerate() {
            if !seen.children[at] {
                // What it was lies elsewhere, where it is foreign, or is gone.
                let node = kept.node.children[at].clone();
                let made = self.make_again(place.as_fd(), name.as_str(), &node);
                kept.children[at] = made.map_err(disk)?;
            }
        }
        Ok(())
    }
}

fn is_the_workers(fd: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(stat.st_uid == rustix::process::geteuid().as_raw())
}

/// Whoever may write to a directory may set attributes of it (xattr(7)).
fn remove_attributes(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::flistxattr(fd, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split(|byte| *byte == 0) {
        if !name.is_empty() && !name.starts_with(b"security.") {
            rustix::fs::fremovexattr(fd, name)?;
        }
    }
    Ok(())
}
