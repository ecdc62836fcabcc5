//! Who holds files of the cache: actions that are about to need them, and input roots that are made of
//! them.

use std::{io, sync::Arc};

use super::{
    cache::FileCache,
    create_input_file::LinkMode,
    input_file::{InputFile, InputFileKind},
    key::FileKey,
};
use crate::worker::{blocking::in_background, lru::Handle};

/// Files that are about to be linked into one input root, in the order in which they are. They are not
/// evicted for as long as this lives, or what takes them from it.
pub struct PinnedFiles {
    pub(super) cache: Arc<FileCache>,
    /// `None` for those that are not here, or were taken.
    pub(super) handles: Vec<Option<Handle>>,
    /// Those that are not here, and where they belong.
    pub(super) absent: Vec<(FileKey, usize)>,
    /// Those whose content was wrong, and which are gone from the disk.
    pub(super) wrong: Vec<FileKey>,
}

/// Files of an input root, which pin what they are made of.
pub struct InputFiles {
    cache: Arc<FileCache>,
    pub list: Vec<InputFile>,
}

/// So many keys are looked up under one lock.
pub(super) const KEYS_AT_A_TIME: usize = 4096;

impl FileCache {
    /// Pins those of these files that are here, having read what this worker never read. The error says that a
    /// file could not be opened. Blocks.
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

    /// Whether all are here.
    pub fn is_complete(&self) -> bool {
        self.absent.is_empty() && self.wrong.is_empty()
    }

    /// Takes the files of one directory, the first of which that is not empty is at `first`. They are
    /// their first inodes where they are hard links. What is not here is the error.
    pub fn take(
        &mut self,
        mut first: usize,
        keys: impl Iterator<Item = FileKey>,
        link_mode: LinkMode,
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
                    first += 1;
                    match (self.handles[first - 1].take(), link_mode) {
                        (None, _) => {
                            absent.push(key);
                            continue;
                        }
                        (Some(handle), LinkMode::HardLink) => InputFileKind::HardLink(handle, 0),
                        (Some(handle), _) => InputFileKind::Own(handle),
                    }
                }
            };
            if !matches!(kind, InputFileKind::HardLink(..)) {
                index.own_inodes += 1;
            }
            files.list.push(index.input_inode(kind));
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

    /// Lets go of all but those that are put in their place.
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
