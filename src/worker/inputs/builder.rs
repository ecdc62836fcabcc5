//! Chooses, lays out and cleans input roots.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{FlockOperation, Mode},
    io::Errno,
    process::Resource,
};

use super::{
    action_directory::{self, ActionDirectory, UsedRoot},
    counts::LayOutCounts,
    ctime::{self, CtimeResolution},
    deletion::{self, DeletionQueue},
    file_cache::{FileCache, FileKey, LinkMode},
    free_space::{DiskSpace, RunningCommand},
    kept::{self, KeptDirectory, KeptRoot},
    plan::{self, Plan},
    pool::{IdleRoot, Pool, StashedTree},
    retention::Retention,
    tree::{Node, Tree},
};
use crate::{
    config::worker::Inputs,
    path::RelativePath,
    worker::{
        beneath::{self, open_child},
        fault::Fault,
    },
};

const DELETED: &str = "deleted";
const STASHED: &str = "stashed";
/// How long the runner may take until the last process of an action is gone.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

pub struct InputRootBuilder {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) path: PathBuf,
    /// Locked for as long as this worker runs.
    pub(super) directory: OwnedFd,
    pub(super) stashed: OwnedFd,
    pub(super) deletions: DeletionQueue,
    pub(super) disk: Arc<DiskSpace>,
    pub(super) cache: Arc<FileCache>,
    pub(super) sequence: AtomicU64,
    pub(super) threads: AtomicUsize,
    /// Twice as many roots are kept, and may wait for cleaning.
    pub(super) slots: usize,
    /// Directories that are open, and that may be.
    pub(super) open: Arc<AtomicU64>,
    pub(super) budget: u64,
    pub(super) fine_ctime: bool,
    pub(super) retention: Retention,
    /// What was made before the last time that something was found wrong is thrown away.
    pub(super) generation: AtomicU64,
    /// Of the cache, those after which all was thrown away; held meanwhile, so that none is given out.
    pub(super) modifications: Mutex<u64>,
    pub(super) pool: Mutex<Pool>,
    pub(super) cleaned: Condvar,
    pub(super) counts: LayOutCounts,
}

/// A root and what must be done to it.
pub struct PlannedRoot {
    shared: Arc<Shared>,
    tree: Tree,
    /// `None` only while it is performed or dropped.
    work: Option<(IdleRoot, Plan<StashedTree>)>,
    hold: bool,
    link_mode: LinkMode,
    modifications: u64,
    spent: Duration,
}

/// A root for one action. Verified in the background when dropped.
pub struct InputRoot {
    shared: Arc<Shared>,
    /// `None` only while being dropped.
    action_directory: Option<ActionDirectory>,
    /// `None` when it is not used again.
    kept: Option<KeptRoot>,
    generation: u64,
    /// Of the cache, before it was laid out.
    modifications: u64,
    /// Seconds since the epoch.
    ready: i64,
    trusted: bool,
    /// From when the command may start.
    watched: Option<RunningCommand>,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    taken_over: Vec<u64>,
}

/// Why there is no input root.
#[derive(Debug)]
pub enum PrepareError {
    /// These are to be restored to the cache; then it may work.
    Vanished(Vec<FileKey>),
    Fault(Fault),
}

impl Drop for PlannedRoot {
    fn drop(&mut self) {
        if let Some((root, plan)) = self.work.take() {
            self.shared.keep_stashed(plan.taken.into_iter());
            let gone = self.shared.return_root(&mut self.shared.pool.lock(), root);
            if let Some(root) = gone {
                self.shared.discard(root.action_directory);
            }
            self.shared.cleaned.notify_all();
        }
    }
}

impl PlannedRoot {
    /// How the files are made of cached ones.
    pub fn link_mode(&self) -> LinkMode {
        self.link_mode
    }

    /// The cached files that will be linked, as often as they will be.
    pub fn links(&self) -> &[FileKey] {
        self.work.as_ref().map_or(&[], |(_, plan)| &plan.links)
    }

    /// Gives up the root that this would have changed.
    pub fn discard(mut self) {
        if let Some((root, plan)) = self.work.take() {
            self.shared.keep_stashed(plan.taken.into_iter());
            self.shared.discard(root.action_directory);
        }
    }
}

