//! Makes files of input roots from cached ones, by reflink, hard link or copy; makes and removes extra inodes of cached
//! files.
//!
//! 1. No two files of a root are one inode, whatever their content is: by the root's `CreateMode` each is a reflink, a
//!    private copy, or a hard link to one of several inodes of the cached file, of which the root links each at most
//!    once (`inputs::inode_allocator` says which). Empty files are made of nothing.
//! 2. Extra inodes of a file are copies of its first one; their inode indices have no gaps. Each is counted for how
//!    many files of input roots are links to it; those at the end that have none are removed before any file
//!    is evicted for the cache's own limits. So there are as many as roots have, not as roots once had.
//! 3. Extra inodes come and go while `FileCache::changing_extra_inodes` is held, or with their file, when
//!    that is in progress: so a name on the disk is always the inode that is known by it.
//! 4. A file is looked at when it is linked: one whose size, mode, owner or mtime somebody changed, by
//!    whatever name of it, is used no more (`MissingOrAltered`).

use std::{fs::File, io, os::fd::BorrowedFd};

use rustix::{fs::AtFlags, io::Errno};

use super::{
    cache::FileCache,
    index::CacheIndex,
    input_file::{InputFile, InputFileKind},
    key::FileKey,
    worker_files::{self, WriteAccess, has_expected_attributes},
};
use crate::{config::worker::Inputs, worker::lru::Handle};

/// How files of an input root are created from cached ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CreateMode {
    /// Each is the worker's and read-only, and shares the blocks of the cached file.
    Reflink,
    /// Each is the worker's and read-only, and shares an inode of the cached file with other roots.
    HardLink,
    /// Each is for one action alone, which may write to it.
    Copy,
}

/// Why a file of an input root could not be created.
#[derive(Debug)]
pub enum CreateError {
    /// Somebody removed the cached file from the disk, changed it, or put another one in its place.
    MissingOrAltered,
    /// The inode of the cached file has all the links that the file system allows.
    TooManyLinks,
    Other(io::Error),
}

impl FileCache {
    /// How files of input roots are created for a runner with such `inputs`.
    pub fn create_mode(&self, inputs: Inputs) -> CreateMode {
        match inputs {
            Inputs::Shared if self.supports_reflinks => CreateMode::Reflink,
            Inputs::Shared | Inputs::HardLinks => CreateMode::HardLink,
            Inputs::Private => CreateMode::Copy,
        }
    }

    /// Whether copies of files take no room of their own until they are written to.
    pub fn supports_reflinks(&self) -> bool {
        self.supports_reflinks
    }

    /// Points a hard link to another inode of the same cached file, which is made if there is none with this index.
    /// What is on disk at the link's place stays as it is; so does a file that is no hard link.
    pub fn switch_inode(
        &self,
        key: &FileKey,
        file: &mut InputFile,
        inode_index: u32,
    ) -> Result<(), CreateError> {
        let InputFileKind::HardLink(handle, before) = file.kind() else {
            return Ok(());
        };
        let mut made = false;
        loop {
            let mut index = self.index.lock();
            let found = match inode_index {
                0 => index.files.value_of(handle).map(|file| file.inode),
                inode_index => index.acquire_extra(key, inode_index),
            };
            if let Some(inode) = found {
                index.release_extra(handle, before, file.inode);
                *file = InputFile::new(InputFileKind::HardLink(handle, inode_index), inode);
                break;
            }
            drop(index);
            self.make_extra_inode(key, handle, inode_index)?;
            made = true;
        }
        if made && self.is_over() {
            self.enforce_limits();
        }
        Ok(())
    }

    /// Makes one more inode of a file, unless it has one with the index `wanted` already.
    fn make_extra_inode(
        &self,
        key: &FileKey,
        handle: Handle,
        wanted: u32,
    ) -> Result<(), CreateError> {
        let first = |index: &CacheIndex| index.files.value_of(handle).map(|cached| cached.inode);
        let inode = first(&self.index.lock());
        // Not under the lock: a file that is found wrong is removed, which takes it.
        let source = self.open_first(key, inode)?;
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let index = self.index.lock();
        if first(&index) != inode {
            return Err(CreateError::MissingOrAltered);
        }
        let inodes = index.inodes_of(key);
        drop(index);
        if inodes > wanted {
            return Ok(());
        }
        let inode = self
            .evicting_when_full(key, || self.directory.duplicate(&source, key, inodes))
            .map_err(CreateError::of_disk)?;
        self.index.lock().add_extra(key, inode);
        Ok(())
    }

