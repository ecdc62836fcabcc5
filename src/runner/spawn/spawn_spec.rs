//! All that an action's first process is made from. Nothing is left to decide once it exists.

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
    pub executables: &'a [CString],
    /// Whether the first of these that can be executed is meant, rather than the only one.
    pub search: bool,
    /// A program and arguments, before the command's; empty for none.
    pub emulator: &'a [CString],
    /// Below the input root.
    pub working_directory: &'a CStr,
    /// Below `base`.
    pub input_root: &'a CStr,
    pub base: PathBase<'a>,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Both uid and gid.
    pub user: u32,
    pub supplementary_groups: &'a [Gid],
    /// The most processes that its user may have.
    pub process_limit: u64,
    pub inherited: InheritedState,
    /// The control group that it is in from its first instruction.
    pub cgroup: Option<BorrowedFd<'a>>,
    pub pid_namespaces: Option<PidNamespaces<'a>>,
    /// What the layers of its sandbox have it do, in this order, while it has all privileges.
    pub setup: &'a [SetupStep<'a>],
    pub seccomp_filter: Option<&'a [libc::sock_filter]>,
}

/// Where the path of an input root starts.
#[derive(Clone, Copy)]
pub(crate) enum PathBase<'a> {
    /// An open directory: of the namespaces that are entered, or of this daemon's own where there are none.
    Directory(BorrowedFd<'a>),
    /// A path in them, when everything is mounted.
    Path(&'a CStr),
}

/// The PID namespace that the process is to be in, and the one that this daemon is in.
#[derive(Clone, Copy)]
pub(crate) struct PidNamespaces<'a> {
    pub inside: BorrowedFd<'a>,
    pub daemon: BorrowedFd<'a>,
}

/// What this daemon has and its child would keep; bit sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InheritedState {
    /// Signal 1 is bit 0.
    pub ignored_signals: u64,
    pub bounding_capabilities: u64,
}
