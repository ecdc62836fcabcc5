//! Rooms: what surrounds an action, prepared before it arrives and torn down after it was answered.
//!
//! 1. A room is one action's own: mounts, System V IPC, POSIX message queues, control group.
//! 2. In a room, every file system is read-only but the build directory, the `writable_directories`,
//!    /proc, and what is the room's own: /dev/shm, and the action's temporary directory on /tmp and
//!    /var/tmp. So an action leaves nothing on the host, whatever directories there are open to all.
//! 3. A room is bound to the build directory as it was; when the worker has made that anew, so are the
//!    rooms.
//!
//! Preparing a room takes about as long as an action's whole start (mount_namespaces(7) are copied
//! and torn down under locks of the whole kernel), hence ahead, on a thread of its own.

use std::{
    ffi::{CStr, CString},
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
        move_mount, open_tree,
    },
};

use super::{
    cgroup::{Cgroup, Cgroups},
    gate,
};
use crate::config::runner::Config;

/// Where the action's temporary directory appears.
const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];
const SHARED_MEMORY: &str = "/dev/shm";
/// Rooms that wait for actions.
const AHEAD: usize = 4;

/// What the host lets us build rooms from.
#[derive(Debug)]
pub struct Plan {
    build_directory: PathBuf,
    writable: Vec<PathBuf>,
    /// Existing places of `TEMPORARY`, without symbolic links, each once.
    temporary: Vec<PathBuf>,
    namespaces: bool,
    cgroups: Option<Cgroups>,
}

/// One action's surroundings.
#[derive(Debug)]
pub struct Room {
    pub namespaces: Option<Namespaces>,
    pub cgroup: Option<Cgroup>,
}

#[derive(Debug)]
pub struct Namespaces {
    pub mount: OwnedFd,
    pub ipc: OwnedFd,
    /// The build directory as it is inside.
    pub build_directory: OwnedFd,
    /// Its device and inode number.
    pub identity: (u64, u64),
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
    fn at(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |error| RoomError {
            step: step.into(),
            error: Arc::new(error),
        }
    }
}

impl Plan {
    pub fn new(config: &Config, namespaces: bool, cgroups: Option<Cgroups>) -> Self {
        let mut temporary: Vec<PathBuf> = TEMPORARY
            .iter()
            .filter_map(|place| fs::canonicalize(place).ok())
            .filter(|place| place.is_dir())
            .collect();
        temporary.dedup();
        Plan {
            build_directory: config.build_directory.clone(),
            writable: config.writable_directories.clone(),
            temporary,
            namespaces,
            cgroups,
        }
    }

    /// Directories that all actions share when rooms have no namespaces.
    pub fn shared(&self) -> Vec<PathBuf> {
        let mut shared = self.temporary.clone();
        shared.push(PathBuf::from(SHARED_MEMORY));
        shared
    }

    fn prepare(&self) -> Result<Room, RoomError> {
        let namespaces = match self.namespaces {
            true => Some(self.namespaces()?),
            false => None,
        };
        let cgroup = match &self.cgroups {
            Some(cgroups) => Some(cgroups.create().map_err(RoomError::at("control group"))?),
            None => None,
        };
        Ok(Room { namespaces, cgroup })
    }

