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

/// A cached file, as it is on disk.
#[derive(Clone, Copy)]
pub(super) struct CachedFile {
    /// The inode number of its first inode.
    pub inode: u64,
    /// Whether this worker has read its content, and found it right.
    pub verified: bool,
}

#[derive(Default)]
pub(super) struct CacheIndex {
    pub files: Lru<FileKey, CachedFile>,
    extra: ExtraInodes,
    /// How many files of input roots are inodes that no cached file is: reflinks, copies and empty files.
    pub unshared_inodes: u64,
    pub in_progress: HashMap<FileKey, InProgress>,
    last_claim_id: u64,
}

/// The inodes that files have beside their first ones.
#[derive(Default)]
struct ExtraInodes {
    /// The extra inodes of each file, by inode index less one.
    by_key: HashMap<FileKey, Vec<ExtraInode>>,
    /// How many extra inodes all files have together.
    count: u64,
    /// How many of all extra inodes no file of an input root links.
    unlinked: u64,
}

struct ExtraInode {
    inode: u64,
    /// How many files of input roots are links to this inode.
    links: u32,
}

/// A file that somebody fetches, evicts, adds or removes, for those who must wait for him. `FileClaim` and `InProgress`
/// are to files what leader and follower (`FetchLeader`, `FetchFollower`) are to Directory messages.
pub(super) struct InProgress {
    /// The `FileClaim::id` of the claim on the file.
    pub claim_id: u64,
    /// Cancelled when that claim is dropped.
    pub done: CancellationToken,
}

/// The files that somebody fetches, evicts, adds or removes, while others wait for him (`InProgress`). Whatever
/// changes files on the disk holds it until that is done, also when who asked for it has given up: two who write the
/// same file would have different inodes of it.
pub(super) struct FileClaim {
    index: Arc<Mutex<CacheIndex>>,
    pub id: u64,
    pub keys: Vec<FileKey>,
    done: CancellationToken,
}

impl FileClaim {
    pub(super) fn new(index: &Arc<Mutex<CacheIndex>>) -> Self {
        let mut locked = index.lock();
        locked.last_claim_id += 1;
        FileClaim {
            index: index.clone(),
            id: locked.last_claim_id,
            keys: Vec::new(),
            done: CancellationToken::new(),
        }
    }

    pub(super) fn add(&mut self, index: &mut CacheIndex, key: FileKey) {
        let in_progress = InProgress {
            claim_id: self.id,
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
                if own.is_some_and(|claimed| claimed.claim_id == self.id) {
                    index.in_progress.remove(key);
                }
            }
        }
        self.done.cancel();
    }
}

impl CacheIndex {
    /// How many inodes on disk are the cache's or in input roots.
    pub(super) fn inodes(&self) -> u64 {
        self.files.len() as u64 + self.inodes_beyond_first()
    }

    /// How many inodes on disk are the cache's or in input roots, without the first ones of cached files.
    pub(super) fn inodes_beyond_first(&self) -> u64 {
        self.extra.count + self.unshared_inodes
    }

    /// How many inodes a cached file has.
    pub(super) fn inodes_of(&self, key: &FileKey) -> u32 {
        let extra = self.extra.by_key.get(key);
        1 + extra.map_or(0, |inodes| inodes.len() as u32)
    }

    /// A file of an input root that is yet to be made on disk, of what is pinned for it.
    pub(super) fn input_file(&self, kind: InputFileKind) -> InputFile {
        let inode = match kind {
            InputFileKind::Empty => None,
            InputFileKind::Unshared(handle) | InputFileKind::HardLink(handle, _) => {
                self.files.value_of(handle).map(|file| file.inode)
            }
        };
        InputFile::new(kind, inode.unwrap_or(0))
    }

    /// Unpins what a file of an input root was made of, as it is there no more.
    pub(super) fn release(&mut self, file: &InputFile) {
        match file.kind() {
            InputFileKind::Empty => self.unshared_inodes -= 1,
            InputFileKind::Unshared(handle) => {
                self.unshared_inodes -= 1;
                self.files.unpin(handle);
            }
            InputFileKind::HardLink(handle, inode_index) => {
                self.release_extra(handle, inode_index, file.inode);
                self.files.unpin(handle);
            }
        }
    }

    /// Adds an inode to those of a file, which has the next inode index.
    pub(super) fn add_extra(&mut self, key: &FileKey, inode: u64) {
        let inodes = self.extra.by_key.entry(*key).or_default();
        inodes.push(ExtraInode { inode, links: 0 });
        self.extra.count += 1;
        self.extra.unlinked += 1;
        self.files.add_weight(key, key.digest.size());
    }

    /// Forgets all but the first inode of a file; returns how many it had in all.
    pub(super) fn forget_extra(&mut self, key: &FileKey) -> u32 {
        let inodes = self.extra.by_key.remove(key).unwrap_or_default();
        self.extra.count -= inodes.len() as u64;
        self.extra.unlinked -= inodes.iter().filter(|inode| inode.links == 0).count() as u64;
        let size = key.digest.size().saturating_mul(inodes.len() as u64);
        self.files.take_weight(key, size);
        1 + inodes.len() as u32
    }

    /// Whether a file has an extra inode with this inode number.
    pub(super) fn has_extra(&self, key: &FileKey, inode: u64) -> bool {
        let inodes = self.extra.by_key.get(key);
        inodes.is_some_and(|inodes| inodes.iter().any(|known| known.inode == inode))
    }

    /// Counts one more link from an input root to an extra inode of a file; returns its inode number, or `None` when
    /// the file has no such inode.
    pub(super) fn acquire_extra(&mut self, key: &FileKey, inode_index: u32) -> Option<u64> {
        let inodes = self.extra.by_key.get_mut(key)?;
        let inode = inodes.get_mut(inode_index as usize - 1)?;
        self.extra.unlinked -= u64::from(inode.links == 0);
        inode.links += 1;
        Some(inode.inode)
    }

    /// Counts one link fewer from an input root to an inode of a file; the first one (0) counts none.
    pub(super) fn release_extra(&mut self, handle: Handle, inode_index: u32, inode: u64) {
        if inode_index == 0 {
            return;
        }
        let Some(key) = self.files.key_of(handle) else {
            return;
        };
        // When all were forgotten meanwhile, another inode may have this index.
        if let Some(inodes) = self.extra.by_key.get_mut(key)
            && let Some(known) = inodes.get_mut(inode_index as usize - 1)
            && known.inode == inode
            && known.links > 0
        {
            known.links -= 1;
            self.extra.unlinked += u64::from(known.links == 0);
        }
    }

    /// Forgets the last extra inodes of each file, as far as no input root links them: inode indices are to have no
    /// gaps. Returns which.
    pub(super) fn forget_unlinked(&mut self) -> Vec<(FileKey, u32)> {
        let mut forgotten = Vec::new();
        if self.extra.unlinked == 0 {
            return forgotten;
        }
        let (extra, files) = (&mut self.extra, &mut self.files);
        extra.by_key.retain(|key, inodes| {
            while inodes.last().is_some_and(|inode| inode.links == 0) {
                forgotten.push((*key, inodes.len() as u32));
                inodes.pop();
                files.take_weight(key, key.digest.size());
            }
            !inodes.is_empty()
        });
        extra.count -= forgotten.len() as u64;
        extra.unlinked -= forgotten.len() as u64;
        forgotten
    }
}
