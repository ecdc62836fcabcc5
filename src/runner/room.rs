//! Rooms: what surrounds an action, prepared before it arrives (`rooms`) and torn down after it was
//! answered.
//!
//! 1. A room is one action's own: namespaces with all that is in them, and a control group. Only
//!    network namespaces are used again, as `network` says.
//! 2. A room is bound to the host's mounts and the build directory as they were; when something was
//!    mounted since, or the worker has made that directory anew, it is not used.
//!
//! What is in a room is furnished by `furnish`. That takes about as long as an action's whole start
//! (mount_namespaces(7) are copied and torn down under locks of the whole kernel), hence ahead, on a
//! thread of its own.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    account::Account,
    cgroup::{Cgroup, Cgroups},
    furnish::Workshop,
    init::{Init, Program},
    layer::{Layer, Layers},
    network::{Network, Networks},
    quota,
    template::{Changes, Moment},
};
use crate::config::runner::{Config, Root};

/// Where the action's temporary directory appears.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];
/// Where a control group could not be made.
pub const GROUP_STEP: &str = "control group";
pub const SHARED_MEMORY: &str = "/dev/shm";

/// What rooms are built from.
#[derive(Debug)]
pub struct Plan {
    pub layers: Layers,
    pub build_directory: PathBuf,
    pub writable: Vec<PathBuf>,
    pub hidden: Vec<PathBuf>,
    /// Existing places of `TEMPORARY`, without symbolic links, each once.
    pub temporary: Vec<PathBuf>,
    /// Another tree in place of the host's.
    pub image: Option<PathBuf>,
    /// Whether /etc/passwd and /etc/group are to tell the action's user.
    pub names_users: bool,
    /// The most pseudo-terminals.
    pub terminals: u32,
    pub init: Option<Arc<Program>>,
    pub networks: Networks,
    pub cgroups: Option<Arc<Cgroups>>,
    /// Of the host's mounts.
    pub changes: Changes,
}

/// One action's surroundings. Dropped in this order: processes first.
#[derive(Debug)]
pub struct Room {
    pub init: Option<Init>,
    /// To be entered, with their kinds (setns(2)); the process namespace is `init`'s.
    pub namespaces: Vec<(OwnedFd, libc::c_int)>,
    pub mounts: Option<Mounts>,
    pub network: Option<Network>,
    pub cgroup: Option<Cgroup>,
}

#[derive(Debug)]
pub struct Mounts {
    /// The build directory as it is inside, and its place there.
    pub build_directory: OwnedFd,
    pub place: CString,
    /// Its device and inode number.
    pub identity: (u64, u64),
    /// When it all was so on the host.
    pub moment: Moment,
    /// Where the action's temporary directory must be mounted.
    pub temporary: Vec<CString>,
    pub account: Account,
}

/// The administrator must act, or there is a shortage on this host.
#[derive(Clone, Debug, thiserror::Error)]
#[error("could not prepare a room for the action: {step}: {error}{}", remedy(.step, .error))]
pub struct RoomError {
    step: String,
    error: Arc<io::Error>,
}

impl RoomError {
    pub fn at(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |error| RoomError {
            step: step.into(),
            error: Arc::new(error),
        }
    }
}

impl Plan {
    pub fn new(config: &Config, layers: Layers, cgroups: Option<Cgroups>) -> io::Result<Self> {
        let image = config.root.image().map(Path::to_owned);
        let root = image.as_deref().unwrap_or(Path::new("/"));
        let mut temporary: Vec<PathBuf> = TEMPORARY
            .iter()
            .map(|place| root.join(&place[1..]))
            .filter_map(|place| fs::canonicalize(place).ok())
            .filter(|place| place.is_dir())
            .filter_map(|place| Some(Path::new("/").join(place.strip_prefix(root).ok()?)))
            .collect();
        temporary.dedup();
        let init = match layers.has(Layer::Processes) {
            true => Some(Arc::new(Program::new()?)),
            false => None,
        };
        Ok(Plan {
            layers,
            build_directory: config.build_directory.clone(),
            writable: config.writable_directories.clone(),
            hidden: config.containment.hidden_paths.clone(),
            temporary,
            image,
            names_users: config.root != Root::Input,
            terminals: quota::terminals(config.users.count),
            init,
            networks: Networks::default(),
            cgroups: cgroups.map(Arc::new),
            changes: Changes::watch()?,
        })
    }

    /// Directories that all actions share when rooms have no mounts of their own.
    pub fn shared(&self) -> Vec<PathBuf> {
        let mut shared = self.temporary.clone();
        shared.push(PathBuf::from(SHARED_MEMORY));
        shared
    }

    /// Whether a room can be made.
    pub fn try_out(&self) -> Result<(), RoomError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("room".to_owned())
                .spawn_scoped(scope, || Workshop::open()?.furnish(self).map(drop))
                .map_err(RoomError::at("thread"))?;
            let panicked = |_| Err(RoomError::at("thread")(io::Error::other("it panicked")));
            thread.join().unwrap_or_else(panicked)
        })
    }
}

impl Room {
    /// Whether it is around the host as it is, and nobody has killed its first process or removed its
    /// control group.
    pub fn is_usable(&self, build_directory: (u64, u64), changes: u64) -> bool {
        self.mounts.as_ref().is_none_or(|mounts| {
            mounts.identity == build_directory
                && mounts.moment.has_mounts_of(changes)
                && mounts.account.is_current()
        }) && self.init.as_ref().is_none_or(Init::is_alive)
            && self
                .cgroup
                .as_ref()
                .is_none_or(|cgroup| !cgroup.is_removed())
    }
}

/// What ran out, and who gives more of it.
fn remedy(step: &str, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            "; bb_runner has all the descriptors that it may have: raise LimitNOFILE= of its unit (systemd.exec(5))"
        }
        Some(libc::ENFILE) => {
            "; this host has all the open files that it may have: raise fs.file-max (sysctl)"
        }
        Some(libc::ENOSPC | libc::EUSERS) => {
            "; this host has all the namespaces or mounts that it may have: raise \
             user.max_mnt_namespaces, user.max_pid_namespaces, user.max_net_namespaces, \
             user.max_ipc_namespaces, user.max_uts_namespaces, user.max_cgroup_namespaces or \
             fs.mount-max (sysctl)"
        }
        Some(libc::EAGAIN) if step.starts_with(GROUP_STEP) => {
            "; there are too many control groups: raise cgroup.max.descendants and cgroup.max.depth \
             of the groups above"
        }
        Some(libc::EAGAIN) => {
            "; this host or bb_runner's control group has all the processes that it may have: raise \
             kernel.pid_max, kernel.threads-max (sysctl) or TasksMax= of its unit"
        }
        Some(libc::ENOMEM) => "; this host is short of memory",
        _ => "",
    }
}

/// The namespace of this kind that this thread is in.
pub fn open_namespace(kind: &str) -> io::Result<OwnedFd> {
    let path = format!("/proc/thread-self/ns/{kind}");
    Ok(fs::File::open(path)?.into())
}

/// Makes this thread leave what it shares with others (unshare(2)).
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: takes a number; concerns this thread only.
    match unsafe { libc::unshare(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes this thread enter a namespace of this kind.
pub fn enter(namespace: impl AsFd, kind: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: takes numbers; the descriptor is open.
    match unsafe { libc::setns(namespace.as_fd().as_raw_fd(), kind) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
