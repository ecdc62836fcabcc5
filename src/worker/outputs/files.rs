//! Regular files among the outputs: opened, taken from the action, hashed, handed on, kept in the
//! cache.
//!
//! 1. Each inode is read once, under whatever names it is met.
//! 2. Its size is counted before it is read.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Stat};

use super::{
    collector::{Blobs, Collector, OpenedOutput, unreadable},
    hashing,
    node_properties::InodeId,
};
use crate::{
    digest::Digest,
    storage::Content,
    worker::{
        beneath,
        command::{CommandOutput, OutputKind},
        fault::Fault,
        inputs::file_cache::{self, FileKey},
    },
};

/// Two files of this size are worth a thread.
const WORTH_A_THREAD_SIZE: i64 = 4 << 20;
/// Of one batch.
const BATCH_BYTES: usize = 8 << 20;
const BATCH_FILES: usize = 64;

impl<S: FnMut(Blobs)> Collector<'_, S> {
    /// A regular file: its digest, and whether anybody may execute it. It stays in the cache.
    pub fn file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
        text: &str,
    ) -> Result<(Digest, bool), Fault> {
        self.bounds.check_time()?;
        let (opened, hashed) = match self.take_ahead(directory, name) {
            Some((opened, digest)) => (opened, Some(digest)),
            None => {
                let (file, stat) =
                    beneath::open_file(directory, name).map_err(|error| unreadable(text, error))?;
                if let Some(read) = self.read.get(&inode_of(&stat)) {
                    return Ok(*read);
                }
                self.bounds.add_file(size_of(&stat), text)?;
                (self.take_over(file, &stat), None)
            }
        };
        let digest = match hashed {
            Some(digest) => {
                self.add(digest, Content::File(opened.file.clone()));
                digest
            }
            None => self.digest(&opened.file, opened.size)?,
        };
        if opened.may_return {
            self.read.insert(opened.inode, (digest, opened.executable));
        }
        let key = FileKey {
            digest,
            executable: opened.executable,
        };
        self.cache
            .add_output(key, &opened.file, opened.is_owned, directory, name);
        Ok((digest, opened.executable))
    }

    /// A file that stays the action's, such as a log: its digest.
    pub fn log_file(&mut self, file: File, stat: &Stat, text: &str) -> Result<Digest, Fault> {
        self.bounds.check_time()?;
        let inode = inode_of(stat);
        if let Some((digest, _)) = self.read.get(&inode) {
            return Ok(*digest);
        }
        self.bounds.add_file(size_of(stat), text)?;
        let digest = self.digest(&Arc::new(file), size_of(stat))?;
        if stat.st_nlink > 1 {
            self.read.insert(inode, (digest, is_executable(stat)));
        }
        Ok(digest)
    }

    /// Takes a file from the action, before it is read.
    fn take_over(&mut self, file: File, stat: &Stat) -> OpenedOutput {
        let executable = is_executable(stat);
        self.properties.remember(inode_of(stat), stat);
        let worker = rustix::process::geteuid().as_raw();
        // What the worker made, or took over before, shows it.
        if (stat.st_uid == worker || stat.st_uid == 0) && !file_cache::has_worker_attributes(stat) {
            self.found.by_a_privileged_user = true;
        }
        if stat.st_uid != worker {
            self.found.adopted_output_inodes.push(stat.st_ino);
        }
        OpenedOutput {
            is_owned: file_cache::take_ownership(&file, executable),
            file: Arc::new(file),
            inode: inode_of(stat),
            size: size_of(stat),
            executable,
            may_return: stat.st_nlink > 1 || self.overlapping,
        }
    }

    fn take_ahead(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Option<(OpenedOutput, Digest)> {
        if self.ahead.is_empty() {
            return None;
        }
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        self.ahead.remove(&inode_of(&stat))
    }

    pub fn hash_outputs_ahead(&mut self, root: BorrowedFd<'_>, outputs: &[CommandOutput]) {
        if outputs.len() < 2 {
            return;
        }
        let parents: Vec<(OwnedFd, &str)> = outputs
            .iter()
            .filter(|output| output.kind != OutputKind::Directory)
            .take(BATCH_FILES)
            .filter_map(|output| {
                let path = output.path.components();
                let (parent, _) = output.path.split_last()?;
                let parent = beneath::open_directory(root, &parent).ok()?;
                Some((parent, path.last()?.as_str()))
            })
            .collect();
        let places = parents.iter().map(|(parent, name)| (parent.as_fd(), *name));
        self.hash_ahead(places.collect());
    }

    /// Hashes those that are large, if there are several. What cannot be read, or is too large, is
    /// for later to tell.
    pub fn hash_ahead(&mut self, places: Vec<(BorrowedFd<'_>, &str)>) {
        if places.len() < 2 {
            return;
        }
        let mut large = Vec::new();
        for (directory, name) in places {
            let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            if let Ok(stat) = stat
                && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && stat.st_size >= WORTH_A_THREAD_SIZE
                && large.len() < BATCH_FILES
                && !self.read.contains_key(&inode_of(&stat))
            {
                large.push((directory, name, inode_of(&stat)));
            }
        }
        if large.len() < 2 {
            return;
        }
        let mut opened: Vec<OpenedOutput> = Vec::new();
        for (directory, name, inode) in large {
            if !opened.iter().any(|other| other.inode == inode)
                && let Ok((file, stat)) = beneath::open_file(directory, name)
                && self.bounds.add_file(size_of(&stat), name).is_ok()
            {
                opened.push(self.take_over(file, &stat));
            }
        }
        let files: Vec<(&File, u64)> = opened
            .iter()
            .map(|opened| (&*opened.file, opened.size))
            .collect();
        let digests = hashing::hash_all(&files, self.function, self.bounds.time());
        for (opened, digest) in opened.into_iter().zip(digests) {
            match digest {
                Some(digest) => drop(self.ahead.insert(opened.inode, (opened, digest))),
                None => self.bounds.give_back(opened.size),
            }
        }
    }

    /// Reads a file of this size and adds it to the batch.
    fn digest(&mut self, file: &Arc<File>, size: u64) -> Result<Digest, Fault> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let time = self.bounds.time();
        let hashed = hashing::hash(file, size, self.function, time, &mut buffer);
        let (digest, whole) = hashed?;
        let content = match whole {
            Some(length) => Content::Bytes(Bytes::copy_from_slice(&buffer[..length])),
            None => Content::File(file.clone()),
        };
        self.buffer = buffer;
        self.add(digest, content);
        Ok(digest)
    }

    pub fn add(&mut self, digest: Digest, content: Content) {
        // The empty blob is everywhere.
        if digest.is_empty_blob() || !self.sent.insert(digest) {
            return;
        }
        match &content {
            Content::Bytes(bytes) => self.batch_bytes += bytes.len(),
            Content::File(_) | Content::FilePart { .. } => self.batch_files += 1,
        }
        self.batch.push((digest, content));
        if self.batch_bytes >= BATCH_BYTES || self.batch_files >= BATCH_FILES {
            (self.batch_bytes, self.batch_files) = (0, 0);
            (self.send)(std::mem::take(&mut self.batch));
        }
    }
}

fn inode_of(stat: &Stat) -> InodeId {
    (stat.st_dev, stat.st_ino)
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn is_executable(stat: &Stat) -> bool {
    stat.st_mode & 0o111 != 0
}
