//! Making a used root what it was: after the action, off the next one's way.
//!
//! The kernel keeps a directory's ctime, which no action can set (I2 Credentials): it changes with every change
//! of the entries, and with every change of the directory itself. So a directory whose ctime is the
//! baseline has the entries that the worker left (I6 Baseline): the same names lead to the same inodes. Files
//! cannot have changed, since they are read-only and the worker's (I1 Files); symbolic links cannot change
//! at all; subdirectories are looked at in turn. Where ctime tells of a change, the directory is
//! read: what is foreign goes (I4), what is missing comes again. Inode numbers suffice to know hard
//! links by: the cache holds every inode that is linked from a kept root, so that no other file can have
//! its number. Of what nothing else holds, reflinks, empty files and symbolic links, an action that
//! removed it may have got the number; but what an action makes is its own, and not the worker's (I2 Credentials),
//! which makes nothing in a root while an action has it, and remembers which outputs it took over.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType},
    io::Errno,
};

use super::{
    assign_inodes,
    file_cache::{self, CreateError, CreateMode},
    inode_allocator::InodeAllocator,
    lay_out::{self, LayOutContext, LayOutError},
    root_record::{self, DirectoryRecord, RootRecord},
};
use crate::{
    removal,
    worker::{attributes, beneath::open_child},
};

/// A directory that is read so often and still has foreign entries is being written to.
const MAXIMUM_ROUNDS: u32 = 16;

/// One root that is cleaned, and what it is verified with.
struct RootCleaning<'a> {
    context: &'a LayOutContext<'a>,
    fine_ctime: bool,
    /// When the action could begin, in seconds since the epoch.
    started: i64,
    /// Those that the root has.
    inodes: &'a mut InodeAllocator,
    create_mode: CreateMode,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    adopted_output_inodes: &'a [u64],
}

/// What became of a directory that the worker keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirectoryCondition {
    Good,
    /// Others had so many entries in it that it is not worth being read any more.
    Oversized,
}

/// Which entries of a directory were found as they should be.
struct SeenEntries {
    files: Vec<bool>,
    symlinks: Vec<bool>,
    children: Vec<bool>,
}

/// Repairs a root. `started` is when the action could begin (seconds since the epoch): baselines from
/// about then are not trusted on kernels whose clock is coarse. On error nothing is known of the root
/// (I7 Errors discard). `Oversized` is about the root itself; what is so beneath it is made again.
pub(super) fn clean_root(
    context: &LayOutContext<'_>,
    root: &mut RootRecord,
    fine_ctime: bool,
    started: i64,
    adopted_output_inodes: &[u64],
) -> io::Result<DirectoryCondition> {
    let mut verification = RootCleaning {
        context,
        fine_ctime,
        started,
        inodes: &mut root.inodes,
        create_mode: root.create_mode,
        adopted_output_inodes,
    };
    verification.verify(&mut root.top)
}

