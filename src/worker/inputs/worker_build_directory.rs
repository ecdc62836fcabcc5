//! The build directory and all that input roots share: makes roots, and makes used ones fit for the next
//! action.

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
    free_space_monitor::{self, FreeSpaceMonitor},
    inode_allocator::InodeAllocator,
    lay_out::LayOutContext,
    lay_out_counts::LayOutCounts,
    merkle_tree::{Node, Tree},
    reuse_suspension::ReuseSuspension,
    root_pool::{IdleRoot, RootPool},
    root_record::{self, DirectoryRecord, RootRecord},
};
use crate::worker::fault::Fault;

/// Threads that lay out a large root.
const LAY_OUT_THREADS: usize = 2;
/// How long an action waits for what is being removed.
const FREE_SPACE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long, before cached files go for it.
const EVICTION_DELAY: Duration = Duration::from_secs(5);

pub struct WorkerBuildDirectory {
    path: PathBuf,
    pub(super) root_pool: RootPool,
    pub(super) cache: Arc<FileCache>,
    pub(super) free_space: Arc<FreeSpaceMonitor>,
    threads: AtomicUsize,
    fine_ctime: bool,
    pub(super) reuse_suspension: ReuseSuspension,
    /// Of the cache, those after which all was thrown away; held meanwhile, so that none is given out.
    modifications: Mutex<u64>,
    pub(super) lay_out_counts: LayOutCounts,
}

/// What is known of a root that an action had.
pub(super) struct UsedRoot {
    /// `None` when it is not used again.
    pub kept: Option<RootRecord>,
    /// Of the idle roots, when it was made.
    pub generation: u64,
    /// When the action could begin, in seconds since the epoch.
    pub ready: i64,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    pub adopted_output_inodes: Vec<u64>,
}

impl WorkerBuildDirectory {
    /// Moves away and then removes what an earlier worker left. Sets the umask of the whole process
    /// to 0, since the action's user must be able to write to directories. EWOULDBLOCK when another
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
        let directories = root_pool.maximum_open;
        tracing::info!(directory = %path.display(), ctime = ?resolution, directories, "{how}");
        let build_directory = Arc::new(WorkerBuildDirectory {
            path: path.to_owned(),
            root_pool,
            cache,
            free_space,
            threads: AtomicUsize::new(threads),
            fine_ctime: resolution == CtimeResolution::Fine,
            reuse_suspension: ReuseSuspension::new(resolution != CtimeResolution::Unknown),
            modifications: Mutex::default(),
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

    /// Input roots that are kept and idle, and stashed subtrees.
    pub fn kept(&self) -> (usize, usize) {
        self.root_pool.kept()
    }

    pub fn lay_out_counts(&self) -> &LayOutCounts {
        &self.lay_out_counts
    }

    /// Why roots are not kept now, though they could be; for the status line.
    pub fn describe_reuse_suspension(&self, now: Instant) -> Option<String> {
        self.reuse_suspension.describe(now)
    }

    /// Something was not as it should be: all that is kept is thrown away, and what is in use will be.
    /// Blocks.
    pub fn invalidate_all(&self) {
        self.root_pool.invalidate_all();
    }

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

    /// Whether a root of this size, of files that are made so, is kept after its action.
    pub(super) fn keeps(&self, tree: &Node, create_mode: CreateMode) -> bool {
        create_mode != CreateMode::Copy
            && self.reuse_suspension.allows_reuse(Instant::now())
            && tree.directories <= self.root_pool.maximum_open / 2
    }

    /// Modifications of the cache by others, after which all that is kept was thrown away, since kept
    /// roots have links to cached files.
    pub(super) fn invalidate_if_cache_modified(&self) -> u64 {
        let mut modifications = self.modifications.lock();
        let now = self.cache.poll_modifications();
        if *modifications != now {
            *modifications = now;
            self.root_pool.invalidate_all();
        }
        now
    }

    /// The root that suits `wanted` best, or any empty one.
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
        let (inode, baseline) = root_record::record_baseline(fd.as_fd())?;
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
            kept: RootRecord {
                top,
                inodes: InodeAllocator::default(),
                // An empty root suits every mode.
                create_mode: CreateMode::HardLink,
            },
            generation: self.root_pool.generation(),
        })
    }

    /// Makes a used root as good as new, or throws it away.
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
        let reverted = self.revert(&action_directory, used);
        action_directory::unlock(action_directory.directory.as_fd());
        tracing::debug!(
            kept = matches!(reverted, Ok(Some(_))),
            microseconds = began.elapsed().as_micros() as u64,
            "cleaned up after an action"
        );
        let reverted = reverted.unwrap_or_else(|error| {
            tracing::warn!(
                directory = %self.path.join(&action_directory.name).display(),
                %error,
                "could not make the root of an action what it was; it is thrown away"
            );
            None
        });
        let (root, gone) = match reverted {
            Some(kept) => {
                let root = IdleRoot {
                    action_directory,
                    kept,
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

    /// `None` when it is not used again.
    fn revert(
        &self,
        action_directory: &ActionDirectory,
        used: UsedRoot,
    ) -> io::Result<Option<RootRecord>> {
        let Some(mut kept) = used.kept else {
            return Ok(None);
        };
        if !action_directory.empty()? {
            return Ok(None);
        }
        let context = self.context(used.generation);
        match clean_root(
            &context,
            &mut kept,
            self.fine_ctime,
            used.ready,
            &used.adopted_output_inodes,
        )? {
            DirectoryCondition::Good => Ok(Some(kept)),
            DirectoryCondition::Oversized => Ok(None),
        }
    }

    /// Waits until an action finds enough free, which what is being removed may leave; then cached
    /// files and kept input roots go. Blocks.
    pub fn await_free_space(&self) -> Result<(), Fault> {
        let began = Instant::now();
        let mut before = None;
        loop {
            let free = self
                .free_space
                .free()
                .map_err(|error| self.disk_fault("look how much is free", error))?;
            if self.free_space.suffices(free) {
                return Ok(());
            }
            let removing = self.root_pool.deletions.is_busy() || self.root_pool.is_cleaning();
            let in_vain = before == Some(free) && !removing;
            let waited = began.elapsed();
            if in_vain || waited >= FREE_SPACE_TIMEOUT {
                return Err(self.free_space.shortage(free));
            }
            if !removing || waited >= EVICTION_DELAY {
                self.cache.evict_to_fit();
                before = Some(free);
            }
            std::thread::sleep(free_space_monitor::FREE_SPACE_INTERVAL);
        }
    }
}
