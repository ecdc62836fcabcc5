//! Makes the files of a root, and says which inode of a cached file each hard link is: one that the root does not link
//! yet (I8 Distinct).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::AtFlags;

use super::{
    file_cache::{
        CreateError, CreateMode, FileCache, FileKey, InputFile, InputFileKind, InputFiles,
    },
    lay_out::{LayOut, LayOutError, error_at},
    root_record::{self, DirectoryRecord},
};
use crate::worker::lru::Handle;

/// Creates a read-only file of a root. When it is to be a hard link to an inode that has all links that it can have,
/// `replace_at_link_limit` says to which other one, by the cached file and the index of the first.
pub(super) fn create_read_only_file(
    cache: &FileCache,
    key: &FileKey,
    file: &mut InputFile,
    directory: BorrowedFd<'_>,
    name: &str,
    buffer: &mut String,
    mut replace_at_link_limit: impl FnMut(Handle, u32) -> u32,
) -> Result<(), CreateError> {
    loop {
        let created = cache.create_read_only(key, file, directory, name, buffer);
        match (created, file.kind()) {
            (Err(CreateError::TooManyLinks), InputFileKind::HardLink(handle, full)) => {
                cache.switch_inode(key, file, replace_at_link_limit(handle, full))?;
            }
            (result, _) => return result,
        }
    }
}

impl LayOut<'_> {
    /// Sees to it, between removals and additions, that the root links no inode twice. What leaves the root frees its
    /// inodes; subtrees that come out of the stash bring theirs. Where the root links such an inode already, the
    /// subtree's file is created anew, of another one.
    pub(super) fn resolve_inode_conflicts(
        &self,
        moved: &[u32],
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        if self.create_mode != CreateMode::HardLink {
            return Ok(());
        }
        let mut is_moved = vec![false; self.dropped.lock().len()];
        for dropped_index in moved {
            is_moved[*dropped_index as usize] = true;
        }
        for (dropped, is_moved) in self.dropped.lock().iter().zip(is_moved) {
            if let (Some(dropped), false) = (dropped, is_moved) {
                self.inodes.lock().free_all(&dropped.record);
            }
        }
        for unstashed in self.unstashed.lock().iter_mut().flatten() {
            self.allocate_inodes(&mut unstashed.record, buffer)?;
        }
        Ok(())
    }

    /// Allocates the inodes that a subtree links, and others for those that the root links already.
    fn allocate_inodes(
        &self,
        record: &mut DirectoryRecord,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let mut inodes = self.inodes.lock();
        let mut conflicts = Vec::new();
        for (i, file) in record.files.list.iter().enumerate() {
            if let InputFileKind::HardLink(handle, inode_index) = file.kind()
                && !inodes.try_allocate(handle, inode_index)
            {
                conflicts.push((i, handle));
            }
        }
        // Only now, so that no file gets an inode that another file of the directory links.
        let replacements: Vec<(usize, u32)> = conflicts
            .into_iter()
            .map(|(i, handle)| (i, inodes.allocate(handle, 0)))
            .collect();
        drop(inodes);
        let fd = record.fd.clone();
        for (i, inode_index) in &replacements {
            let entry = &record.node.directory.files[*i];
            let (name, file) = (entry.name.as_str(), &mut record.files.list[*i]);
            self.switch_inode(&entry.key, file, *inode_index)?;
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(error_at(name))?;
            self.create_file(fd.as_fd(), &entry.key, name, file, buffer)?;
        }
        if !replacements.is_empty() {
            let recorded = root_record::finalize_directory(fd.as_fd());
            record.baseline = Some(recorded.map_err(error_at("."))?.1);
        }
        for child in &mut record.children {
            self.allocate_inodes(child, buffer)?;
        }
        Ok(())
    }

    /// Takes the files of one directory from those that are pinned, each as an inode that the root does not link yet.
    /// The first that is not empty is at `first` of those that the plan creates.
    pub(super) fn take_files(
        &self,
        first: usize,
        keys: impl Iterator<Item = FileKey> + Clone,
    ) -> Result<InputFiles, LayOutError> {
        let mut pinned = self.pinned.lock();
        let handed_over = pinned.hand_over(first, keys.clone(), self.create_mode);
        drop(pinned);
        let mut files = handed_over.map_err(LayOutError::MissingFiles)?;
        if self.create_mode != CreateMode::HardLink {
            return Ok(files);
        }
        let mut inodes = self.inodes.lock();
        let mut extra = Vec::new();
        for (i, file) in files.list.iter().enumerate() {
            if let InputFileKind::HardLink(handle, _) = file.kind() {
                let inode_index = inodes.allocate(handle, 0);
                extra.extend((inode_index > 0).then_some((i, inode_index)));
            }
        }
        drop(inodes);
        if !extra.is_empty() {
            let keys: Vec<FileKey> = keys.collect();
            for (i, inode_index) in extra {
                self.switch_inode(&keys[i], &mut files.list[i], inode_index)?;
            }
        }
        Ok(files)
    }

    fn switch_inode(
        &self,
        key: &FileKey,
        file: &mut InputFile,
        inode_index: u32,
    ) -> Result<(), LayOutError> {
        let switched = self.context.cache.switch_inode(key, file, inode_index);
        self.collect_missing(key, &key.digest.to_string(), switched)
    }

    /// Makes an error of a result, unless the file is gone from the cache: that is only noted, so that all other files
    /// are tried too, and one attempt finds all that are gone.
    fn collect_missing(
        &self,
        key: &FileKey,
        name: &str,
        result: Result<(), CreateError>,
    ) -> Result<(), LayOutError> {
        match result {
            Ok(()) => Ok(()),
            Err(CreateError::MissingOrAltered) => {
                self.queue.lock().missing.push(*key);
                Ok(())
            }
            Err(CreateError::TooManyLinks) => Err(error_at(name)(rustix::io::Errno::MLINK)),
            Err(CreateError::Other(error)) => Err(LayOutError::Disk(name.to_owned(), error)),
        }
    }

    /// Creates a file of the root, in the way that all of its files are created.
    pub(super) fn create_file(
        &self,
        directory: BorrowedFd<'_>,
        key: &FileKey,
        name: &str,
        file: &mut InputFile,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let cache = &self.context.cache;
        let replace_at_link_limit =
            |file, full| self.inodes.lock().replace_at_link_limit(file, full);
        let created = match self.create_mode {
            CreateMode::Copy => cache.create_writable(key, file, directory, name),
            _ => create_read_only_file(
                cache,
                key,
                file,
                directory,
                name,
                buffer,
                replace_at_link_limit,
            ),
        };
        self.collect_missing(key, name, created)
    }
}
