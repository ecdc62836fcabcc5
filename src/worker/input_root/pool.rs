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
    Gate, Shared,
    model::{self, Kept, KeptRoot},
    plan,
};
use crate::{
    digest::Digest,
    worker::{cache::Method, tree::Tree},
};

/// Subtrees that are parked at a time.
const PARKED: usize = 10_000;
/// Directories of a root that are looked at to see how much it shares with another.
const LOOKS: u32 = 200;

/// A root that no action has.
pub struct Root {
    pub gate: Gate,
    pub kept: KeptRoot,
    /// Of `Shared::generation`.
    pub generation: u64,
}

/// A subtree, beside the roots.
pub struct Parked {
    pub kept: Kept,
    /// How its files were made.
    pub method: Method,
    /// In the directory for parked ones.
    pub name: String,
    pub generation: u64,
}

impl Root {
    pub fn is_empty(&self) -> bool {
        self.kept.top.node.entries == 0
    }
}

#[derive(Default)]
pub struct Pool {
    /// The longest unused first.
    pub ready: Vec<Root>,
    /// Roots being cleaned.
    pub dirty: usize,
    parked: BTreeMap<u64, Parked>,
    by_digest: HashMap<(Method, Digest), Vec<u64>>,
    sequence: u64,
}

impl Pool {
    pub fn has(&self, method: Method, digest: &Digest) -> bool {
        self.by_digest.contains_key(&(method, *digest))
    }

    pub fn take(&mut self, method: Method, digest: &Digest) -> Option<Parked> {
        let numbers = self.by_digest.get_mut(&(method, *digest))?;
        let number = numbers.pop()?;
        if numbers.is_empty() {
            self.by_digest.remove(&(method, *digest));
        }
        self.parked.remove(&number)
    }

    /// Adds a subtree; returns one that had to go for it.
    pub fn put(&mut self, parked: Parked) -> Option<Parked> {
        self.sequence += 1;
        let key = (parked.method, parked.kept.node.digest);
        let numbers = self.by_digest.entry(key).or_default();
        numbers.push(self.sequence);
        self.parked.insert(self.sequence, parked);
        match self.parked.len() > PARKED {
            true => self.take_oldest(),
            false => None,
        }
    }

    pub fn take_oldest(&mut self) -> Option<Parked> {
        let (number, parked) = self.parked.pop_first()?;
        let key = (parked.method, parked.kept.node.digest);
        if let Some(numbers) = self.by_digest.get_mut(&key) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_digest.remove(&key);
            }
        }
        Some(parked)
    }

    /// The root that shares most with the wanted one; an empty one rather than one that shares
    /// nothing; then the longest unused. None whose files were made in another way.
    fn choose(&mut self, method: Method, wanted: &Tree) -> Option<Root> {
        let score = |root: &Root| {
            let shared = plan::shared(&root.kept.top.node, wanted, &mut LOOKS.clone());
            (shared, root.is_empty())
        };
        let mut best: Option<(usize, (u64, bool))> = None;
        for (at, root) in self.ready.iter().enumerate() {
            if root.kept.method != method && !root.is_empty() {
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
    pub fn pick(&mut self, wanted: Option<(Method, &Tree)>) -> Option<Root> {
        match wanted {
            Some((method, tree)) => self.choose(method, tree),
            None => self.take_empty(),
        }
    }

    fn take_empty(&mut self) -> Option<Root> {
        let at = self.ready.iter().position(Root::is_empty)?;
        Some(self.ready.remove(at))
    }
}

impl Shared {
    /// Moves a verified subtree out of a root.
    pub(super) fn shelve(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        kept: Kept,
        method: Method,
    ) -> Result<Parked, Errno> {
        let parked = self.next_name();
        rustix::fs::renameat(parent, name, &self.parked, &parked)?;
        Ok(Parked {
            kept,
            method,
            name: parked,
            generation: self.generation(),
        })
    }

    /// Moves a parked subtree into a root. A rename sets the ctime of what is renamed, so that its
    /// baseline is new (I6); what is below is as it was.
    pub(super) fn unshelve(
        &self,
        parked: Parked,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<Kept, Errno> {
        let Parked {
            mut kept,
            name: from,
            ..
        } = parked;
        rustix::fs::renameat(&self.parked, &from, parent, name)?;
        let (inode, baseline) = model::look(std::os::fd::AsFd::as_fd(&*kept.place))?;
        if inode != kept.inode {
            return Err(Errno::STALE);
        }
        kept.baseline = Some(baseline);
        Ok(kept)
    }

    pub(super) fn park(&self, parked: impl Iterator<Item = Parked>) {
        for parked in parked {
            // Looked at under the lock: whoever forgets all counts up first, and then empties the pool.
            let mut pool = self.pool.lock();
            let gone = match self.generation() == parked.generation {
                true => pool.put(parked),
                false => Some(parked),
            };
            drop(pool);
            if let Some(gone) = gone {
                self.throw_away(gone);
            }
        }
    }

    /// A root that no action has any more; comes back when it was to be forgotten meanwhile.
    pub(super) fn give_back(&self, pool: &mut Pool, root: Root) -> Option<Root> {
        if self.generation() != root.generation {
            return Some(root);
        }
        pool.ready.push(root);
        None
    }

    pub(super) fn throw_away(&self, parked: Parked) {
        self.trash.throw(&self.parked, &parked.name);
    }

    /// Lets go of something that is kept, a subtree first; `false` when there is nothing.
    pub(super) fn release(&self) -> bool {
        let mut pool = self.pool.lock();
        if let Some(parked) = pool.take_oldest() {
            drop(pool);
            self.throw_away(parked);
            return true;
        }
        let warm = pool.ready.iter().position(|root| !root.is_empty());
        let root = warm.map(|at| pool.ready.remove(at));
        drop(pool);
        match root {
            Some(root) => {
                self.discard(root.gate);
                true
            }
            None => false,
        }
    }

    /// All that is kept is thrown away, and what is in use will be (I7).
    pub(super) fn forget_all(&self) {
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
