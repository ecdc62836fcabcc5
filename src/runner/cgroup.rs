//! One control group for each action, version 2 (cgroups(7)).
//!
//! 1. An action's processes are in its group from their first instruction, and cannot leave it.
//! 2. An action has ended when its group has no live process (cgroup.events, populated).
//! 3. Names are unique for the life of a runner; groups that an earlier runner with the same users
//!    left are killed and removed at start-up.
//!
//! Layout, below the daemon's own group, or beside it where it must move out of the way (a group
//! with controllers for its children has no processes):
//!
//! ```text
//! …/bb-runner.service/daemon/                this daemon
//! …/bb-runner.service/bb-runner-58000/17/    the 17th action of the runner with users.first = 58000
//! ```

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::config::runner::Limits;

/// Microseconds in which the share of processor time is kept (cpu.max).
const PERIOD: u64 = 100_000;

/// Where actions' groups are made.
#[derive(Debug)]
pub struct Cgroups {
    directory: PathBuf,
    /// Open, as some threads see control groups read-only; the mount that it was opened by is not.
    parent: Mutex<Arc<OwnedFd>>,
    next: AtomicU64,
    /// Those that were accepted at the start, so that each group must accept them.
    settings: Vec<Setting>,
    unkept: Vec<Unkept>,
}

/// What is written to which file of a group, for which limit.
#[derive(Clone, Debug)]
struct Setting {
    file: &'static str,
    value: String,
    key: &'static str,
}

/// A configured limit that is not kept here.
#[derive(Clone, Debug)]
pub struct Unkept {
    pub key: &'static str,
    pub reason: String,
}

/// What a group says of its action at the end: all processes, those that nobody waited for included.
/// Where a controller is missing, so is what it would tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub processor: Option<Processor>,
    pub memory: Option<Memory>,
    pub io: Option<Io>,
    /// How often a process could not be made, as there were too many.
    pub processes_refused: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    pub user: Duration,
    pub system: Duration,
    /// Time in which something wanted to run and had used up its share.
    pub throttled: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes; the kernel tells since Linux 5.19.
    pub peak: Option<u64>,
    pub limit: Option<u64>,
    /// Processes that were killed for want of memory: this group's, or the host's.
    pub killed: u64,
    /// How often the limit stood in the way.
    pub refused: u64,
}

/// Bytes, of all devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Io {
    pub read: u64,
    pub written: u64,
}

impl Memory {
    /// The action used more than its limit.
    pub fn is_exhausted(&self) -> bool {
        self.killed > 0 && self.refused > 0
    }

    /// The action was killed since others had used too much.
    pub fn is_victim(&self) -> bool {
        self.killed > 0 && self.refused == 0
    }
}

/// The group of one action; removed on drop, when it should be empty.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    parent: Arc<OwnedFd>,
    directory: OwnedFd,
    events: fs::File,
}

