//! Words for mounts: copies of trees, their attributes, and private file systems.
//!
//! The new system calls are used where they exist since Linux 5.12: a tree that is not attached
//! anywhere belongs to whoever holds it, and vanishes with its descriptor.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree},
};

/// mount_setattr(2); libc lacks its words on glibc.
pub const READ_ONLY: u64 = 0x1;
pub const NO_SET_USER_ID: u64 = 0x2;
pub const NO_DEVICES: u64 = 0x4;
pub const RECURSIVE: u32 = 0x8000;

#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// A copy of the mounts from a path down.
pub fn copy_of_tree(path: &Path) -> io::Result<OwnedFd> {
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

/// Mounts a tree at a path, over whatever is there.
pub fn attach(tree: &OwnedFd, path: &Path) -> io::Result<()> {
    move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

pub fn set_attributes(path: &CStr, set: u64, clear: u64, flags: u32) -> io::Result<()> {
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

/// A new, empty file system in memory; `mode` is that of its root, such as `mode=1777`.
pub fn private_tmpfs(place: &Path, mode: &CStr) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount("tmpfs", place, "tmpfs", flags, Some(mode))?)
}
