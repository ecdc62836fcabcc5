//! One runner for each number: a runner kills whatever runs under its range of users, so that two
//! with a number in common would kill each other's actions.
//!
//! That is a lock on the bytes `first..first + count` of one file for the whole host (fcntl(2),
//! open file description locks): overlapping ranges exclude each other, and the kernel drops the
//! lock of a runner that dies.
//!
//! That file is `cgroup.procs` of the root of the control groups that are mounted here, since runners
//! that have one of their own in common would also clear each other's groups; and where it cannot be
//! opened, or for a runner of an older version, one below /run, which a service or a container may
//! have to itself.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use nix::fcntl::{FcntlArg, fcntl};

use super::sandbox::cgroup_mount_point;

const DIRECTORY: &str = "/run/bb-runner";
const NAME: &str = "users.lock";
/// A killed runner's last processes, too, hold its lock until they are gone.
const RANGE_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Held while the runner lives.
pub(super) struct UserRangeLock {
    _files: Vec<File>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum UserRangeError {
    #[error("another bb_runner on this host uses some of the users {} to {}", .0.start, .0.end - 1)]
    Taken(Range<u32>),
    #[error("could not lock {DIRECTORY}/{NAME}: {0}")]
    Io(#[from] io::Error),
}

impl UserRangeLock {
    pub(super) async fn take(range: &Range<u32>) -> Result<Self, UserRangeError> {
        let mut files = vec![open(Path::new(DIRECTORY))?];
        let groups = cgroup_mount_point().map(|root| root.join("cgroup.procs"));
        let groups = groups.map(|path| OpenOptions::new().read(true).write(true).open(path));
        files.extend(groups.and_then(Result::ok));
        let mut waited = Duration::ZERO;
        for file in &files {
            while !lock(file, range)? {
                if waited >= RANGE_LOCK_TIMEOUT {
                    return Err(UserRangeError::Taken(range.clone()));
                }
                let pause = Duration::from_millis(50);
                tokio::time::sleep(pause).await;
                waited += pause;
            }
        }
        Ok(UserRangeLock { _files: files })
    }
}

fn open(directory: &Path) -> io::Result<File> {
    match fs::DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(directory.join(NAME))
}

/// False when somebody else has some of it.
fn lock(file: &File, range: &Range<u32>) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start.into(),
        l_len: (range.end - range.start).into(),
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_exclude_each_other_until_one_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b, c] = [(); 3].map(|()| open(directory.path()).unwrap());
        assert!(lock(&a, &(58_000..58_256)).unwrap());
        assert!(!lock(&b, &(58_255..58_300)).unwrap());
        assert!(lock(&c, &(58_256..58_300)).unwrap());
        drop(a);
        assert!(lock(&b, &(58_000..58_256)).unwrap());
    }
}
