//! What a configuration may say about a disk: sizes that fit, and paths that are there.

use std::path::{Path, PathBuf};

use super::Installation;
use crate::config::{Diagnostics, Size};

/// A file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// All of it.
    pub total: u64,
    /// For users who are not root.
    pub available: u64,
}

/// The closest directory above `path`, or `path` itself, that exists.
pub fn nearest_directory(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|ancestor| ancestor.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// What keeps a directory from being made at `path`, or is there in its place: `path` or the closest
/// above it that exists, when that is no directory.
pub fn blocking_path(path: &Path) -> Option<&Path> {
    path.ancestors()
        .find(|ancestor| std::fs::symlink_metadata(ancestor).is_ok())
        .filter(|found| !found.is_dir())
}

/// The disk that a directory is on, or will be.
pub fn space(path: &Path) -> Option<DiskSpace> {
    let stat = rustix::fs::statvfs(nearest_directory(path)).ok()?;
    Some(DiskSpace {
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
        available: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// Whole mebibytes, for people.
pub fn rounded_to_mib(bytes: u64) -> Size {
    Size(bytes >> 20 << 20)
}

impl Installation {
    /// A size that somebody wrote must fit on the whole disk; a default adapts.
    pub fn check_size(
        &self,
        key: &str,
        size: Size,
        directory: &Path,
        diagnostics: &mut Diagnostics,
    ) {
        if self.explicit_keys().contains(key)
            && let Some(disk) = space(directory)
            && size.get() > disk.total
        {
            diagnostics.add(
                key,
                format!(
                    "{size} is more than the whole disk of {} has, {}; lower it, or choose a larger disk",
                    directory.display(),
                    rounded_to_mib(disk.total)
                ),
            );
        }
    }

    /// Addresses of systemd's sockets win. Before the sockets are taken.
    pub fn check_socket(
        &self,
        name: &str,
        unit: &str,
        key: &'static str,
        address: &crate::config::ListenAddress,
        diagnostics: &mut Diagnostics,
    ) {
        if let Some(sockets) = super::listen::passed(name)
            && self.explicit_keys().contains(key)
            && !sockets.contains(address)
        {
            let sockets: Vec<String> = sockets.iter().map(ToString::to_string).collect();
            diagnostics.add(
                key,
                super::check::overridden(address, unit, &sockets.join(" and ")),
            );
        }
    }
}
