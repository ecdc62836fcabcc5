//! Rooms: what surrounds an action, prepared before it arrives and torn down after it was answered.
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
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;

use super::{
    cgroup::{Cgroup, Cgroups},
    furnish::Workshop,
    init::{Init, Program},
    layer::{Layer, Layers},
    network::{Network, Networks},
    template::{Changes, Moment},
};
use crate::config::runner::Config;

/// Where the action's temporary directory appears.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];
pub const SHARED_MEMORY: &str = "/dev/shm";
/// Rooms that wait for actions.
const AHEAD: usize = 4;

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
}

/// The administrator must act, or there is a shortage on this host.
#[derive(Clone, Debug, thiserror::Error)]
#[error("could not prepare a room for the action: {step}: {error}")]
pub struct RoomError {
    step: String,
    error: Arc<io::Error>,
}

/// Gives out rooms that a thread prepares ahead.
#[derive(Debug)]
pub struct Rooms {
    plan: Arc<Plan>,
    /// `None` once closed.
    ready: Mutex<Option<Ready>>,
}

#[derive(Debug)]
struct Ready {
    rooms: Receiver<Result<Room, RoomError>>,
    builder: JoinHandle<()>,
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
    /// Whether it is around the host as it is, and nobody has killed its first process.
    fn is_usable(&self, build_directory: (u64, u64), changes: u64) -> bool {
        self.mounts.as_ref().is_none_or(|mounts| {
            mounts.identity == build_directory && mounts.moment.has_mounts_of(changes)
        }) && self.init.as_ref().is_none_or(Init::is_alive)
    }
}

impl Rooms {
    pub fn open(plan: Plan) -> io::Result<Self> {
        let plan = Arc::new(plan);
        let (sender, rooms) = sync_channel(AHEAD);
        let builder = std::thread::Builder::new()
            .name("rooms".to_owned())
            .spawn({
                let plan = plan.clone();
                move || {
                    let mut workshop = Workshop::open();
                    let mut next = || {
                        workshop
                            .as_mut()
                            .map_err(|error| error.clone())?
                            .furnish(&plan)
                    };
                    while sender.send(next()).is_ok() {}
                }
            })?;
        Ok(Rooms {
            plan,
            ready: Mutex::new(Some(Ready { rooms, builder })),
        })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// A room around the build directory that has this device and inode number.
    pub fn take(&self, build_directory: (u64, u64)) -> Result<Room, RoomError> {
        let mut last = None;
        let changes = self.plan.changes.count();
        // Each of those that are ready may be out of date, as may the one that is in the making.
        for _ in 0..AHEAD + 2 {
            let next = match &*self.ready.lock() {
                Some(ready) => ready.rooms.recv(),
                None => break,
            };
            match next {
                Ok(Ok(room)) if room.is_usable(build_directory, changes) => return Ok(room),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => last = Some(error),
                Err(_) => break,
            }
        }
        Err(last.unwrap_or_else(|| {
            RoomError::at("build directory")(io::Error::other(
                "it is replaced, or rooms are killed, all the time",
            ))
        }))
    }

    /// Removes all rooms that nobody is in; there will be no others.
    pub fn close(&self) {
        let ready = self.ready.lock().take();
        if let Some(Ready { rooms, builder }) = ready {
            drop(rooms);
            let _ = builder.join();
        }
        if let Some(cgroups) = &self.plan.cgroups {
            cgroups.close();
        }
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