impl InputRootBuilder {
    /// Moves away and then removes what an earlier worker left. Sets the umask of the whole process
    /// to 0, since the action's user must be able to write to directories. EWOULDBLOCK when another
    /// worker uses the directory.
    pub fn open(path: &Path, cache: Arc<FileCache>, slots: usize) -> io::Result<Self> {
        rustix::process::umask(Mode::empty());
        std::fs::create_dir_all(path)?;
        let directory = open_child(rustix::fs::CWD, path)?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        // Actions pass through on the way to their directories.
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o711))?;
        let within = |name: &str| -> io::Result<OwnedFd> {
            match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(open_child(&directory, name)?)
        };
        let deletions = within(DELETED)?;
        let deletions = DeletionQueue::open(deletions, &path.join(DELETED))?;
        delete_everything(&directory, &deletions)?;
        let stashed = within(STASHED)?;
        let resolution = ctime::probe(directory.as_fd())?;
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        let limit = limit.unwrap_or(1 << 20);
        let budget = limit / 4 * 3;
        let watched = directory.try_clone()?;
        let disk = DiskSpace::new(path.to_owned(), watched, cache.minimum_free())?;
        let shared = Arc::new(Shared {
            disk,
            path: path.to_owned(),
            directory,
            stashed,
            deletions,
            cache,
            sequence: AtomicU64::new(1),
            threads: AtomicUsize::new(
                std::thread::available_parallelism().map_or(1, |n| n.get().min(2)),
            ),
            slots,
            open: Arc::default(),
            budget,
            fine_ctime: resolution == CtimeResolution::Fine,
            retention: Retention::new(resolution != CtimeResolution::Unknown),
            generation: AtomicU64::new(0),
            modifications: Mutex::default(),
            pool: Mutex::default(),
            cleaned: Condvar::new(),
            counts: LayOutCounts::default(),
        });
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
        tracing::info!(directory = %path.display(), ctime = ?resolution, directories = budget, "{how}");
        for _ in 0..slots {
            let root = shared.make_root()?;
            shared.pool.lock().ready.push(root);
        }
        let weak = Arc::downgrade(&shared);
        let release = move || weak.upgrade().is_some_and(|shared| shared.release());
        shared.cache.on_pressure(release);
        Ok(InputRootBuilder { shared })
    }

    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// How many threads lay out a large root from now on.
    pub fn set_threads(&self, threads: usize) {
        self.shared.threads.store(threads, Ordering::Relaxed);
    }

    pub fn counts(&self) -> &LayOutCounts {
        &self.shared.counts
    }

    /// Whether an action finds room; waits for what is being removed. Blocks.
    pub fn await_free_space(&self) -> Result<(), Fault> {
        self.shared.await_free_space()
    }

    /// An empty root. Blocks.
    pub fn take(&self) -> io::Result<InputRoot> {
        let root = self.shared.take_root(None)?;
        Ok(self.shared.input_root(root))
    }

    /// Chooses a root for `tree` and says what must be done to it. `None` when that would block.
    pub fn try_plan(&self, tree: &Tree, inputs: Inputs) -> Option<PlannedRoot> {
        let shared = &self.shared;
        let modifications = shared.look();
        let link_mode = shared.cache.link_mode(inputs);
        let hold = shared.holds(tree, link_mode);
        let wanted = hold.then_some((link_mode, tree));
        let root = shared.pool.lock().pick(wanted)?;
        Some(shared.planned(root, tree, hold, link_mode, modifications))
    }

    /// As `try_plan`; blocks until there is a root.
    pub fn plan(&self, tree: &Tree, inputs: Inputs) -> io::Result<PlannedRoot> {
        let shared = &self.shared;
        let modifications = shared.look();
        let link_mode = shared.cache.link_mode(inputs);
        let hold = shared.holds(tree, link_mode);
        let root = shared.take_root(hold.then_some((link_mode, tree)))?;
        Ok(shared.planned(root, tree, hold, link_mode, modifications))
    }

    /// Lays out the root, and the directories `parents`. All files that it links must be pinned.
    /// Blocks.
    pub fn prepare(
        &self,
        mut planned: PlannedRoot,
        parents: &BTreeSet<RelativePath>,
    ) -> Result<InputRoot, PrepareError> {
        let began = Instant::now();
        let shared = &self.shared;
        let (root, plan) = planned.work.take().expect("present until performed");
        let IdleRoot {
            action_directory,
            kept,
            generation,
        } = root;
        let mut input_root = InputRoot {
            shared: shared.clone(),
            action_directory: Some(action_directory),
            kept: None,
            generation,
            modifications: planned.modifications,
            ready: 0,
            trusted: true,
            watched: None,
            taken_over: Vec::new(),
        };
        shared.count(&planned.tree, &plan);
        let (linked, made, unstashed) = (plan.links.len(), plan.made.len(), plan.taken.len());
        // An error drops the root without its model: it is thrown away (I7).
        let mut kept = match shared.perform(kept, plan, planned.hold, planned.link_mode) {
            Ok(kept) => kept,
            Err(error) => {
                return Err(match error.fault(shared) {
                    Ok(fault) => PrepareError::Fault(fault),
                    Err(keys) => PrepareError::Vanished(keys),
                });
            }
        };
        for parent in parents {
            let made = match &mut kept {
                Some(kept) => make_parent(&mut kept.top, parent),
                None => beneath::make_directories(input_root.root(), parent)
                    .map_err(|(component, error)| (component.as_str().to_owned(), error)),
            };
            if let Err((component, error)) = made {
                input_root.kept = kept;
                return Err(PrepareError::Fault(match error {
                    Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG => Fault::Invalid(format!(
                        "could not make directory {parent}, which declared outputs lie in: {component} is no directory in the input root"
                    )),
                    error => shared.disk_fault(&format!("make directory {parent}"), error.into()),
                }));
            }
        }
        input_root.kept = kept;
        shared.await_free_space().map_err(PrepareError::Fault)?;
        input_root.watched = Some(shared.disk.watch());
        input_root.ready = now();
        let spent = planned.spent + began.elapsed();
        tracing::debug!(
            input_root = %planned.tree.digest,
            entries = planned.tree.entries,
            linked,
            made,
            unstashed,
            microseconds = spent.as_micros() as u64,
            "laid out an input root"
        );
        shared
            .counts
            .nanoseconds
            .fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
        Ok(input_root)
    }

    /// Why roots are not kept now, though they could be; for the status line.
    pub fn retention_suspension(&self, now: Instant) -> Option<String> {
        self.shared.retention.suspension(now)
    }

    /// Something was not as it should be: all that is kept is thrown away, and what is in use will be.
    pub fn invalidate_all(&self) {
        self.shared.invalidate_all();
    }
}

