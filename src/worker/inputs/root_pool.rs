//! The roots that are idle in the build directory, and the stash of subtrees, under one lock.
//!
//! 1. Everything here is as its record says: it was cleaned after the last action that had it.
//! 2. It is bounded: in roots, in subtrees, in open directories; the longest unused go first,
//!    subtrees before roots.
//! 3. What was made before the last time that everything was invalidated does not come back into it.

use std::{
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
    root_record::{DirectoryFd, DirectoryRecord, RootRecord},
    subtree_stash::{StashedSubtree, SubtreeStash},
};
use crate::worker::beneath::open_child;

const DELETED: &str = "deleted";
const STASHED: &str = "stashed";
/// How many directories of a root are looked at to see how much it shares with another.
const COMPARED_DIRECTORIES: u32 = 200;

/// A root that no action has.
pub(super) struct IdleRoot {
    pub action_directory: ActionDirectory,
    pub record: RootRecord,
    /// `RootPool::generation` when the root was made.
    pub generation: u64,
}

impl IdleRoot {
    /// Whether there is nothing in the root.
    pub(super) fn is_empty(&self) -> bool {
        self.record.top.node.entries == 0
    }
}

pub(super) struct RootPool {
    /// Locked for as long as this worker runs.
    build_directory: OwnedFd,
    stash_directory: OwnedFd,
    pub deletions: DeletionQueue,
    next_name: AtomicU64,
    /// How many actions run at a time. Twice as many roots may be idle, and twice as many being cleaned.
    slots: usize,
    /// How many directories are open.
    open_directories: Arc<AtomicU64>,
    /// How many directories may be open.
    pub maximum_open_directories: u64,
    /// How often everything was invalidated.
    generation: AtomicU64,
    state: Mutex<RootPoolState>,
    /// Notified when a root was cleaned or returned.
    cleaned: Condvar,
}

#[derive(Default)]
struct RootPoolState {
    /// The longest unused first.
    roots: Vec<IdleRoot>,
    /// How many roots are being cleaned.
    cleaning: usize,
    stash: SubtreeStash,
}

impl RootPoolState {
    /// Takes the root that suits a tree best, or an empty one where no tree is given.
    fn take_root(&mut self, wanted: Option<(CreateMode, &Tree)>) -> Option<IdleRoot> {
        let at = match wanted {
            Some((create_mode, tree)) => self.most_similar(create_mode, tree)?,
            None => self.roots.iter().position(IdleRoot::is_empty)?,
        };
        Some(self.roots.remove(at))
    }

    /// Which root shares most with the wanted tree; an empty one rather than one that shares nothing; among equals
    /// the longest unused. Roots whose files were created in another way do not count, unless they are empty.
    fn most_similar(&self, create_mode: CreateMode, wanted: &Tree) -> Option<usize> {
        let mut best: Option<(usize, (u64, bool))> = None;
        for (at, root) in self.roots.iter().enumerate() {
            if root.record.create_mode != create_mode && !root.is_empty() {
                continue;
            }
            let mut budget = COMPARED_DIRECTORIES;
            let shared = plan::shared_entries(&root.record.top.node, wanted, &mut budget);
            let score = (shared, root.is_empty());
            if best.is_none_or(|(_, highest)| score > highest) {
                best = Some((at, score));
            }
        }
        best.map(|(at, _)| at)
    }
}

