//! Input roots: the directories that actions run in.
//!
//! ```text
//! BUILD_DIRECTORY/N/               the gate: the worker's, 0700. The runner opens it for the
//!                                  action's user while the action runs, and shuts it again
//! BUILD_DIRECTORY/N/root/          the input root; every directory in it is the worker's, 0777
//! BUILD_DIRECTORY/N/tmp/           0777
//! BUILD_DIRECTORY/N/server_logs/   0777
//! BUILD_DIRECTORY/N/std{out,err}   made by the runner
//! BUILD_DIRECTORY/trash/           what could not be cleaned, and what an earlier worker left
//! ```
//!
//! 1. An action finds in its root what its Directory messages say and nothing else, and empty
//!    `tmp` and `server_logs`.
//! 2. A gate is used again only after all that an action left was deleted, while its lock was
//!    held: the runner holds that lock (flock(2)) for as long as a process of the action lives.
//!    It then has another name, so that a call that arrives late at the runner finds nothing.
//! 3. Gates are made and cleaned in the background, not while an action waits. How many wait for
//!    cleaning is bounded; beyond that, actions wait.
//! 4. Input files are hard links to the cache: the worker's, read-only. Only directories can be
//!    written to.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{AtFlags, Dir, FlockOperation, Mode, OFlags},
    io::Errno,
};

use super::{
    beneath,
    cache::{Cache, Key, LinkError},
    directories::Tree,
    fault::Fault,
    removal,
};
use crate::path::{Component, RelativePath};

const TRASH: &str = "trash";
const PARTS: [&str; 3] = ["root", "tmp", "server_logs"];

/// From so many entries on a second thread helps.
const WORTH_A_THREAD: u64 = 1_000;
/// Directories never shrink on ext4; one that grew beyond this is not used again.
const LARGEST_DIRECTORY: i64 = 256 << 10;
/// How long the runner may take until the last process of an action is gone.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Roots {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// Locked for as long as this worker runs.
    directory: OwnedFd,
    trash: OwnedFd,
    cache: Arc<Cache>,
    sequence: AtomicU64,
    threads: usize,
    /// Gates that are kept ready; twice as many may wait for cleaning.
    slots: usize,
    pool: Mutex<Pool>,
    cleaned: Condvar,
}

#[derive(Default)]
struct Pool {
    spare: Vec<Gate>,
    /// Being cleaned.
    dirty: usize,
}

struct Gate {
    name: String,
    gate: OwnedFd,
    root: OwnedFd,
}

/// A root for one action. Cleaned in the background when dropped.
pub struct InputRoot {
    shared: Arc<Shared>,
    /// `None` only while being dropped.
    gate: Option<Gate>,
    /// Of files, directories and symbolic links.
    pub entries: u64,
    trusted: bool,
}

/// Why there is no input root.
#[derive(Debug)]
pub enum PrepareError {
    /// These are to be restored to the cache; then it may work.
    Vanished(Vec<Key>),
    Fault(Fault),
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
        match rustix::fs::mkdirat(&directory, TRASH, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let trash = listing(&directory, TRASH)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            directory,
            trash,
            cache,
            sequence: AtomicU64::new(1),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get().min(2)),
            slots,
            pool: Mutex::default(),
            cleaned: Condvar::new(),
        });
        shared.discard_everything()?;
        let background = shared.clone();
        std::thread::Builder::new()
            .name("empty-trash".to_owned())
            .spawn(move || background.empty_trash())?;
        for _ in 0..slots {
            let gate = shared.make_gate()?;
            shared.pool.lock().spare.push(gate);
        }
        Ok(Roots { shared })
    }

    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// An empty root. Blocks.
    pub fn take(&self) -> io::Result<InputRoot> {
        let gate = self.shared.take_gate()?;
        Ok(InputRoot {
            shared: self.shared.clone(),
            gate: Some(gate),
            entries: 0,
            trusted: true,
        })
    }

    /// A root with the files of `tree`, all of which must be pinned, and with the directories
    /// `parents`. Blocks.
    pub fn prepare(
        &self,
        tree: &Tree,
        parents: &BTreeSet<RelativePath>,
    ) -> Result<InputRoot, PrepareError> {
        let fault =
            |error| PrepareError::Fault(self.shared.disk_fault("make an action directory", error));
        let mut root = self.take().map_err(fault)?;
        root.entries = tree.entries();
        self.shared.lay_out(tree, root.root())?;
        for parent in parents {
            beneath::make_directories(root.root(), parent).map_err(|(component, error)| {
                PrepareError::Fault(match error {
                    Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG => Fault::Invalid(format!(
                        "could not make directory {parent}, which declared outputs lie in: {component} is no directory in the input root"
                    )),
                    error => self.shared.disk_fault(&format!("make directory {parent}"), error.into()),
                })
            })?;
        }
        Ok(root)
    }
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
            .gate
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

    /// Waits until the runner says, by letting go of its lock, that no process of the action is
    /// left. `false` when that takes longer than `LOCK_TIMEOUT`.
    pub async fn vacated(&self) -> bool {
        let mut pause = Duration::from_millis(1);
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            if try_lock(self.gate()) {
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
            let trusted = self.trusted;
            let clean = move || shared.clean(gate, trusted);
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(clean)),
                Err(_) => clean(),
            }
        }
    }
}

