//! The layer `containment.cgroups`: one control group for each action, version 2 (cgroups(7)).
//!
//! The cgroup namespace comes with the PID namespace (`pid_namespace`).
//!
//! 1. An action's processes are in its sandbox's group from their first instruction, and cannot leave it.
//! 2. An action has ended when its group has no live process (cgroup.events, populated).
//! 3. Names are unique for the life of a runner; groups that an earlier runner with the same users
//!    left are killed and removed at start-up.
//!
//! Layout, below the daemon's own group, or beside it where it must move out of the way (a group
//! with controllers for its children has no processes):
//!
//! ```text
//! …/bb-runner.service/daemon/                this daemon
//! …/bb-runner.service/bb-runner-58000/17/    the 17th sandbox of the runner with users.first = 58000
//! ```
//!
//! Groups are numbered in the order in which they are made. Number 0 is made at start-up, to try the limits, and
//! removed again. All others are made ahead, with their sandboxes, and some never get an action.

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
use rustix::fs::{AtFlags, Mode, OFlags, openat};

use super::{
    cgroup_limits::{CgroupSetting, UnenforcedLimit, settings},
    cgroup_usage::{self, CgroupUsage},
    containment_layer::{Layer, Layers, Probe},
    error::{CGROUP_STEP, SandboxError},
    proc_self_cgroup::own_cgroup,
};
use crate::config::runner::{Config, Demand, Limits};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::CGROUPS,
    key: "containment.cgroups",
    demand: |containment| containment.cgroups,
    needs: Layers::empty(),
    probe: Probe::Function(can_be_had),
    unshared_namespace: None,
    on: "actions have control groups",
    off: "actions' processes are found by their users",
};

/// The parent group of actions' groups.
#[derive(Debug)]
pub(crate) struct ActionCgroupParent {
    directory: PathBuf,
    /// An open descriptor of it, since some threads see control groups read-only; the mount that it was opened by is
    /// not.
    parent: Mutex<Arc<OwnedFd>>,
    /// The number of the next group.
    next: AtomicU64,
    /// Settings that were accepted at start-up, so that each group must accept them.
    settings: Vec<CgroupSetting>,
    /// Configured limits that are not enforced here.
    unenforced: Vec<UnenforcedLimit>,
}

/// Prepares what all actions' groups need. The error says why there are none.
pub(super) fn prepare(config: &Config) -> Result<ActionCgroupParent, String> {
    let cgroups = ActionCgroupParent::set_up(config.users.first, &config.limits)?;
    if config.containment.cgroups == Demand::Require {
        all_enforced(&cgroups.unenforced)?;
    }
    for UnenforcedLimit { key, reason } in &cgroups.unenforced {
        tracing::warn!("{key} is not kept: {reason}");
    }
    Ok(cgroups)
}

/// Whether there can be groups on this host that enforce all limits, wherever the daemon runs; changes nothing.
fn can_be_had(config: &Config) -> Result<(), String> {
    let controllers = own_cgroup()?.mount.join("cgroup.controllers");
    let available = fs::read_to_string(controllers).unwrap_or_default();
    let has = |name| available.split_whitespace().any(|found| found == name);
    let mut unenforced: Vec<UnenforcedLimit> = settings(&config.limits)
        .into_iter()
        .filter(|setting| !has(setting.controller()))
        .filter_map(|setting| setting.unenforced(io::ErrorKind::NotFound.into()))
        .collect();
    unenforced.dedup_by_key(|it| it.key);
    all_enforced(&unenforced)
}

/// Fails when some limits are not enforced.
fn all_enforced(unenforced: &[UnenforcedLimit]) -> Result<(), String> {
    let reason = |it: &UnenforcedLimit| format!("{} cannot be kept: {}", it.key, it.reason);
    match unenforced {
        [] => Ok(()),
        _ => Err(unenforced.iter().map(reason).collect::<Vec<_>>().join("; ")),
    }
}

/// The group of one action; removed on drop, when it should be empty.
#[derive(Debug)]
pub(crate) struct ActionCgroup {
    path: PathBuf,
    parent: Arc<OwnedFd>,
    directory: OwnedFd,
    events: fs::File,
}

