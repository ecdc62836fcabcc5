//! Subtrees that were dropped from roots, by the digests of their Directories, for roots that will want them.
//!
//! 1. A stashed subtree is on disk in the stash directory, under a name of its own, and as its record says.
//! 2. No more than `MAXIMUM_STASHED` are there; the longest unused go first.
//! 3. Subtrees whose files were created in different ways are kept apart, since no root mixes them.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, BorrowedFd},
};

use rustix::io::Errno;

use super::{
    file_cache::CreateMode,
    root_record::{self, DirectoryRecord},
};
use crate::digest::Digest;

/// How many subtrees are stashed at a time.
const MAXIMUM_STASHED: usize = 10_000;

/// A subtree in the stash directory, which no root has.
pub(super) struct StashedSubtree {
    pub record: DirectoryRecord,
    /// How its files were created.
    create_mode: CreateMode,
    /// Its name in the stash directory.
    pub name: String,
    /// The generation of the root that it was dropped from.
    pub generation: u64,
}

impl StashedSubtree {
    /// Moves a subtree that is as its record says out of a root, to `stashed_name`.
    pub(super) fn move_from_root(
        (parent, name): (BorrowedFd<'_>, &str),
        (stash_directory, stashed_name): (BorrowedFd<'_>, String),
        record: DirectoryRecord,
        create_mode: CreateMode,
        generation: u64,
    ) -> Result<Self, Errno> {
        rustix::fs::renameat(parent, name, stash_directory, &stashed_name)?;
        Ok(StashedSubtree {
            record,
            create_mode,
            name: stashed_name,
            generation,
        })
    }

    /// Moves the subtree into a root. A rename sets the ctime of what is renamed, so that the baseline of its
    /// uppermost directory is a new one (I6 Baseline); those below are what they were.
    pub(super) fn move_into_root(
        self,
        stash_directory: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<DirectoryRecord, Errno> {
        let mut record = self.record;
        rustix::fs::renameat(stash_directory, &self.name, parent, name)?;
        let (inode, baseline) = root_record::read_baseline(record.fd.as_fd())?;
        if inode != record.inode {
            return Err(Errno::STALE);
        }
        record.baseline = Some(baseline);
        Ok(record)
    }
}

/// Which subtrees are stashed. `RootPool` has the lock and the directory.
#[derive(Default)]
pub(super) struct SubtreeStash {
    /// The subtrees by number; a higher one was added later.
    subtrees: BTreeMap<u64, StashedSubtree>,
    /// The numbers of those that are equal.
    by_digest: HashMap<(CreateMode, Digest), Vec<u64>>,
    last_number: u64,
}

impl SubtreeStash {
    pub(super) fn len(&self) -> usize {
        self.subtrees.len()
    }

    pub(super) fn contains(&self, create_mode: CreateMode, digest: &Digest) -> bool {
        self.by_digest.contains_key(&(create_mode, *digest))
    }

    /// Takes the subtree of this digest that was added last.
    pub(super) fn take(
        &mut self,
        create_mode: CreateMode,
        digest: &Digest,
    ) -> Option<StashedSubtree> {
        let numbers = self.by_digest.get_mut(&(create_mode, *digest))?;
        let number = numbers.pop()?;
        if numbers.is_empty() {
            self.by_digest.remove(&(create_mode, *digest));
        }
        self.subtrees.remove(&number)
    }

    /// Adds a subtree; returns one that must go for it, if there are too many.
    pub(super) fn add(&mut self, stashed: StashedSubtree) -> Option<StashedSubtree> {
        self.last_number += 1;
        let key = (stashed.create_mode, stashed.record.node.digest);
        let numbers = self.by_digest.entry(key).or_default();
        numbers.push(self.last_number);
        self.subtrees.insert(self.last_number, stashed);
        match self.subtrees.len() > MAXIMUM_STASHED {
            true => self.take_oldest(),
            false => None,
        }
    }

    pub(super) fn take_oldest(&mut self) -> Option<StashedSubtree> {
        let (number, stashed) = self.subtrees.pop_first()?;
        let key = (stashed.create_mode, stashed.record.node.digest);
        if let Some(numbers) = self.by_digest.get_mut(&key) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_digest.remove(&key);
            }
        }
        Some(stashed)
    }
}
