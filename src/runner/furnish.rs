//! What is in a room, as the list of steps that it is.
//!
//! 1. Every file system is read-only but the action's own directories, the `writable_directories`,
//!    /proc, and what is the room's own in memory. So an action leaves nothing on the host, whatever
//!    directories there are open to all.
//! 2. An action's gate (see `gate`) is mounted on the build directory when it starts, so that its
//!    paths are the same in every slot and it sees nobody else's.
//! 3. Hidden paths are empty; what must be seen below them is mounted there again.
//!
//! It runs on a thread of its own, which is in the namespaces that it makes, and ends with it.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change},
};

use super::{
    gate,
    init::Init,
    layer::Layer,
    mount::{READ_ONLY, RECURSIVE, attach, copy_of_tree, private_tmpfs, set_attributes},
    network::Network,
    room::{Mounts, Plan, Room, RoomError, SHARED_MEMORY, enter, open_namespace},
};

/// Kinds of namespaces: the layer, the flag, the name in /proc.
const KINDS: [(Layer, libc::c_int, &str); 3] = [
    (Layer::Mounts, libc::CLONE_NEWNS, "mnt"),
    (Layer::Ipc, libc::CLONE_NEWIPC, "ipc"),
    (Layer::Hostname, libc::CLONE_NEWUTS, "uts"),
];

/// What programs may expect in /dev, besides links, terminals and shared memory.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// What every host calls itself, and /etc/hosts knows.
const HOSTNAME: &str = "localhost";

/// Everything but the control group.
pub fn furnish(plan: &Plan, cgroup: Option<BorrowedFd<'_>>) -> Result<Room, RoomError> {
    let mut room = Room {
        init: None,
        namespaces: Vec::new(),
        mounts: None,
        network: None,
        cgroup: None,
    };
    if plan.layers.has(Layer::Network) {
        room.network = Some(join_network(plan).map_err(RoomError::at("network namespace"))?);
    }
    unshare(plan).map_err(RoomError::at("unshare"))?;
    // While /proc is still the host's.
    for (layer, flag, name) in KINDS {
        if plan.layers.has(layer) {
            let namespace = open_namespace(name).map_err(RoomError::at(name))?;
            room.namespaces.push((namespace, flag));
        }
    }
    if let Some(network) = &room.network {
        let namespace = network
            .namespace()
            .map_err(RoomError::at("network namespace"))?;
        room.namespaces.push((namespace, libc::CLONE_NEWNET));
    }
    if plan.layers.has(Layer::Hostname) {
        nix::unistd::sethostname(HOSTNAME)
            .map_err(|error| RoomError::at("host name")(error.into()))?;
    }
    if plan.layers.has(Layer::Mounts) {
        room.mounts = Some(mounts(plan)?);
    }
    if let Some(program) = &plan.init {
        let init = Init::start(program, cgroup).map_err(RoomError::at("process namespace"))?;
        room.init = Some(init);
    }
    Ok(room)
}

fn join_network(plan: &Plan) -> io::Result<Network> {
    let network = plan.networks.take()?;
    enter(network.namespace()?, libc::CLONE_NEWNET)?;
    Ok(network)
}

fn unshare(plan: &Plan) -> io::Result<()> {
    let flags = KINDS
        .iter()
        .filter(|(layer, ..)| plan.layers.has(*layer))
        .fold(0, |flags, (_, flag, _)| flags | flag);
    // SAFETY: takes a number; concerns this thread only.
    match unsafe { libc::unshare(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mounts(plan: &Plan) -> Result<Mounts, RoomError> {
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
    } else if Path::new(SHARED_MEMORY).is_dir() {
        private_tmpfs(Path::new(SHARED_MEMORY), c"mode=1777")
            .map_err(RoomError::at(SHARED_MEMORY))?;
    }
    let masks = match plan.layers.has(Layer::Hidden) {
        true => hide(plan, &writable)?,
        false => Vec::new(),
    };
    let temporary = temporary_directories(plan, &writable)?;
    for (path, tree) in &writable {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .or_else(|error| if path.is_dir() { Ok(()) } else { Err(error) })
            .and_then(|()| attach(tree, path))
            .map_err(RoomError::at(path.to_string_lossy()))?;
    }
    for mask in &masks {
        set_attributes(mask, READ_ONLY, 0, 0)
            .map_err(RoomError::at(mask.to_string_lossy().into_owned()))?;
    }

    let place =
        fs::canonicalize(&plan.build_directory).map_err(RoomError::at("build directory"))?;
    let build_directory = rustix::fs::open(
        &place,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(at("build directory"))?;
    Ok(Mounts {
        identity: gate::identity(&build_directory).map_err(RoomError::at("build directory"))?,
        build_directory,
        place: c_path(&place).map_err(RoomError::at("build directory"))?,
        temporary,
    })
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

/// A /dev with nothing in it that is the host's alone.
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
    private_tmpfs(Path::new(SHARED_MEMORY), c"mode=1777").map_err(RoomError::at(SHARED_MEMORY))?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount("devpts", "/dev/pts", "devpts", flags, Some(options)).map_err(at("/dev/pts"))?;
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

fn temporary_directories(
    plan: &Plan,
    writable: &[(PathBuf, OwnedFd)],
) -> Result<Vec<CString>, RoomError> {
    let mut temporary = Vec::new();
    for place in &plan.temporary {
        if writable.iter().any(|(path, _)| path.starts_with(place)) {
            // The action's temporary directory here would hide it.
            private_tmpfs(place, c"mode=1777").map_err(RoomError::at(place.to_string_lossy()))?;
        } else {
            temporary.push(c_path(place).map_err(RoomError::at("temporary directory"))?);
        }
    }
    Ok(temporary)
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

fn at(step: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> RoomError {
    |error| RoomError::at(step)(error.into())
}
