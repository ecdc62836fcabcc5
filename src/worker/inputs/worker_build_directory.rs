//! The worker's build directory and all that its input roots share: makes empty roots, decides which are kept, has used
//! ones cleaned for the next action, invalidates them when somebody changed the cache, and waits for free space.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::fs::Mode;

use super::{
    action_directory::{self, ActionDirectory, INPUT_ROOT, LAST_PROCESS_TIMEOUT},
    cleaning::{DirectoryCondition, clean_root},
    ctime_resolution::{self, CtimeResolution},
    file_cache::{CreateMode, FileCache, InputFiles},
    free_space_monitor::{self, Free, FreeSpaceMonitor},
    inode_allocator::InodeAllocator,
    lay_out::LayOutContext,
    lay_out_counts::LayOutCounts,
    merkle_tree::{Node, Tree},
    reuse_suspension::ReuseSuspension,
    root_pool::{IdleRoot, RootPool},
    root_record::{self, DirectoryRecord, RootRecord},
};
use crate::worker::fault::Fault;

/// How many threads lay out a large root.
const LAY_OUT_THREADS: usize = 2;
/// How long an action waits for space that the removal of used directories may leave.
const FREE_SPACE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an action waits for space from such removal before cached files are evicted for it.
const EVICTION_DELAY: Duration = Duration::from_secs(5);

pub struct WorkerBuildDirectory {
    path: PathBuf,
    pub(super) root_pool: RootPool,
    pub(super) cache: Arc<FileCache>,
    pub(super) free_space: Arc<FreeSpaceMonitor>,
    /// How many threads lay out a large root.
    threads: AtomicUsize,
    /// Whether every change of a directory gives it another ctime.
    fine_ctime: bool,
    pub(super) reuse_suspension: ReuseSuspension,
    /// `FileCache::poll_modifications` when idle roots were last invalidated for it. Held while they are, so that
    /// nobody takes one that links a modified file.
    seen_modifications: Mutex<u64>,
    pub(super) lay_out_counts: LayOutCounts,
}

/// What is known of a root that an action had.
pub(super) struct UsedRoot {
    /// `None` when the root is not used again.
    pub record: Option<RootRecord>,
    /// `RootPool::generation` when the root was made.
    pub generation: u64,
    /// When the command could start, in seconds since the epoch.
    pub command_start_seconds: i64,
    /// The inode numbers of what the worker adopted of what the action made, sorted.
    pub adopted_output_inodes: Vec<u64>,
}