impl RootCleaning<'_> {
    fn verify(&mut self, kept: &mut DirectoryRecord) -> io::Result<DirectoryCondition> {
        let trusted = self.fine_ctime
            || kept
                .baseline
                .is_some_and(|baseline| baseline.is_before(self.started - 1));
        if (!trusted || !kept.is_untouched()) && self.repair(kept)? == DirectoryCondition::Oversized
        {
            return Ok(DirectoryCondition::Oversized);
        }
        for i in 0..kept.children.len() {
            if self.verify(&mut kept.children[i])? == DirectoryCondition::Oversized {
                self.replace(kept, i)?;
            }
        }
        Ok(DirectoryCondition::Good)
    }

    /// Makes a subdirectory again that is itself as it should be, but too large to be used.
    fn replace(&mut self, kept: &mut DirectoryRecord, child: usize) -> io::Result<()> {
        let fd = kept.fd.clone();
        let name = kept.node.directory.directories[child].0.clone();
        self.context
            .root_pool
            .deletions
            .try_delete(&*fd, name.as_str())?;
        self.make_child_again(kept, child)?;
        kept.baseline = Some(root_record::record_baseline(fd.as_fd())?.1);
        Ok(())
    }

    /// It is not in its place any more.
    fn make_child_again(&mut self, kept: &mut DirectoryRecord, child: usize) -> io::Result<()> {
        let fd = kept.fd.clone();
        let name = kept.node.directory.directories[child].0.as_str();
        let gone = &mut kept.children[child];
        self.inodes.free_all(gone);
        let (parent, inodes) = (fd.as_fd(), &mut *self.inodes);
        let made = self
            .context
            .make_again(parent, name, &gone.node, inodes, self.create_mode);
        *gone = made.map_err(into_io)?;
        Ok(())
    }

    fn repair(&mut self, kept: &mut DirectoryRecord) -> io::Result<DirectoryCondition> {
        let fd = kept.fd.clone();
        let stat = rustix::fs::fstat(&*fd)?;
        if stat.st_ino != kept.inode || stat.st_nlink == 0 {
            return Err(Errno::STALE.into());
        }
        if root_record::is_oversized(&stat, &kept.node.directory) {
            return Ok(DirectoryCondition::Oversized);
        }
        let directory = open_child(&*fd, ".")?;
        let mut entries = Dir::read_from(&directory)?;
        let mut rounds = 0;
        let seen = loop {
            let (seen, foreign) = self.sweep(kept, &mut entries, directory.as_fd())?;
            if !foreign {
                break seen;
            }
            rounds += 1;
            if rounds > MAXIMUM_ROUNDS {
                return Err(Errno::BUSY.into());
            }
            entries.rewind();
        };
        self.add_missing(kept, &seen)?;
        attributes::remove_all(directory.as_fd())?;
        let (inode, baseline) = root_record::record_baseline(fd.as_fd())?;
        if inode != kept.inode {
            return Err(Errno::STALE.into());
        }
        kept.baseline = Some(baseline);
        Ok(DirectoryCondition::Good)
    }

    /// Reads a directory once and removes what is foreign; tells whether there was any.
    fn sweep(
        &self,
        kept: &DirectoryRecord,
        entries: &mut Dir,
        fd: BorrowedFd<'_>,
    ) -> io::Result<(SeenEntries, bool)> {
        let directory = &kept.node.directory;
        let mut seen = SeenEntries {
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
            let at = name.to_str().ok().and_then(|name| {
                let found = match kind {
                    FileType::RegularFile => directory
                        .files
                        .binary_search_by(|file| file.name.as_str().cmp(name)),
                    FileType::Symlink => directory
                        .symlinks
                        .binary_search_by(|link| link.0.as_str().cmp(name)),
                    FileType::Directory => directory
                        .directories
                        .binary_search_by(|entry| entry.0.as_str().cmp(name)),
                    _ => return None,
                };
                found.ok()
            });
            if let Some(at) = at {
                // Whether an action's file may have the number of the inode, which nothing else holds.
                let (inode, seen, doubtful) = match kind {
                    FileType::RegularFile => {
                        let link = &kept.files.list[at];
                        (link.inode, &mut seen.files, link.has_unshared_inode())
                    }
                    FileType::Symlink => (kept.symlinks[at], &mut seen.symlinks, true),
                    _ => (kept.children[at].inode, &mut seen.children, false),
                };
                let is_ours = |inode: u64| -> io::Result<bool> {
                    let other = self.adopted_output_inodes.binary_search(&inode).is_ok();
                    Ok(!other && entry_is_made_by_worker(fd, name)?)
                };
                if inode == entry.ino() && (!doubtful || is_ours(inode)?) {
                    seen[at] = true;
                    continue;
                }
            }
            foreign = true;
            self.remove_foreign(fd, name, kind)?;
        }
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
        match self.context.root_pool.deletions.try_delete(fd, name) {
            Ok(()) => Ok(()),
            // Without privileges another user's directory cannot be moved, but perhaps emptied.
            Err(Errno::ACCESS | Errno::PERM) => {
                removal::empty(open_child(fd, name)?.as_fd())?;
                Ok(rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn add_missing(&mut self, kept: &mut DirectoryRecord, seen: &SeenEntries) -> io::Result<()> {
        let directory = kept.node.directory.clone();
        let fd = kept.fd.clone();
        let mut buffer = String::new();
        for (at, file) in directory.files.iter().enumerate() {
            if seen.files[at] {
                continue;
            }
            let (name, link) = (file.name.as_str(), &mut kept.files.list[at]);
            let replace_at_link_limit = |file, full| self.inodes.replace_at_link_limit(file, full);
            let (cache, directory) = (self.context.cache, fd.as_fd());
            let linked = assign_inodes::link(
                cache,
                &file.key,
                link,
                directory,
                name,
                &mut buffer,
                replace_at_link_limit,
            );
            linked.map_err(|error| match error {
                CreateError::MissingOrAltered => io::ErrorKind::NotFound.into(),
                CreateError::TooManyLinks => Errno::MLINK.into(),
                CreateError::Other(error) => error,
            })?;
        }
        for (at, (name, target)) in directory.symlinks.iter().enumerate() {
            if !seen.symlinks[at] {
                let made = lay_out::make_symlink(fd.as_fd(), name.as_str(), target);
                kept.symlinks[at] = made.map_err(into_io)?;
            }
        }
        for at in 0..directory.directories.len() {
            if !seen.children[at] {
                // What it was lies elsewhere, where it is foreign, or is gone.
                self.make_child_again(kept, at)?;
            }
        }
        Ok(())
    }
}

fn into_io(error: LayOutError) -> io::Error {
    match error {
        LayOutError::MissingFiles(_) => io::ErrorKind::NotFound.into(),
        LayOutError::Disk(_, error) => error,
    }
}

/// Whether an entry is the worker's, whose names no action can give to what is its own.
fn entry_is_made_by_worker(fd: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let owner = rustix::process::geteuid().as_raw();
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => file_cache::is_made_by_worker(&stat),
        _ => stat.st_uid == owner,
    })
}