impl Cgroups {
    /// Finds the daemon's own group, and makes room below it. The error says why there is none.
    pub fn find(first_user: u32, limits: &Limits) -> Result<Self, String> {
        let base = make_way(own_group()?.directory)?;
        let directory = base.join(format!("bb-runner-{first_user}"));
        clear(&directory);
        let parent = make_directory(&directory)
            .map_err(|error| format!("could not create {}: {error}", directory.display()))?;
        let mut cgroups = Cgroups {
            directory,
            parent: Mutex::new(Arc::new(parent)),
            next: AtomicU64::new(0),
            settings: Vec::new(),
            unkept: Vec::new(),
        };
        let first = cgroups
            .create()
            .map_err(|(path, error)| format!("could not use {}: {error}", path.display()))?;
        for setting in settings(limits) {
            match setting.apply(&first.path) {
                Ok(()) => cgroups.settings.push(setting),
                Err(error) => cgroups.unkept.extend(setting.unkept(error)),
            }
        }
        Ok(cgroups)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Removes the place for groups, if all of them are gone.
    pub fn close(&self) {
        let _ = fs::remove_dir(&self.directory);
    }

    /// Those of the configured limits that are not kept here.
    pub fn unkept(&self) -> &[Unkept] {
        &self.unkept
    }

    /// Those that cannot be kept on this host, wherever the daemon runs; changes nothing. The error
    /// says why there are no groups.
    pub fn check(limits: &Limits) -> Result<Vec<Unkept>, String> {
        let controllers = own_group()?.mount.join("cgroup.controllers");
        let available = fs::read_to_string(controllers).unwrap_or_default();
        let has = |name| available.split_whitespace().any(|found| found == name);
        let lacking = settings(limits)
            .into_iter()
            .filter(|it| !has(it.controller()));
        let mut unkept: Vec<Unkept> = lacking
            .filter_map(|it| it.unkept(io::ErrorKind::NotFound.into()))
            .collect();
        unkept.dedup_by_key(|it| it.key);
        Ok(unkept)
    }

    /// The error has the place.
    pub fn create(&self) -> Result<Cgroup, (PathBuf, io::Error)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join(number.to_string());
        match create_directory(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = make_directory(&self.directory);
                let parent = parent.map_err(|error| (self.directory.clone(), error))?;
                *self.parent.lock() = Arc::new(parent);
                tracing::warn!(directory = %self.directory.display(), "somebody removed the place for actions' control groups; it was made again");
                create_directory(&path)
            }
            result => result,
        }
        .map_err(|error| (path.clone(), error))?;
        let cgroup = Cgroup::open(&path, self.parent.lock().clone());
        let cgroup = cgroup.map_err(|error| (path.clone(), error))?;
        for setting in &self.settings {
            let set = setting.apply(&path);
            set.map_err(|error| (path.join(setting.file), error))?;
        }
        Ok(cgroup)
    }
}

/// What `limits` mean for a group.
fn settings(limits: &Limits) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |key, file, value| settings.push(Setting { file, value, key });
    set("limits.processes", "pids.max", limits.processes.to_string());
    if limits.memory.get() > 0 {
        let key = "limits.memory";
        set(key, "memory.max", limits.memory.get().to_string());
        set(key, "memory.swap.max", "0".to_owned());
        // All or nothing: what is left of an action without some of its processes is no result.
        set(key, "memory.oom.group", "1".to_owned());
    }
    if limits.processors > 0.0 {
        let quota = (limits.processors * PERIOD as f64) as u64;
        set("limits.processors", "cpu.max", format!("{quota} {PERIOD}"));
    }
    settings
}

impl Setting {
    fn controller(&self) -> &'static str {
        self.file.split('.').next().unwrap_or(self.file)
    }

    fn apply(&self, group: &Path) -> io::Result<()> {
        // Not made where there is none: a file system of another kind would take it.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(group.join(self.file))?;
        io::Write::write_all(&mut file, self.value.as_bytes())
    }

    /// Why the limit is not kept, if that must be told.
    fn unkept(&self, error: io::Error) -> Option<Unkept> {
        let is_missing = error.kind() == io::ErrorKind::NotFound;
        let reason = match (self.file, is_missing) {
            // Then processes are limited for each user (setrlimit(2)).
            ("pids.max", true) => return None,
            // A kernel that does not count swap; there may be none.
            ("memory.swap.max", true) if !has_swap() => return None,
            ("memory.swap.max", true) => {
                "the kernel does not count swap, of which this host has some; boot it with \
                 swapaccount=1, or switch swap off"
                    .to_owned()
            }
            (file, true) => format!(
                "there is no {file}: the controller {} is not delegated to this daemon",
                self.controller()
            ),
            (file, false) => format!("{:?} could not be written to {file}: {error}", self.value),
        };
        Some(Unkept {
            key: self.key,
            reason,
        })
    }
}

fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|table| table.lines().count() > 1)
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.close();
    }
}

impl Cgroup {
    fn open(path: &Path, parent: Arc<OwnedFd>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Cgroup {
            directory: rustix::fs::open(path, flags, Mode::empty())?,
            events: fs::File::open(path.join("cgroup.events"))?,
            path: path.to_owned(),
            parent,
        })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// By somebody else: nothing can be started in it any more.
    pub fn is_removed(&self) -> bool {
        let looked = self.events.read_at(&mut [0; 1], 0);
        looked.is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
    }

