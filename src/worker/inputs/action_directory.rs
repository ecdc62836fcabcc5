//! Gates: the directories around roots, from being made to being as good as new again.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, FlockOperation, Mode},
    io::Errno,
};

use super::{
    builder::{LOCK_TIMEOUT, Shared},
    directory::Directory,
    file_cache::LinkMode,
    inodes::Inodes,
    kept::{self, DirectoryFd, KeptDirectory, KeptRoot},
    pool::IdleRoot,
    tree::{Node, Tree},
    verify::DirectoryCondition,
};
use crate::worker::{beneath::open_child, removal};

const PARTS: [&str; 4] = ["root", "tmp", "server_logs", "home"];

pub struct ActionDirectory {
    pub name: String,
    pub directory: OwnedFd,
    pub root: OwnedFd,
}

/// What is known of a root that an action had.
pub struct UsedRoot {
    /// `None` when it is not used again.
    pub kept: Option<KeptRoot>,
    /// Of `Shared::generation`.
    pub generation: u64,
    /// When the action could begin, in seconds since the epoch.
    pub ready: i64,
    /// Inode numbers of what is the worker's though the action made it, in their order.
    pub taken_over: Vec<u64>,
}

/// Whether nobody else holds the lock; does not keep it.
pub fn try_lock(action_directory: BorrowedFd<'_>) -> bool {
    let free =
        rustix::fs::flock(action_directory, FlockOperation::NonBlockingLockExclusive).is_ok();
    if free {
        let _ = rustix::fs::flock(action_directory, FlockOperation::Unlock);
    }
    free
}

impl Shared {
    /// The one that suits `wanted` best, or any empty one.
    pub(super) fn take_root(&self, wanted: Option<(LinkMode, &Tree)>) -> io::Result<IdleRoot> {
        let mut pool = self.pool.lock();
        loop {
            if let Some(root) = pool.pick(wanted) {
                return Ok(root);
            }
            if pool.dirty <= 2 * self.slots {
                break;
            }
            self.cleaned.wait(&mut pool);
        }
        drop(pool);
        self.make_root()
    }

    pub(super) fn make_root(&self) -> io::Result<IdleRoot> {
        let name = self.next_name();
        rustix::fs::mkdirat(&self.directory, &name, Mode::from_raw_mode(0o700))?;
        let directory = open_child(&self.directory, &name)?;
        for part in PARTS {
            rustix::fs::mkdirat(&directory, part, Mode::from_raw_mode(0o777))?;
        }
        let root = open_child(&directory, PARTS[0])?;
        let place = DirectoryFd::open(&directory, PARTS[0], &self.open)?;
        let (inode, baseline) = kept::settle(place.as_fd())?;
        // An empty root suits every mode.
        let link_mode = LinkMode::HardLink;
        let links = self.cache.pin(std::iter::empty(), link_mode);
        let top = KeptDirectory {
            node: Node::empty(),
            place: Arc::new(place),
            inode,
            baseline: Some(baseline),
            links: links.map_err(|_| io::ErrorKind::NotFound)?,
            symlinks: Box::default(),
            children: Vec::new(),
        };
        Ok(IdleRoot {
            action_directory: ActionDirectory {
                name,
                directory,
                root,
            },
            kept: KeptRoot {
                top,
                inodes: Inodes::default(),
                link_mode,
            },
            generation: self.generation(),
        })
    }

