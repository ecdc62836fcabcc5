//! An action's resource limits (getrlimit(2)): at most these, however high this daemon's own are; where
//! the daemon was started with lower hard ones, those. Some bound what the kernel counts by user, and so by action,
//! as each has a user of its own; the others bound each process.
//!
//! What the kernel counts for nobody is in bb-remote-execution(7), "What is not stopped".

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// The most of each resource, as soft and as hard limit.
const LIMITS: [(Resource, u64); 6] = [
    (Resource::Core, 0),
    // Bytes of memory that cannot be swapped, and of POSIX message queues: the kernel's defaults.
    (Resource::Memlock, 8 << 20),
    (Resource::Msgqueue, 819_200),
    // Signals that wait to be delivered, and timers.
    (Resource::Sigpending, 65_536),
    // Nobody runs before others.
    (Resource::Rtprio, 0),
    (Resource::Nice, 0),
];

/// The soft and the hard limit of open files, as systemd gives them to services and sessions
/// (systemd-system.conf(5), DefaultLimitNOFILE=): programs that use select(2) rely on the soft one.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Sets all limits but that of open files. For a new process (`sys`).
pub(super) fn limit_resources(processes: u64) -> Result<(), Errno> {
    for (resource, most) in LIMITS {
        lower(resource, most, most)?;
    }
    lower(Resource::Nproc, processes, processes)
}

/// Sets the limit of open files. For a new process (`sys`), which cannot open more than that afterwards.
pub(super) fn limit_open_files() -> Result<(), Errno> {
    lower(Resource::Nofile, OPEN_FILES.0, OPEN_FILES.1)
}

/// Sets the soft and the hard limit of a resource, neither above this process's hard limit.
fn lower(resource: Resource, soft: u64, hard: u64) -> Result<(), Errno> {
    let maximum = getrlimit(resource).maximum.unwrap_or(u64::MAX).min(hard);
    setrlimit(
        resource,
        Rlimit {
            current: Some(soft.min(maximum)),
            maximum: Some(maximum),
        },
    )
}
