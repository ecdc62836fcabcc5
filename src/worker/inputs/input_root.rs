//! The input root of an action that is about to run, runs or has run: from its lay-out to the end, when it is cleaned
//! and becomes idle.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{
    action_directory::{self, ActionDirectory},
    free_space_monitor::{Free, FreeSpaceWatch},
    root_pool::IdleRoot,
    root_record::RootRecord,
    worker_build_directory::{UsedRoot, WorkerBuildDirectory},
};
use crate::worker::{
    blocking::{blocking, in_background},
    fault::Fault,
};

/// The input root of one action. When it is dropped, it is cleaned in the background.
pub struct InputRoot {
    build_directory: Arc<WorkerBuildDirectory>,
    /// `None` only while this is dropped.
    action_directory: Option<ActionDirectory>,
    /// `None` when the root is not used again.
    pub(super) record: Option<RootRecord>,
    /// `RootPool::generation` when the root was made.
    generation: u64,
    /// `FileCache::poll_modifications` before the root was chosen.
    modifications: u64,
    /// When the command could start, in seconds since the epoch.
    command_start_seconds: i64,
    reusable: bool,
    /// Whether its files are copies for this action alone (`CreateMode::Copy`), which it may write to.
    pub(super) has_private_files: bool,
    /// Watches the disk from when the command can start; `None` before.
    free_space_watch: Option<FreeSpaceWatch>,
    /// The inode numbers of what the worker adopted of what the action made, sorted.
    adopted_output_inodes: Vec<u64>,
}

impl InputRoot {
    /// A root with nothing in it. Blocks.
    pub fn empty(build_directory: &Arc<WorkerBuildDirectory>) -> std::io::Result<Self> {
        let modifications = build_directory.invalidate_if_cache_modified();
        let IdleRoot {
            action_directory,
            record,
            generation,
        } = build_directory.take_root(None)?;
        let mut root = InputRoot::new(build_directory, action_directory, generation, modifications);
        root.record = Some(record);
        Ok(root)
    }

    /// A root that has no record yet.
    pub(super) fn new(
        build_directory: &Arc<WorkerBuildDirectory>,
        action_directory: ActionDirectory,
        generation: u64,
        modifications: u64,
    ) -> Self {
        InputRoot {
            build_directory: build_directory.clone(),
            action_directory: Some(action_directory),
            record: None,
            generation,
            modifications,
            command_start_seconds: now(),
            reusable: true,
            has_private_files: false,
            free_space_watch: None,
            adopted_output_inodes: Vec::new(),
        }
    }

    /// Says that from now on a command can start in the root, which found so much free.
    pub(super) fn begin(&mut self, found: Free) -> io::Result<()> {
        let directory = self.directory().try_clone_to_owned()?;
        self.free_space_watch = Some(self.build_directory.free_space.watch(directory, found));
        self.command_start_seconds = now();
        Ok(())
    }

    /// Waits until the command has taken more of the disk than its share, so that it is to be ended; else for ever.
    pub async fn disk_excess(&self) -> Fault {
        match &self.free_space_watch {
            Some(watch) => watch.excess().await,
            None => std::future::pending().await,
        }
    }

    fn action_directory(&self) -> &ActionDirectory {
        let present = self.action_directory.as_ref();
        present.expect("present until dropped")
    }

    /// The name of the action's directory in the build directory.
    pub fn name(&self) -> &str {
        &self.action_directory().name
    }

    /// Whether its files are copies for this action alone, which it may write to.
    pub fn has_private_files(&self) -> bool {
        self.has_private_files
    }

    /// The action's directory, in which `stdout` and `stderr` are.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.action_directory().directory.as_fd()
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.action_directory().root.as_fd()
    }

    /// Has no other action get this directory: a runner that failed may have let go of its lock while processes of the
    /// action live.
    pub fn discard_after_use(&mut self) {
        self.reusable = false;
    }

    /// Tells which files of those that the action made the worker may have adopted, by their inode numbers.
    pub fn set_adopted_output_inodes(&mut self, mut inodes: Vec<u64>) {
        inodes.sort_unstable();
        self.adopted_output_inodes = inodes;
    }

    /// Throws this root and all idle ones away, and has none kept for a while: the action ran as root or as the
    /// worker, and may have changed anything in place (I2 Credentials). Blocks.
    pub fn discard_all_after_privileged_action(&mut self) {
        self.reusable = false;
        self.build_directory
            .reuse_suspension
            .suspend(Instant::now());
        self.build_directory.invalidate_all();
    }

    /// Whether what the command found and left can be relied on: nobody but the worker changed files of
    /// the cache since the root was chosen, the disk was never full, and the root is still where it was. Blocks.
    pub fn check(&self) -> Result<(), Fault> {
        if !self.action_directory().is_in_place() {
            return Err(Fault::Contended(
                "while the command ran, somebody on the worker's host, or the command itself, removed or replaced its input root; nothing may be removed from the worker's build directory while actions run".to_owned(),
            ));
        }
        if let Some(fault) = self
            .free_space_watch
            .as_ref()
            .and_then(FreeSpaceWatch::fault)
        {
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

    /// What is left to do when the action has ended; a call of it blocks, and nobody needs to wait for it.
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
            record: self.record.take().filter(|_| reusable),
            generation: self.generation,
            command_start_seconds: self.command_start_seconds,
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

/// Seconds since the epoch.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs() as i64)
}
