//! What waits for the next action: whole roots, and subtrees that were dropped from roots.
//!
//! 1. Everything in the pool was verified after the last action that had it.
//! 2. It is bounded: in roots, in subtrees, in open directories; the longest unused go first,
//!    subtrees before roots.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::BorrowedFd,
};

use rustix::io::Errno;

use super::{
    action_directory::ActionDirectory,
    builder::Shared,
    file_cache::LinkMode,
    kept::{self, KeptDirectory, KeptRoot},
    plan,
    tree::Tree,
};
use crate::digest::Digest;

/// Subtrees that are stashed at a time.
const STASHED: usize = 10_000;
/// Directories of a root that are looked at to see how much it shares with another.
const LOOKS: u32 = 200;

/// A root that no action has.
pub struct IdleRoot {
    pub action_directory: ActionDirectory,
    pub kept: KeptRoot,
    /// Of `Shared::generation`.
    pub generation: u64,
}

/// A subtree, beside the roots.
pub struct StashedTree {
    pub kept: KeptDirectory,
    /// How its files were made.
    pub link_mode: LinkMode,
    /// In the directory for stashed ones.
    pub name: String,
    pub generation: u64,
}

impl IdleRoot {
    pub fn is_empty(&self) -> bool {
        self.kept.top.node.entries == 0
    }
}

#[derive(Default)]
pub struct Pool {
    /// The longest unused first.
    pub ready: Vec<IdleRoot>,
    /// Roots being cleaned.
    pub dirty: usize,
    stashed: BTreeMap<u64, StashedTree>,
    by_digest: HashMap<(LinkMode, Digest), Vec<u64>>,
    sequence: u64,
}

impl Pool {
    pub fn has(&self, link_mode: LinkMode, digest: &Digest) -> bool {
        self.by_digest.contains_key(&(link_mode, *digest))
    }

    pub fn take(&mut self, link_mode: LinkMode, digest: &Digest) -> Option<StashedTree> {
        let numbers = self.by_digest.get_mut(&(link_mode, *digest))?;
        let number = numbers.pop()?;
        if numbers.is_empty() {
            self.by_digest.remove(&(link_mode, *digest));
        }
        self.stashed.remove(&number)
    }

    /// Adds a subtree; returns one that had to go for it.
    pub fn put(&mut self, stashed: StashedTree) -> Option<StashedTree> {
        self.sequence += 1;
        let key = (stashed.link_mode, stashed.kept.node.digest);
        let numbers = self.by_digest.entry(key).or_default();
        numbers.push(self.sequence);
        self.stashed.insert(self.sequence, stashed);
        match self.stashed.len() > STASHED {
            true => self.take_oldest(),
            false => None,
        }
    }

    pub fn take_oldest(&mut self) -> Option<StashedTree> {
        let (number, stashed) = self.stashed.pop_first()?;
        let key = (stashed.link_mode, stashed.kept.node.digest);
        if let Some(numbers) = self.by_digest.get_mut(&key) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_digest.remove(&key);
            }
        }
        Some(stashed)
    }

    /// The root that shares most with the wanted one; an empty one rather than one that shares
    /// nothing; then the longest unused. None whose files were made in another way.
    fn choose(&mut self, link_mode: LinkMode, wanted: &Tree) -> Option<IdleRoot> {
        let score = |root: &IdleRoot| {
            let shared = plan::shared(&root.kept.top.node, wanted, &mut LOOKS.clone());
            (shared, root.is_empty())
        };
        let mut best: Option<(usize, (u64, bool))> = None;
        for (at, root) in self.ready.iter().enumerate() {
            if root.kept.link_mode != link_mode && !root.is_empty() {
                continue;
            }
            let score = score(root);
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((at, score));
            }
        }
        let (at, _) = best?;
        Some(self.ready.remove(at))
    }

    /// The root that suits a tree best; an empty one where none is given.
    pub fn pick(&mut self, wanted: Option<(LinkMode, &Tree)>) -> Option<IdleRoot> {
        match wanted {
            Some((link_mode, tree)) => self.choose(link_mode, tree),
            None => self.take_empty(),
        }
    }

    fn take_empty(&mut self) -> Option<IdleRoot> {
        let at = self.ready.iter().position(IdleRoot::is_empty)?;
        Some(self.ready.remove(at))
    }
}

impl Shared {
    /// Moves a verified subtree out of a root.
    pub(super) fn stash(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        kept: KeptDirectory,
        link_mode: LinkMode,
    ) -> Result<StashedTree, Errno> {
        let stashed = self.next_name();
        rustix::fs::renameat(parent, name, &self.stashed, &stashed)?;
        Ok(StashedTree {
            kept,
            link_mode,
            name: stashed,
            generation: self.generation(),
        })
    }

    /// Moves a stashed subtree into a root. A rename sets the ctime of what is renamed, so that its
    /// baseline is new (I6); what is below is as it was.
    pub(super) fn unstash(
        &self,
        stashed: StashedTree,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<KeptDirectory, Errno> {
        let StashedTree {
            mut kept,
            name: from,
            ..
        } = stashed;
        rustix::fs::renameat(&self.stashed, &from, parent, name)?;
        let (inode, baseline) = kept::look(std::os::fd::AsFd::as_fd(&*kept.place))?;
        if inode != kept.inode {
            return Err(Errno::STALE);
        }
        kept.baseline = Some(baseline);
        Ok(kept)
    }

    pub(super) fn keep_stashed(&self, stashed: impl Iterator<Item = StashedTree>) {
        for stashed in stashed {
            // Looked at under the lock: whoever forgets all counts up first, and then empties the pool.
            let mut pool = self.pool.lock();
            let gone = match self.generation() == stashed.generation {
                true => pool.put(stashed),
                false => Some(stashed),
            };
            drop(pool);
            if let Some(gone) = gone {
                self.delete_stashed(gone);
            }
        }
    }

    /// A root that no action has any more; comes back when it was to be forgotten meanwhile.
    pub(super) fn return_root(&self, pool: &mut Pool, root: IdleRoot) -> Option<IdleRoot> {
        if self.generation() != root.generation {
            return Some(root);
        }
        pool.ready.push(root);
        None
    }

    pub(super) fn delete_stashed(&self, stashed: StashedTree) {
        self.deletions.delete(&self.stashed, &stashed.name);
    }

    /// Lets go of something that is kept, a subtree first; `false` when there is nothing.
    pub(super) fn release(&self) -> bool {
        let mut pool = self.pool.lock();
        if let Some(stashed) = pool.take_oldest() {
            drop(pool);
            self.delete_stashed(stashed);
            return true;
        }
        let warm = pool.ready.iter().position(|root| !root.is_empty());
        let root = warm.map(|at| pool.ready.remove(at));
        drop(pool);
        match root {
            Some(root) => {
                self.discard(root.action_directory);
                true
            }
            None => false,
        }
    }

    /// All that is kept is thrown away, and what is in use will be (I7).
    pub(super) fn invalidate_all(&self) {
        self.generation
            .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        while self.release() {}
    }

    /// Makes room for so many more open directories; `false` when there is not enough.
    pub(super) fn reserve(&self, directories: u64) -> bool {
        loop {
            let open = self.open.load(std::sync::atomic::Ordering::Relaxed);
            if open.saturating_add(directories) <= self.budget {
                return true;
            }
            if !self.release() {
                return false;
            }
        }
    }
}