/// Whether nobody else holds the lock; does not keep it.
fn try_lock(gate: BorrowedFd<'_>) -> bool {
    let free = rustix::fs::flock(gate, FlockOperation::NonBlockingLockExclusive).is_ok();
    if free {
        let _ = rustix::fs::flock(gate, FlockOperation::Unlock);
    }
    free
}

fn listing<P: rustix::path::Arg>(parent: impl AsFd, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

impl Shared {
    fn disk_fault(&self, what: &str, error: io::Error) -> Fault {
        let what = format!("{what} in {}", self.path.display());
        Fault::of_disk(what, error)
    }

    fn take_gate(&self) -> io::Result<Gate> {
        let mut pool = self.pool.lock();
        loop {
            if let Some(gate) = pool.spare.pop() {
                return Ok(gate);
            }
            if pool.dirty <= 2 * self.slots {
                break;
            }
            self.cleaned.wait(&mut pool);
        }
        drop(pool);
        self.make_gate()
    }

    fn next_name(&self) -> String {
        self.sequence.fetch_add(1, Ordering::Relaxed).to_string()
    }

    fn make_gate(&self) -> io::Result<Gate> {
        let name = self.next_name();
        rustix::fs::mkdirat(&self.directory, &name, Mode::from_raw_mode(0o700))?;
        let gate = listing(&self.directory, &name)?;
        for part in PARTS {
            rustix::fs::mkdirat(&gate, part, Mode::from_raw_mode(0o777))?;
        }
        let root = listing(&gate, PARTS[0])?;
        Ok(Gate { name, gate, root })
    }

    /// Makes a used gate as good as new, or puts it away.
    fn clean(&self, mut gate: Gate, trusted: bool) {
        let name = self.next_name();
        if rustix::fs::renameat(&self.directory, &gate.name, &self.directory, &name).is_ok() {
            gate.name = name;
        }
        let mut pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        while rustix::fs::flock(&gate.gate, FlockOperation::NonBlockingLockExclusive).is_err() {
            if waited > LOCK_TIMEOUT {
                tracing::error!(
                    directory = %self.path.join(&gate.name).display(),
                    "the runner did not let go of the directory of an action that is over; it is left until the next start"
                );
                self.pool.lock().dirty -= 1;
                self.cleaned.notify_all();
                return;
            }
            std::thread::sleep(pause);
            waited += pause;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        let reusable = match self.empty_gate(&gate) {
            Ok(reusable) => reusable,
            Err(error) => {
                tracing::error!(
                    directory = %self.path.join(&gate.name).display(),
                    %error,
                    "could not remove what an action left behind; the worker needs CAP_DAC_OVERRIDE and CAP_FOWNER, or the runner must remove it"
                );
                false
            }
        };
        let _ = rustix::fs::flock(&gate.gate, FlockOperation::Unlock);
        let discarded = {
            let mut pool = self.pool.lock();
            pool.dirty -= 1;
            match trusted && reusable && pool.spare.len() <= self.slots {
                true => {
                    pool.spare.push(gate);
                    None
                }
                false => Some(gate),
            }
        };
        self.cleaned.notify_all();
        if let Some(gate) = discarded {
            let thrown = rustix::fs::renameat(&self.directory, &gate.name, &self.trash, &gate.name);
            let emptied = removal::empty(gate.gate.as_fd());
            if thrown.is_ok() && emptied.is_ok() {
                let _ = rustix::fs::unlinkat(&self.trash, &gate.name, AtFlags::REMOVEDIR);
            }
        }
    }

    /// `false` when it cannot be told from a used one.
    fn empty_gate(&self, gate: &Gate) -> io::Result<bool> {
        let mut entries = Dir::read_from(&gate.gate)?;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = entry.file_name();
            let known = |part: &str| name.to_bytes() == part.as_bytes();
            if name == c"." || name == c".." || PARTS.iter().any(|part| known(part)) {
                continue;
            }
            match rustix::fs::unlinkat(&gate.gate, name, AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR) => {
                    removal::empty(listing(&gate.gate, name)?.as_fd())?;
                    rustix::fs::unlinkat(&gate.gate, name, AtFlags::REMOVEDIR)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        removal::empty(gate.root.as_fd())?;
        let (tmp, logs) = (
            listing(&gate.gate, PARTS[1])?,
            listing(&gate.gate, PARTS[2])?,
        );
        removal::empty(tmp.as_fd())?;
        removal::empty(logs.as_fd())?;
        let as_made = is_as_made(gate.gate.as_fd(), 0o700)?
            && is_as_made(gate.root.as_fd(), 0o777)?
            && is_as_made(tmp.as_fd(), 0o777)?
            && is_as_made(logs.as_fd(), 0o777)?;
        Ok(as_made)
    }

    /// Throws away all that is in the build directory.
    fn discard_everything(&self) -> io::Result<()> {
        let mut entries = Dir::read_from(&self.directory)?;
        let mut names = Vec::new();
        while let Some(entry) = entries.read() {
            let name = entry?.file_name().to_owned();
            let kept = [c".", c"..", c"trash", c"lost+found"];
            if !kept.contains(&name.as_c_str()) {
                names.push(name);
            }
        }
        let mut number = 0_u64;
        for name in names {
            loop {
                let no_replace = rustix::fs::RenameFlags::NOREPLACE;
                let new = number.to_string();
                number += 1;
                match rustix::fs::renameat_with(
                    &self.directory,
                    &name,
                    &self.trash,
                    new,
                    no_replace,
                ) {
                    Ok(()) => break,
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Of an earlier worker, each after its action is over.
    fn empty_trash(&self) {
        let mut entries = match Dir::read_from(&self.trash) {
            Ok(entries) => entries,
            Err(_) => return,
        };
        let mut names = Vec::new();
        while let Some(Ok(entry)) = entries.read() {
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        for name in names {
            let removed = match listing(&self.trash, &name) {
                Ok(directory) => rustix::fs::flock(&directory, FlockOperation::LockExclusive)
                    .map_err(io::Error::from)
                    .and_then(|()| removal::empty(directory.as_fd()))
                    .and_then(|()| {
                        let flags = AtFlags::REMOVEDIR;
                        Ok(rustix::fs::unlinkat(&self.trash, &name, flags)?)
                    }),
                Err(_) => rustix::fs::unlinkat(&self.trash, &name, AtFlags::empty())
                    .map_err(io::Error::from),
            };
            if let Err(error) = removed {
                tracing::warn!(
                    path = %self.path.join(TRASH).join(name.to_string_lossy().as_ref()).display(),
                    %error,
                    "could not remove what an earlier worker left behind"
                );
            }
        }
    }

    fn lay_out(&self, tree: &Tree, root: BorrowedFd<'_>) -> Result<(), PrepareError> {
        let layout = Layout {
            shared: self,
            tree,
            queue: Mutex::new(Queue {
                jobs: Vec::new(),
                working: 1,
                vanished: Vec::new(),
                fault: None,
            }),
            changed: Condvar::new(),
        };
        let helpers = match tree.entries() >= WORTH_A_THREAD {
            true => self.threads - 1,
            false => 0,
        };
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|| layout.work());
            }
            let mut buffer = String::new();
            // The first directory is open already.
            match root.try_clone_to_owned() {
                Ok(root) => layout.fill(tree.root(), root, &mut buffer),
                Err(error) => layout.fail(self.disk_fault("lay out the input root", error)),
            }
            layout.queue.lock().working -= 1;
            layout.changed.notify_all();
            layout.work();
        });
        let queue = layout.queue.into_inner();
        match queue.fault {
            Some(fault) => Err(PrepareError::Fault(fault)),
            None if queue.vanished.is_empty() => Ok(()),
            None => Err(PrepareError::Vanished(queue.vanished)),
        }
    }
}

/// Owner, mode, attributes and size as when it was made.
fn is_as_made(directory: BorrowedFd<'_>, mode: u32) -> io::Result<bool> {
    let stat = rustix::fs::fstat(directory)?;
    let mut names = [0; 512];
    let plain = match rustix::fs::flistxattr(directory, &mut names[..]) {
        Ok(length) => names[..length]
            .split(|byte| *byte == 0)
            .all(|name| name.is_empty() || name.starts_with(b"security.")),
        Err(error) => error == Errno::OPNOTSUPP,
    };
    Ok(plain
        && stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_mode & 0o7777 == mode
        && stat.st_size <= LARGEST_DIRECTORY)
}

/// One input root being laid out, by one or two threads.
struct Layout<'a> {
    shared: &'a Shared,
    tree: &'a Tree,
    queue: Mutex<Queue<'a>>,
    changed: Condvar,
}

struct Queue<'a> {
    /// The last first: so only the ancestors of what is worked on are open.
    jobs: Vec<Job<'a>>,
    /// Threads that may yet add jobs.
    working: usize,
    vanished: Vec<Key>,
    fault: Option<Fault>,
}

/// A directory to open and fill.
struct Job<'a> {
    parent: Arc<OwnedFd>,
    name: &'a Component,
    node: u32,
}

impl<'a> Layout<'a> {
    fn work(&self) {
        let mut buffer = String::new();
        loop {
            let job = {
                let mut queue = self.queue.lock();
                loop {
                    if queue.fault.is_some() {
                        return;
                    }
                    if let Some(job) = queue.jobs.pop() {
                        queue.working += 1;
                        break job;
                    }
                    if queue.working == 0 {
                        return;
                    }
                    self.changed.wait(&mut queue);
                }
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = job.name.as_str();
            match rustix::fs::openat(&job.parent, name, flags, Mode::empty()) {
                Ok(directory) => self.fill(job.node, directory, &mut buffer),
                Err(error) => self.fail_at(name, error.into()),
            }
            drop(job);
            self.queue.lock().working -= 1;
            self.changed.notify_all();
        }
    }

    fn fail(&self, fault: Fault) {
        self.queue.lock().fault.get_or_insert(fault);
    }

    fn fail_at(&self, name: &str, error: io::Error) {
        self.fail(
            self.shared
                .disk_fault(&format!("make {name:?} of the input root"), error),
        );
    }

    fn fill(&self, node: u32, directory: OwnedFd, buffer: &mut String) {
        let node = self.tree.node(node);
        for file in &node.directory.files {
            let name = file.name.as_str();
            match self
                .shared
                .cache
                .link(&file.key, directory.as_fd(), name, buffer)
            {
                Ok(()) => {}
                Err(LinkError::Vanished) => self.queue.lock().vanished.push(file.key),
                Err(LinkError::Other(error)) => return self.fail_at(name, error),
            }
        }
        for (name, target) in &node.directory.symlinks {
            if let Err(error) = rustix::fs::symlinkat(&**target, &directory, name.as_str()) {
                return self.fail_at(name.as_str(), error.into());
            }
        }
        for (name, _) in &node.directory.directories {
            let mode = Mode::from_raw_mode(0o777);
            if let Err(error) = rustix::fs::mkdirat(&directory, name.as_str(), mode) {
                return self.fail_at(name.as_str(), error.into());
            }
        }
        let parent = Arc::new(directory);
        let jobs = node.directory.directories.iter().zip(&node.children);
        let jobs = jobs
            .filter(|(_, child)| self.tree.node(**child).entries > 0)
            .map(|((name, _), child)| Job {
                parent: parent.clone(),
                name,
                node: *child,
            });
        self.queue.lock().jobs.extend(jobs);
        self.changed.notify_all();
    }
}
