//! Whether the file system that actions write to has enough free. A command whose writes failed for want of
//! it may exit with 0 all the same, with outputs that are cut.
//!
//! 1. No command starts unless `cache.minimum_free` is free.
//! 2. A command during which hardly anything was free has no result, whoever took it: one sample is
//!    taken every `FREE_SPACE_INTERVAL` while any command runs, and one at the end.
//!
//! With a `minimum_free` of 0 nothing of this is looked at.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

use super::file_cache::MINIMUM_FREE_INODES;
use crate::{config::Size, worker::fault::Fault};

/// Between two looks at it.
pub(super) const FREE_SPACE_INTERVAL: Duration = Duration::from_millis(50);
/// With less free than this part of `minimum_free`, and no more than this, a write may have failed.
const FULL_DIVISOR: u64 = 8;
const FULL_AT_MOST: u64 = 64 << 20;
const FULL_INODES: u64 = 16;

pub(super) struct FreeSpaceMonitor {
    path: PathBuf,
    directory: OwnedFd,
    minimum_free: u64,
    commands: Arc<Commands>,
    /// Samples that found hardly anything free.
    full: AtomicU64,
}

/// What the thread that looks waits for, without holding it.
#[derive(Default)]
struct Commands {
    running: Mutex<u64>,
    /// One starts, or free space is not looked at any more.
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Free {
    pub bytes: u64,
    pub inodes: u64,
}

/// Free space is looked at, for a command that runs, until this is dropped.
pub(super) struct FreeSpaceWatch {
    space: Arc<FreeSpaceMonitor>,
    full_before: u64,
}

impl Drop for FreeSpaceWatch {
    fn drop(&mut self) {
        *self.space.commands.running.lock() -= 1;
    }
}

impl Drop for FreeSpaceMonitor {
    fn drop(&mut self) {
        self.commands.changed.notify_all();
    }
}

impl FreeSpaceMonitor {
    pub(super) fn new(
        path: PathBuf,
        directory: OwnedFd,
        minimum_free: u64,
    ) -> io::Result<Arc<Self>> {
        let space = Arc::new(FreeSpaceMonitor {
            path,
            directory,
            minimum_free,
            commands: Arc::default(),
            full: AtomicU64::new(0),
        });
        if minimum_free > 0 {
            let (weak, commands) = (Arc::downgrade(&space), space.commands.clone());
            std::thread::Builder::new()
                .name("watch-disk".to_owned())
                .spawn(move || sample(&weak, &commands))?;
        }
        Ok(space)
    }

    /// Bytes and inodes that unprivileged users can still take.
    pub(super) fn free(&self) -> io::Result<Free> {
        let stat = rustix::fs::fstatvfs(&self.directory)?;
        Ok(Free {
            bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            // Some file systems have no fixed number of inodes, and say 0.
            inodes: match stat.f_files {
                0 => u64::MAX,
                _ => stat.f_favail,
            },
        })
    }

    pub(super) fn suffices(&self, free: Free) -> bool {
        self.minimum_free == 0
            || (free.bytes >= self.minimum_free && free.inodes >= MINIMUM_FREE_INODES)
    }

    fn full_size(&self) -> u64 {
        (self.minimum_free / FULL_DIVISOR).min(FULL_AT_MOST)
    }

    fn take_sample(&self) {
        let full = |free: Free| free.bytes < self.full_size() || free.inodes < FULL_INODES;
        if self.minimum_free > 0 && self.free().is_ok_and(full) {
            self.full.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// What there is to say to an action for which this is not enough.
    pub(super) fn shortage(&self, free: Free) -> Fault {
        Fault::Contended(format!(
            "the file system of {} on the worker's host has {} bytes and {} inodes free, but an action is to find {} (cache.minimum_free in bb_worker.toml) and {MINIMUM_FREE_INODES} inodes; make room there",
            self.path.display(),
            free.bytes,
            free.inodes,
            Size(self.minimum_free)
        ))
    }

    /// Watches until what is returned is dropped.
    pub(super) fn watch(self: &Arc<Self>) -> FreeSpaceWatch {
        *self.commands.running.lock() += 1;
        self.commands.changed.notify_all();
        FreeSpaceWatch {
            full_before: self.full.load(Ordering::SeqCst),
            space: self.clone(),
        }
    }
}

impl FreeSpaceWatch {
    /// What there is to say when the disk was, or is, full.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.space.take_sample();
        if self.space.full.load(Ordering::SeqCst) == self.full_before {
            return None;
        }
        Some(Fault::Contended(format!(
            "while the command ran, less than {} bytes or {FULL_INODES} inodes were free on the file system of {} on the worker's host, so that what it wrote may be cut; make room there, or raise cache.minimum_free ({}) in bb_worker.toml",
            self.space.full_size(),
            self.space.path.display(),
            Size(self.space.minimum_free)
        )))
    }
}

fn sample(space: &Weak<FreeSpaceMonitor>, commands: &Commands) {
    loop {
        let mut running = commands.running.lock();
        while *running == 0 && space.strong_count() > 0 {
            // Whoever drops `FreeSpaceMonitor` may do so between the two looks.
            commands
                .changed
                .wait_for(&mut running, FREE_SPACE_INTERVAL * 20);
        }
        drop(running);
        match space.upgrade() {
            Some(space) => space.take_sample(),
            None => return,
        }
        std::thread::sleep(FREE_SPACE_INTERVAL);
    }
}
