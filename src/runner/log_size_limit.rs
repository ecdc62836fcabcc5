//! What a command writes to its standard output and error, kept from filling the disk.
//!
//! Commands write to files, not through this daemon. So the files are looked at while a command runs
//! and cut where they are too long: what comes after the limit is lost, as a last line tells.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::fs::{Gid, Uid, fchown, fstat, ftruncate};

use crate::config::Size;

/// How often files are looked at; a fast writer writes some hundred megabytes meanwhile.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The file of a command's standard output or error, with the size that it may have.
#[derive(Debug)]
pub(super) struct LimitedStdioFile {
    pub file: OwnedFd,
    limit: Size,
    is_cut: bool,
}

impl LimitedStdioFile {
    /// A file of at most `limit` bytes; a `limit` of 0 is none.
    pub(super) fn new(file: OwnedFd, limit: Size) -> Self {
        LimitedStdioFile {
            file,
            limit,
            is_cut: false,
        }
    }

    /// Shortens the file, if it is too long.
    pub(super) fn truncate(&mut self) {
        let limit = self.limit.get();
        if limit == 0 {
            return;
        }
        if let Ok(stat) = fstat(&self.file)
            && stat.st_size as u64 > limit
        {
            let _ = ftruncate(&self.file, limit);
            self.is_cut = true;
        }
    }

    /// To be called when nothing writes any more: cuts the file, and says so in it. If the action has linked the
    /// file into its own directories, it becomes the action's user's, like all else that is there: what is root's
    /// there says that something ran as root.
    pub(super) fn finish(&mut self, user: u32) {
        self.truncate();
        if let Ok(stat) = fstat(&self.file)
            && stat.st_nlink > 1
        {
            let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
            if let Err(error) = fchown(&self.file, Some(user), Some(group)) {
                tracing::warn!(%error, "could not give an action its log, to which it has made links");
            }
        }
        if self.is_cut {
            self.append_line(&format!(
                "the rest of this output was cut: limits.log_size of bb_runner.toml is {}",
                self.limit
            ));
        }
    }

    /// Adds a line of the runner's own at the end.
    pub(super) fn append_line(&self, text: &str) {
        let line = format!("\nbb_runner: {text}\n");
        if let Err(error) = rustix::io::write(&self.file, line.as_bytes()) {
            tracing::warn!(%error, text, "could not write to an action's log");
        }
    }
}
