//! The input root of an action that is about to run, runs or has run: from its lay-out to the end, when it goes back
//! to the store to be cleaned and kept.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{
    action_directory::{self, ActionDirectory},
    free_space_monitor::FreeSpaceWatch,
    root_pool::IdleRoot,
    root_record::RootRecord,
    worker_build_directory::{UsedRoot, WorkerBuildDirectory},
};
use crate::worker::{
    blocking::{blocking, in_background},
    fault::Fault,
};

/// A root for one action. Verified in the background when dropped.
pub struct InputRoot {
    build_directory: Arc<WorkerBuildDirectory>,
    /// `None` only while being dropped.
    action_directory: Option<ActionDirectory>,
    /// `None` when it is not used again.
    pub(super) kept: Option<RootRecord>,
    generation: u64,
    /// Of the cache, before it was laid out.
    modifications: u64,
    /// Seconds since the epoch.
    ready: i64,
    reusable: bool,
    /// Whether its files are copies for this action alone (`CreateMode::Copy`), which it may have changed.
    pub(super) has_private_files: bool,
    /// From when the command may start.
    command: Option<FreeSpaceWatch>,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    adopted_output_inodes: Vec<u64>,
}

impl InputRoot {
    /// An empty root. Blocks.
    pub fn empty(build_directory: &Arc<WorkerBuildDirectory>) -> std::io::Result<Self> {
        let modifications = build_directory.invalidate_if_cache_modified();
        let IdleRoot {
            action_directory,
            kept,
            generation,
        } = build_directory.take_root(None)?;
        let mut root = InputRoot::new(build_directory, action_directory, generation, modifications);
        root.kept = Some(kept);
        Ok(root)
    }

    /// A root of whose files nothing is known.
    pub(super) fn new(
        build_directory: &Arc<WorkerBuildDirectory>,
        action_directory: ActionDirectory,
        generation: u64,
        modifications: u64,
    ) -> Self {
        InputRoot {
            build_directory: build_directory.clone(),
            action_directory: Some(action_directory),
            kept: None,
            generation,
            modifications,
            ready: now(),
            reusable: true,
            has_private_files: false,
            command: None,
            adopted_output_inodes: Vec::new(),
        }
    }

    /// A command may start in it.
    pub(super) fn begin(&mut self) {
        self.command = Some(self.build_directory.free_space.watch());
        self.ready = now();
    }

    fn action_directory(&self) -> &ActionDirectory {
        let present = self.action_directory.as_ref();
        present.expect("present until dropped")
    }

    /// The name of the action's directory, in the build directory.
    pub fn name(&self) -> &str {
        &self.action_directory().name
    }

    /// Whether its files are copies for this action alone, which it may write to.
    pub fn has_private_files(&self) -> bool {
        self.has_private_files
    }

    /// The directory with `stdout` and `stderr`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.action_directory().directory.as_fd()
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.action_directory().root.as_fd()
    }

    /// A runner that failed may have let go of its lock while processes of the action live: no
    /// other action gets this directory.
    pub fn discard_after_use(&mut self) {
        self.reusable = false;
    }

    /// The files with these inode numbers, which the action made, may be the worker's now.
    pub fn set_adopted_output_inodes(&mut self, mut inodes: Vec<u64>) {
        inodes.sort_unstable();
        self.adopted_output_inodes = inodes;
    }

    /// The action ran as root or as the worker, and may have changed anything in place (I2 Credentials). Blocks.
    pub fn discard_all_after_privileged_action(&mut self) {
        self.reusable = false;
        self.build_directory
            .reuse_suspension
            .suspend(Instant::now());
        self.build_directory.invalidate_all();
    }

    /// Whether what the command found and left can be relied on: nobody but the worker changed files of
    /// the cache since the root was chosen, and the disk was never full. Blocks.
    pub fn check(&self) -> Result<(), Fault> {
        if let Some(fault) = self.command.as_ref().and_then(FreeSpaceWatch::fault) {
            return Err(fault);
        }
        match self.build_directory.cache.poll_modifications() == self.modifications {
            true => Ok(()),
            false => Err(Fault::Unavailable(format!(
                "while the command ran, somebody changed input files in the cache in {} on the worker's host; they will be fetched again",
                self.build_directory.cache.path().display()
            ))),
        }
    }

    /// Opens the directory to a group, for a runner that cannot do so for an action's user. Such a
    /// runner holds no lock either (I5 No process), so that the root is not used again. Blocks.
    pub fn grant_group_access(&mut self, group: u32) -> Result<(), Fault> {
        self.reusable = false;
        self.action_directory().grant_group_access(group).map_err(|error| {
            let what = format!(
                "open a directory to runners.group {group}; the worker needs CAP_CHOWN, or to be in that group"
            );
            self.build_directory.disk_fault(&what, error.into())
        })
    }

    /// Waits until the runner says, by letting go of its lock, that no process of the action is
    /// left. `false` when that takes too long.
    pub async fn await_unlocked(&self) -> bool {
        let Ok(directory) = self.directory().try_clone_to_owned() else {
            return false;
        };
        let lock = move || {
            let locked = action_directory::lock(directory.as_fd());
            if locked {
                action_directory::unlock(directory.as_fd());
            }
            locked
        };
        blocking("lock an action's directory", lock).await == Ok(true)
    }

    /// What is left to do when the action has ended. Blocks, and nobody needs to wait for it.
    pub fn into_cleaning(mut self) -> impl FnOnce() + Send + use<> {
        let cleaning = self.begin_cleaning();
        move || cleaning.into_iter().for_each(|cleaning| cleaning())
    }

    fn begin_cleaning(&mut self) -> Option<impl FnOnce() + Send + use<>> {
        let action_directory = self.action_directory.take()?;
        self.build_directory.root_pool.begin_cleaning();
        let build_directory = self.build_directory.clone();
        // A thread that panics may not have told what it took over.
        let reusable = self.reusable && !std::thread::panicking();
        let used = UsedRoot {
            kept: self.kept.take().filter(|_| reusable),
            generation: self.generation,
            ready: self.ready,
            adopted_output_inodes: std::mem::take(&mut self.adopted_output_inodes),
        };
        Some(move || build_directory.clean(action_directory, used))
    }
}

impl Drop for InputRoot {
    fn drop(&mut self) {
        if let Some(cleaning) = self.begin_cleaning() {
            in_background(cleaning);
        }
    }
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs() as i64)
}
