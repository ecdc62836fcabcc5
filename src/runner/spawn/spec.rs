//! All that an action's first process is made from, and what it does itself to get into its sandbox (`SetupStep`).
//! Nothing is left to decide once it exists.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
        move_mount, open_tree, unmount,
    },
    process::{Gid, chdir, pivot_root},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

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
    pub streams: [BorrowedFd<'a>; 3],
    /// Both uid and gid.
    pub user: u32,
    pub groups: &'a [Gid],
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

/// One thing that the process does before it loses its privileges.
#[derive(Debug)]
pub(crate) enum SetupStep<'a> {
    EnterNamespace(BorrowedFd<'a>, LinkNameSpaceType),
    /// What the host mounts from now on is not seen, as it would be writable.
    MakeMountsPrivate,
    /// Mounts a tree that is attached nowhere.
    AttachMount {
        tree: OwnedFd,
        place: CString,
    },
    /// Mounts a copy of the mounts from one path down on another one.
    CopyMount {
        from: CString,
        to: CString,
    },
    /// Makes what is mounted there its `/`, and unmounts all else.
    ChangeRoot(CString),
}

/// How far a process has come, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpawnStage {
    #[default]
    Namespaces,
    Mounts,
    Root,
    Session,
    Descriptors,
    Limits,
    InputRoot,
    Credentials,
    Filter,
    WorkingDirectory,
    Search,
    Execute,
    /// Instead of that, where an emulator is executed with the command as an argument.
    Emulate,
}

impl SetupStep<'_> {
    pub(super) fn stage(&self) -> SpawnStage {
        match self {
            SetupStep::EnterNamespace(..) => SpawnStage::Namespaces,
            SetupStep::MakeMountsPrivate | SetupStep::AttachMount { .. } => SpawnStage::Mounts,
            SetupStep::CopyMount { .. } | SetupStep::ChangeRoot(_) => SpawnStage::Root,
        }
    }

    /// For a new process (`sys`).
    pub(super) fn perform(&self) -> Result<(), Errno> {
        match self {
            SetupStep::EnterNamespace(namespace, kind) => {
                move_into_link_name_space(*namespace, Some(*kind))
            }
            SetupStep::MakeMountsPrivate => {
                let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                mount_change(c"/", flags)
            }
            SetupStep::AttachMount { tree, place } => attach(tree.as_fd(), place),
            SetupStep::CopyMount { from, to } => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE;
                attach(open_tree(CWD, from.as_c_str(), flags)?.as_fd(), to)
            }
            SetupStep::ChangeRoot(place) => {
                // The new root is put on top of the old one, which is then taken away from below it.
                chdir(place.as_c_str())?;
                pivot_root(c".", c".")?;
                unmount(c".", UnmountFlags::DETACH)
            }
        }
    }
}

fn attach(tree: BorrowedFd<'_>, place: &CStr) -> Result<(), Errno> {
    move_mount(
        tree,
        c"",
        CWD,
        place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}