    /// Creates a read-only file of an input root, of what is pinned for it. `buffer` is used again and again.
    pub fn create_read_only(
        &self,
        key: &FileKey,
        file: &mut InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), CreateError> {
        match file.kind() {
            InputFileKind::HardLink(_, inode_index) => {
                self.hard_link(key, inode_index, file.inode, parent, name, buffer)
            }
            _ => {
                file.inode = self.create_unshared(key, file, parent, name, WriteAccess::Nobody)?;
                Ok(())
            }
        }
    }

    /// Creates a file of an input root that its action may write to, by copying what is pinned for it.
    pub fn create_writable(
        &self,
        key: &FileKey,
        file: &InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), CreateError> {
        let made = self.create_unshared(key, file, parent, name, WriteAccess::Everybody);
        made.map(|_| ())
    }

    /// Creates a file with an unshared inode, whose inode number is returned.
    fn create_unshared(
        &self,
        key: &FileKey,
        file: &InputFile,
        parent: BorrowedFd<'_>,
        name: &str,
        access: WriteAccess,
    ) -> Result<u64, CreateError> {
        let made = match file.kind() {
            InputFileKind::Empty => {
                worker_files::create_empty(parent, name, key.executable, access)
            }
            InputFileKind::Unshared(handle) | InputFileKind::HardLink(handle, _) => {
                let cached = self.index.lock().files.value_of(handle).copied();
                let source = self.open_first(key, cached.map(|cached| cached.inode))?;
                worker_files::create_copy(&source, key, parent, name, access)
            }
        };
        made.map_err(CreateError::of_disk)
    }

    /// Creates a file that is a hard link to one of the inodes of a cached file, which must have this inode number.
    fn hard_link(
        &self,
        key: &FileKey,
        inode_index: u32,
        inode: u64,
        parent: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), CreateError> {
        match self
            .directory
            .link_into_root(key, inode_index, parent, name, buffer)
        {
            Ok(()) => {}
            Err(Errno::MLINK) => return Err(CreateError::TooManyLinks),
            Err(error) => return Err(CreateError::of_disk(error.into())),
        }
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|error| CreateError::Other(error.into()))?;
        self.check_as_made(key, inode_index, &stat, Some(inode))
    }

    /// Opens the first inode of a cached file, which must have this inode number.
    fn open_first(&self, key: &FileKey, inode: Option<u64>) -> Result<File, CreateError> {
        let file = self
            .directory
            .open_inode(key, 0)
            .map_err(CreateError::of_disk)?;
        let stat = rustix::fs::fstat(&file).map_err(|error| CreateError::Other(error.into()))?;
        self.check_as_made(key, 0, &stat, inode)?;
        Ok(file)
    }

    /// Checks that what was found on disk is the inode that the cache knows by this index, and as the cache made it.
    /// Removes the cached file when somebody changed that inode.
    fn check_as_made(
        &self,
        key: &FileKey,
        inode_index: u32,
        stat: &rustix::fs::Stat,
        inode: Option<u64>,
    ) -> Result<(), CreateError> {
        if Some(stat.st_ino) != inode {
            return Err(CreateError::MissingOrAltered);
        }
        if !has_expected_attributes(stat, key, rustix::process::geteuid().as_raw()) {
            self.remove_modified(
                &[(*key, inode_index)],
                "somebody changed a file of the cache, by whatever name of it",
            );
            return Err(CreateError::MissingOrAltered);
        }
        Ok(())
    }

    /// Forgets all but the first inode of a file, and removes them from the disk.
    pub(super) fn forget_extra_inodes(&self, key: &FileKey) {
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let inodes = self.index.lock().forget_extra(key);
        self.remove_inodes(key, 1..inodes);
    }

    /// Removes the last extra inodes of each file, as far as no input root links them; `false` when there are none.
    pub(super) fn remove_unlinked_extra_inodes(&self) -> bool {
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let forgotten = self.index.lock().forget_unlinked();
        for (key, inode_index) in &forgotten {
            self.remove_inodes(key, *inode_index..inode_index + 1);
        }
        !forgotten.is_empty()
    }

    fn remove_inodes(&self, key: &FileKey, inode_indices: std::ops::Range<u32>) {
        for inode_index in inode_indices.rev() {
            if let Err(error) = self.directory.remove_inode(key, inode_index) {
                tracing::warn!(digest = %key.digest, number = inode_index, %error, "could not remove a file from the cache");
            }
        }
    }
}

impl CreateError {
    fn of_disk(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESTALE) => CreateError::MissingOrAltered,
            _ => CreateError::Other(error),
        }
    }
}
