//! Whether the file system that actions write to has enough free, when a command starts and while it runs. A command
//! whose writes failed for want of it may exit with 0 all the same, with outputs that are cut.
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

/// The time between two samples of what is free.
pub(super) const FREE_SPACE_INTERVAL: Duration = Duration::from_millis(50);
// With fewer bytes free than this part of `minimum_free`, or at most so many, or with fewer inodes, a write may have
// failed.
const FULL_DIVISOR: u64 = 8;
const FULL_AT_MOST: u64 = 64 << 20;
const FULL_INODES: u64 = 16;

/// Looks how much is free on the file system that actions write to.
pub(super) struct FreeSpaceMonitor {
    path: PathBuf,
    directory: OwnedFd,
    minimum_free: u64,
    commands: Arc<Commands>,
    /// How many samples found hardly anything free.
    full_samples: AtomicU64,
}

/// What the sampling thread waits for; apart from the monitor, so that the thread does not keep that.
#[derive(Default)]
struct Commands {
    /// How many commands run.
    running: Mutex<u64>,
    /// Notified when a command starts, or the monitor is dropped.
    changed: Condvar,
}

/// What unprivileged users can still take on the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Free {
    pub bytes: u64,
    pub inodes: u64,
}

/// Has samples taken, for a command that runs, until it is dropped.
pub(super) struct FreeSpaceWatch {
    monitor: Arc<FreeSpaceMonitor>,
    /// `FreeSpaceMonitor::full_samples` when it began.
    full_samples_before: u64,
}

impl Drop for FreeSpaceWatch {
    fn drop(&mut self) {
        *self.monitor.commands.running.lock() -= 1;
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
        let monitor = Arc::new(FreeSpaceMonitor {
            path,
            directory,
            minimum_free,
            commands: Arc::default(),
            full_samples: AtomicU64::new(0),
        });
        if minimum_free > 0 {
            let (weak, commands) = (Arc::downgrade(&monitor), monitor.commands.clone());
            std::thread::Builder::new()
                .name("watch-disk".to_owned())
                .spawn(move || sample_while_commands_run(&weak, &commands))?;
        }
        Ok(monitor)
    }

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

    /// Whether a command may start with so much free.
    pub(super) fn suffices(&self, free: Free) -> bool {
        self.minimum_free == 0
            || (free.bytes >= self.minimum_free && free.inodes >= MINIMUM_FREE_INODES)
    }

    /// How many bytes are free at least, unless the disk is full.
    fn full_threshold(&self) -> u64 {
        (self.minimum_free / FULL_DIVISOR).min(FULL_AT_MOST)
    }

    fn take_sample(&self) {
        let is_full = |free: Free| free.bytes < self.full_threshold() || free.inodes < FULL_INODES;
        if self.minimum_free > 0 && self.free().is_ok_and(is_full) {
            self.full_samples.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The fault of an action for which so much free is not enough.
    pub(super) fn shortage_fault(&self, free: Free) -> Fault {
        Fault::Contended(format!(
            "the file system of {} on the worker's host has {} bytes and {} inodes free, but an action is to find {} (cache.minimum_free in bb_worker.toml) and {MINIMUM_FREE_INODES} inodes; make room there",
            self.path.display(),
            free.bytes,
            free.inodes,
            Size(self.minimum_free)
        ))
    }

    /// Has samples taken until what is returned is dropped.
    pub(super) fn watch(self: &Arc<Self>) -> FreeSpaceWatch {
        *self.commands.running.lock() += 1;
        self.commands.changed.notify_all();
        FreeSpaceWatch {
            full_samples_before: self.full_samples.load(Ordering::SeqCst),
            monitor: self.clone(),
        }
    }
}

impl FreeSpaceWatch {
    /// The fault of the command when the disk is full, or was since this watch began.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.monitor.take_sample();
        if self.monitor.full_samples.load(Ordering::SeqCst) == self.full_samples_before {
            return None;
        }
        Some(Fault::Contended(format!(
            "while the command ran, less than {} bytes or {FULL_INODES} inodes were free on the file system of {} on the worker's host, so that what it wrote may be cut; make room there, or raise cache.minimum_free ({}) in bb_worker.toml",
            self.monitor.full_threshold(),
            self.monitor.path.display(),
            Size(self.monitor.minimum_free)
        )))
    }
}

/// Takes samples for as long as the monitor lives, while any command runs.
fn sample_while_commands_run(monitor: &Weak<FreeSpaceMonitor>, commands: &Commands) {
    loop {
        let mut running = commands.running.lock();
        while *running == 0 && monitor.strong_count() > 0 {
            // Not without end: the monitor may be dropped between the condition and the wait.
            commands
                .changed
                .wait_for(&mut running, FREE_SPACE_INTERVAL * 20);
        }
        drop(running);
        match monitor.upgrade() {
            Some(monitor) => monitor.take_sample(),
            None => return,
        }
        std::thread::sleep(FREE_SPACE_INTERVAL);
    }
}