impl RootPool {
    /// Opens the directory, and moves away and then removes what an earlier worker left. EWOULDBLOCK when another
    /// worker uses it.
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
        let preserved_names = [CString::new(DELETED)?, c"lost+found".to_owned()];
        for name in deletion::list(&build_directory)? {
            if !preserved_names.contains(&name) {
                let moved = deletions.move_in(&build_directory, &name)?;
                deletions.remove_later(moved);
            }
        }
        let stash_directory = within(STASHED)?;
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        Ok(RootPool {
            build_directory,
            stash_directory,
            deletions,
            next_name: AtomicU64::new(1),
            slots,
            open_directories: Arc::default(),
            maximum_open_directories: limit.unwrap_or(1 << 20) / 4 * 3,
            generation: AtomicU64::new(0),
            state: Mutex::default(),
            cleaned: Condvar::new(),
        })
    }

    pub(super) fn build_directory(&self) -> BorrowedFd<'_> {
        self.build_directory.as_fd()
    }

    /// How many roots are idle and not empty, and how many subtrees are stashed.
    pub(super) fn idle_counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        let roots = state.roots.iter().filter(|root| !root.is_empty());
        (roots.count(), state.stash.len())
    }

    /// How often everything was invalidated.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A name that nothing in the build directory has had.
    pub(super) fn next_name(&self) -> String {
        self.next_name.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Opens a directory of a root, which is counted for as long as it is open.
    pub(super) fn open_directory(
        &self,
        parent: impl AsFd,
        name: &str,
    ) -> Result<DirectoryFd, Errno> {
        DirectoryFd::open(parent, name, &self.open_directories)
    }

    /// Takes the root that suits `wanted` best, or any empty one. Waits while too many are being cleaned;
    /// `None` when one is to be made.
    pub(super) fn take_root(&self, wanted: Option<(CreateMode, &Tree)>) -> Option<IdleRoot> {
        let mut state = self.state.lock();
        loop {
            if let Some(root) = state.take_root(wanted) {
                return Some(root);
            }
            if state.cleaning <= 2 * self.slots {
                return None;
            }
            self.cleaned.wait(&mut state);
        }
    }

    /// Plans what must be done to `old` to make `new` of it; if `may_unstash`, takes subtrees that help out of the
    /// stash.
    pub(super) fn plan(
        &self,
        old: &Tree,
        new: &Tree,
        create_mode: CreateMode,
        may_unstash: bool,
    ) -> LayOutPlan<StashedSubtree> {
        let mut state = self.state.lock();
        let rewrite = plan::compare(old, new, &|digest| {
            may_unstash && state.stash.contains(create_mode, digest)
        });
        plan::resolve(old, rewrite, &mut |digest| match may_unstash {
            true => state.stash.take(create_mode, digest),
            false => None,
        })
    }

    /// Takes back a root that no action has, and which is as its record says.
    pub(super) fn return_root(&self, root: IdleRoot) {
        let mut state = self.state.lock();
        let gone = self.put_root(&mut state, root);
        drop(state);
        self.cleaned.notify_all();
        if let Some(root) = gone {
            self.delete(root.action_directory);
        }
    }

    /// Adds an idle root; returns it when everything was invalidated since it was made.
    fn put_root(&self, state: &mut RootPoolState, root: IdleRoot) -> Option<IdleRoot> {
        if self.generation() != root.generation {
            return Some(root);
        }
        state.roots.push(root);
        None
    }

    /// Counts one more root that is being cleaned, until `end_cleaning`.
    pub(super) fn begin_cleaning(&self) {
        self.state.lock().cleaning += 1;
    }

    /// Whether any root is being cleaned.
    pub(super) fn is_cleaning(&self) -> bool {
        self.state.lock().cleaning > 0
    }

    /// Takes back a root that was cleaned; `None` when it is not used again. Tells whether fewer roots are idle than
    /// there are slots.
    pub(super) fn end_cleaning(&self, root: Option<IdleRoot>) -> bool {
        let mut gone = Vec::new();
        let mut state = self.state.lock();
        state.cleaning -= 1;
        gone.extend(root.and_then(|root| self.put_root(&mut state, root)));
        if state.roots.len() > 2 * self.slots {
            gone.push(state.roots.remove(0));
        }
        let lacks = state.roots.len() < self.slots;
        drop(state);
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

    /// Deletes what there is of an action's directory that could not be made as a whole.
    pub(super) fn delete_if_there(&self, name: &str) {
        let _ = self.deletions.try_delete(&self.build_directory, name);
    }

    /// Moves a subtree that is as its record says out of a root.
    pub(super) fn detach_subtree(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        record: DirectoryRecord,
        create_mode: CreateMode,
        generation: u64,
    ) -> Result<StashedSubtree, Errno> {
        let place = (self.stash_directory.as_fd(), self.next_name());
        StashedSubtree::move_from_root((parent, name), place, record, create_mode, generation)
    }

    /// Moves a stashed subtree into a root.
    pub(super) fn attach_subtree(
        &self,
        stashed: StashedSubtree,
        parent: BorrowedFd<'_>,
        name: &str,
    ) -> Result<DirectoryRecord, Errno> {
        stashed.move_into_root(self.stash_directory.as_fd(), parent, name)
    }

    /// Adds subtrees to the stash, but those of roots from before everything was invalidated.
    pub(super) fn add_stashed(&self, stashed: impl IntoIterator<Item = StashedSubtree>) {
        for stashed in stashed {
            // Compared under the lock: whoever invalidates everything counts first, and then lets go of all.
            let mut state = self.state.lock();
            let gone = match self.generation() == stashed.generation {
                true => state.stash.add(stashed),
                false => Some(stashed),
            };
            drop(state);
            if let Some(gone) = gone {
                self.delete_stashed(gone);
            }
        }
    }

    pub(super) fn delete_stashed(&self, stashed: StashedSubtree) {
        self.deletions.delete(&self.stash_directory, &stashed.name);
    }

    /// Lets go of a stashed subtree, else of an idle root that is not empty; `false` when there are none.
    pub(super) fn reclaim(&self) -> bool {
        let mut state = self.state.lock();
        if let Some(stashed) = state.stash.take_oldest() {
            drop(state);
            self.delete_stashed(stashed);
            return true;
        }
        let reusable = state.roots.iter().position(|root| !root.is_empty());
        let root = reusable.map(|at| state.roots.remove(at));
        drop(state);
        match root {
            Some(root) => {
                self.delete(root.action_directory);
                true
            }
            None => false,
        }
    }

    /// Throws away all idle roots and stashed subtrees; roots that actions have will be when these end (I7 Errors
    /// discard).
    pub(super) fn invalidate_all(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        while self.reclaim() {}
        // Whoever wrote where nobody may could have written to empty ones as well.
        let empty = std::mem::take(&mut self.state.lock().roots);
        for root in empty {
            self.delete(root.action_directory);
        }
    }

    /// Lets go of stashed subtrees and idle roots until so many more directories may be open; `false` when that is not
    /// enough.
    pub(super) fn make_room_for_directories(&self, directories: u64) -> bool {
        loop {
            let open = self.open_directories.load(Ordering::Relaxed);
            if open.saturating_add(directories) <= self.maximum_open_directories {
                return true;
            }
            if !self.reclaim() {
                return false;
            }
        }
    }
}
