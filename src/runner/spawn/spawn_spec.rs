//! All that an action's command process is made from. Nothing is left to decide once it exists.

use std::{
    ffi::{CStr, CString},
    os::fd::BorrowedFd,
};

use rustix::process::Gid;

use super::setup_step::SetupStep;

/// A process to be made. All descriptors are numbered 3 or above.
pub(crate) struct SpawnSpec<'a> {
    pub arguments: &'a [CString],
    pub environment: &'a [CString],
    /// Paths of the executable.
    pub executables: &'a [CString],
    /// Whether the first of `executables` that can be executed is meant, rather than the only one.
    pub search: bool,
    /// A program and arguments, before the command's; empty for none.
    pub emulator: &'a [CString],
    /// A path below the input root.
    pub working_directory: &'a CStr,
    /// A path below `base`.
    pub input_root: &'a CStr,
    pub base: PathBase<'a>,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// The number of its user and of its group.
    pub user: u32,
    pub supplementary_groups: &'a [Gid],
    /// The most processes that its user may have.
    pub process_limit: u64,
    pub inherited: InheritedState,
    /// The control group that it is in from its first instruction; `None` for this daemon's.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// `None` where it stays in this daemon's PID namespace.
    pub pid_namespaces: Option<PidNamespaces<'a>>,
    /// What its sandbox and its mounts have it do, in this order, while it has all privileges.
    pub setup: &'a [SetupStep<'a>],
    pub seccomp_filter: Option<&'a [libc::sock_filter]>,
}

/// Where the path of an input root starts.
#[derive(Clone, Copy)]
pub(crate) enum PathBase<'a> {
    /// An open directory: of the mount namespace that is entered, or of this daemon's own where none is.
    Directory(BorrowedFd<'a>),
    /// A path in the mount namespace that is entered, when everything is mounted.
    Path(&'a CStr),
}

/// The PID namespace that the process is to be in, and the one that this daemon is in.
#[derive(Clone, Copy)]
pub(crate) struct PidNamespaces<'a> {
    pub inside: BorrowedFd<'a>,
    pub daemon: BorrowedFd<'a>,
}

/// What this daemon has and its child would keep, as bit sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InheritedState {
    /// Signal 1 is bit 0.
    pub ignored_signals: u64,
    pub bounding_capabilities: u64,
}