/// Makes the directories of a path that the tree does not have. What changes below is found after the
/// action, since the directory has no baseline any more.
fn make_parent(root: &mut KeptDirectory, path: &RelativePath) -> Result<(), (String, Errno)> {
    let mut at = root;
    let mut components = path.components().iter();
    let mut rest = path.components();
    while let Some(component) = components.next() {
        let directories = &at.node.directory.directories;
        let found = directories.binary_search_by(|entry| entry.0.cmp(component));
        let Ok(found) = found else { break };
        at = &mut at.children[found];
        rest = components.as_slice();
    }
    if rest.is_empty() {
        return Ok(());
    }
    let rest: RelativePath = rest
        .iter()
        .cloned()
        .fold(RelativePath::root(), |path, name| path.join(name));
    at.baseline = None;
    let place = at.place.clone();
    let made = beneath::make_directories(place.as_fd(), &rest);
    made.map_err(|(component, error)| (component.as_str().to_owned(), error))?;
    kept::set_mtime(place.as_fd()).map_err(|error| (path.to_string(), error))
}

impl InputRoot {
    /// Relative to the build directory.
    pub fn name(&self) -> &str {
        self.action_directory
            .as_ref()
            .map_or("", |action_directory| action_directory.name.as_str())
    }

    /// The directory with `stdout` and `stderr`.
    pub fn action_directory(&self) -> BorrowedFd<'_> {
        self.action_directory
            .as_ref()
            .expect("present until dropped")
            .directory
            .as_fd()
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.action_directory
            .as_ref()
            .expect("present until dropped")
            .root
            .as_fd()
    }

    /// A runner that failed may have let go of its lock while processes of the action live: no
    /// other action gets this directory.
    pub fn distrust(&mut self) {
        self.trusted = false;
    }

    /// The files with these inode numbers, which the action made, may be the worker's now.
    pub fn taken_over(&mut self, mut inodes: Vec<u64>) {
        inodes.sort_unstable();
        self.taken_over = inodes;
    }

    /// The action ran as root or as the worker, and may have changed anything in place (I2).
    pub fn suspect_privileged_user(&mut self) {
        self.trusted = false;
        self.shared.retention.suspend(Instant::now());
        self.shared.invalidate_all();
    }

    /// Why what the command wrote may be cut: the disk was full.
    pub fn disk_was_full(&self) -> Option<Fault> {
        self.watched.as_ref()?.fault()
    }

    /// Whether nobody but the worker changed files of the cache since the root was chosen.
    pub fn cache_is_unmodified(&self) -> bool {
        self.shared.cache.modifications() == self.modifications
    }

    /// Opens the directory to a group, for a runner that cannot do so for an action's user. Such a
    /// runner holds no lock either (I5), so that the root is not used again.
    pub fn open_to(&mut self, group: u32) -> Result<(), Fault> {
        self.trusted = false;
        let action_directory = self.action_directory();
        let group = rustix::fs::Gid::from_raw(group);
        rustix::fs::fchown(action_directory, None, Some(group))
            .and_then(|()| rustix::fs::fchmod(action_directory, Mode::from_raw_mode(0o770)))
            .map_err(|error| {
                let what = format!(
                    "open a directory to runners.group {}; the worker needs CAP_CHOWN, or to be in that group",
                    group.as_raw()
                );
                self.shared.disk_fault(&what, error.into())
            })
    }

    /// Waits until the runner says, by letting go of its lock, that no process of the action is
    /// left. `false` when that takes longer than `LOCK_TIMEOUT`.
    pub async fn await_unlocked(&self) -> bool {
        let mut pause = Duration::from_millis(1);
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            if action_directory::try_lock(self.action_directory()) {
                return true;
            }
            if tokio::time::Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}