impl WorkerBuildDirectory {
    /// Opens the directory, and moves away and then removes what an earlier worker left. Sets the umask of the whole
    /// process to 0, since the action's user must be able to write to directories. EWOULDBLOCK when another
    /// worker uses the directory.
    pub fn open(path: &Path, cache: Arc<FileCache>, slots: usize) -> io::Result<Arc<Self>> {
        rustix::process::umask(Mode::empty());
        let root_pool = RootPool::open(path, slots)?;
        let resolution = ctime_resolution::probe(root_pool.build_directory())?;
        let watched = root_pool.build_directory().try_clone_to_owned()?;
        let free_space = FreeSpaceMonitor::new(path.to_owned(), watched, cache.minimum_free())?;
        let threads =
            std::thread::available_parallelism().map_or(1, |n| n.get().min(LAY_OUT_THREADS));
        let how = match resolution {
            CtimeResolution::Fine => {
                "input roots are kept and changed; ctime tells every change of a directory"
            }
            CtimeResolution::Coarse => {
                "input roots are kept and changed; ctime moves in steps, so what was just made is read again after an action"
            }
            CtimeResolution::Unknown => {
                "each input root is made anew: not known how ctime behaves on this file system; ext4, xfs, btrfs and tmpfs are known"
            }
        };
        let directories = root_pool.maximum_open_directories;
        tracing::info!(directory = %path.display(), ctime = ?resolution, directories, "{how}");
        let build_directory = Arc::new(WorkerBuildDirectory {
            path: path.to_owned(),
            root_pool,
            cache,
            free_space,
            threads: AtomicUsize::new(threads),
            fine_ctime: resolution == CtimeResolution::Fine,
            reuse_suspension: ReuseSuspension::new(resolution != CtimeResolution::Unknown),
            seen_modifications: Mutex::default(),
            lay_out_counts: LayOutCounts::default(),
        });
        for _ in 0..slots {
            build_directory
                .root_pool
                .return_root(build_directory.make_root()?);
        }
        let weak = Arc::downgrade(&build_directory);
        let reclaim = move || {
            weak.upgrade()
                .is_some_and(|build_directory| build_directory.root_pool.reclaim())
        };
        build_directory.cache.on_pressure(reclaim);
        Ok(build_directory)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many threads lay out a large root from now on.
    pub fn set_threads(&self, threads: usize) {
        self.threads.store(threads, Ordering::Relaxed);
    }

    /// How many input roots are idle and not empty, and how many subtrees are stashed.
    pub fn idle_counts(&self) -> (usize, usize) {
        self.root_pool.idle_counts()
    }

    pub fn lay_out_counts(&self) -> &LayOutCounts {
        &self.lay_out_counts
    }

    /// Why roots are not kept now, though they could be; for the status line.
    pub fn describe_reuse_suspension(&self, now: Instant) -> Option<String> {
        self.reuse_suspension.describe(now)
    }

    /// Throws away all idle roots and stashed subtrees, since something was not as it should be; roots that actions
    /// have will be when these end. Blocks.
    pub fn invalidate_all(&self) {
        self.root_pool.invalidate_all();
    }

    /// What laying out a root of this generation needs.
    pub(super) fn context(&self, generation: u64) -> LayOutContext<'_> {
        LayOutContext {
            root_pool: &self.root_pool,
            cache: &self.cache,
            threads: self.threads.load(Ordering::Relaxed),
            generation,
        }
    }

    pub(super) fn disk_fault(&self, what: &str, error: io::Error) -> Fault {
        let what = format!("{what} in {}", self.path.display());
        Fault::of_disk(what, error)
    }

    /// Whether a root of this tree, whose files are created in this way, is kept after its action.
    pub(super) fn keeps(&self, tree: &Node, create_mode: CreateMode) -> bool {
        create_mode != CreateMode::Copy
            && self.reuse_suspension.allows_reuse(Instant::now())
            && tree.directories <= self.root_pool.maximum_open_directories / 2
    }

    /// Throws away all idle roots if others modified the cache since the last call, since roots link cached files.
    /// Returns `FileCache::poll_modifications`.
    pub(super) fn invalidate_if_cache_modified(&self) -> u64 {
        let mut seen = self.seen_modifications.lock();
        let now = self.cache.poll_modifications();
        if *seen != now {
            *seen = now;
            self.root_pool.invalidate_all();
        }
        now
    }

    /// Takes the idle root that suits `wanted` best, or an empty one, which is made if there is none.
    pub(super) fn take_root(&self, wanted: Option<(CreateMode, &Tree)>) -> io::Result<IdleRoot> {
        match self.root_pool.take_root(wanted) {
            Some(root) => Ok(root),
            None => self.make_root(),
        }
    }

    fn make_root(&self) -> io::Result<IdleRoot> {
        let name = self.root_pool.next_name();
        let made = self.make_root_at(name.clone());
        made.inspect_err(|_| self.root_pool.delete_if_there(&name))
    }

    fn make_root_at(&self, name: String) -> io::Result<IdleRoot> {
        let action_directory = ActionDirectory::create(self.root_pool.build_directory(), name)?;
        let fd = self
            .root_pool
            .open_directory(&action_directory.directory, INPUT_ROOT)?;
        let (inode, baseline) = root_record::finalize_directory(fd.as_fd())?;
        let top = DirectoryRecord {
            node: Node::empty(),
            fd: Arc::new(fd),
            inode,
            baseline: Some(baseline),
            files: InputFiles::none(&self.cache),
            symlinks: Box::default(),
            children: Vec::new(),
        };
        Ok(IdleRoot {
            action_directory,
            record: RootRecord {
                top,
                inodes: InodeAllocator::default(),
                // An empty root suits every mode.
                create_mode: CreateMode::HardLink,
            },
            generation: self.root_pool.generation(),
        })
    }