    /// Makes a used root as good as new, or throws it away.
    pub(super) fn clean(&self, mut action_directory: ActionDirectory, used: UsedRoot) {
        let generation = used.generation;
        let name = self.next_name();
        if rustix::fs::renameat(
            &self.directory,
            &action_directory.name,
            &self.directory,
            &name,
        )
        .is_ok()
        {
            action_directory.name = name;
        }
        if !self.lock(&action_directory) {
            self.pool.lock().dirty -= 1;
            self.cleaned.notify_all();
            return;
        }
        let began = Instant::now();
        let cleaned = self.restore(&action_directory, used);
        let _ = rustix::fs::flock(&action_directory.directory, FlockOperation::Unlock);
        tracing::debug!(
            kept = matches!(cleaned, Ok(Some(_))),
            microseconds = began.elapsed().as_micros() as u64,
            "cleaned up after an action"
        );
        let root = match cleaned {
            Ok(Some(kept)) => Ok(IdleRoot {
                action_directory,
                kept,
                generation,
            }),
            Ok(None) => Err(action_directory),
            Err(error) => {
                tracing::warn!(
                    directory = %self.path.join(&action_directory.name).display(),
                    %error,
                    "could not make the root of an action what it was; it is thrown away"
                );
                Err(action_directory)
            }
        };
        let mut pool = self.pool.lock();
        pool.dirty -= 1;
        let mut gone = Vec::new();
        let forgotten = match root {
            Ok(root) => self.return_root(&mut pool, root),
            Err(action_directory) => {
                gone.push(action_directory);
                None
            }
        };
        if pool.ready.len() > 2 * self.slots {
            gone.push(pool.ready.remove(0).action_directory);
        }
        let lacks = pool.ready.len() < self.slots;
        drop(pool);
        gone.extend(forgotten.map(|root| root.action_directory));
        self.cleaned.notify_all();
        for action_directory in gone {
            self.discard(action_directory);
        }
        if lacks && let Ok(root) = self.make_root() {
            self.pool.lock().ready.push(root);
            self.cleaned.notify_all();
        }
        if self.cache.is_over() {
            self.cache.evict_to_fit();
        }
    }

    /// Waits until no process of the action is left (I5).
    fn lock(&self, action_directory: &ActionDirectory) -> bool {
        let mut pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        while rustix::fs::flock(&action_directory.directory, exclusive).is_err() {
            if waited > LOCK_TIMEOUT {
                tracing::error!(
                    directory = %self.path.join(&action_directory.name).display(),
                    "the runner did not let go of the directory of an action that is over; it is left until the next start"
                );
                return false;
            }
            std::thread::sleep(pause);
            waited += pause;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        true
    }

    /// `None` when it is not used again.
    fn restore(
        &self,
        action_directory: &ActionDirectory,
        used: UsedRoot,
    ) -> io::Result<Option<KeptRoot>> {
        let Some(mut kept) = used.kept else {
            return Ok(None);
        };
        if !self.empty(action_directory)? {
            return Ok(None);
        }
        match self.verify_root(&mut kept, used.ready, &used.taken_over)? {
            DirectoryCondition::Good => Ok(Some(kept)),
            DirectoryCondition::Oversized => Ok(None),
        }
    }

    /// Removes all but the root. `false` when it cannot be told from a used one.
    fn empty(&self, action_directory: &ActionDirectory) -> io::Result<bool> {
        let mut entries = Dir::read_from(&action_directory.directory)?;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = entry.file_name();
            let known = |part: &str| name.to_bytes() == part.as_bytes();
            if name == c"." || name == c".." || PARTS.iter().any(|part| known(part)) {
                continue;
            }
            match rustix::fs::unlinkat(&action_directory.directory, name, AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR) => {
                    removal::empty(open_child(&action_directory.directory, name)?.as_fd())?;
                    rustix::fs::unlinkat(&action_directory.directory, name, AtFlags::REMOVEDIR)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        for part in &PARTS[1..] {
            let directory = open_child(&action_directory.directory, *part)?;
            removal::empty(directory.as_fd())?;
            if !is_as_made(directory.as_fd(), 0o777)? {
                return Ok(false);
            }
        }
        is_as_made(action_directory.directory.as_fd(), 0o700)
    }

    /// Deletes a whole action directory.
    pub(super) fn discard(&self, action_directory: ActionDirectory) {
        self.deletions
            .delete(&self.directory, &action_directory.name);
    }
}

/// Owner, mode, attributes and size as when it was made.
fn is_as_made(directory: BorrowedFd<'_>, mode: u32) -> io::Result<bool> {
    let stat = rustix::fs::fstat(directory)?;
    let mut names = [0; 512];
    let plain = match rustix::fs::flistxattr(directory, &mut names[..]) {
        Ok(length) => names[..length]
            .split(|byte| *byte == 0)
            .all(|name| name.is_empty() || name.starts_with(b"security.")),
        Err(error) => error == Errno::OPNOTSUPP,
    };
    let empty = Directory::default();
    Ok(plain && kept::is_as_made(&stat, mode) && !kept::is_oversized(&stat, &empty))
}