    pub fn usage(&self) -> Usage {
        let read = |file| fs::read_to_string(self.path.join(file)).ok();
        let number = |file| read(file)?.trim().parse().ok();
        Usage {
            processor: read("cpu.stat").map(|text| Processor {
                user: Duration::from_micros(field(&text, "user_usec")),
                system: Duration::from_micros(field(&text, "system_usec")),
                throttled: Duration::from_micros(field(&text, "throttled_usec")),
            }),
            memory: read("memory.events").map(|events| Memory {
                peak: number("memory.peak"),
                limit: number("memory.max"),
                killed: field(&events, "oom_kill"),
                refused: field(&events, "oom"),
            }),
            io: read("io.stat").map(|text| Io::sum(&text)),
            processes_refused: read("pids.events").map_or(0, |text| field(&text, "max")),
        }
    }

    /// Kills whatever is in it. False when something was left after `patience`.
    pub fn empty(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_micros(50);
        while self.is_populated() {
            // Again each time: harmless, and cheap beside the processes that it is for.
            let _ = fs::write(self.path.join("cgroup.kill"), "1");
            if Instant::now() > deadline {
                return false;
            }
            // The kernel tells of changes no sooner than 10 ms after the last one (poll(2) on
            // cgroup.events), hence looking.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        true
    }

    fn is_populated(&self) -> bool {
        let mut text = [0; 64];
        match self.events.read_at(&mut text, 0) {
            Ok(length) => !text[..length].starts_with(b"populated 0"),
            // ENODEV: somebody has removed it, which takes that it was empty.
            Err(error) => error.raw_os_error() != Some(libc::ENODEV),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let name = self.path.file_name().unwrap_or_default();
        if self.is_removed() {
            return;
        }
        if let Err(error) = rustix::fs::unlinkat(&*self.parent, name, AtFlags::REMOVEDIR) {
            let _ = fs::write(self.path.join("cgroup.kill"), "1");
            tracing::warn!(cgroup = %self.path.display(), %error, "could not remove a control group; the next start will");
        }
    }
}

impl Io {
    /// Of `io.stat`: a line for each device.
    fn sum(text: &str) -> Io {
        let mut sum = Io::default();
        for word in text.split_whitespace() {
            let of = |name| word.strip_prefix(name)?.parse::<u64>().ok();
            sum.read = sum.read.saturating_add(of("rbytes=").unwrap_or(0));
            sum.written = sum.written.saturating_add(of("wbytes=").unwrap_or(0));
        }
        sum
    }
}

/// A number of a flat keyed file; 0 when it is not there.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// Where control groups are mounted; the same directory for all runners that can touch each other's.
pub fn mount_point() -> Option<PathBuf> {
    own_group().ok().map(|group| group.mount)
}

struct OwnGroup {
    mount: PathBuf,
    directory: PathBuf,
}

fn own_group() -> Result<OwnGroup, String> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|error| format!("could not read {path}: {error}"))
    };
    let (root, mount) = read("/proc/self/mountinfo")?
        .lines()
        .find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            file_system
                .starts_with("cgroup2 ")
                .then(|| (unescape(root), unescape(point)))
        })
        .ok_or("control groups version 2 are not mounted")?;
    let path = read("/proc/self/cgroup")?
        .lines()
        .find_map(|line| line.strip_prefix("0::").map(str::to_owned))
        .ok_or("/proc/self/cgroup names no group of version 2")?;
    Path::new(&path)
        .strip_prefix(&root)
        .map(|below| OwnGroup {
            directory: Path::new(&mount).join(below),
            mount: PathBuf::from(&mount),
        })
        .map_err(|_| format!("{path} is not below what is mounted at {mount}"))
}

