//! Makes a used root what it was before its action, while no other action waits for it.
//!
//! The kernel keeps a directory's ctime, which no action can set (I2 Credentials): it changes with every change
//! of the entries, and with every change of the directory itself. So a directory whose ctime is the
//! baseline has the entries that the worker left (I6 Baseline): the same names lead to the same inodes. Files
//! cannot have changed, since they are read-only and the worker's (I1 Files); symbolic links cannot change
//! at all; subdirectories are looked at in turn. Where ctime tells of a change, the directory is
//! read: what is foreign is removed (I4), and what is missing is made again. Inode numbers suffice to know hard
//! links by: the cache has every inode that a recorded root links, so that no other file can have
//! its number. An action that removed what nothing else holds (a reflink, an empty file or a symbolic link) may have
//! got the inode number for a file of its own; but what an action makes is its user's, and not the worker's
//! (I2 Credentials). The worker makes nothing in a root while an action has it, and remembers which outputs it adopted.

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

/// How often a directory is read again while foreign entries are found in it; if more are, something is writing to it.
const MAXIMUM_ROUNDS: u32 = 16;

/// A root that is being cleaned, and what that needs.
struct RootCleaning<'a> {
    context: &'a LayOutContext<'a>,
    /// Whether every change of a directory gives it another ctime.
    fine_ctime: bool,
    /// When the command could start, in seconds since the epoch.
    command_start_seconds: i64,
    /// Which inodes of cached files the root links.
    inodes: &'a mut InodeAllocator,
    create_mode: CreateMode,
    /// The inode numbers of what the worker adopted of what the action made, sorted.
    adopted_output_inodes: &'a [u64],
}

/// What came of cleaning a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirectoryCondition {
    /// It is as its record says.
    Good,
    /// Others had so many entries in it that it is not worth being read any more.
    Oversized,
}

/// Which entries of a directory were found to be as its record says.
struct SeenEntries {
    files: Vec<bool>,
    symlinks: Vec<bool>,
    children: Vec<bool>,
}

/// Makes a root what its record says. Baselines from about `command_start_seconds`, when the command could start
/// (seconds since the epoch), are not trusted unless every change gives a directory another ctime (`fine_ctime`). After
/// an error nothing is known of the root (I7 Errors discard). `Oversized` is about the root itself; directories beneath
/// it that are oversized are made again.
pub(super) fn clean_root(
    context: &LayOutContext<'_>,
    root: &mut RootRecord,
    fine_ctime: bool,
    command_start_seconds: i64,
    adopted_output_inodes: &[u64],
) -> io::Result<DirectoryCondition> {
    let mut cleaning = RootCleaning {
        context,
        fine_ctime,
        command_start_seconds,
        inodes: &mut root.inodes,
        create_mode: root.create_mode,
        adopted_output_inodes,
    };
    cleaning.clean_directory(&mut root.top)
}

