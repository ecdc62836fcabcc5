//! Makes the files of a root, and chooses which inode of a cached file each hard link is: one that the root does not
//! have yet (I8 Distinct).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::AtFlags;

use super::{
    file_cache::{
        CreateError, CreateMode, FileCache, FileKey, InputFile, InputFileKind, InputFiles,
    },
    lay_out::{LayOut, LayOutError, at},
    root_record::{self, DirectoryRecord},
};
use crate::worker::lru::Handle;

/// Makes one file of a root; with another inode, which `other` tells instead of a full one, when that
/// has all links that it can have.
pub(super) fn link(
    cache: &FileCache,
    key: &FileKey,
    link: &mut InputFile,
    directory: BorrowedFd<'_>,
    name: &str,
    buffer: &mut String,
    mut other: impl FnMut(Handle, u32) -> u32,
) -> Result<(), CreateError> {
    loop {
        match (
            cache.create_read_only(key, link, directory, name, buffer),
            link.kind(),
        ) {
            (Err(CreateError::TooManyLinks), InputFileKind::HardLink(handle, number)) => {
                cache.switch_inode(key, link, other(handle, number))?;
            }
            (result, _) => return result,
        }
    }
}

impl LayOut<'_> {
    /// Between removals and additions: what leaves the root frees its inodes, and subtrees that come
    /// into it take theirs. Where the root has such an inode already, the subtree's file gets another.
    pub(super) fn resolve_inode_conflicts(
        &self,
        moved: &[u32],
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        if self.create_mode != CreateMode::HardLink {
            return Ok(());
        }
        let mut stays = vec![false; self.dropped.lock().len()];
        for number in moved {
            stays[*number as usize] = true;
        }
        for (stashed, stays) in self.dropped.lock().iter().zip(stays) {
            if let (Some(stashed), false) = (stashed, stays) {
                self.inodes.lock().free_all(&stashed.kept);
            }
        }
        for stashed in self.taken.lock().iter_mut().flatten() {
            self.take_inodes(&mut stashed.kept, buffer)?;
        }
        Ok(())
    }

    fn take_inodes(
        &self,
        kept: &mut DirectoryRecord,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let mut inodes = self.inodes.lock();
        let mut taken = Vec::new();
        for (i, link) in kept.files.list.iter().enumerate() {
            if let InputFileKind::HardLink(file, number) = link.kind()
                && !inodes.take_this(file, number)
            {
                taken.push((i, file));
            }
        }
        // Those that nobody has there are taken first, so that the others do not get them.
        let others: Vec<(usize, u32)> = taken
            .into_iter()
            .map(|(i, file)| (i, inodes.take(file, 0)))
            .collect();
        drop(inodes);
        let fd = kept.fd.clone();
        for (i, number) in &others {
            let file = &kept.node.directory.files[*i];
            let (name, link) = (file.name.as_str(), &mut kept.files.list[*i]);
            self.choose(&file.key, link, *number)?;
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(at(name))?;
            self.link(fd.as_fd(), &file.key, name, link, buffer)?;
        }
        if !others.is_empty() {
            kept.baseline = Some(root_record::record_baseline(fd.as_fd()).map_err(at("."))?.1);
        }
        for child in &mut kept.children {
            self.take_inodes(child, buffer)?;
        }
        Ok(())
    }

    /// Takes the pinned files of one directory, each as an inode that the root does not have yet. The
    /// first that is not empty is at `first`.
    pub(super) fn take_files(
        &self,
        first: usize,
        keys: impl Iterator<Item = FileKey> + Clone,
    ) -> Result<InputFiles, LayOutError> {
        let handed_over = self
            .pinned
            .lock()
            .hand_over(first, keys.clone(), self.create_mode);
        let mut files = handed_over.map_err(LayOutError::MissingFiles)?;
        if self.create_mode != CreateMode::HardLink {
            return Ok(files);
        }
        let mut inodes = self.inodes.lock();
        let mut others = Vec::new();
        for (i, file) in files.list.iter().enumerate() {
            if let InputFileKind::HardLink(handle, _) = file.kind() {
                let number = inodes.take(handle, 0);
                others.extend((number > 0).then_some((i, number)));
            }
        }
        drop(inodes);
        if !others.is_empty() {
            let keys: Vec<FileKey> = keys.collect();
            for (i, number) in others {
                self.choose(&keys[i], &mut files.list[i], number)?;
            }
        }
        Ok(files)
    }

    fn choose(&self, key: &FileKey, link: &mut InputFile, number: u32) -> Result<(), LayOutError> {
        let chosen = self.context.cache.switch_inode(key, link, number);
        self.record(key, &key.digest.to_string(), chosen)
    }

    /// All others are tried, so that one attempt finds all that are gone.
    fn record(
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
            Err(CreateError::TooManyLinks) => Err(at(name)(rustix::io::Errno::MLINK)),
            Err(CreateError::Other(error)) => Err(LayOutError::Disk(name.to_owned(), error)),
        }
    }

    pub(super) fn link(
        &self,
        directory: BorrowedFd<'_>,
        key: &FileKey,
        name: &str,
        link: &mut InputFile,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let cache = &self.context.cache;
        let made = match self.create_mode {
            CreateMode::Copy => cache.create_writable(key, link, directory, name),
            _ => self::link(cache, key, link, directory, name, buffer, |file, full| {
                self.inodes.lock().replace_at_link_limit(file, full)
            }),
        };
        self.record(key, name, made)
    }
}
