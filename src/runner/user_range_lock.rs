//! One runner for each number: a runner kills whatever runs under its range of users, so that two
//! with a number in common would kill each other's actions.
//!
//! That is a lock on the bytes `first..first + count` of one file for the whole host (fcntl(2),
//! open file description locks): overlapping ranges exclude each other, and the kernel drops the
//! lock of a runner that dies.
//!
//! There are two such files, and a runner locks both:
//!
//! - one below /run, which nobody but root can open, but which a service or a container may have to itself;
//! - `cgroup.procs` of the root of the control groups that are mounted here, where it can be opened:
//!   runners that have these in common would also remove each other's groups, whatever /run each of them
//!   sees. Every user may read it, and who may read may take a lock for reading, which keeps this one out.
//!   A runner's is for writing. So one that is in the way and for reading is of another program, and then the
//!   first file alone decides.

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
/// How long the lock is waited for: a killed runner's last processes, too, hold it until they are gone.
const RANGE_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The locks of a runner's range of users, held as long as this lives.
pub(super) struct UserRangeLock {
    _own: File,
    _cgroup_procs: Option<File>,
}

/// Why a runner may not use its range of users.
#[derive(Debug, thiserror::Error)]
pub(super) enum UserRangeError {
    #[error("another bb_runner on this host uses some of the users {} to {}", .0.start, .0.end - 1)]
    Taken(Range<u32>),
    #[error("could not lock {DIRECTORY}/{NAME} or the root's cgroup.procs: {0}")]
    Io(#[from] io::Error),
}

impl UserRangeLock {
    /// Locks a range, or finds that another runner has some of it.
    pub(super) async fn take(range: &Range<u32>) -> Result<Self, UserRangeError> {
        let cgroup_procs = cgroup_mount_point().map(|root| root.join("cgroup.procs"));
        let cgroup_procs =
            cgroup_procs.map(|path| OpenOptions::new().read(true).write(true).open(path));
        let cgroup_procs = cgroup_procs.and_then(Result::ok);
        let own = open(Path::new(DIRECTORY))?;
        if !lock_in_time(&own, range).await? {
            return Err(UserRangeError::Taken(range.clone()));
        }
        if let Some(cgroup_procs) = &cgroup_procs
            && !lock_in_time(cgroup_procs, range).await?
        {
            if !is_kept_by_readers_alone(cgroup_procs, range)? {
                return Err(UserRangeError::Taken(range.clone()));
            }
            tracing::warn!(
                "somebody holds a lock for reading on cgroup.procs of the root (lslocks(8)); another bb_runner \
                 that uses some of the same users is not noticed if it has a /run of its own"
            );
        }
        Ok(UserRangeLock {
            _own: own,
            _cgroup_procs: cgroup_procs,
        })
    }
}

/// Waits for a lock; false when somebody else still has some of the range.
async fn lock_in_time(file: &File, range: &Range<u32>) -> io::Result<bool> {
    let pause = Duration::from_millis(50);
    let mut waited = Duration::ZERO;
    while !lock(file, range)? {
        if waited >= RANGE_LOCK_TIMEOUT {
            return Ok(false);
        }
        tokio::time::sleep(pause).await;
        waited += pause;
    }
    Ok(true)
}

/// Opens the file of the lock, which nobody but root can open, and makes it if there is none.
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

/// Locks a range of a file, without waiting; false when somebody else has some of it.
fn lock(file: &File, range: &Range<u32>) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&write_lock(range))) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether all locks on a range are for reading: whoever may read the file can take those, and no runner does.
fn is_kept_by_readers_alone(file: &File, range: &Range<u32>) -> io::Result<bool> {
    // One by one: of a lock for writing and one for reading, the kernel may tell the latter. On a single
    // byte there cannot be both.
    for number in range.clone() {
        let mut found = write_lock(&(number..number + 1));
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
        if found.l_type == libc::F_WRLCK as libc::c_short {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A lock for writing on the bytes of a range (fcntl(2)).
fn write_lock(range: &Range<u32>) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start.into(),
        l_len: (range.end - range.start).into(),
        l_pid: 0,
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

    #[test]
    fn a_lock_of_somebody_who_may_only_read_is_told_from_a_runners() {
        let directory = tempfile::tempdir().unwrap();
        let [runner, other] = [(); 2].map(|()| open(directory.path()).unwrap());
        let foreign = File::open(directory.path().join(NAME)).unwrap();
        let mut reads = write_lock(&(0..u32::MAX));
        reads.l_type = libc::F_RDLCK as libc::c_short;
        fcntl(&foreign, FcntlArg::F_OFD_SETLK(&reads)).unwrap();
        let range = 58_000..58_256;
        assert!(!lock(&runner, &range).unwrap());
        assert!(is_kept_by_readers_alone(&runner, &range).unwrap());
        // Beside a runner that has one number in common.
        reads.l_len = 58_255;
        reads.l_type = libc::F_UNLCK as libc::c_short;
        reads.l_start = 58_255;
        fcntl(&foreign, FcntlArg::F_OFD_SETLK(&reads)).unwrap();
        assert!(lock(&other, &(58_255..58_300)).unwrap());
        assert!(!lock(&runner, &range).unwrap());
        assert!(!is_kept_by_readers_alone(&runner, &range).unwrap());
        // A writer is no reader to itself.
        assert!(is_kept_by_readers_alone(&other, &(58_255..58_300)).unwrap());
    }
}
