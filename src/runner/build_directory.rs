//! The build directory, which a worker lays out actions in.
//!
//! Every path is opened beneath it, and through no symbolic link.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, fchmod, fstat, openat2};

use super::{run_spec::StdioPath, sandbox::DirectoryId};
use crate::path::RelativePath;

/// How every path is opened.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The build directory as it was when it was opened: a worker may make it anew.
pub(super) struct BuildDirectory {
    directory: OwnedFd,
}

/// Why a path of the build directory could not be opened; the worker must act, or the administrator.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildDirectoryError {
    #[error("Failed to open build directory {path:?}: {error}")]
    BuildDirectory { path: PathBuf, error: io::Error },
    #[error("Failed to open directory {path:?} in build directory: {error}")]
    Directory { path: String, error: io::Error },
    #[error("Failed to open {} path {:?}: {}", .stdio.stream, .stdio.text, stdio_reason(.error))]
    Stdio { stdio: StdioPath, error: io::Error },
}

impl BuildDirectoryError {
    /// Whether the caller sent a path that leads elsewhere.
    pub(super) fn escapes(&self) -> bool {
        match self {
            BuildDirectoryError::BuildDirectory { .. } => false,
            BuildDirectoryError::Stdio { error, .. }
            | BuildDirectoryError::Directory { error, .. } => leads_away(error),
        }
    }
}

/// Whether openat2(2) refused a path since it leads out of the build directory, or through a symbolic link.
fn leads_away(error: &io::Error) -> bool {
    // EXDEV for a `..` that leads out of it, and ELOOP for a symbolic link on the way.
    matches!(error.raw_os_error(), Some(libc::EXDEV | libc::ELOOP))
}

fn stdio_reason(error: &io::Error) -> String {
    if leads_away(error) {
        "Path resolves to a location outside the build directory".to_owned()
    } else {
        error.to_string()
    }
}

impl BuildDirectory {
    pub(super) fn open(path: &Path) -> Result<Self, BuildDirectoryError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(directory) => Ok(BuildDirectory { directory }),
            Err(error) => Err(BuildDirectoryError::BuildDirectory {
                path: path.to_owned(),
                error: error.into(),
            }),
        }
    }

    /// Which directory it is, whatever its path leads to now.
    pub(super) fn identity(&self) -> io::Result<DirectoryId> {
        DirectoryId::of_descriptor(self.directory.as_fd())
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Fails unless something is at this path; a symbolic link is something.
    pub(super) fn check(&self, path: &RelativePath) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(
            &self.directory,
            path.to_string(),
            flags,
            Mode::empty(),
            BENEATH,
        )?;
        Ok(())
    }

    /// Opens a directory beneath it.
    pub(super) fn directory(
        &self,
        path: &RelativePath,
        flags: OFlags,
    ) -> Result<OwnedFd, BuildDirectoryError> {
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(
            &self.directory,
            path.to_string(),
            flags,
            Mode::empty(),
            BENEATH,
        )
        .map_err(|error| BuildDirectoryError::Directory {
            path: path.to_string(),
            error: error.into(),
        })
    }

    /// Makes a file for a command's standard output or error. The action may open it again, as /dev/stderr;
    /// others are kept out by the action's directory.
    pub(super) fn create_stdio_file(
        &self,
        stdio: &StdioPath,
    ) -> Result<OwnedFd, BuildDirectoryError> {
        let parts = stdio.path.split_last().ok_or(rustix::io::Errno::ISDIR);
        let created = parts.and_then(|(parent, name)| self.create(&parent, name.as_str(), 0o666));
        created.map_err(|error| BuildDirectoryError::Stdio {
            stdio: stdio.clone(),
            error: error.into(),
        })
    }

    /// Makes a server log, for whoever reads an action's logs, in a directory that the action could write to.
    pub(super) fn create_server_log(
        &self,
        directory: &RelativePath,
        name: &str,
    ) -> io::Result<OwnedFd> {
        Ok(self.create(directory, name, 0o644)?)
    }

    /// Makes a file that was not there, of exactly this mode.
    fn create(&self, parent: &RelativePath, name: &str, mode: u32) -> rustix::io::Result<OwnedFd> {
        let parent = openat2(
            &self.directory,
            parent.to_string(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            BENEATH,
        )?;
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL;
        let file = openat2(
            &parent,
            name,
            flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(mode),
            BENEATH,
        )?;
        // The umask, or a default ACL, may have taken something away; each change of a file
        // costs as much as making one.
        if fstat(&file)?.st_mode & 0o777 != mode {
            fchmod(&file, Mode::from_raw_mode(mode))?;
        }
        Ok(file)
    }
}

/// The first directory on the way to the build directory, or that itself, which actions' users cannot pass.
pub(super) fn first_impassable(build_directory: &Path) -> Option<PathBuf> {
    let mut ancestors: Vec<_> = build_directory.ancestors().collect();
    ancestors.reverse();
    ancestors
        .into_iter()
        .find(|directory| {
            fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 == 0)
        })
        .map(Path::to_owned)
}

/// What to do about a directory that actions' users cannot pass.
pub(super) fn impassable_message(directory: &Path) -> String {
    format!(
        "actions' users cannot pass {}; run: chmod o+x {0}",
        directory.display()
    )
}
