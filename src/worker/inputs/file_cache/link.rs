//! How files of input roots are made from cached ones.
//!
//! 1. A file of a root is one inode of its own there, whatever else has its content: a reflink, where
//!    the file system has them; else a hard link to one of several inodes of the cached file, of which
//!    the root has each once (`input_root::inodes` chooses). Empty files are made.
//! 2. Extra inodes of a file are copies of its first one, numbered from 1 without gaps. Each knows
//!    how many files of kept roots it is; those at the end that are none are removed before any file
//!    is evicted. So their number follows what roots have, not what roots once had.
//! 3. Extra inodes come and go while `FileCache::duplicating` is held, or with their file, when that is
//!    busy: so a name on the disk is always the inode that is known by it.
//! 4. A file is looked at when it is linked: one whose size, mode, owner or mtime somebody changed, by
//!    whatever name of it, is used no more (`Vanished`).

use std::{collections::HashMap, fs::File, io, os::fd::BorrowedFd, sync::Arc};

use rustix::{fs::AtFlags, io::Errno};

use super::{
    FileCache, FileKey, Index, InputFile, InputFileKind, InputFiles,
    disk::{self, WriteAccess},
    eviction::is_full,
};
use crate::{config::worker::Inputs, worker::lru::Handle};

/// How a file of an input root is made from a cached one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkMode {
    /// The worker's, read-only; shares the blocks of the cached file.
    Reflink,
    /// The worker's, read-only; shares the inode of the cached file with other roots.
    HardLink,
    /// The action's, which may write to it.
    Copy,
}

/// Why a file of the cache could not be linked.
#[derive(Debug)]
pub enum LinkError {
    /// Somebody removed it from the disk, changed it, or put another one in its place.
    Vanished,
    /// This inode has all the links that the file system allows.
    Full,
    Other(io::Error),
}

/// An inode of a file beside its first one.
struct ExtraInode {
    inode: u64,
    /// Files of kept input roots that it is.
    links: u32,
}

#[derive(Default)]
pub(super) struct ExtraInodes {
    of: HashMap<FileKey, Vec<ExtraInode>>,
    /// Of all files together, and those of them that are no file of a kept input root.
    count: u64,
    idle: u64,
}

impl Index {
    /// Inodes on disk that are the cache's or in kept input roots.
    pub(super) fn inodes(&self) -> u64 {
        self.kept.len() as u64 + self.further.count + self.own
    }

    /// Inodes beside the first ones of cached files.
    pub(super) fn extra_inodes(&self) -> u64 {
        self.further.count + self.own
    }

    /// How many inodes a file has.
    pub(super) fn copies(&self, key: &FileKey) -> u32 {
        1 + self.further.of.get(key).map_or(0, |of| of.len() as u32)
    }

    pub(super) fn add_further(&mut self, key: &FileKey, inode: u64) {
        let of = self.further.of.entry(*key).or_default();
        of.push(ExtraInode { inode, links: 0 });
        self.further.count += 1;
        self.further.idle += 1;
        self.kept.add_weight(key, key.digest.size());
    }

    /// Forgets all but the first inode of a file; tells how many there were in all.
    pub(super) fn take_further(&mut self, key: &FileKey) -> u32 {
        let of = self.further.of.remove(key).unwrap_or_default();
        self.further.count -= of.len() as u64;
        self.further.idle -= of.iter().filter(|inode| inode.links == 0).count() as u64;
        let size = key.digest.size().saturating_mul(of.len() as u64);
        self.kept.take_weight(key, size);
        1 + of.len() as u32
    }

    pub(super) fn has_further(&self, key: &FileKey, inode: u64) -> bool {
        let of = self.further.of.get(key);
        of.is_some_and(|of| of.iter().any(|known| known.inode == inode))
    }

    /// One more file of a kept root is the n-th inode of a file; tells its inode number.
    fn link_further(&mut self, key: &FileKey, number: u32) -> Option<u64> {
        let of = self.further.of.get_mut(key)?;
        let inode = of.get_mut(number as usize - 1)?;
        self.further.idle -= u64::from(inode.links == 0);
        inode.links += 1;
        Some(inode.inode)
    }