impl Drop for InputRoot {
    fn drop(&mut self) {
        if let Some(action_directory) = self.action_directory.take() {
            self.shared.pool.lock().dirty += 1;
            let shared = self.shared.clone();
            // A thread that panics may not have told what it took over.
            let trusted = self.trusted && !std::thread::panicking();
            let used = UsedRoot {
                kept: self.kept.take().filter(|_| trusted),
                generation: self.generation,
                ready: self.ready,
                taken_over: std::mem::take(&mut self.taken_over),
            };
            let clean = move || shared.clean(action_directory, used);
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(clean)),
                Err(_) => clean(),
            }
        }
    }
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs() as i64)
}

/// Throws away all that is in the build directory.
fn delete_everything(directory: &OwnedFd, deletions: &DeletionQueue) -> io::Result<()> {
    for name in deletion::list(directory)? {
        if ![c"deleted", c"lost+found"].contains(&name.as_c_str()) {
            let moved = deletions.take(directory, &name)?;
            deletions.remove_later(moved);
        }
    }
    Ok(())
}

impl Shared {
    pub(super) fn disk_fault(&self, what: &str, error: io::Error) -> Fault {
        let what = format!("{what} in {}", self.path.display());
        Fault::of_disk(what, error)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn next_name(&self) -> String {
        self.sequence.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Whether a root of this size, of files that are made so, is kept after its action.
    pub(super) fn holds(&self, tree: &Node, link_mode: LinkMode) -> bool {
        link_mode != LinkMode::Copy
            && self.retention.is_active(Instant::now())
            && tree.directories <= self.budget / 2
    }

    pub(super) fn input_root(self: &Arc<Self>, root: IdleRoot) -> InputRoot {
        InputRoot {
            shared: self.clone(),
            action_directory: Some(root.action_directory),
            kept: Some(root.kept),
            generation: root.generation,
            modifications: *self.modifications.lock(),
            ready: now(),
            trusted: true,
            watched: None,
            taken_over: Vec::new(),
        }
    }

    /// Throws all away when somebody else changed files of the cache, to which kept roots have links.
    pub(super) fn look(&self) -> u64 {
        let mut modifications = self.modifications.lock();
        let now = self.cache.modifications();
        if *modifications != now {
            *modifications = now;
            self.invalidate_all();
        }
        now
    }

    pub(super) fn planned(
        self: &Arc<Self>,
        root: IdleRoot,
        tree: &Tree,
        hold: bool,
        link_mode: LinkMode,
        modifications: u64,
    ) -> PlannedRoot {
        let began = Instant::now();
        let mut pool = self.pool.lock();
        let old = root.kept.top.node.clone();
        let rewrite = plan::compare(&old, tree, &|digest| hold && pool.has(link_mode, digest));
        let plan = plan::resolve(&old, rewrite, &mut |digest| match hold {
            true => pool.take(link_mode, digest),
            false => None,
        });
        drop(pool);
        let hold = hold && self.reserve(plan.made.len() as u64);
        PlannedRoot {
            shared: self.clone(),
            tree: tree.clone(),
            work: Some((root, plan)),
            hold,
            link_mode,
            modifications,
            spent: began.elapsed(),
        }
    }
}