    /// On a thread that ends with it: a thread that has left the host's namespaces is of no other use.
    pub fn namespaces(&self) -> Result<Namespaces, RoomError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("room".to_owned())
                .spawn_scoped(scope, || self.furnish())
                .map_err(RoomError::at("thread"))?;
            thread
                .join()
                .unwrap_or_else(|_| Err(RoomError::at("thread")(io::Error::other("it panicked"))))
        })
    }

    fn furnish(&self) -> Result<Namespaces, RoomError> {
        // SAFETY: takes a number; concerns this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC) } != 0 {
            return Err(RoomError::at("unshare")(io::Error::last_os_error()));
        }
        // What the host mounts and unmounts later is seen here too, and not the other way round.
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .map_err(|error| RoomError::at("mounts of its own")(error.into()))?;

        let mut writable = Vec::new();
        for path in self.writable.iter().chain([&self.build_directory]) {
            let at = || RoomError::at(path.to_string_lossy());
            let path = fs::canonicalize(path).map_err(at())?;
            let tree = copy_of_tree(&path).map_err(at())?;
            writable.push((path, tree));
        }
        set_attributes(c"/", READ_ONLY, 0, RECURSIVE).map_err(RoomError::at("read-only /"))?;
        // Processes write to their own files there: uid_map, oom_score_adj, ….
        match set_attributes(c"/proc", 0, READ_ONLY, 0) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => tracing::debug!(%error, "/proc stays read-only for actions"),
        }

        if Path::new(SHARED_MEMORY).is_dir() {
            private_tmpfs(Path::new(SHARED_MEMORY))?;
        }
        let mut temporary = Vec::new();
        for place in &self.temporary {
            let mut inside = writable
                .iter()
                .map(|(path, _)| path)
                .filter(|path| path.starts_with(place))
                .peekable();
            if inside.peek().is_some() {
                // The action's temporary directory here would hide it.
                private_tmpfs(place)?;
                for path in inside {
                    fs::DirBuilder::new()
                        .recursive(true)
                        .mode(0o755)
                        .create(path)
                        .map_err(RoomError::at(path.to_string_lossy()))?;
                }
            } else if let Ok(place) = CString::new(place.as_os_str().as_encoded_bytes()) {
                temporary.push(place);
            }
        }
        for (path, tree) in writable {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&tree, "", CWD, &path, flags)
                .map_err(|error| RoomError::at(path.to_string_lossy())(error.into()))?;
        }

        let open = |path: &Path, flags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| RoomError::at(path.to_string_lossy())(error.into()))
        };
        let build_directory = open(&self.build_directory, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Namespaces {
            mount: open(Path::new("/proc/thread-self/ns/mnt"), OFlags::RDONLY)?,
            ipc: open(Path::new("/proc/thread-self/ns/ipc"), OFlags::RDONLY)?,
            identity: gate::identity(&build_directory).map_err(RoomError::at("build directory"))?,
            build_directory,
            temporary,
        })
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
                move || while sender.send(plan.prepare()).is_ok() {}
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
        // Each of those that are ready may be out of date, as may the one that is in the making.
        for _ in 0..AHEAD + 2 {
            let next = match &*self.ready.lock() {
                Some(ready) => ready.rooms.recv(),
                None => break,
            };
            match next {
                Ok(Ok(room)) => match &room.namespaces {
                    Some(namespaces) if namespaces.identity != build_directory => {}
                    _ => return Ok(room),
                },
                Ok(Err(error)) => last = Some(error),
                Err(_) => break,
            }
        }
        Err(last.unwrap_or_else(|| {
            RoomError::at("build directory")(io::Error::other("it is replaced all the time"))
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

/// mount_setattr(2); libc lacks its words on glibc.
const READ_ONLY: u64 = 0x1;
const NO_SET_USER_ID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const RECURSIVE: u32 = 0x8000;

#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// A copy of the mounts from a directory down.
fn copy_of_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// A copy of the mount that an open directory is on, from there down: private to whoever mounts it,
/// without set-user-ID programs and devices.
pub fn copy_of_directory(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(directory, "", flags)?;
    let attributes = MountAttributes {
        set: NO_SET_USER_ID | NO_DEVICES,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        user_namespace: 0,
    };
    let empty = libc::AT_EMPTY_PATH as u32;
    mount_setattr(tree.as_raw_fd(), c"", empty, &attributes)?;
    Ok(tree)
}

fn set_attributes(path: &CStr, set: u64, clear: u64, flags: u32) -> io::Result<()> {
    let attributes = MountAttributes {
        set,
        clear,
        propagation: 0,
        user_namespace: 0,
    };
    mount_setattr(libc::AT_FDCWD, path, flags, &attributes)
}

fn mount_setattr(
    directory: RawFd,
    path: &CStr,
    flags: u32,
    attributes: &MountAttributes,
) -> io::Result<()> {
    // SAFETY: path and attributes live during the call, and the size is that of the latter.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn private_tmpfs(place: &Path) -> Result<(), RoomError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", place, "tmpfs", flags, Some(c"mode=1777"))
        .map_err(|error| RoomError::at(format!("tmpfs on {}", place.display()))(error.into()))
}