    pub(super) fn unlink_further(&mut self, handle: Handle, number: u32, inode: u64) {
        if number == 0 {
            return;
        }
        let Some(key) = self.kept.key_of(handle) else {
            return;
        };
        // When all were forgotten meanwhile, another one may have the number.
        if let Some(of) = self.further.of.get_mut(key)
            && let Some(known) = of.get_mut(number as usize - 1)
            && known.inode == inode
            && known.links > 0
        {
            known.links -= 1;
            self.further.idle += u64::from(known.links == 0);
        }
    }

    /// Forgets further inodes that are no file of a kept root.
    fn take_idle(&mut self) -> Vec<(FileKey, u32)> {
        let mut idle = Vec::new();
        if self.further.idle == 0 {
            return idle;
        }
        let (further, kept) = (&mut self.further, &mut self.kept);
        further.of.retain(|key, of| {
            while of.last().is_some_and(|inode| inode.links == 0) {
                idle.push((*key, of.len() as u32));
                of.pop();
                kept.take_weight(key, key.digest.size());
            }
            !of.is_empty()
        });
        further.count -= idle.len() as u64;
        further.idle -= idle.len() as u64;
        idle
    }
}

impl FileCache {
    /// How files of input roots are made for those who want such `inputs`.
    pub fn link_mode(&self, inputs: Inputs) -> LinkMode {
        match inputs {
            Inputs::Shared if self.reflinks => LinkMode::Reflink,
            Inputs::Shared | Inputs::HardLinks => LinkMode::HardLink,
            Inputs::Private => LinkMode::Copy,
        }
    }

    /// Whether copies of files take no room of their own until they are written to.
    pub fn shares_blocks(&self) -> bool {
        self.reflinks
    }

    /// Pins files that are to be made in a root, of first inodes. Those that are not here are the
    /// error.
    pub fn pin(
        self: &Arc<Self>,
        keys: impl Iterator<Item = FileKey>,
        link_mode: LinkMode,
    ) -> Result<InputFiles, Vec<FileKey>> {
        let mut links = InputFiles {
            cache: self.clone(),
            of: Vec::with_capacity(keys.size_hint().0),
        };
        let mut absent = Vec::new();
        let mut state = self.state.lock();
        for key in keys {
            if key.digest.size() == 0 {
                state.own += 1;
                links.of.push(InputFile::new(InputFileKind::Empty, 0));
                continue;
            }
            let Some(handle) = state.kept.pin(&key) else {
                absent.push(key);
                continue;
            };
            let kind = match link_mode {
                LinkMode::HardLink => InputFileKind::HardLink(handle, 0),
                LinkMode::Reflink | LinkMode::Copy => {
                    state.own += 1;
                    InputFileKind::Own(handle)
                }
            };
            let stored = state.kept.value_of(handle);
            links.of.push(InputFile::new(
                kind,
                stored.map_or(0, |stored| stored.inode),
            ));
        }
        drop(state);
        match absent.is_empty() {
            true => Ok(links),
            false => Err(absent),
        }
    }

    /// Another inode of the same file instead, which is made if there is none with this number.
    pub fn choose(
        &self,
        key: &FileKey,
        link: &mut InputFile,
        number: u32,
    ) -> Result<(), LinkError> {
        let InputFileKind::HardLink(handle, before) = link.kind() else {
            return Ok(());
        };
        let mut made = false;
        loop {
            let mut state = self.state.lock();
            let found = match number {
                0 => state.kept.value_of(handle).map(|stored| stored.inode),
                number => state.link_further(key, number),
            };
            if let Some(inode) = found {
                state.unlink_further(handle, before, link.inode);
                *link = InputFile::new(InputFileKind::HardLink(handle, number), inode);
                break;
            }
            drop(state);
            self.make_further(key, handle, number)?;
            made = true;
        }
        if made && self.is_over() {
            self.enforce_limits();
        }
        Ok(())
    }

    /// Makes one more inode of a file, unless there are so many.
    fn make_further(&self, key: &FileKey, handle: Handle, wanted: u32) -> Result<(), LinkError> {
        let stored = self.state.lock().kept.value_of(handle).copied();
        let source = self.open_first(key, stored.map(|stored| stored.inode))?;
        let _one_at_a_time = self.duplicating.lock();
        let copies = self.state.lock().copies(key);
        if copies > wanted {
            return Ok(());
        }
        let inode = self.when_not_full(key, || self.files.duplicate(&source, key, copies))?;
        self.state.lock().add_further(key, inode);
        Ok(())
    }

