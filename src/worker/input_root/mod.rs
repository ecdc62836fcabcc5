//! Input roots: the directories that actions run in. Their cost follows what changed: the roots of
//! past actions are kept, and turned into those of the next ones.
//!
//! ```text
//! BUILD_DIRECTORY/N/               the gate: the worker's, 0700. The runner opens it for the
//!                                  action's user while the action runs, and shuts it again
//! BUILD_DIRECTORY/N/root/          the input root; every directory in it is the worker's, 0777
//! BUILD_DIRECTORY/N/tmp/           0777
//! BUILD_DIRECTORY/N/server_logs/   0777
//! BUILD_DIRECTORY/N/home/          0777; the action's $HOME
//! BUILD_DIRECTORY/N/std{out,err}   made by the runner
//! BUILD_DIRECTORY/parked/          subtrees that no root has, for roots that will want them
//! BUILD_DIRECTORY/trash/           what is to be removed, and what an earlier worker left
//! ```
//!
//! An action finds in its root what its Directory messages say and nothing else, and empty `tmp`,
//! `home` and `server_logs`. That holds because of these:
//!
//! - I1 Files: an input file is the worker's and read-only: a reflink of a cached file or an empty one,
//!   made while no action can see it; or a hard link to a file of the cache, which was whole before it
//!   had a name.
//! - I2 Credentials: actions run as users that are neither root nor the worker. When an action's
//!   output tells otherwise, all is thrown away, and nothing is kept for a while (`keeping`).
//! - I3 Directories: every directory of a root is the worker's, so that no action can change its
//!   owner, mode or times; it may write to it because of its mode, behind the gate.
//! - I4 Nothing foreign stays: what an action made is removed before the next one gets the root.
//! - I5 No process: roots are verified while the gate's lock is held, which the runner holds for as
//!   long as a process of the action lives (flock(2)). The gate then has another name, so that a call
//!   that arrives late at the runner finds nothing.
//! - I6 Baseline: a directory's ctime is looked at after the worker's last change to it.
//! - I7 Doubt means cold: after any error, a root and all that is known of it is thrown away.
//! - I8 Distinct: no two files of a root are one inode, so that programs find separate files whatever
//!   their content is. Reflinks and empty files are so by themselves. Of hard links, a root knows which
//!   of the inodes of a cached file it has (`inodes`), takes for a further occurrence the first one that
//!   it does not have, and the cache makes it when it does not have it either. A subtree that leaves the
//!   root gives its inodes back; one that comes into it takes its own along, and where the root has one
//!   of these already, that file is linked anew, to another inode, before the subtree is in its place.
//!   So what stays in a root is not looked at; what comes or goes costs some nanoseconds a file, and at
//!   most one link for each whose content the root has elsewhere: less than making the subtree.
//!
//! Roots of reflinks and roots of hard links do not become one another, nor lend one another subtrees.
//! Where actions are to have input files of their own, each root is made anew, of copies: then the
//! runner makes the action's user their owner, and nothing of the root is kept.
//!
//! `plan` says what changes, `lay_out` does it, `verify` reverts what the action did, `pool` keeps
//! what waits. Verification happens in the background. How many roots wait for it is bounded;
//! beyond that, actions wait.

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
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
    process::Resource,
};

use super::{
    beneath,
    cache::{Cache, Key, Method},
    fault::Fault,
    tree::{Node, Tree},
};
use crate::{config::worker::Inputs, path::RelativePath};

mod clock;
mod counts;
mod disk;
mod gate;
mod inodes;
mod keeping;
mod lay_out;
mod link;
mod model;
pub mod plan;
mod pool;
mod trash;
mod verify;

use clock::Clock;
pub use counts::Counts;
use disk::{Disk, Watched};
use gate::{Gate, Used};
use keeping::Keeping;
use model::{Kept, KeptRoot};
use plan::Plan;
use pool::{Parked, Pool, Root};
use trash::Trash;

