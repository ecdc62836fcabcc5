//! What all rooms have in common: a mount namespace that each room's is a copy of (mount_namespaces(7)).
//!
//! 1. Every file system is read-only but the build directory, the `writable_directories`, /proc, and
//!    what each room has of its own in memory. So an action leaves nothing on the host, whatever
//!    directories there are open to all.
//! 2. Hidden paths are empty; what must be seen below them is mounted there again. So is the place of
//!    control groups, where each room has its own group mounted (`init`).
//! 3. It is of one moment: when something was mounted on the host since, or the directories that it
//!    is about were made anew, then another must be made, which `Moment` tells.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt, symlink},
    },
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change},
};

use super::{
    layer::Layer,
    mount::{READ_ONLY, RECURSIVE, attach, copy_of_tree, private_tmpfs, set_attributes},
    room::{Plan, RoomError, SHARED_MEMORY, open_namespace, unshare},
};

/// As `child::first` has it.
const CGROUPS: &str = "/sys/fs/cgroup";
/// What programs may expect in /dev, besides links, terminals and shared memory.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// The namespace, and what is to be done in a copy of it.
#[derive(Debug)]
pub struct Template {
    pub namespace: OwnedFd,
    pub moment: Moment,
    pub fresh: Vec<Fresh>,
    /// The place of the build directory.
    pub place: CString,
    /// Where the action's temporary directory is to be mounted.
    pub temporary: Vec<CString>,
}

/// A directory that is new and empty in each room, but for those mounts.
#[derive(Debug)]
pub struct Fresh {
    pub place: PathBuf,
    pub keeps: Vec<PathBuf>,
}

/// When a template was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    mounts: u64,
    /// Devices and inode numbers, where they exist.
    directories: Vec<Option<(u64, u64)>>,
}

/// Counts changes of this daemon's mounts.
#[derive(Debug)]
pub struct Changes(Mutex<(fs::File, u64)>);

impl Changes {
    /// On a thread that is in the daemon's own mount namespace.
    pub fn watch() -> io::Result<Self> {
        let table = fs::File::open("/proc/thread-self/mountinfo")?;
        Ok(Changes(Mutex::new((table, 0))))
    }

    pub fn count(&self) -> u64 {
        let (table, count) = &mut *self.0.lock();
        // proc_pid_mountinfo(5): an open table is an exceptional condition once after each change.
        let mut fds = [PollFd::new(&*table, PollFlags::PRI)];
        if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
            *count += 1;
        }
        *count
    }
}

impl Moment {
    /// On a thread that is in the daemon's own mount namespace.
    pub fn now(plan: &Plan) -> Self {
        let mounts = plan.changes.count();
        let root = plan.image.as_deref().unwrap_or(Path::new("/"));
        let hidden = plan.hidden.iter().map(|path| {
            let below = path.strip_prefix("/").unwrap_or(path);
            fs::metadata(root.join(below))
        });
        let directories = [&plan.build_directory]
            .into_iter()
            .chain(&plan.writable)
            .map(fs::metadata)
            .chain(hidden)
            .map(|metadata| metadata.ok().map(|it| (it.dev(), it.ino())))
            .collect();
        Moment {
            mounts,
            directories,
        }
    }

    /// Whether nothing was mounted since.
    pub fn has_mounts_of(&self, changes: u64) -> bool {
        self.mounts >= changes
    }
}

impl Template {
    /// On a thread that is in the daemon's own mount namespace; leaves it in the template.
    pub fn make(plan: &Plan, moment: Moment) -> Result<Self, RoomError> {
        unshare(libc::CLONE_NEWNS).map_err(RoomError::at("unshare"))?;
        let namespace = open_namespace("mnt").map_err(RoomError::at("mnt"))?;
        // What the host mounts and unmounts later is seen here too, and not the other way round.
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .map_err(at("mounts of its own"))?;

        let mut writable = Vec::new();
        for path in plan.writable.iter().chain([&plan.build_directory]) {
            let named = || RoomError::at(path.to_string_lossy());
            let path = fs::canonicalize(path).map_err(named())?;
            let tree = copy_of_tree(&path).map_err(named())?;
            writable.push((path, tree));
        }
        if let Some(image) = &plan.image {
            enter_image(image)?;
        }
        set_attributes(c"/", READ_ONLY, 0, RECURSIVE).map_err(RoomError::at("read-only /"))?;
        if !plan.layers.has(Layer::Processes) {
            // Processes write to their own files there: uid_map, oom_score_adj, ….
            match set_attributes(c"/proc", 0, READ_ONLY, 0) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => tracing::debug!(%error, "/proc stays read-only for actions"),
            }
        }
        if plan.layers.has(Layer::Devices) {
            devices()?;
        }
        let masks = match plan.layers.has(Layer::Hidden) {
            true => hide(plan, &writable)?,
            false => Vec::new(),
        };
        if plan.cgroups.is_some() && Path::new(CGROUPS).is_dir() {
            private_tmpfs(Path::new(CGROUPS), c"mode=755,size=64k")
                .map_err(RoomError::at(CGROUPS))?;
            set_attributes(c"/sys/fs/cgroup", READ_ONLY, 0, 0).map_err(RoomError::at(CGROUPS))?;
        }
        let (fresh, temporary) = fresh(plan, &writable)?;
        for (path, tree) in &writable {
            make_place(path)
                .and_then(|()| attach(tree, path))
                .map_err(RoomError::at(path.to_string_lossy()))?;
        }
        for mask in &masks {
            set_attributes(mask, READ_ONLY, 0, 0)
                .map_err(RoomError::at(mask.to_string_lossy().into_owned()))?;
        }
        let place = fs::canonicalize(&plan.build_directory)
            .and_then(|place| c_path(&place))
            .map_err(RoomError::at("build directory"))?;
        Ok(Template {
            namespace,
            moment,
            fresh,
            place,
            temporary,
        })
    }
}

