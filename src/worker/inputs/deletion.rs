//! The directory to which used ones are moved, and the thread of low priority that removes them from it.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, Dir, FlockOperation},
    io::Errno,
};

use crate::{removal, worker::beneath::open_child};

pub(super) struct DeletionQueue {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    next_name: AtomicU64,
    /// How many entries the thread has not tried to remove yet.
    pending_deletions: Arc<AtomicU64>,
    /// Sends names of entries to the thread that removes these.
    names: Mutex<Sender<String>>,
}

/// How often the thread looks whether a process is still in what is to be removed.
const LOCKED_INTERVAL: Duration = Duration::from_secs(1);

/// With more pending deletions than this, whoever throws something away removes it himself.
const MAXIMUM_PENDING: u64 = 1_000;

impl DeletionQueue {
    /// Opens the directory, and removes what is in it already too.
    pub(super) fn open(directory: OwnedFd, path: &Path) -> io::Result<Self> {
        let (names, received_names) = channel::<String>();
        let directory = Arc::new(directory);
        let pending_deletions = Arc::new(AtomicU64::new(0));
        let mut next_name = 0;
        for name in list(&directory)? {
            // The names that this queue gives are numbers.
            if let Some(number) = name.to_str().ok().and_then(|name| name.parse::<u64>().ok()) {
                next_name = next_name.max(number + 1);
            }
            pending_deletions.fetch_add(1, Ordering::Relaxed);
            let _ = names.send(name.to_string_lossy().into_owned());
        }
        let deletions = DeletionQueue {
            path: path.to_owned(),
            directory: directory.clone(),
            next_name: AtomicU64::new(next_name),
            pending_deletions: pending_deletions.clone(),
            names: Mutex::new(names),
        };
        let path = path.to_owned();
        std::thread::Builder::new()
            .name("delete-used".to_owned())
            .spawn(move || {
                // It may be forbidden, which does no harm.
                let _ = rustix::process::nice(19);
                // Those that a process is in; they are not counted as pending.
                let mut locked = Vec::<String>::new();
                loop {
                    let next = match locked.is_empty() {
                        true => received_names.recv().map_err(RecvTimeoutError::from),
                        false => received_names.recv_timeout(LOCKED_INTERVAL),
                    };
                    match next {
                        Ok(name) => {
                            if !try_remove(&directory, &name, &path) {
                                locked.push(name);
                            }
                            pending_deletions.fetch_sub(1, Ordering::Relaxed);
                        }
                        Err(RecvTimeoutError::Timeout) => {
                            locked.retain(|name| !try_remove(&directory, name, &path));
                        }
                        // The next start removes the rest.
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
            })?;
        Ok(deletions)
    }

    /// Moves an entry of a directory here, and has it removed. On failure it stays, and the log says so.
    pub(super) fn delete(&self, parent: impl AsFd, name: &str) {
        if let Err(error) = self.try_delete(parent, name) {
            tracing::error!(%name, %error, "could not move a used directory to those that are deleted");
        }
    }

    /// Moves an entry of a directory here, and has it removed or removes it.
    pub(super) fn try_delete<P: rustix::path::Arg>(
        &self,
        parent: impl AsFd,
        name: P,
    ) -> Result<(), Errno> {
        let to = self.move_in(parent, name)?;
        if self.pending_deletions.load(Ordering::Relaxed) > MAXIMUM_PENDING
            && try_remove(&self.directory, &to, &self.path)
        {
            return Ok(());
        }
        self.remove_later(to);
        Ok(())
    }

    /// Moves an entry of a directory here, under the name that is returned.
    pub(super) fn move_in<P: rustix::path::Arg>(
        &self,
        parent: impl AsFd,
        name: P,
    ) -> Result<String, Errno> {
        let to = self.next_name.fetch_add(1, Ordering::Relaxed).to_string();
        rustix::fs::renameat(parent, name, &*self.directory, &to)?;
        Ok(to)
    }

    /// Whether deletions are pending. Directories that a process is in are not counted.
    pub(super) fn is_busy(&self) -> bool {
        self.pending_deletions.load(Ordering::Relaxed) > 0
    }

    /// Has the thread remove what has this name here.
    pub(super) fn remove_later(&self, name: String) {
        self.pending_deletions.fetch_add(1, Ordering::Relaxed);
        let _ = self.names.lock().send(name);
    }
}

/// The names of a directory's entries.
pub(super) fn list(directory: &OwnedFd) -> io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    let mut entries = Dir::read_from(directory)?;
    while let Some(entry) = entries.read() {
        let name = entry?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Removes an entry, or logs that it cannot be; `false` while the runner says, by its lock, that a process is in it, or
/// while there are too few descriptors.
fn try_remove(deletions: &OwnedFd, name: &str, path: &Path) -> bool {
    let lock = |directory: &OwnedFd| {
        rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive)
    };
    let removed = match open_child(deletions, name) {
        Ok(directory) => match lock(&directory) {
            Err(Errno::WOULDBLOCK) => return false,
            locked => locked.map_err(io::Error::from),
        }
        .and_then(|()| removal::empty(directory.as_fd()))
        .and_then(|()| Ok(rustix::fs::unlinkat(deletions, name, AtFlags::REMOVEDIR)?)),
        Err(Errno::ACCESS) => CString::new(name)
            .map_err(io::Error::from)
            .and_then(|name| removal::remove(deletions.as_fd(), &name)),
        Err(Errno::NOTDIR | Errno::LOOP) => {
            rustix::fs::unlinkat(deletions, name, AtFlags::empty()).map_err(io::Error::from)
        }
        Err(error) => Err(error.into()),
    };
    if let Err(error) = removed {
        if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
            return false;
        }
        tracing::warn!(
            path = %path.join(name).display(),
            %error,
            "could not remove what an action left behind; the worker needs CAP_DAC_OVERRIDE and CAP_FOWNER"
        );
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_is_in_waits_and_nothing_else_does() {
        let place = tempfile::tempdir().unwrap();
        let open = |path: &Path| OwnedFd::from(std::fs::File::open(path).unwrap());
        let path = place.path().join("deleted");
        for name in ["deleted", "used", "other"] {
            std::fs::create_dir(place.path().join(name)).unwrap();
        }
        let used = open(&place.path().join("used"));
        rustix::fs::flock(&used, FlockOperation::LockExclusive).unwrap();
        let deletions = DeletionQueue::open(open(&path), &path).unwrap();
        let parent = open(place.path());
        deletions.try_delete(&parent, "used").unwrap();
        deletions.try_delete(&parent, "other").unwrap();
        let left = |expected: usize| {
            for _ in 0..1_000 {
                if std::fs::read_dir(&path).unwrap().count() == expected {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            false
        };
        assert!(left(1) && path.join("0").exists());
        drop(used);
        assert!(left(0));
    }
}
