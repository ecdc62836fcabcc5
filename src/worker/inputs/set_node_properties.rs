//! Sets the modes and times of inputs that a client gives (REAPI: NodeProperties).
//!
//! 1. A root in which anything has such properties is made anew, of copies, and not kept: inodes that roots share have
//!    one mode and one time.
//! 2. The runner makes the action's user the owner of such a root, so that it may do what its files' owner
//!    may. A directory keeps the mode that lets actions write to it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};

use super::{directory_message::NodeProperties, merkle_tree::Node};

/// Gives everything in a root that was laid out the properties that it should have. The error names the
/// entry.
pub(super) fn set_all(root: BorrowedFd<'_>, tree: &Node) -> Result<(), (String, Errno)> {
    let error_at = |name: &str| {
        let name = name.to_owned();
        move |error| (name, error)
    };
    // The directories from the root down to one: of a tree as wide as a client likes, no more are open than it is deep.
    let mut open: Vec<(OwnedFd, &Node, usize)> = Vec::new();
    let root = rustix::io::fcntl_dupfd_cloexec(root, 0).map_err(error_at("."))?;
    open.push((root, tree, 0));
    while let Some((directory, node, next)) = open.last_mut() {
        let mut left = node.children[*next..].iter();
        if let Some(skipped) = left.position(|child| child.has_properties) {
            let place = *next + skipped;
            *next = place + 1;
            let (name, _) = &node.directory.directories[place];
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = rustix::fs::openat(&*directory, name.as_str(), flags, Mode::empty());
            let below = below.map_err(error_at(name.as_str()))?;
            let child = &node.children[place];
            open.push((below, child, 0));
            continue;
        }
        for (name, properties) in &node.directory.properties {
            let name = name.as_ref().map_or(".", |name| name.as_str());
            set(*properties, directory.as_fd(), name).map_err(error_at(name))?;
        }
        open.pop();
    }
    Ok(())
}

/// Gives one entry its properties; `.` is the directory itself.
fn set(properties: NodeProperties, directory: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if let Some(mode) = properties.unix_mode
        && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
    {
        // Whose user ID a file sets is not for the client to say.
        let mode = Mode::from_raw_mode(mode & 0o777);
        // Nothing follows a link here: it was just seen to be a file, and no action runs yet.
        rustix::fs::chmodat(directory, name, mode, AtFlags::empty())?;
    }
    if let Some((seconds, nanoseconds)) = properties.mtime {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: seconds,
                tv_nsec: nanoseconds.into(),
            },
        };
        rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}
