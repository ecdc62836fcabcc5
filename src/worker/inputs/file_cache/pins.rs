//! Who holds files of the cache: actions that are about to need them, and input roots that are made of
//! them.

use std::{io, sync::Arc};

use super::{
    cache::FileCache,
    create_input_file::CreateMode,
    input_file::{InputFile, InputFileKind},
    key::FileKey,
};
use crate::worker::{blocking::in_background, lru::Handle};

/// The cached files that one input root is about to be made of, in the order in which it needs them. They are not
/// evicted for as long as this lives, or what takes them from it.
pub struct PinnedFiles {
    pub(super) cache: Arc<FileCache>,
    /// One for each of these files; `None` for those that are not in the cache, or were handed over.
    pub(super) handles: Vec<Option<Handle>>,
    /// The files that are not in the cache, each with its place in `handles`.
    pub(super) absent: Vec<(FileKey, usize)>,
    /// The files whose content was wrong, and which are gone from the disk.
    pub(super) wrong: Vec<FileKey>,
}

/// The files of one directory of an input root, which pin the cached files that they are made of.
pub struct InputFiles {
    cache: Arc<FileCache>,
    pub list: Vec<InputFile>,
}

/// How many keys are looked up at a time, under one lock.
pub(super) const KEYS_AT_A_TIME: usize = 4096;

impl FileCache {
    /// Pins those of these files that are in the cache, having read those that this worker never read. The error says
    /// that a file could not be opened. Blocks.
    pub fn pin(self: &Arc<Self>, keys: &[FileKey]) -> io::Result<PinnedFiles> {
        let mut pinned = PinnedFiles::none(self);
        pinned.handles.reserve_exact(keys.len());
        let mut unverified = Vec::new();
        let keys_in_all = keys.len();
        for keys in keys.chunks(KEYS_AT_A_TIME) {
            let mut index = self.index.lock();
            for key in keys {
                let handle = index.files.pin(key);
                match handle.and_then(|handle| index.files.value_of(handle)) {
                    Some(file) if !file.verified => unverified.push(*key),
                    Some(_) => {}
                    None => pinned.absent.push((*key, pinned.handles.len())),
                }
                pinned.handles.push(handle);
            }
        }
        self.uses.misses.add(pinned.absent.len() as u64);
        self.uses
            .hits
            .add((keys_in_all - pinned.absent.len()) as u64);
        if !unverified.is_empty() {
            pinned.wrong = self.verify_first_use(unverified)?;
        }
        Ok(pinned)
    }
}

impl PinnedFiles {
    pub fn none(cache: &Arc<FileCache>) -> Self {
        PinnedFiles {
            cache: cache.clone(),
            handles: Vec::new(),
            absent: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// Whether all files are in the cache, and none of them is wrong.
    pub fn is_complete(&self) -> bool {
        self.absent.is_empty() && self.wrong.is_empty()
    }

    /// Hands over the files of one directory, the first of which that is not empty is at `next`. Where they are to be
    /// hard links, each is the first inode of its cached file. The error tells those that are not in the cache.
    pub fn hand_over(
        &mut self,
        mut next: usize,
        keys: impl Iterator<Item = FileKey>,
        create_mode: CreateMode,
    ) -> Result<InputFiles, Vec<FileKey>> {
        let mut files = InputFiles {
            cache: self.cache.clone(),
            list: Vec::with_capacity(keys.size_hint().1.unwrap_or(0)),
        };
        let mut absent = Vec::new();
        let mut index = self.cache.index.lock();
        for key in keys {
            let kind = match key.digest.size() {
                0 => InputFileKind::Empty,
                _ => {
                    next += 1;
                    match (self.handles[next - 1].take(), create_mode) {
                        (None, _) => {
                            absent.push(key);
                            continue;
                        }
                        (Some(handle), CreateMode::HardLink) => InputFileKind::HardLink(handle, 0),
                        (Some(handle), _) => InputFileKind::Unshared(handle),
                    }
                }
            };
            if !matches!(kind, InputFileKind::HardLink(..)) {
                index.unshared_inodes += 1;
            }
            files.list.push(index.input_file(kind));
        }
        drop(index);
        match absent.is_empty() {
            true => Ok(files),
            false => Err(absent),
        }
    }
}

impl Drop for PinnedFiles {
    fn drop(&mut self) {
        let mut index = self.cache.index.lock();
        for handle in self.handles.drain(..).flatten() {
            index.files.unpin(handle);
        }
        drop(index);
        if self.cache.is_over() {
            let cache = self.cache.clone();
            in_background(move || cache.evict_to_fit());
        }
    }
}

impl InputFiles {
    pub fn none(cache: &Arc<FileCache>) -> Self {
        InputFiles {
            cache: cache.clone(),
            list: Vec::new(),
        }
    }

    /// Puts `list` in the place of all these files; lets go of those that are `gone`, and that `list` lacks.
    pub fn replace(&mut self, gone: impl Iterator<Item = InputFile>, list: Vec<InputFile>) {
        self.list = list;
        let gone = InputFiles {
            cache: self.cache.clone(),
            list: gone.collect(),
        };
        drop(gone);
    }
}

impl Drop for InputFiles {
    fn drop(&mut self) {
        if !self.list.is_empty() {
            let mut index = self.cache.index.lock();
            for file in &self.list {
                index.release(file);
            }
        }
    }
}
