//! Who holds files of the cache: actions that need them, kept input roots that link them, and
//! whoever is changing them.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{FileCache, FileKey, InProgress, Index};
use crate::worker::lru::Handle;

/// A file of an input root.
#[derive(Clone, Copy, Debug)]
pub struct InputFile {
    pub inode: u64,
    /// Of the cached file; empty files are none.
    pin: Option<Handle>,
    /// Which inode of the cached file it is, or `OWN`.
    number: u32,
}

/// An inode of its own, that no other name leads to.
const OWN: u32 = u32::MAX;

/// What a file of an input root is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFileKind {
    /// Made for this place alone, as there is nothing in it.
    Empty,
    /// An inode of its own with the content of a cached file.
    Own(Handle),
    /// Another name of the n-th inode of a cached file.
    HardLink(Handle, u32),
}

impl InputFile {
    pub(super) fn new(kind: InputFileKind, inode: u64) -> Self {
        let (pin, number) = match kind {
            InputFileKind::Empty => (None, OWN),
            InputFileKind::Own(handle) => (Some(handle), OWN),
            InputFileKind::HardLink(handle, number) => (Some(handle), number),
        };
        InputFile { inode, pin, number }
    }

    pub fn kind(&self) -> InputFileKind {
        match (self.pin, self.number) {
            (None, _) => InputFileKind::Empty,
            (Some(handle), OWN) => InputFileKind::Own(handle),
            (Some(handle), number) => InputFileKind::HardLink(handle, number),
        }
    }

    /// Whether only this place in the root holds the number of its inode: when the file is gone,
    /// another one may get it.
    pub fn is_of_its_own(&self) -> bool {
        self.number == OWN
    }
}

/// Files of an input root, which pin what they are made of.
pub struct InputFiles {
    pub(super) cache: Arc<FileCache>,
    pub of: Vec<InputFile>,
}

impl InputFiles {
    /// These alone; the others are let go of with what is returned.
    pub fn part(&self, of: Vec<InputFile>) -> Self {
        InputFiles {
            cache: self.cache.clone(),
            of,
        }
    }
}

impl Drop for InputFiles {
    fn drop(&mut self) {
        if !self.of.is_empty() {
            let mut state = self.cache.state.lock();
            for link in &self.of {
                state.release(link);
            }
        }
    }
}

impl Index {
    fn release(&mut self, link: &InputFile) {
        match link.kind() {
            InputFileKind::Empty => self.own -= 1,
            InputFileKind::Own(handle) => {
                self.own -= 1;
                self.kept.unpin(handle);
            }
            InputFileKind::HardLink(handle, number) => {
                self.unlink_further(handle, number, link.inode);
                self.kept.unpin(handle);
            }
        }
    }
}

/// Files that are not evicted for as long as this lives.
pub struct Pinned {
    pub(super) cache: Arc<FileCache>,
    pub(super) handles: Vec<Handle>,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        for handle in &self.handles {
            state.kept.unpin(*handle);
        }
        drop(state);
        let over = self.cache.is_over();
        if over && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let cache = self.cache.clone();
            runtime.spawn_blocking(move || cache.evict_to_fit());
        }
    }
}

/// Keys that we change; others wait for us.
pub(super) struct FileClaim<'a> {
    cache: &'a FileCache,
    pub(super) number: u64,
    pub(super) keys: Vec<FileKey>,
    done: CancellationToken,
}

impl<'a> FileClaim<'a> {
    pub(super) fn new(cache: &'a FileCache) -> Self {
        let mut state = cache.state.lock();
        state.claims += 1;
        FileClaim {
            cache,
            number: state.claims,
            keys: Vec::new(),
            done: CancellationToken::new(),
        }
    }

    pub(super) fn add(&mut self, state: &mut Index, key: FileKey) {
        let busy = InProgress {
            claim: self.number,
            done: self.done.clone(),
        };
        state.busy.insert(key, busy);
        self.keys.push(key);
    }
}

impl Drop for FileClaim<'_> {
    fn drop(&mut self) {
        if !self.keys.is_empty() {
            let mut state = self.cache.state.lock();
            for key in &self.keys {
                state.busy.remove(key);
            }
        }
        self.done.cancel();
    }
}
