//! What waits in the build directory for the next action: whole roots, and subtrees that were dropped
//! from roots.
//!
//! 1. Everything here was verified after the last action that had it.
//! 2. It is bounded: in roots, in subtrees, in open directories; the longest unused go first,
//!    subtrees before roots.
//! 3. What was made before the last time that something was found wrong does not come back into it.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{FlockOperation, Mode},
    io::Errno,
    process::Resource,
};

use super::{
    action_directory::ActionDirectory,
    deletion::{self, DeletionQueue},
    file_cache::CreateMode,
    merkle_tree::Tree,
    plan::{self, LayOutPlan},
    root_record::{self, DirectoryFd, DirectoryRecord, RootRecord},
};
use crate::{digest::Digest, worker::beneath::open_child};

const DELETED: &str = "deleted";
const STASHED: &str = "stashed";
/// Subtrees that are stashed at a time.
const MAXIMUM_STASHED: usize = 10_000;
/// Directories of a root that are looked at to see how much it shares with another.
const COMPARED_DIRECTORIES: u32 = 200;

/// A root that no action has.
pub(super) struct IdleRoot {
    pub action_directory: ActionDirectory,
    pub kept: RootRecord,
    /// Of all idle roots, when it was made.
    pub generation: u64,
}

impl IdleRoot {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.top.node.entries == 0
    }
}

/// A subtree, beside the roots.
pub(super) struct StashedTree {
    pub kept: DirectoryRecord,
    /// How its files were made.
    create_mode: CreateMode,
    /// In the directory for stashed ones.
    name: String,
    generation: u64,
}

pub(super) struct RootPool {
    /// Locked for as long as this worker runs.
    build_directory: OwnedFd,
    stash_directory: OwnedFd,
    pub deletions: DeletionQueue,
    sequence: AtomicU64,
    /// Actions that run at a time. Twice as many roots are kept, and may wait for cleaning.
    slots: usize,
    /// Directories that are open, and that may be.
    open_directories: Arc<AtomicU64>,
    pub maximum_open: u64,
    /// Counts how often all was thrown away.
    generation: AtomicU64,
    waiting: Mutex<WaitingRoots>,
    cleaned: Condvar,
}

#[derive(Default)]
struct WaitingRoots {
    /// The longest unused first.
    roots: Vec<IdleRoot>,
    /// Roots being cleaned.
    cleaning: usize,
    stashed: BTreeMap<u64, StashedTree>,
    by_digest: HashMap<(CreateMode, Digest), Vec<u64>>,
    sequence: u64,
}

impl WaitingRoots {
    fn has(&self, create_mode: CreateMode, digest: &Digest) -> bool {
        self.by_digest.contains_key(&(create_mode, *digest))
    }

    fn take(&mut self, create_mode: CreateMode, digest: &Digest) -> Option<StashedTree> {
        let numbers = self.by_digest.get_mut(&(create_mode, *digest))?;
        let number = numbers.pop()?;
        if numbers.is_empty() {
            self.by_digest.remove(&(create_mode, *digest));
        }
        self.stashed.remove(&number)
    }

    /// Adds a subtree; returns one that had to go for it.
    fn put(&mut self, stashed: StashedTree) -> Option<StashedTree> {
        self.sequence += 1;
        let key = (stashed.create_mode, stashed.kept.node.digest);
        let numbers = self.by_digest.entry(key).or_default();
        numbers.push(self.sequence);
        self.stashed.insert(self.sequence, stashed);
        match self.stashed.len() > MAXIMUM_STASHED {
            true => self.take_oldest(),
            false => None,
        }
    }

    fn take_oldest(&mut self) -> Option<StashedTree> {
        let (number, stashed) = self.stashed.pop_first()?;
        let key = (stashed.create_mode, stashed.kept.node.digest);
        if let Some(numbers) = self.by_digest.get_mut(&key) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_digest.remove(&key);
            }
        }
        Some(stashed)
    }

    /// The root that suits a tree best; an empty one where none is given.
    fn take_root(&mut self, wanted: Option<(CreateMode, &Tree)>) -> Option<IdleRoot> {
        let at = match wanted {
            Some((create_mode, tree)) => self.most_similar(create_mode, tree)?,
            None => self.roots.iter().position(IdleRoot::is_empty)?,
        };
        Some(self.roots.remove(at))
    }

    /// The root that shares most with the wanted one; an empty one rather than one that shares
    /// nothing; then the longest unused. None whose files were made in another way.
    fn most_similar(&self, create_mode: CreateMode, wanted: &Tree) -> Option<usize> {
        let mut best: Option<(usize, (u64, bool))> = None;
        for (at, root) in self.roots.iter().enumerate() {
            if root.kept.create_mode != create_mode && !root.is_empty() {
                continue;
            }
            let mut budget = COMPARED_DIRECTORIES;
            let shared = plan::shared(&root.kept.top.node, wanted, &mut budget);
            let score = (shared, root.is_empty());
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((at, score));
            }
        }
        best.map(|(at, _)| at)
    }
}

