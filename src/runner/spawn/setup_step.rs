//! What a new process does itself to get into its sandbox, as data: the sandbox and the action's mounts say which
//! steps, and know nothing of processes; the process performs them, and knows no layer.

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
    process::{chdir, pivot_root},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::spawn_stage::SpawnStage;

/// One thing that the process does before it loses its privileges.
#[derive(Debug)]
pub(crate) enum SetupStep<'a> {
    /// Moves the process into a namespace of this kind.
    EnterNamespace(BorrowedFd<'a>, LinkNameSpaceType),
    /// Makes the propagation of all mounts private: what the host mounts from now on is not seen, as it would be
    /// writable.
    MakeMountsPrivate,
    /// Mounts a tree that is attached nowhere.
    AttachMount { tree: OwnedFd, mount_point: CString },
    /// Clones the mounts from one path down, and mounts the clone on another one.
    CopyMount { from: CString, to: CString },
    /// Makes what is mounted at a path its `/`, and unmounts all else.
    ChangeRoot(CString),
}

impl SetupStep<'_> {
    /// The stage at which it is performed.
    pub(super) fn stage(&self) -> SpawnStage {
        match self {
            SetupStep::EnterNamespace(..) => SpawnStage::Namespaces,
            SetupStep::MakeMountsPrivate | SetupStep::AttachMount { .. } => SpawnStage::Mounts,
            SetupStep::CopyMount { .. } | SetupStep::ChangeRoot(_) => SpawnStage::Root,
        }
    }

    /// Performs it, in a new process (`sys`).
    pub(super) fn perform(&self) -> Result<(), Errno> {
        match self {
            SetupStep::EnterNamespace(namespace, kind) => {
                move_into_link_name_space(*namespace, Some(*kind))
            }
            SetupStep::MakeMountsPrivate => {
                let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                mount_change(c"/", flags)
            }
            SetupStep::AttachMount { tree, mount_point } => attach(tree.as_fd(), mount_point),
            SetupStep::CopyMount { from, to } => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_RECURSIVE;
                attach(open_tree(CWD, from.as_c_str(), flags)?.as_fd(), to)
            }
            SetupStep::ChangeRoot(root) => {
                // The new root is put on top of the old one, which is then taken away from below it.
                chdir(root.as_c_str())?;
                pivot_root(c".", c".")?;
                unmount(c".", UnmountFlags::DETACH)
            }
        }
    }
}

/// Mounts a tree that is attached nowhere.
fn attach(tree: BorrowedFd<'_>, mount_point: &CStr) -> Result<(), Errno> {
    move_mount(
        tree,
        c"",
        CWD,
        mount_point,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}
