//! What the cache knows of its files, without any I/O: which there are, in the order of their last use,
//! what pins them, which inodes they have, and which keys somebody is changing.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    input_file::{InputFile, InputFileKind},
    key::FileKey,
};
use crate::worker::lru::{Handle, Lru};

/// A file on disk.
#[derive(Clone, Copy)]
pub(super) struct CachedFile {
    /// The number of its first inode.
    pub inode: u64,
    /// Whether its content was read by this worker.
    pub verified: bool,
}

#[derive(Default)]
pub(super) struct CacheIndex {
    pub files: Lru<FileKey, CachedFile>,
    extra: ExtraInodes,
    /// Inodes in input roots that are not the cache's.
    pub own_inodes: u64,
    pub in_progress: HashMap<FileKey, InProgress>,
    claims: u64,
}

/// The inodes that files have beside their first ones.
#[derive(Default)]
struct ExtraInodes {
    of: HashMap<FileKey, Vec<ExtraInode>>,
    /// Of all files together, and those of them that are no file of a kept input root.
    count: u64,
    idle: u64,
}

struct ExtraInode {
    inode: u64,
    /// Files of kept input roots that it is.
    links: u32,
}

/// Somebody fetches, evicts or removes a file.
pub(super) struct InProgress {
    /// The number of his claim.
    pub claim: u64,
    pub done: CancellationToken,
}

/// Keys that we change; others wait for us. Whatever changes files on the disk holds it until that is done,
/// also when who asked for it has given up: two who write the same file would have different inodes of it.
pub(super) struct FileClaim {
    index: Arc<Mutex<CacheIndex>>,
    pub number: u64,
    pub keys: Vec<FileKey>,
    done: CancellationToken,
}

impl FileClaim {
    pub(super) fn new(index: &Arc<Mutex<CacheIndex>>) -> Self {
        let mut locked = index.lock();
        locked.claims += 1;
        FileClaim {
            index: index.clone(),
            number: locked.claims,
            keys: Vec::new(),
            done: CancellationToken::new(),
        }
    }

    pub(super) fn add(&mut self, index: &mut CacheIndex, key: FileKey) {
        let in_progress = InProgress {
            claim: self.number,
            done: self.done.clone(),
        };
        index.in_progress.insert(key, in_progress);
        self.keys.push(key);
    }
}

impl Drop for FileClaim {
    fn drop(&mut self) {
        if !self.keys.is_empty() {
            let mut index = self.index.lock();
            for key in &self.keys {
                // Somebody else may have claimed it since.
                let own = index.in_progress.get(key);
                if own.is_some_and(|claimed| claimed.claim == self.number) {
                    index.in_progress.remove(key);
                }
            }
        }
        self.done.cancel();
    }
}

impl CacheIndex {
    /// Inodes on disk that are the cache's or in kept input roots.
    pub(super) fn inodes(&self) -> u64 {
        self.files.len() as u64 + self.extra_inodes()
    }

    /// Inodes beside the first ones of cached files.
    pub(super) fn extra_inodes(&self) -> u64 {
        self.extra.count + self.own_inodes
    }

    /// How many inodes a file has.
    pub(super) fn inodes_of(&self, key: &FileKey) -> u32 {
        1 + self.extra.of.get(key).map_or(0, |of| of.len() as u32)
    }

    /// What a pinned file is in an input root that is yet to be made.
    pub(super) fn input_inode(&self, kind: InputFileKind) -> InputFile {
        let inode = match kind {
            InputFileKind::Empty => None,
            InputFileKind::Own(handle) | InputFileKind::HardLink(handle, _) => {
                self.files.value_of(handle).map(|file| file.inode)
            }
        };
        InputFile::new(kind, inode.unwrap_or(0))
    }

    /// A file is in an input root no more.
    pub(super) fn release(&mut self, file: &InputFile) {
        match file.kind() {
            InputFileKind::Empty => self.own_inodes -= 1,
            InputFileKind::Own(handle) => {
                self.own_inodes -= 1;
                self.files.unpin(handle);
            }
            InputFileKind::HardLink(handle, number) => {
                self.release_extra(handle, number, file.inode);
                self.files.unpin(handle);
            }
        }
    }

    pub(super) fn add_extra(&mut self, key: &FileKey, inode: u64) {
        let of = self.extra.of.entry(*key).or_default();
        of.push(ExtraInode { inode, links: 0 });
        self.extra.count += 1;
        self.extra.idle += 1;
        self.files.add_weight(key, key.digest.size());
    }

    /// Forgets all but the first inode of a file; tells how many there were in all.
    pub(super) fn forget_extra(&mut self, key: &FileKey) -> u32 {
        let of = self.extra.of.remove(key).unwrap_or_default();
        self.extra.count -= of.len() as u64;
        self.extra.idle -= of.iter().filter(|inode| inode.links == 0).count() as u64;
        let size = key.digest.size().saturating_mul(of.len() as u64);
        self.files.take_weight(key, size);
        1 + of.len() as u32
    }

    pub(super) fn has_extra(&self, key: &FileKey, inode: u64) -> bool {
        let of = self.extra.of.get(key);
        of.is_some_and(|of| of.iter().any(|known| known.inode == inode))
    }

    /// One more file of a kept root is the n-th inode of a file; tells its inode number.
    pub(super) fn acquire_extra(&mut self, key: &FileKey, number: u32) -> Option<u64> {
        let of = self.extra.of.get_mut(key)?;
        let inode = of.get_mut(number as usize - 1)?;
        self.extra.idle -= u64::from(inode.links == 0);
        inode.links += 1;
        Some(inode.inode)
    }

    pub(super) fn release_extra(&mut self, handle: Handle, number: u32, inode: u64) {
        if number == 0 {
            return;
        }
        let Some(key) = self.files.key_of(handle) else {
            return;
        };
        // When all were forgotten meanwhile, another one may have the number.
        if let Some(of) = self.extra.of.get_mut(key)
            && let Some(known) = of.get_mut(number as usize - 1)
            && known.inode == inode
            && known.links > 0
        {
            known.links -= 1;
            self.extra.idle += u64::from(known.links == 0);
        }
    }

    /// Forgets extra inodes that are no file of a kept root.
    pub(super) fn forget_idle(&mut self) -> Vec<(FileKey, u32)> {
        let mut idle = Vec::new();
        if self.extra.idle == 0 {
            return idle;
        }
        let (extra, files) = (&mut self.extra, &mut self.files);
        extra.of.retain(|key, of| {
            while of.last().is_some_and(|inode| inode.links == 0) {
                idle.push((*key, of.len() as u32));
                of.pop();
                files.take_weight(key, key.digest.size());
            }
            !of.is_empty()
        });
        extra.count -= idle.len() as u64;
        extra.idle -= idle.len() as u64;
        idle
    }
}