    /// Has a used root become idle once it is what it was before its action; else throws it away.
    pub(super) fn clean(&self, mut action_directory: ActionDirectory, used: UsedRoot) {
        let generation = used.generation;
        let build_directory = self.root_pool.build_directory();
        action_directory.rename(build_directory, self.root_pool.next_name());
        if !action_directory::lock(action_directory.directory.as_fd()) {
            tracing::error!(
                directory = %self.path.join(&action_directory.name).display(),
                seconds = LAST_PROCESS_TIMEOUT.as_secs(),
                "the runner did not let go of the directory of an action that is over; it is left until the next start"
            );
            self.root_pool.end_cleaning(None);
            return;
        }
        let began = Instant::now();
        let cleaned = self.clean_action_directory(&action_directory, used);
        action_directory::unlock(action_directory.directory.as_fd());
        tracing::debug!(
            kept = matches!(cleaned, Ok(Some(_))),
            microseconds = began.elapsed().as_micros() as u64,
            "cleaned up after an action"
        );
        let cleaned = cleaned.unwrap_or_else(|error| {
            tracing::warn!(
                directory = %self.path.join(&action_directory.name).display(),
                %error,
                "could not make the root of an action what it was; it is thrown away"
            );
            None
        });
        let (root, gone) = match cleaned {
            Some(record) => {
                let root = IdleRoot {
                    action_directory,
                    record,
                    generation,
                };
                (Some(root), None)
            }
            None => (None, Some(action_directory)),
        };
        let lacks = self.root_pool.end_cleaning(root);
        if let Some(gone) = gone {
            self.root_pool.delete(gone);
        }
        if lacks && let Ok(root) = self.make_root() {
            self.root_pool.return_root(root);
        }
        if self.cache.is_over() {
            self.cache.evict_to_fit();
        }
    }

    /// Makes an action's directory, and the root in it, what they were before the action; `None` when they are not used
    /// again.
    fn clean_action_directory(
        &self,
        action_directory: &ActionDirectory,
        used: UsedRoot,
    ) -> io::Result<Option<RootRecord>> {
        let Some(mut record) = used.record else {
            return Ok(None);
        };
        if !action_directory.empty()? {
            return Ok(None);
        }
        let context = self.context(used.generation);
        match clean_root(
            &context,
            &mut record,
            self.fine_ctime,
            used.command_start_seconds,
            &used.adopted_output_inodes,
        )? {
            DirectoryCondition::Good => Ok(Some(record)),
            DirectoryCondition::Oversized => Ok(None),
        }
    }

    /// Waits until an action finds enough free, and returns that. Space may come from what is being removed; if not, cached files are
    /// evicted for it, and idle roots let go of. Blocks.
    pub(super) fn await_free_space(&self) -> Result<Free, Fault> {
        let began = Instant::now();
        let mut before = None;
        loop {
            let free = self
                .free_space
                .free()
                .map_err(|error| self.disk_fault("look how much is free", error))?;
            if self.free_space.suffices(free) {
                return Ok(free);
            }
            let removing = self.root_pool.deletions.is_busy() || self.root_pool.is_cleaning();
            let in_vain = before == Some(free) && !removing;
            let waited = began.elapsed();
            if in_vain || waited >= FREE_SPACE_TIMEOUT {
                return Err(self.free_space.shortage_fault(free));
            }
            if !removing || waited >= EVICTION_DELAY {
                self.cache.evict_to_fit();
                before = Some(free);
            }
            std::thread::sleep(free_space_monitor::FREE_SPACE_INTERVAL);
        }
    }
}
