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
    counts::LayOutCounts,
    ctime_resolution::{self, CtimeResolution},
    file_cache::{FileCache, InputFiles, LinkMode},
    free_space::{self, FreeSpace},
    idle_roots::{IdleRoot, IdleRoots},
    kept_root::{self, KeptDirectory, KeptRoot},
    lay_out::LayOutContext,
    retention::Retention,
    tree::{Node, Tree},
    used_inodes::UsedInodes,
};
use crate::worker::fault::Fault;

/// Threads that lay out a large root.
const LAY_OUT_THREADS: usize = 2;
/// How long an action waits for what is being removed.
const FREE_SPACE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long, before cached files go for it.
const EVICTION_DELAY: Duration = Duration::from_secs(5);

pub struct RootStore {
    path: PathBuf,
    pub(super) idle_roots: IdleRoots,
    pub(super) cache: Arc<FileCache>,
    pub(super) space: Arc<FreeSpace>,
    threads: AtomicUsize,
    fine_ctime: bool,
    pub(super) retention: Retention,
    /// Of the cache, those after which all was thrown away; held meanwhile, so that none is given out.
    modifications: Mutex<u64>,
    pub(super) counts: LayOutCounts,
}

/// What is known of a root that an action had.
pub(super) struct UsedRoot {
    /// `None` when it is not used again.
    pub kept: Option<KeptRoot>,
    /// Of the idle roots, when it was made.
    pub generation: u64,
    /// When the action could begin, in seconds since the epoch.
    pub ready: i64,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    pub adopted_output_inodes: Vec<u64>,
}

impl RootStore {
    /// Moves away and then removes what an earlier worker left. Sets the umask of the whole process
    /// to 0, since the action's user must be able to write to directories. EWOULDBLOCK when another
    /// worker uses the directory.
    pub fn open(path: &Path, cache: Arc<FileCache>, slots: usize) -> io::Result<Arc<Self>> {
        rustix::process::umask(Mode::empty());
        let idle_roots = IdleRoots::open(path, slots)?;
        let resolution = ctime_resolution::probe(idle_roots.build_directory())?;
        let watched = idle_roots.build_directory().try_clone_to_owned()?;
        let space = FreeSpace::new(path.to_owned(), watched, cache.minimum_free())?;
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
        let directories = idle_roots.maximum_open;
        tracing::info!(directory = %path.display(), ctime = ?resolution, directories, "{how}");
        let store = Arc::new(RootStore {
            path: path.to_owned(),
            idle_roots,
            cache,
            space,
            threads: AtomicUsize::new(threads),
            fine_ctime: resolution == CtimeResolution::Fine,
            retention: Retention::new(resolution != CtimeResolution::Unknown),
            modifications: Mutex::default(),
            counts: LayOutCounts::default(),
        });
        for _ in 0..slots {
            store.idle_roots.return_root(store.make_root()?);
        }
        let weak = Arc::downgrade(&store);
        let reclaim = move || {
            weak.upgrade()
                .is_some_and(|store| store.idle_roots.reclaim())
        };
        store.cache.on_pressure(reclaim);
        Ok(store)
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
        self.idle_roots.kept()
    }

    pub fn counts(&self) -> &LayOutCounts {
        &self.counts
    }

    /// Why roots are not kept now, though they could be; for the status line.
    pub fn retention_suspension(&self, now: Instant) -> Option<String> {
        self.retention.suspension(now)
    }

    /// Something was not as it should be: all that is kept is thrown away, and what is in use will be.
    /// Blocks.
    pub fn invalidate_all(&self) {
        self.idle_roots.invalidate_all();
    }

    pub(super) fn context(&self, generation: u64) -> LayOutContext<'_> {
        LayOutContext {
            idle_roots: &self.idle_roots,
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
    pub(super) fn keeps(&self, tree: &Node, link_mode: LinkMode) -> bool {
        link_mode != LinkMode::Copy
            && self.retention.is_active(Instant::now())
            && tree.directories <= self.idle_roots.maximum_open / 2
    }

    /// Modifications of the cache by others, after which all that is kept was thrown away, since kept
    /// roots have links to cached files.
    pub(super) fn modifications(&self) -> u64 {
        let mut modifications = self.modifications.lock();
        let now = self.cache.modifications();
        if *modifications != now {
            *modifications = now;
            self.idle_roots.invalidate_all();
        }
        now
    }

    /// The root that suits `wanted` best, or any empty one.
    pub(super) fn take_root(&self, wanted: Option<(LinkMode, &Tree)>) -> io::Result<IdleRoot> {
        match self.idle_roots.take_root(wanted) {
            Some(root) => Ok(root),
            None => self.make_root(),
        }
    }

    fn make_root(&self) -> io::Result<IdleRoot> {
        let name = self.idle_roots.next_name();
        let made = self.make_root_at(name.clone());
        made.inspect_err(|_| self.idle_roots.delete_if_there(&name))
    }

    fn make_root_at(&self, name: String) -> io::Result<IdleRoot> {
        let action_directory = ActionDirectory::create(self.idle_roots.build_directory(), name)?;
        let fd = self
            .idle_roots
            .open_directory(&action_directory.directory, INPUT_ROOT)?;
        let (inode, baseline) = kept_root::record_baseline(fd.as_fd())?;
        let top = KeptDirectory {
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
            kept: KeptRoot {
                top,
                inodes: UsedInodes::default(),
                // An empty root suits every mode.
                link_mode: LinkMode::HardLink,
            },
            generation: self.idle_roots.generation(),
        })
    }

    /// Makes a used root as good as new, or throws it away.
    pub(super) fn clean(&self, mut action_directory: ActionDirectory, used: UsedRoot) {
        let generation = used.generation;
        let build_directory = self.idle_roots.build_directory();
        action_directory.rename(build_directory, self.idle_roots.next_name());
        if !action_directory::lock(action_directory.directory.as_fd()) {
            tracing::error!(
                directory = %self.path.join(&action_directory.name).display(),
                seconds = LAST_PROCESS_TIMEOUT.as_secs(),
                "the runner did not let go of the directory of an action that is over; it is left until the next start"
            );
            self.idle_roots.end_cleaning(None);
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
        let lacks = self.idle_roots.end_cleaning(root);
        if let Some(gone) = gone {
            self.idle_roots.delete(gone);
        }
        if lacks && let Ok(root) = self.make_root() {
            self.idle_roots.return_root(root);
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
    ) -> io::Result<Option<KeptRoot>> {
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
                .space
                .free()
                .map_err(|error| self.disk_fault("look how much is free", error))?;
            if self.space.suffices(free) {
                return Ok(());
            }
            let removing = self.idle_roots.deletions.is_busy() || self.idle_roots.is_cleaning();
            let in_vain = before == Some(free) && !removing;
            let waited = began.elapsed();
            if in_vain || waited >= FREE_SPACE_TIMEOUT {
                return Err(self.space.shortage(free));
            }
            if !removing || waited >= EVICTION_DELAY {
                self.cache.evict_to_fit();
                before = Some(free);
            }
            std::thread::sleep(free_space::FREE_SPACE_INTERVAL);
        }
    }
}