const TRASH: &str = "trash";
const PARKED: &str = "parked";
/// How long the runner may take until the last process of an action is gone.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Roots {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// Locked for as long as this worker runs.
    directory: OwnedFd,
    parked: OwnedFd,
    trash: Trash,
    disk: Arc<Disk>,
    cache: Arc<Cache>,
    sequence: AtomicU64,
    threads: AtomicUsize,
    /// Twice as many roots are kept, and may wait for cleaning.
    slots: usize,
    /// Directories that are open, and that may be.
    open: Arc<AtomicU64>,
    budget: u64,
    fine_clock: bool,
    keeping: Keeping,
    /// What was made before the last time that something was found wrong is thrown away.
    generation: AtomicU64,
    /// Of the cache, those after which all was thrown away; held meanwhile, so that none is given out.
    alterations: Mutex<u64>,
    pool: Mutex<Pool>,
    cleaned: Condvar,
    counts: Counts,
}

/// A root and what must be done to it.
pub struct Planned {
    shared: Arc<Shared>,
    tree: Tree,
    /// `None` only while it is performed or dropped.
    work: Option<(Root, Plan<Parked>)>,
    hold: bool,
    method: Method,
    alterations: u64,
    spent: Duration,
}

/// A root for one action. Verified in the background when dropped.
pub struct InputRoot {
    shared: Arc<Shared>,
    /// `None` only while being dropped.
    gate: Option<Gate>,
    /// `None` when it is not used again.
    kept: Option<KeptRoot>,
    generation: u64,
    /// Of the cache, before it was laid out.
    alterations: u64,
    /// Seconds since the epoch.
    ready: i64,
    trusted: bool,
    /// From when the command may start.
    watched: Option<Watched>,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    taken_over: Vec<u64>,
}

/// Why there is no input root.
#[derive(Debug)]
pub enum PrepareError {
    /// These are to be restored to the cache; then it may work.
    Vanished(Vec<Key>),
    Fault(Fault),
}

impl Drop for Planned {
    fn drop(&mut self) {
        if let Some((root, plan)) = self.work.take() {
            self.shared.park(plan.taken.into_iter());
            let gone = self.shared.give_back(&mut self.shared.pool.lock(), root);
            if let Some(root) = gone {
                self.shared.discard(root.gate);
            }
            self.shared.cleaned.notify_all();
        }
    }
}

impl Planned {
    /// How the files are made of cached ones.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The cached files that will be linked, as often as they will be.
    pub fn links(&self) -> &[Key] {
        self.work.as_ref().map_or(&[], |(_, plan)| &plan.links)
    }

    /// Gives up the root that this would have changed.
    pub fn discard(mut self) {
        if let Some((root, plan)) = self.work.take() {
            self.shared.park(plan.taken.into_iter());
            self.shared.discard(root.gate);
        }
    }
}

