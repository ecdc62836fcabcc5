//! The layer `containment.devices`: a /dev with null, zero, full, random, urandom and tty only, and an instance of
//! devpts for each action.
//!
//! The kernel counts pseudo-terminals once for the whole host, so that each action has a share.

use std::{
    ffi::CString,
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::symlink,
    },
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount, mount_bind},
};

use super::{
    containment_layer::{Layer, Layers, Probe},
    error::SandboxError,
    mount_calls::{READ_ONLY, mount_tmpfs, set_attributes},
};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::DEVICES,
    key: "containment.devices",
    demand: |containment| containment.devices,
    needs: Layers::MOUNTS,
    probe: Probe::Sandbox,
    unshared_namespace: None,
    on: "actions have a /dev of their own with null, zero, full, random, urandom, tty and terminals",
    off: "actions see the host's devices, as far as their permissions let them",
};

/// What programs may expect in /dev, besides links, terminals and shared memory.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Links in /dev, and what they lead to.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the /dev of all sandboxes, on a thread that is in their template: shm and pts are empty.
pub(super) fn prepare_template() -> Result<(), SandboxError> {
    let dev = Path::new("/dev");
    let mut originals: Vec<(&str, OwnedFd)> = Vec::new();
    for name in DEVICES {
        let path = dev.join(name);
        match rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(original) => originals.push((name, original)),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(SandboxError::at(path.to_string_lossy())(error)),
        }
    }
    // Device files on it are binds of the host's, whose own mount says that devices work.
    mount_tmpfs(dev, c"mode=755,size=64k").map_err(SandboxError::at("/dev"))?;
    for (name, original) in &originals {
        let path = dev.join(name);
        fs::File::create(&path).map_err(SandboxError::at(path.to_string_lossy()))?;
        let source = format!("/proc/thread-self/fd/{}", original.as_raw_fd());
        mount_bind(&source, &path).map_err(SandboxError::at(path.to_string_lossy()))?;
    }
    for (name, target) in LINKS {
        symlink(target, dev.join(name)).map_err(SandboxError::at(name))?;
    }
    for name in ["shm", "pts"] {
        fs::create_dir(dev.join(name)).map_err(SandboxError::at(name))?;
    }
    set_attributes(c"/dev", READ_ONLY, 0, 0).map_err(SandboxError::at("/dev"))
}

/// Gives one sandbox so many terminals, on a thread that is in it.
pub(super) fn prepare(terminals: u32) -> Result<(), SandboxError> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = format!("newinstance,ptmxmode=0666,mode=0620,gid=5,max={terminals}");
    let options = CString::new(options).unwrap_or_default();
    mount("devpts", "/dev/pts", "devpts", flags, Some(&*options))
        .map_err(SandboxError::at("/dev/pts"))
}

/// The least and the most terminals of an action: some for each, and enough for any test of terminals.
const TERMINALS: (u32, u32) = (8, 64);

/// How many pseudo-terminals one action may have (pts(4): kernel.pty).
pub(super) fn terminals(users: u32) -> u32 {
    let number = |name| {
        let text = fs::read_to_string(format!("/proc/sys/kernel/pty/{name}")).ok()?;
        text.trim().parse::<u32>().ok()
    };
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let all = number("max").unwrap_or(4096);
    share(all, number("reserve").unwrap_or(1024), processors, users)
}

/// One action's share of all terminals. As workers run one action for each processor, unless told otherwise, twice
/// as many have a share. The kernel keeps the reserve for mounts of the host's own.
fn share(all: u32, reserve: u32, processors: u32, users: u32) -> u32 {
    let actions = users.min(processors.saturating_mul(2)).max(1);
    (all.saturating_sub(reserve) / actions).clamp(TERMINALS.0, TERMINALS.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_as_many_actions_as_processors_leave_terminals_for_each_other() {
        for (processors, users, expected) in [
            (2, 256, 64),
            (32, 256, 48),
            (128, 256, 12),
            (500, 500, 8),
            (128, 1, 64),
        ] {
            let share = share(4096, 1024, processors, users);
            assert_eq!(share, expected);
        }
        assert_eq!(share(16, 1024, 4, 4), 8);
    }
}