impl RootPool {
    /// Moves away and then removes what an earlier worker left. EWOULDBLOCK when another worker uses
    /// the directory.
    pub(super) fn open(path: &Path, slots: usize) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let build_directory = open_child(rustix::fs::CWD, path)?;
        rustix::fs::flock(&build_directory, FlockOperation::NonBlockingLockExclusive)?;
        // Actions pass through on the way to their directories.
        rustix::fs::fchmod(&build_directory, Mode::from_raw_mode(0o711))?;
        let within = |name: &str| -> io::Result<OwnedFd> {
            match rustix::fs::mkdirat(&build_directory, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(open_child(&build_directory, name)?)
        };
        let deletions = DeletionQueue::open(within(DELETED)?, &path.join(DELETED))?;
        let stays = [CString::new(DELETED)?, c"lost+found".to_owned()];
        for name in deletion::list(&build_directory)? {
            if !stays.contains(&name) {
                let moved = deletions.take(&build_directory, &name)?;
                deletions.remove_later(moved);
            }
        }
        let stash_directory = within(STASHED)?;
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        Ok(RootPool {
            build_directory,
            stash_directory,
            deletions,
            sequence: AtomicU64::new(1),
            slots,
            open_directories: Arc::default(),
            maximum_open: limit.unwrap_or(1 << 20) / 4 * 3,
            generation: AtomicU64::new(0),
            waiting: Mutex::default(),
            cleaned: Condvar::new(),
        })
    }