impl RootCleaning<'_> {
    /// Makes a directory, and all beneath it, what its record says.
    fn clean_directory(&mut self, record: &mut DirectoryRecord) -> io::Result<DirectoryCondition> {
        let trusted = self.fine_ctime
            || record
                .baseline
                .is_some_and(|baseline| baseline.is_before(self.command_start_seconds - 1));
        if (!trusted || !record.is_untouched())
            && self.restore_directory(record)? == DirectoryCondition::Oversized
        {
            return Ok(DirectoryCondition::Oversized);
        }
        for i in 0..record.children.len() {
            if self.clean_directory(&mut record.children[i])? == DirectoryCondition::Oversized {
                self.replace_oversized(record, i)?;
            }
        }
        Ok(DirectoryCondition::Good)
    }

    /// Removes a subdirectory that is oversized, and makes it again.
    fn replace_oversized(&mut self, record: &mut DirectoryRecord, child: usize) -> io::Result<()> {
        let fd = record.fd.clone();
        let name = record.node.directory.directories[child].0.clone();
        self.context
            .root_pool
            .deletions
            .try_delete(&*fd, name.as_str())?;
        self.restore_child(record, child)?;
        record.baseline = Some(root_record::finalize_directory(fd.as_fd())?.1);
        Ok(())
    }

    /// Makes a subdirectory again that is not in its place any more, with all that is in it.
    fn restore_child(&mut self, record: &mut DirectoryRecord, child: usize) -> io::Result<()> {
        let fd = record.fd.clone();
        let name = record.node.directory.directories[child].0.as_str();
        let gone = &mut record.children[child];
        self.inodes.free_all(gone);
        let (parent, inodes) = (fd.as_fd(), &mut *self.inodes);
        let made = self
            .context
            .make_subtree(parent, name, &gone.node, inodes, self.create_mode);
        *gone = made.map_err(into_io)?;
        Ok(())
    }

    /// Reads one directory, removes what is foreign, and makes what is missing.
    fn restore_directory(
        &mut self,
        record: &mut DirectoryRecord,
    ) -> io::Result<DirectoryCondition> {
        let fd = record.fd.clone();
        let stat = rustix::fs::fstat(&*fd)?;
        if stat.st_ino != record.inode || stat.st_nlink == 0 {
            return Err(Errno::STALE.into());
        }
        if root_record::is_oversized(&stat, &record.node.directory) {
            return Ok(DirectoryCondition::Oversized);
        }
        let directory = open_child(&*fd, ".")?;
        let mut entries = Dir::read_from(&directory)?;
        let mut rounds = 0;
        let seen = loop {
            let (seen, foreign) =
                self.remove_foreign_entries(record, &mut entries, directory.as_fd())?;
            if !foreign {
                break seen;
            }
            rounds += 1;
            if rounds > MAXIMUM_ROUNDS {
                return Err(Errno::BUSY.into());
            }
            entries.rewind();
        };
        self.restore_missing(record, &seen)?;
        attributes::remove_all(directory.as_fd())?;
        let (inode, baseline) = root_record::finalize_directory(fd.as_fd())?;
        if inode != record.inode {
            return Err(Errno::STALE.into());
        }
        record.baseline = Some(baseline);
        Ok(DirectoryCondition::Good)
    }

    /// Reads a directory once and removes what is foreign; tells whether there was any.
    fn remove_foreign_entries(
        &self,
        record: &DirectoryRecord,
        entries: &mut Dir,
        fd: BorrowedFd<'_>,
    ) -> io::Result<(SeenEntries, bool)> {
        let directory = &record.node.directory;
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
            // The worker gives no names that are not UTF-8.
            let index = name.to_str().ok().and_then(|name| {
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
            if let Some(index) = index {
                // Unshared inodes are held by nothing else: an action's file may have got their numbers.
                let (inode, seen, is_unshared) = match kind {
                    FileType::RegularFile => {
                        let file = &record.files.list[index];
                        (file.inode, &mut seen.files, file.has_unshared_inode())
                    }
                    FileType::Symlink => (record.symlinks[index], &mut seen.symlinks, true),
                    _ => (record.children[index].inode, &mut seen.children, false),
                };
                let is_made_by_worker = |inode: u64| -> io::Result<bool> {
                    let adopted = self.adopted_output_inodes.binary_search(&inode).is_ok();
                    Ok(!adopted && entry_has_worker_attributes(fd, name)?)
                };
                if inode == entry.ino() && (!is_unshared || is_made_by_worker(inode)?) {
                    seen[index] = true;
                    continue;
                }
            }
            foreign = true;
            self.remove_foreign_entry(fd, name, kind)?;
        }
        Ok((seen, foreign))
    }

    /// Removes an entry that the record of its directory lacks.
    fn remove_foreign_entry(
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

    /// Makes the entries of a directory that were not seen in it.
    fn restore_missing(
        &mut self,
        record: &mut DirectoryRecord,
        seen: &SeenEntries,
    ) -> io::Result<()> {
        let directory = record.node.directory.clone();
        let fd = record.fd.clone();
        let mut buffer = String::new();
        for (index, entry) in directory.files.iter().enumerate() {
            if seen.files[index] {
                continue;
            }
            let (name, file) = (entry.name.as_str(), &mut record.files.list[index]);
            let replace_at_link_limit = |file, full| self.inodes.replace_at_link_limit(file, full);
            let (cache, directory) = (self.context.cache, fd.as_fd());
            let created = assign_inodes::create_read_only_file(
                cache,
                &entry.key,
                file,
                directory,
                name,
                &mut buffer,
                replace_at_link_limit,
            );
            created.map_err(|error| match error {
                CreateError::MissingOrAltered => io::ErrorKind::NotFound.into(),
                CreateError::TooManyLinks => Errno::MLINK.into(),
                CreateError::Other(error) => error,
            })?;
        }
        for (index, (name, target)) in directory.symlinks.iter().enumerate() {
            if !seen.symlinks[index] {
                let made = lay_out::create_symlink(fd.as_fd(), name.as_str(), target);
                record.symlinks[index] = made.map_err(into_io)?;
            }
        }
        for index in 0..directory.directories.len() {
            if !seen.children[index] {
                // The directory that it was is elsewhere in the root, where it is foreign, or is gone.
                self.restore_child(record, index)?;
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

/// Whether an entry has the attributes of what the worker makes: a file owner, mode and mtime, all else the owner. No
/// action can give what it makes that owner.
fn entry_has_worker_attributes(fd: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let owner = rustix::process::geteuid().as_raw();
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => file_cache::has_worker_attributes(&stat),
        _ => stat.st_uid == owner,
    })
}