impl ActionCgroupParent {
    /// Finds the daemon's own group, makes the parent group below or beside it, and tries the limits. The error says
    /// why there is none.
    fn set_up(first_user: u32, limits: &Limits) -> Result<Self, String> {
        let base = move_daemon_to_leaf(own_cgroup()?.directory)?;
        let directory = base.join(format!("bb-runner-{first_user}"));
        remove_leftovers(&directory);
        let parent = make_directory(&directory)
            .map_err(|error| format!("could not create {}: {error}", directory.display()))?;
        let mut cgroups = ActionCgroupParent {
            directory,
            parent: Mutex::new(Arc::new(parent)),
            next: AtomicU64::new(0),
            settings: Vec::new(),
            unenforced: Vec::new(),
        };
        let first = cgroups
            .try_create()
            .map_err(|(path, error)| format!("could not use {}: {error}", path.display()))?;
        for setting in settings(limits) {
            match setting.apply(&first.path) {
                Ok(()) => cgroups.settings.push(setting),
                Err(error) => cgroups.unenforced.extend(setting.unenforced(error)),
            }
        }
        Ok(cgroups)
    }

    /// The directory of the parent group.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Removes the parent group, if all groups in it are gone.
    pub(crate) fn close(&self) {
        let _ = fs::remove_dir(&self.directory);
    }

    /// Makes a group for one action.
    pub(crate) fn create(&self) -> Result<ActionCgroup, SandboxError> {
        self.try_create().map_err(|(path, error)| {
            SandboxError::at(format!("{CGROUP_STEP} {}", path.display()))(error)
        })
    }

    /// Makes a group; the error has the path that it is about.
    fn try_create(&self) -> Result<ActionCgroup, (PathBuf, io::Error)> {
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
        let cgroup = ActionCgroup::open(&path, self.parent.lock().clone()).map_err(|error| {
            let _ = fs::remove_dir(&path);
            (path.clone(), error)
        })?;
        for setting in &self.settings {
            let set = setting.apply(&path);
            set.map_err(|error| (path.join(setting.file), error))?;
        }
        Ok(cgroup)
    }
}

impl Drop for ActionCgroupParent {
    fn drop(&mut self) {
        self.close();
    }
}

impl ActionCgroup {
    fn open(path: &Path, parent: Arc<OwnedFd>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(ActionCgroup {
            directory: rustix::fs::open(path, flags, Mode::empty())?,
            events: fs::File::open(path.join("cgroup.events"))?,
            path: path.to_owned(),
            parent,
        })
    }

    /// What clone3(2) takes to make a process in it.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether somebody else has removed it, so that nothing can be started in it any more.
    pub(crate) fn is_removed(&self) -> bool {
        let looked = self.events.read_at(&mut [0; 1], 0);
        looked.is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
    }

    /// What it says of its action by now.
    pub(crate) fn usage(&self) -> CgroupUsage {
        CgroupUsage::read(|name| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let file = openat(&self.directory, name, flags, Mode::empty())?;
            cgroup_usage::read_text(fs::File::from(file))
        })
    }

    /// Kills whatever is in it. False when something was left after this long.
    pub(crate) fn kill_all(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
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

    /// Whether it has a live process.
    fn is_populated(&self) -> bool {
        let mut text = [0; 64];
        match self.events.read_at(&mut text, 0) {
            Ok(length) => !text[..length].starts_with(b"populated 0"),
            // ENODEV: somebody has removed it, which takes that it was empty.
            Err(error) => error.raw_os_error() != Some(libc::ENODEV),
        }
    }
}

impl Drop for ActionCgroup {
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

/// Moves this process to `daemon/` below its group, if it is alone there, so that controllers can be enabled for what
/// lies beside it (cgroups(7), "no internal processes"); returns the group that actions' groups are made in. Of a
/// group that other processes share, controllers stay as they are.
fn move_daemon_to_leaf(base: PathBuf) -> Result<PathBuf, String> {
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

/// Enables the controllers that limits and usage need for the children of a group, as far as there are any.
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

/// Makes the parent group of actions' groups, unless it is there; returns an open descriptor of it.
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

/// Makes a group in which, whatever the umask is, actions cannot make others.
fn create_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

/// Kills and removes the groups that an earlier runner left.
fn remove_leftovers(directory: &Path) {
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
