//! Extended attributes (xattr(7)), ACLs among them, that an action may have set.

use std::{io, os::fd::BorrowedFd};

use rustix::io::Errno;

/// More than the kernel tells of one file (XATTR_LIST_MAX).
const LIST_SIZE: usize = 64 << 10;
/// So many bytes of names suffice for what nobody touched.
const SHORT_LIST_SIZE: usize = 512;

/// Whether there is none but those that only the kernel's security modules may set.
pub(super) fn has_none(fd: BorrowedFd<'_>) -> bool {
    let mut list = [0; SHORT_LIST_SIZE];
    match rustix::fs::flistxattr(fd, &mut list[..]) {
        Ok(length) => names(&list[..length]).next().is_none(),
        Err(error) => error == Errno::OPNOTSUPP,
    }
}

/// Removes all but those that only the kernel's security modules may set.
pub(super) fn remove_all(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut list = vec![0; LIST_SIZE];
    let length = match rustix::fs::flistxattr(fd, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names(&list[..length]) {
        rustix::fs::fremovexattr(fd, name)?;
    }
    Ok(())
}

fn names(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !name.starts_with(b"security."))
}