    pub(super) fn build_directory(&self) -> BorrowedFd<'_> {
        self.build_directory.as_fd()
    }

    /// Roots that are idle and not empty, and stashed subtrees.
    pub(super) fn kept(&self) -> (usize, usize) {
        let waiting = self.waiting.lock();
        let roots = waiting.roots.iter().filter(|root| !root.is_empty());
        (roots.count(), waiting.stashed.len())
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A name that nothing in the build directory has had.
    pub(super) fn next_name(&self) -> String {
        self.sequence.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// A directory of a root, counted for as long as it is open.
    pub(super) fn open_directory(
        &self,
        parent: impl AsFd,
        name: &str,
    ) -> Result<DirectoryFd, Errno> {
        DirectoryFd::open(parent, name, &self.open_directories)
    }

    /// The one that suits `wanted` best, or any empty one. Waits while too many are being cleaned;
    /// `None` when one is to be made.
    pub(super) fn take_root(&self, wanted: Option<(CreateMode, &Tree)>) -> Option<IdleRoot> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(root) = waiting.take_root(wanted) {
                return Some(root);
            }
            if waiting.cleaning <= 2 * self.slots {
                return None;
            }
            self.cleaned.wait(&mut waiting);
        }
    }

    /// What must be done to `old` to make `new` of it; takes stashed subtrees that help, if any may.
    pub(super) fn plan(
        &self,
        old: &Tree,
        new: &Tree,
        create_mode: CreateMode,
        may_take: bool,
    ) -> LayOutPlan<StashedTree> {
        let mut waiting = self.waiting.lock();
        let rewrite = plan::compare(old, new, &|digest| {
            may_take && waiting.has(create_mode, digest)
        });
        plan::resolve(old, rewrite, &mut |digest| match may_take {
            true => waiting.take(create_mode, digest),
            false => None,
        })
    }

    /// A root that no action has any more, and whose files are as its model says.
    pub(super) fn return_root(&self, root: IdleRoot) {
        let mut waiting = self.waiting.lock();
        let gone = self.put_root(&mut waiting, root);
        drop(waiting);
        self.cleaned.notify_all();
        if let Some(root) = gone {
            self.delete(root.action_directory);
        }
    }

    /// Comes back when it was to be forgotten meanwhile.
    fn put_root(&self, waiting: &mut WaitingRoots, root: IdleRoot) -> Option<IdleRoot> {
        if self.generation() != root.generation {
            return Some(root);
        }
        waiting.roots.push(root);
        None
    }

    /// One more root is cleaned, until `end_cleaning`.
    pub(super) fn begin_cleaning(&self) {
        self.waiting.lock().cleaning += 1;
    }

    pub(super) fn is_cleaning(&self) -> bool {
        self.waiting.lock().cleaning > 0
    }

    /// A root was cleaned; `None` when it is not used again. Tells whether there are fewer roots than
    /// slots.
    pub(super) fn end_cleaning(&self, root: Option<IdleRoot>) -> bool {
        let mut gone = Vec::new();
        let mut waiting = self.waiting.lock();
        waiting.cleaning -= 1;
        gone.extend(root.and_then(|root| self.put_root(&mut waiting, root)));
        if waiting.roots.len() > 2 * self.slots {
            gone.push(waiting.roots.remove(0));
        }
        let lacks = waiting.roots.len() < self.slots;
        drop(waiting);
        self.cleaned.notify_all();
        for root in gone {
            self.delete(root.action_directory);
        }
        lacks
    }

    pub(super) fn delete(&self, action_directory: ActionDirectory) {
        self.deletions
            .delete(&self.build_directory, &action_directory.name);
    }

    /// Of an action's directory that could not be made, or not as a whole.
    pub(super) fn delete_if_there(&self, name: &str) {
        let _ = self.deletions.try_delete(&self.build_directory, name);
    }

    /// Moves a verified subtree out of a root.
    pub(super) fn stash(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        kept: DirectoryRecord,
        create_mode: CreateMode,
        generation: u64,
    ) -> Result<StashedTree, Errno> {
        let stashed = self.next_name();
        rustix::fs::renameat(parent, name, &self.stash_directory, &stashed)?;
        Ok(StashedTree {
            kept,
            create_mode,
            name: stashed,
            generation,
        })
    }

    /// Moves a stashed subtree into a root. A rename sets the ctime of what is renamed, so that its
    /// baseline is new (I6 Baseline); what is below is as it was.
    pub(super) fn unstash(
        &self,
        stashed: StashedTree,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<DirectoryRecord, Errno> {
        let StashedTree {
            mut kept,
            name: from,
            ..
        } = stashed;
        rustix::fs::renameat(&self.stash_directory, &from, parent, name)?;
        let (inode, baseline) = root_record::read_baseline(kept.fd.as_fd())?;
        if inode != kept.inode {
            return Err(Errno::STALE);
        }
        kept.baseline = Some(baseline);
        Ok(kept)
    }

    /// Subtrees wait for a root that has them.
    pub(super) fn add_stashed(&self, stashed: impl IntoIterator<Item = StashedTree>) {
        for stashed in stashed {
            // Looked at under the lock: whoever forgets all counts up first, and then lets go of all.
            let mut waiting = self.waiting.lock();
            let gone = match self.generation() == stashed.generation {
                true => waiting.put(stashed),
                false => Some(stashed),
            };
            drop(waiting);
            if let Some(gone) = gone {
                self.delete_stashed(gone);
            }
        }
    }

    pub(super) fn delete_stashed(&self, stashed: StashedTree) {
        self.deletions.delete(&self.stash_directory, &stashed.name);
    }

    /// Lets go of something that is kept, a subtree first; `false` when there is nothing.
    pub(super) fn reclaim(&self) -> bool {
        let mut waiting = self.waiting.lock();
        if let Some(stashed) = waiting.take_oldest() {
            drop(waiting);
            self.delete_stashed(stashed);
            return true;
        }
        let warm = waiting.roots.iter().position(|root| !root.is_empty());
        let root = warm.map(|at| waiting.roots.remove(at));
        drop(waiting);
        match root {
            Some(root) => {
                self.delete(root.action_directory);
                true
            }
            None => false,
        }
    }

    /// All that is kept is thrown away, and what is in use will be (I7 Errors discard).
    pub(super) fn invalidate_all(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        while self.reclaim() {}
        // Empty ones, too: whoever wrote where nobody may have written there as well.
        let empty = std::mem::take(&mut self.waiting.lock().roots);
        for root in empty {
            self.delete(root.action_directory);
        }
    }

    /// Lets go of what is kept until so many more directories may be open; `false` when that is not
    /// enough.
    pub(super) fn make_room_for_directories(&self, directories: u64) -> bool {
        loop {
            let open = self.open_directories.load(Ordering::Relaxed);
            if open.saturating_add(directories) <= self.maximum_open {
                return true;
            }
            if !self.reclaim() {
                return false;
            }
        }
    }
}
