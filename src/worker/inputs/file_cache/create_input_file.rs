//! How files of input roots are made from cached ones.
//!
//! 1. A file of a root is one inode of its own there, whatever else has its content: a reflink, where
//!    the file system has them; else a hard link to one of several inodes of the cached file, of which
//!    the root has each once (`inputs::inodes` chooses). Empty files are made.
//! 2. Extra inodes of a file are copies of its first one, numbered from 1 without gaps. Each knows
//!    how many files of kept roots it is; those at the end that are none are removed before any file
//!    is evicted. So their number follows what roots have, not what roots once had.
//! 3. Extra inodes come and go while `FileCache::changing_extra_inodes` is held, or with their file, when
//!    that is in progress: so a name on the disk is always the inode that is known by it.
//! 4. A file is looked at when it is linked: one whose size, mode, owner or mtime somebody changed, by
//!    whatever name of it, is used no more (`MissingOrAltered`).

use std::{fs::File, io, os::fd::BorrowedFd};

use rustix::{fs::AtFlags, io::Errno};

use super::{
    cache::FileCache,
    cache_directory::{self, WriteAccess},
    index::CacheIndex,
    input_file::{InputFile, InputFileKind},
    key::FileKey,
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
    MissingOrAltered,
    /// This inode has all the links that the file system allows.
    TooManyLinks,
    Other(io::Error),
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

    /// Another inode of the same file instead, which is made if there is none with this number.
    pub fn choose(
        &self,
        key: &FileKey,
        file: &mut InputFile,
        number: u32,
    ) -> Result<(), LinkError> {
        let InputFileKind::HardLink(handle, before) = file.kind() else {
            return Ok(());
        };
        let mut made = false;
        loop {
            let mut index = self.index.lock();
            let found = match number {
                0 => index.files.value_of(handle).map(|file| file.inode),
                number => index.acquire_extra(key, number),
            };
            if let Some(inode) = found {
                index.release_extra(handle, before, file.inode);
                *file = InputFile::new(InputFileKind::HardLink(handle, number), inode);
                break;
            }
            drop(index);
            self.make_extra_inode(key, handle, number)?;
            made = true;
        }
        if made && self.is_over() {
            self.enforce_limits();
        }
        Ok(())
    }

    /// Makes one more inode of a file, unless there are so many.
    fn make_extra_inode(
        &self,
        key: &FileKey,
        handle: Handle,
        wanted: u32,
    ) -> Result<(), LinkError> {
        let first = |index: &CacheIndex| index.files.value_of(handle).map(|cached| cached.inode);
        let inode = first(&self.index.lock());
        // Not under the lock: a file that is found wrong is removed, which takes it.
        let source = self.open_first(key, inode)?;
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let index = self.index.lock();
        if first(&index) != inode {
            return Err(LinkError::MissingOrAltered);
        }
        let inodes = index.inodes_of(key);
        drop(index);
        if inodes > wanted {
            return Ok(());
        }
        let inode = self
            .evicting_when_full(key, || self.directory.duplicate(&source, key, inodes))
            .map_err(LinkError::of_disk)?;
        self.index.lock().add_extra(key, inode);
        Ok(())
    }

    /// Makes a file of a root, of what is pinned for it. `buffer` is used again and again.
    pub fn link(
        &self,
        key: &FileKey,
        file: &mut InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        match file.kind() {
            InputFileKind::HardLink(_, number) => {
                self.hard_link(key, number, file.inode, parent, name, buffer)
            }
            _ => {
                file.inode = self.make(key, file, parent, name, WriteAccess::Nobody)?;
                Ok(())
            }
        }
    }

    /// Copies a pinned file into an input root, for an action that may change it.
    pub fn copy(
        &self,
        key: &FileKey,
        file: &InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), LinkError> {
        let made = self.make(key, file, parent, name, WriteAccess::Everybody);
        made.map(|_| ())
    }

    /// A file with an inode of its own, whose number is returned.
    fn make(
        &self,
        key: &FileKey,
        file: &InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
        access: WriteAccess,
    ) -> Result<u64, LinkError> {
        let made = match file.kind() {
            InputFileKind::Empty => {
                cache_directory::make_empty(parent, name, key.executable, access)
            }
            InputFileKind::Own(handle) | InputFileKind::HardLink(handle, _) => {
                let cached = self.index.lock().files.value_of(handle).copied();
                let source = self.open_first(key, cached.map(|cached| cached.inode))?;
                cache_directory::copy(&source, key, parent, name, access)
            }
        };
        made.map_err(LinkError::of_disk)
    }

    fn hard_link(
        &self,
        key: &FileKey,
        number: u32,
        inode: u64,
        parent: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        match self.directory.link(key, number, parent, name, buffer) {
            Ok(()) => {}
            Err(Errno::MLINK) => return Err(LinkError::TooManyLinks),
            Err(error) => return Err(LinkError::of_disk(error.into())),
        }
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|error| LinkError::Other(error.into()))?;
        self.check_as_made(key, number, &stat, Some(inode))
    }

    /// The first inode of a file, which must have this number.
    fn open_first(&self, key: &FileKey, inode: Option<u64>) -> Result<File, LinkError> {
        let file = self
            .directory
            .open_inode(key, 0)
            .map_err(LinkError::of_disk)?;
        let stat = rustix::fs::fstat(&file).map_err(|error| LinkError::Other(error.into()))?;
        self.check_as_made(key, 0, &stat, inode)?;
        Ok(file)
    }

    /// Whether a file is the n-th extra inode that the cache knows, or the first one (0), and as the cache
    /// made it.
    fn check_as_made(
        &self,
        key: &FileKey,
        number: u32,
        stat: &rustix::fs::Stat,
        inode: Option<u64>,
    ) -> Result<(), LinkError> {
        if Some(stat.st_ino) != inode {
            return Err(LinkError::MissingOrAltered);
        }
        if !cache_directory::is_intact(stat, key, rustix::process::geteuid().as_raw()) {
            self.remove_modified(
                &[(*key, number)],
                "somebody changed a file of the cache, by whatever name of it",
            );
            return Err(LinkError::MissingOrAltered);
        }
        Ok(())
    }

    /// Removes all but the first inode of a file, from the disk too.
    pub(super) fn forget_extra_inodes(&self, key: &FileKey) {
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let inodes = self.index.lock().forget_extra(key);
        self.remove_inodes(key, 1..inodes);
    }

    /// Removes extra inodes that no kept input root has; `false` when there are none.
    pub(super) fn remove_idle_extra_inodes(&self) -> bool {
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let idle = self.index.lock().forget_idle();
        for (key, number) in &idle {
            self.remove_inodes(key, *number..number + 1);
        }
        !idle.is_empty()
    }

    fn remove_inodes(&self, key: &FileKey, numbers: std::ops::Range<u32>) {
        for number in numbers.rev() {
            if let Err(error) = self.directory.remove_inode(key, number) {
                tracing::warn!(digest = %key.digest, number, %error, "could not remove a file from the cache");
            }
        }
    }
}

impl LinkError {
    fn of_disk(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESTALE) => LinkError::MissingOrAltered,
            _ => LinkError::Other(error),
        }
    }
}