/// proc(5): space, tab, newline and backslash are written in octal.
fn unescape(text: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Moves this process to `daemon/` where the group is its alone, so that controllers can be enabled.
fn make_way(base: PathBuf) -> Result<PathBuf, String> {
    // Only the root group lacks this file, and it alone may have both processes and controllers.
    let is_root = !base.join("cgroup.type").exists();
    if is_root {
        return Ok(base);
    }
    if base.file_name().is_some_and(|name| name == "daemon")
        && let Some(parent) = base.parent()
    {
        enable_controllers(parent);
        return Ok(parent.to_owned());
    }
    let own = std::process::id().to_string();
    let alone = fs::read_to_string(base.join("cgroup.procs"))
        .is_ok_and(|processes| processes.split_whitespace().all(|pid| pid == own));
    if alone {
        let daemon = base.join("daemon");
        let _ = create_directory(&daemon);
        fs::write(daemon.join("cgroup.procs"), &own)
            .map_err(|error| format!("could not move to {}: {error}", daemon.display()))?;
        enable_controllers(&base);
    }
    Ok(base)
}

fn enable_controllers(directory: &Path) {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    for controller in ["pids", "memory", "cpu", "io"] {
        if available.split_whitespace().any(|name| name == controller) {
            let _ = fs::write(
                directory.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    }
}

/// The place for actions' groups; an open descriptor of it.
fn make_directory(directory: &Path) -> io::Result<OwnedFd> {
    match create_directory(directory) {
        // Another thread was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result?,
    }
    enable_controllers(directory);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(directory, flags, Mode::empty())?)
}

/// Whatever the umask is: actions must not make groups.
fn create_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

/// Kills and removes what an earlier runner left.
fn clear(directory: &Path) {
    if !directory.exists() {
        return;
    }
    let _ = fs::write(directory.join("cgroup.kill"), "1");
    for _ in 0..100 {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let _ = fs::remove_dir(entry.path());
            }
        }
        if fs::remove_dir(directory).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    tracing::warn!(cgroup = %directory.display(), "could not remove what an earlier runner left");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_their_whole_names_and_summed_over_devices() {
        let events = "low 0\nhigh 0\nmax 41\noom 2\noom_kill 3\noom_group_kill 1\n";
        assert_eq!((field(events, "oom"), field(events, "oom_kill")), (2, 3));
        assert_eq!(field(events, "missing"), 0);
        let stat = "254:0 rbytes=4096 wbytes=100 rios=1 wios=1 dbytes=7 dios=0\n\
                    254:16 rbytes=1 wbytes=1 rios=1 wios=1 dbytes=0 dios=0\n";
        assert_eq!(
            Io::sum(stat),
            Io {
                read: 4097,
                written: 101
            }
        );
    }

    #[test]
    fn a_limit_that_the_kernel_does_not_take_is_told_with_its_file_and_reason() {
        let group = tempfile::tempdir().unwrap();
        // Refuses what is written.
        std::os::unix::fs::symlink("/dev/full", group.path().join("pids.max")).unwrap();
        fs::write(group.path().join("cpu.max"), "").unwrap();
        let limits = Limits {
            memory: crate::config::Size::mib(64),
            processors: 0.5,
            processes: 100,
            ..Limits::default()
        };
        let unkept: Vec<Unkept> = settings(&limits)
            .into_iter()
            .filter_map(|setting| setting.unkept(setting.apply(group.path()).err()?))
            .collect();
        let told = |key| unkept.iter().find(|it| it.key == key).map(|it| &*it.reason);
        let reason = told("limits.processes").unwrap();
        assert!(
            reason.contains("\"100\" could not be written to pids.max"),
            "{reason}"
        );
        let reason = told("limits.memory").unwrap();
        assert!(
            reason.contains("controller memory is not delegated"),
            "{reason}"
        );
        assert_eq!(told("limits.processors"), None);
        assert_eq!(
            fs::read_to_string(group.path().join("cpu.max")).unwrap(),
            "50000 100000"
        );
        // Without the controller, users' own limits do.
        fs::remove_file(group.path().join("pids.max")).unwrap();
        let first = settings(&limits).swap_remove(0);
        assert!(
            first
                .unkept(first.apply(group.path()).unwrap_err())
                .is_none()
        );
    }
}
