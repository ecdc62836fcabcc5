//! Where directories wait for being removed, by a thread of low priority.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, Dir, FlockOperation},
    io::Errno,
};

use crate::worker::{beneath::open_child, removal};

pub(super) struct DeletionQueue {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    sequence: AtomicU64,
    waiting: Arc<AtomicU64>,
    /// `None` when nobody empties it.
    names: Mutex<Sender<String>>,
}

/// More waiting than this, and whoever throws something away removes it himself.
const WAITING: u64 = 1_000;

impl DeletionQueue {
    /// What is in it already is emptied too.
    pub(super) fn open(directory: OwnedFd, path: &Path) -> io::Result<Self> {
        let (names, thrown) = channel::<String>();
        let directory = Arc::new(directory);
        let waiting = Arc::new(AtomicU64::new(0));
        let mut sequence = 0;
        for name in list(&directory)? {
            // Ours are numbers.
            if let Some(number) = name.to_str().ok().and_then(|name| name.parse::<u64>().ok()) {
                sequence = sequence.max(number + 1);
            }
            waiting.fetch_add(1, Ordering::Relaxed);
            let _ = names.send(name.to_string_lossy().into_owned());
        }
        let deletions = DeletionQueue {
            path: path.to_owned(),
            directory: directory.clone(),
            sequence: AtomicU64::new(sequence),
            waiting: waiting.clone(),
            names: Mutex::new(names),
        };
        let path = path.to_owned();
        std::thread::Builder::new()
            .name("delete-used".to_owned())
            .spawn(move || {
                // It may be forbidden, which does no harm.
                let _ = rustix::process::nice(19);
                for name in thrown {
                    remove(&directory, &name, &path);
                    waiting.fetch_sub(1, Ordering::Relaxed);
                }
            })?;
        Ok(deletions)
    }

    /// Moves an entry of a directory here. On failure it stays, and the log says so.
    pub(super) fn delete(&self, parent: impl AsFd, name: &str) {
        if let Err(error) = self.try_delete(parent, name) {
            tracing::error!(%name, %error, "could not move a used directory to those that are deleted");
        }
    }

    pub(super) fn try_delete<P: rustix::path::Arg>(
        &self,
        parent: impl AsFd,
        name: P,
    ) -> Result<(), Errno> {
        let to = self.take(parent, name)?;
        if self.waiting.load(Ordering::Relaxed) > WAITING {
            remove(&self.directory, &to, &self.path);
            return Ok(());
        }
        self.remove_later(to);
        Ok(())
    }

    /// Moves an entry of a directory here, under the name that is returned.
    pub(super) fn take<P: rustix::path::Arg>(
        &self,
        parent: impl AsFd,
        name: P,
    ) -> Result<String, Errno> {
        let to = self.sequence.fetch_add(1, Ordering::Relaxed).to_string();
        rustix::fs::renameat(parent, name, &*self.directory, &to)?;
        Ok(to)
    }

    /// Whether something waits to be removed, or is being removed.
    pub(super) fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    pub(super) fn remove_later(&self, name: String) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
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

/// Waits until the runner says, by its lock, that no process is in it.
fn remove(deletions: &OwnedFd, name: &str, path: &Path) {
    let removed = match open_child(deletions, name) {
        Ok(directory) => rustix::fs::flock(&directory, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .and_then(|()| removal::empty(directory.as_fd()))
            .and_then(|()| Ok(rustix::fs::unlinkat(deletions, name, AtFlags::REMOVEDIR)?)),
        Err(Errno::ACCESS) => removal::remove(deletions.as_fd(), name),
        Err(_) => rustix::fs::unlinkat(deletions, name, AtFlags::empty()).map_err(io::Error::from),
    };
    if let Err(error) = removed {
        tracing::warn!(
            path = %path.join(name).display(),
            %error,
            "could not remove what an action left behind; the worker needs CAP_DAC_OVERRIDE and CAP_FOWNER"
        );
    }
}