    /// Makes a file of a root, of what is pinned for it. `buffer` is used again and again.
    pub fn link(
        &self,
        key: &FileKey,
        link: &mut InputFile,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        match link.kind() {
            InputFileKind::HardLink(_, number) => {
                self.hard_link(key, number, link.inode, directory, name, buffer)
            }
            _ => {
                link.inode = self.make(key, link, directory, name, WriteAccess::Nobody)?;
                Ok(())
            }
        }
    }

    /// Copies a pinned file into an input root, for an action that may change it.
    pub fn copy(
        &self,
        key: &FileKey,
        link: &InputFile,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), LinkError> {
        let made = self.make(key, link, directory, name, WriteAccess::Everybody);
        made.map(|_| ())
    }

    /// A file with an inode of its own, whose number is returned.
    fn make(
        &self,
        key: &FileKey,
        link: &InputFile,
        directory: BorrowedFd<'_>,
        name: &str,
        may_write: WriteAccess,
    ) -> Result<u64, LinkError> {
        let made = match link.kind() {
            InputFileKind::Empty => disk::make_empty(directory, name, key.executable, may_write),
            InputFileKind::Own(handle) | InputFileKind::HardLink(handle, _) => {
                let state = self.state.lock();
                let stored = state.kept.value_of(handle).copied();
                drop(state);
                let source = self.open_first(key, stored.map(|stored| stored.inode))?;
                disk::copy(&source, key, directory, name, may_write)
            }
        };
        made.map_err(LinkError::of_disk)
    }

    fn hard_link(
        &self,
        key: &FileKey,
        number: u32,
        inode: u64,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        match self.files.link(key, number, directory, name, buffer) {
            Ok(()) => {}
            Err(Errno::MLINK) => return Err(LinkError::Full),
            Err(error) => return Err(LinkError::of_disk(error.into())),
        }
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|error| LinkError::Other(error.into()))?;
        self.look_at(key, &stat, Some(inode))
    }

    /// The first inode of a file, which must have this number.
    fn open_first(&self, key: &FileKey, inode: Option<u64>) -> Result<File, LinkError> {
        let file = self.files.open_copy(key, 0).map_err(LinkError::of_disk)?;
        let stat = rustix::fs::fstat(&file).map_err(|error| LinkError::Other(error.into()))?;
        self.look_at(key, &stat, inode)?;
        Ok(file)
    }

    /// Whether a file is the one that the cache knows, and as the cache made it.
    fn look_at(
        &self,
        key: &FileKey,
        stat: &rustix::fs::Stat,
        inode: Option<u64>,
    ) -> Result<(), LinkError> {
        if Some(stat.st_ino) != inode {
            return Err(LinkError::Vanished);
        }
        if !disk::is_as_made(stat, key, rustix::process::geteuid().as_raw()) {
            self.report_modified(
                &[*key],
                "somebody changed a file of the cache, by whatever name of it",
            );
            return Err(LinkError::Vanished);
        }
        Ok(())
    }

    /// Removes all but the first inode of a file, from the disk too.
    pub(super) fn forget_further(&self, key: &FileKey) {
        let _one_at_a_time = self.duplicating.lock();
        let copies = self.state.lock().take_further(key);
        self.remove_copies(key, 1..copies);
    }

    /// Removes further inodes that no kept input root has; `false` when there are none.
    pub(super) fn remove_idle(&self) -> bool {
        let _one_at_a_time = self.duplicating.lock();
        let idle = self.state.lock().take_idle();
        for (key, number) in &idle {
            self.remove_copies(key, *number..number + 1);
        }
        !idle.is_empty()
    }

    fn remove_copies(&self, key: &FileKey, copies: std::ops::Range<u32>) {
        for copy in copies.rev() {
            if let Err(error) = self.files.remove_copy(key, copy) {
                tracing::warn!(digest = %key.digest, copy, %error, "could not remove a file from the cache");
            }
        }
    }

    /// Tries again after having made space on a full disk.
    fn when_not_full<T>(
        &self,
        key: &FileKey,
        mut write: impl FnMut() -> io::Result<T>,
    ) -> Result<T, LinkError> {
        let mut attempts = 0;
        loop {
            match write() {
                Err(error) if attempts < 4 && is_full(&error) && self.evict_when_full(key) => {
                    attempts += 1;
                }
                result => return result.map_err(LinkError::of_disk),
            }
        }
    }
}

impl LinkError {
    fn of_disk(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESTALE) => LinkError::Vanished,
            _ => LinkError::Other(error),
        }
    }
}