/// A directory to mount something on, if there is none.
pub fn make_place(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .or_else(|error| if path.is_dir() { Ok(()) } else { Err(error) })
}

/// What each room has of its own in memory, and where the action's temporary directory is mounted.
fn fresh(
    plan: &Plan,
    writable: &[(PathBuf, OwnedFd)],
) -> Result<(Vec<Fresh>, Vec<CString>), RoomError> {
    let mut fresh = Vec::new();
    let mut temporary = Vec::new();
    let below = |place: &Path| -> Vec<PathBuf> {
        let paths = writable.iter().map(|(path, _)| path);
        paths
            .filter(|path| path.starts_with(place))
            .cloned()
            .collect()
    };
    for place in &plan.temporary {
        // The action's temporary directory there would hide it.
        let keeps = below(place);
        if keeps.is_empty() {
            temporary.push(c_path(place).map_err(RoomError::at("temporary directory"))?);
        } else {
            fresh.push(Fresh {
                place: place.clone(),
                keeps,
            });
        }
    }
    let place = PathBuf::from(SHARED_MEMORY);
    if place.is_dir() {
        let keeps = below(&place);
        fresh.push(Fresh { place, keeps });
    }
    for Fresh { place, keeps } in &fresh {
        if !keeps.is_empty() {
            private_tmpfs(place, c"mode=1777").map_err(RoomError::at(place.to_string_lossy()))?;
        }
    }
    Ok((fresh, temporary))
}

/// Makes a tree of files this thread's root, with the host's /proc, /sys and /dev for now.
fn enter_image(image: &Path) -> Result<(), RoomError> {
    let named = |path: &Path| RoomError::at(path.to_string_lossy().into_owned());
    let tree = copy_of_tree(image).map_err(named(image))?;
    attach(&tree, image).map_err(named(image))?;
    for directory in ["proc", "sys", "dev"] {
        let place = image.join(directory);
        let tree = copy_of_tree(&Path::new("/").join(directory)).map_err(named(&place))?;
        attach(&tree, &place).map_err(named(&place))?;
    }
    // The new root on top of the old one, which is then taken from below it (pivot_root(2)). The
    // working directory is this thread's own since it left the host's mounts.
    rustix::process::chdir(image).map_err(at(image.to_string_lossy()))?;
    rustix::process::pivot_root(".", ".").map_err(at(image.to_string_lossy()))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at("the host's root"))?;
    Ok(())
}

/// A /dev with nothing in it that is the host's alone, nor one action's: shm and pts are empty.
fn devices() -> Result<(), RoomError> {
    let dev = Path::new("/dev");
    let mut originals: Vec<(&str, OwnedFd)> = Vec::new();
    for name in DEVICES {
        let path = dev.join(name);
        match rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(original) => originals.push((name, original)),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(at(path.to_string_lossy())(error)),
        }
    }
    // Device files on it are binds of the host's, whose own mount says that devices work.
    private_tmpfs(dev, c"mode=755,size=64k").map_err(RoomError::at("/dev"))?;
    for (name, original) in &originals {
        use std::os::fd::AsRawFd;
        let path = dev.join(name);
        let named = || RoomError::at(path.to_string_lossy());
        fs::File::create(&path).map_err(named())?;
        let source = format!("/proc/thread-self/fd/{}", original.as_raw_fd());
        mount_bind(&source, &path).map_err(at(path.to_string_lossy()))?;
    }
    for (name, target) in LINKS {
        symlink(target, dev.join(name)).map_err(RoomError::at(name))?;
    }
    for name in ["shm", "pts"] {
        fs::create_dir(dev.join(name)).map_err(RoomError::at(name))?;
    }
    set_attributes(c"/dev", READ_ONLY, 0, 0).map_err(RoomError::at("/dev"))
}

/// Covers what actions must not see. What is returned must be made read-only when everything that
/// is to be seen there is mounted.
fn hide(plan: &Plan, writable: &[(PathBuf, OwnedFd)]) -> Result<Vec<CString>, RoomError> {
    let mut masks: Vec<CString> = Vec::new();
    for path in &plan.hidden {
        let Ok(path) = fs::canonicalize(path) else {
            continue;
        };
        // What is to be seen as a whole cannot be hidden.
        if writable.iter().any(|(seen, _)| path.starts_with(seen)) {
            continue;
        }
        let named = || RoomError::at(format!("hide {}", path.display()));
        if path.is_dir() {
            private_tmpfs(&path, c"mode=755,size=64k").map_err(named())?;
            masks.push(c_path(&path).map_err(named())?);
        } else {
            mount_bind("/dev/null", &path).map_err(|error| named()(error.into()))?;
        }
    }
    Ok(masks)
}

pub fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

pub fn at(step: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> RoomError {
    |error| RoomError::at(step)(error.into())
}
