//! Mount calls: clones of mounts, their attributes, and new file systems in memory.
//!
//! Needs open_tree(2) and mount_setattr(2), of Linux 5.12. A tree that is attached nowhere belongs to whoever holds
//! its descriptor, and vanishes with that.

use std::{
    ffi::{CStr, CString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree},
};

use crate::runner::sys::{MountAttributes, mount_setattr};

/// Attributes and flags of mount_setattr(2), which libc lacks on glibc.
pub(super) const READ_ONLY: u64 = 0x1;
const NO_SET_USER_ID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
pub(super) const RECURSIVE: u32 = 0x8000;

/// Clones the mounts from a path down; the clone is attached nowhere.
pub(super) fn clone_tree_recursive(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// Clones the mount that an open directory is on, from there down, without what is mounted below. In the clone,
/// which is attached nowhere, propagation is private, and set-user-ID programs and devices do not work.
pub(crate) fn clone_mount_restricted(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
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
    mount_setattr(tree.as_fd(), c"", empty, &attributes)?;
    Ok(tree)
}

/// Mounts a tree at a path, over whatever is there.
pub(super) fn attach(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Sets and clears attributes of the mount at a path.
pub(super) fn set_attributes(path: &CStr, set: u64, clear: u64, flags: u32) -> io::Result<()> {
    let attributes = MountAttributes {
        set,
        clear,
        propagation: 0,
        user_namespace: 0,
    };
    mount_setattr(CWD, path, flags, &attributes)
}

/// Mounts a new, empty file system in memory; `options` are those of tmpfs(5), such as `mode=755,size=64k`.
pub(super) fn mount_tmpfs(mount_point: &Path, options: &CStr) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount("tmpfs", mount_point, "tmpfs", flags, Some(options))?)
}

/// Makes a directory to mount something on, if there is none.
pub(super) fn make_mount_point(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .or_else(|error| if path.is_dir() { Ok(()) } else { Err(error) })
}

/// A path for system calls that take C strings.
pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}