impl Roots {
    /// Moves away and then removes what an earlier worker left. Sets the umask of the whole process
    /// to 0, since the action's user must be able to write to directories. EWOULDBLOCK when another
    /// worker uses the directory.
    pub fn open(path: &Path, cache: Arc<Cache>, slots: usize) -> io::Result<Self> {
        rustix::process::umask(Mode::empty());
        std::fs::create_dir_all(path)?;
        let directory = listing(rustix::fs::CWD, path)?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        // Actions pass through on the way to their gates.
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o711))?;
        let within = |name: &str| -> io::Result<OwnedFd> {
            match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(listing(&directory, name)?)
        };
        let trash = within(TRASH)?;
        let trash = Trash::open(trash, &path.join(TRASH))?;
        discard_everything(&directory, &trash)?;
        let parked = within(PARKED)?;
        let clock = clock::probe(directory.as_fd())?;
        let limit = rustix::process::getrlimit(Resource::Nofile).current;
        let limit = limit.unwrap_or(1 << 20);
        let budget = limit / 4 * 3;
        let watched = directory.try_clone()?;
        let disk = Disk::new(path.to_owned(), watched, cache.minimum_free())?;
        let shared = Arc::new(Shared {
            disk,
            path: path.to_owned(),
            directory,
            parked,
            trash,
            cache,
            sequence: AtomicU64::new(1),
            threads: AtomicUsize::new(
                std::thread::available_parallelism().map_or(1, |n| n.get().min(2)),
            ),
            slots,
            open: Arc::default(),
            budget,
            fine_clock: clock == Clock::Fine,
            keeping: Keeping::new(clock != Clock::Unknown),
            generation: AtomicU64::new(0),
            alterations: Mutex::default(),
            pool: Mutex::default(),
            cleaned: Condvar::new(),
            counts: Counts::default(),
        });
        let how = match clock {
            Clock::Fine => {
                "input roots are kept and changed; ctime tells every change of a directory"
            }
            Clock::Coarse => {
                "input roots are kept and changed; ctime moves in steps, so what was just made is read again after an action"
            }
            Clock::Unknown => {
                "each input root is made anew: not known how ctime behaves on this file system; ext4, xfs, btrfs and tmpfs are known"
            }
        };
        tracing::info!(directory = %path.display(), clock = ?clock, directories = budget, "{how}");
        for _ in 0..slots {
            let root = shared.make_root()?;
            shared.pool.lock().ready.push(root);
        }
        let weak = Arc::downgrade(&shared);
        let release = move || weak.upgrade().is_some_and(|shared| shared.release());
        shared.cache.on_pressure(release);
        Ok(Roots { shared })
    }

    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// How many threads lay out a large root from now on.
    pub fn set_threads(&self, threads: usize) {
        self.shared.threads.store(threads, Ordering::Relaxed);
    }

    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Whether an action finds room; waits for what is being removed. Blocks.
    pub fn await_room(&self) -> Result<(), Fault> {
        self.shared.await_room()
    }

    /// An empty root. Blocks.
    pub fn take(&self) -> io::Result<InputRoot> {
        let root = self.shared.take_root(None)?;
        Ok(self.shared.input_root(root))
    }

    /// Chooses a root for `tree` and says what must be done to it. `None` when that would block.
    pub fn try_plan(&self, tree: &Tree, inputs: Inputs) -> Option<Planned> {
        let shared = &self.shared;
        let alterations = shared.look();
        let method = shared.cache.method(inputs);
        let hold = shared.holds(tree, method);
        let wanted = hold.then_some((method, tree));
        let root = shared.pool.lock().pick(wanted)?;
        Some(shared.planned(root, tree, hold, method, alterations))
    }

    /// As `try_plan`; blocks until there is a root.
    pub fn plan(&self, tree: &Tree, inputs: Inputs) -> io::Result<Planned> {
        let shared = &self.shared;
        let alterations = shared.look();
        let method = shared.cache.method(inputs);
        let hold = shared.holds(tree, method);
        let root = shared.take_root(hold.then_some((method, tree)))?;
        Ok(shared.planned(root, tree, hold, method, alterations))
    }

    /// Lays out the root, and the directories `parents`. All files that it links must be pinned.
    /// Blocks.
    pub fn prepare(
        &self,
        mut planned: Planned,
        parents: &BTreeSet<RelativePath>,
    ) -> Result<InputRoot, PrepareError> {
        let began = Instant::now();
        let shared = &self.shared;
        let (root, plan) = planned.work.take().expect("present until performed");
        let Root {
            gate,
            kept,
            generation,
        } = root;
        let mut input_root = InputRoot {
            shared: shared.clone(),
            gate: Some(gate),
            kept: None,
            generation,
            alterations: planned.alterations,
            ready: 0,
            trusted: true,
            watched: None,
            taken_over: Vec::new(),
        };
        shared.count(&planned.tree, &plan);
        let (linked, made, unparked) = (plan.links.len(), plan.made.len(), plan.taken.len());
        // An error drops the root without its model: it is thrown away (I7).
        let mut kept = match shared.perform(kept, plan, planned.hold, planned.method) {
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
        shared.await_room().map_err(PrepareError::Fault)?;
        input_root.watched = Some(shared.disk.watch());
        input_root.ready = now();
        let spent = planned.spent + began.elapsed();
        tracing::debug!(
            input_root = %planned.tree.digest,
            entries = planned.tree.entries,
            linked,
            made,
            unparked,
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
    pub fn why_not_kept(&self, now: Instant) -> Option<String> {
        self.shared.keeping.why_not(now)
    }

    /// Something was not as it should be: all that is kept is thrown away, and what is in use will be.
    pub fn distrust_all(&self) {
        self.shared.forget_all();
    }
}

/// Makes the directories of a path that the tree does not have. What changes below is found after the
/// action, since the directory has no baseline any more.
fn make_parent(root: &mut Kept, path: &RelativePath) -> Result<(), (String, Errno)> {
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
    model::set_mtime(place.as_fd()).map_err(|error| (path.to_string(), error))
}

impl InputRoot {
    /// Relative to the build directory.
    pub fn name(&self) -> &str {
        self.gate.as_ref().map_or("", |gate| gate.name.as_str())
    }

    /// The directory with `stdout` and `stderr`.
    pub fn gate(&self) -> BorrowedFd<'_> {
        self.gate
            .as_ref()
            .expect("present until dropped")
            .directory
            .as_fd()
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.gate
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
    pub fn distrust_user(&mut self) {
        self.trusted = false;
        self.shared.keeping.distrust(Instant::now());
        self.shared.forget_all();
    }

    /// Why what the command wrote may be cut: the disk was full.
    pub fn disk_was_full(&self) -> Option<Fault> {
        self.watched.as_ref()?.fault()
    }

    /// Whether nobody but the worker changed files of the cache since the root was chosen.
    pub fn is_unaltered(&self) -> bool {
        self.shared.cache.alterations() == self.alterations
    }

    /// Opens the directory to a group, for a runner that cannot do so for an action's user. Such a
    /// runner holds no lock either (I5), so that the root is not used again.
    pub fn open_to(&mut self, group: u32) -> Result<(), Fault> {
        self.trusted = false;
        let gate = self.gate();
        let group = rustix::fs::Gid::from_raw(group);
        rustix::fs::fchown(gate, None, Some(group))
            .and_then(|()| rustix::fs::fchmod(gate, Mode::from_raw_mode(0o770)))
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
    pub async fn vacated(&self) -> bool {
        let mut pause = Duration::from_millis(1);
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            if gate::try_lock(self.gate()) {
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
        if let Some(gate) = self.gate.take() {
            self.shared.pool.lock().dirty += 1;
            let shared = self.shared.clone();
            // A thread that panics may not have told what it took over.
            let trusted = self.trusted && !std::thread::panicking();
            let used = Used {
                kept: self.kept.take().filter(|_| trusted),
                generation: self.generation,
                ready: self.ready,
                taken_over: std::mem::take(&mut self.taken_over),
            };
            let clean = move || shared.clean(gate, used);
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(clean)),
                Err(_) => clean(),
            }
        }
    }
}

fn listing<P: rustix::path::Arg>(parent: impl AsFd, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs() as i64)
}

/// Throws away all that is in the build directory.
fn discard_everything(directory: &OwnedFd, trash: &Trash) -> io::Result<()> {
    for name in trash::list(directory)? {
        if ![c"trash", c"lost+found"].contains(&name.as_c_str()) {
            let moved = trash.take(directory, &name)?;
            trash.remove_later(moved);
        }
    }
    Ok(())
}

impl Shared {
    fn disk_fault(&self, what: &str, error: io::Error) -> Fault {
        let what = format!("{what} in {}", self.path.display());
        Fault::of_disk(what, error)
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    fn next_name(&self) -> String {
        self.sequence.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// Whether a root of this size, of files that are made so, is kept after its action.
    fn holds(&self, tree: &Node, method: Method) -> bool {
        method != Method::Copy
            && self.keeping.is_on(Instant::now())
            && tree.directories <= self.budget / 2
    }

    fn input_root(self: &Arc<Self>, root: Root) -> InputRoot {
        InputRoot {
            shared: self.clone(),
            gate: Some(root.gate),
            kept: Some(root.kept),
            generation: root.generation,
            alterations: *self.alterations.lock(),
            ready: now(),
            trusted: true,
            watched: None,
            taken_over: Vec::new(),
        }
    }

    /// Throws all away when somebody else changed files of the cache, to which kept roots have links.
    fn look(&self) -> u64 {
        let mut alterations = self.alterations.lock();
        let now = self.cache.alterations();
        if *alterations != now {
            *alterations = now;
            self.forget_all();
        }
        now
    }

    fn planned(
        self: &Arc<Self>,
        root: Root,
        tree: &Tree,
        hold: bool,
        method: Method,
        alterations: u64,
    ) -> Planned {
        let began = Instant::now();
        let mut pool = self.pool.lock();
        let old = root.kept.top.node.clone();
        let rewrite = plan::compare(&old, tree, &|digest| hold && pool.has(method, digest));
        let plan = plan::resolve(&old, rewrite, &mut |digest| match hold {
            true => pool.take(method, digest),
            false => None,
        });
        drop(pool);
        let hold = hold && self.reserve(plan.made.len() as u64);
        Planned {
            shared: self.clone(),
            tree: tree.clone(),
            work: Some((root, plan)),
            hold,
            method,
            alterations,
            spent: began.elapsed(),
        }
    }
}
