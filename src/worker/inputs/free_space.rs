//! Whether the file system that actions write to has room. A command whose writes failed for want of
//! it may exit with 0 all the same, with outputs that are cut.
//!
//! 1. No command starts unless `cache.minimum_free` is free.
//! 2. A command during which hardly anything was free has no result, whoever took it: one sample is
//!    taken every `INTERVAL` while any command runs, and one at the end.
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

use super::builder::Shared;
use crate::{config::Size, worker::fault::Fault};

const INTERVAL: Duration = Duration::from_millis(50);
/// With less free than this part of `minimum_free`, and no more than this, a write may have failed.
const FULL_PART: u64 = 8;
const FULL_AT_MOST: u64 = 64 << 20;
/// Every file and directory takes one.
const MINIMUM_FREE_INODES: u64 = 1_000;
const FULL_INODES: u64 = 16;
/// How long an action waits for what is being removed.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);
/// How long, before cached files go for it.
const CACHE_PATIENCE: Duration = Duration::from_secs(5);

pub struct DiskSpace {
    path: PathBuf,
    directory: OwnedFd,
    minimum_free: u64,
    commands: Arc<Commands>,
    /// Samples that found hardly anything free.
    full: AtomicU64,
}

/// What the thread that looks waits for, without holding the disk.
#[derive(Default)]
struct Commands {
    running: Mutex<u64>,
    /// One starts, or the disk is not looked at any more.
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Free {
    pub bytes: u64,
    pub inodes: u64,
}

/// A command that runs.
pub struct RunningCommand {
    disk: Arc<DiskSpace>,
    full_before: u64,
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        *self.disk.commands.running.lock() -= 1;
    }
}

impl Drop for DiskSpace {
    fn drop(&mut self) {
        self.commands.changed.notify_all();
    }
}

impl DiskSpace {
    pub fn new(path: PathBuf, directory: OwnedFd, minimum_free: u64) -> io::Result<Arc<Self>> {
        let disk = Arc::new(DiskSpace {
            path,
            directory,
            minimum_free,
            commands: Arc::default(),
            full: AtomicU64::new(0),
        });
        if minimum_free > 0 {
            let (weak, commands) = (Arc::downgrade(&disk), disk.commands.clone());
            std::thread::Builder::new()
                .name("watch-disk".to_owned())
                .spawn(move || sample(&weak, &commands))?;
        }
        Ok(disk)
    }

    /// Bytes and inodes that unprivileged users can still take.
    fn free(&self) -> io::Result<Free> {
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

    fn suffices(&self, free: Free) -> bool {
        self.minimum_free == 0
            || (free.bytes >= self.minimum_free && free.inodes >= MINIMUM_FREE_INODES)
    }

    fn full_size(&self) -> u64 {
        (self.minimum_free / FULL_PART).min(FULL_AT_MOST)
    }

    fn look(&self) {
        let full = |free: Free| free.bytes < self.full_size() || free.inodes < FULL_INODES;
        if self.minimum_free > 0 && self.free().is_ok_and(full) {
            self.full.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Watches until what is returned is dropped.
    pub fn watch(self: &Arc<Self>) -> RunningCommand {
        *self.commands.running.lock() += 1;
        self.commands.changed.notify_all();
        RunningCommand {
            full_before: self.full.load(Ordering::SeqCst),
            disk: self.clone(),
        }
    }
}

impl RunningCommand {
    /// What there is to say when the disk was, or is, full.
    pub fn fault(&self) -> Option<Fault> {
        self.disk.look();
        if self.disk.full.load(Ordering::SeqCst) == self.full_before {
            return None;
        }
        Some(Fault::Contended(format!(
            "while the command ran, less than {} bytes or {FULL_INODES} inodes were free on the file system of {} on the worker's host, so that what it wrote may be cut; make room there, or raise cache.minimum_free ({}) in bb_worker.toml",
            self.disk.full_size(),
            self.disk.path.display(),
            Size(self.disk.minimum_free)
        )))
    }
}

fn sample(disk: &Weak<DiskSpace>, commands: &Commands) {
    loop {
        let mut running = commands.running.lock();
        while *running == 0 && disk.strong_count() > 0 {
            // Whoever drops the disk may do so between the two looks.
            commands.changed.wait_for(&mut running, INTERVAL * 20);
        }
        drop(running);
        match disk.upgrade() {
            Some(disk) => disk.look(),
            None => return,
        }
        std::thread::sleep(INTERVAL);
    }
}

impl Shared {
    /// Waits until an action has room, which what is being removed may leave; then cached files and
    /// kept input roots go. Blocks.
    pub(super) fn await_free_space(&self) -> Result<(), Fault> {
        let mut waited = Duration::ZERO;
        let mut before = None;
        loop {
            let free = self
                .disk
                .free()
                .map_err(|error| self.disk_fault("look how much is free", error))?;
            if self.disk.suffices(free) {
                return Ok(());
            }
            let removing = self.deletions.is_busy() || self.pool.lock().dirty > 0;
            let in_vain = before == Some(free) && !removing;
            if in_vain || waited >= ROOM_TIMEOUT {
                return Err(Fault::Contended(format!(
                    "the file system of {} on the worker's host has {} bytes and {} inodes free, but an action is to find {} (cache.minimum_free in bb_worker.toml) and {MINIMUM_FREE_INODES} inodes; make room there",
                    self.path.display(),
                    free.bytes,
                    free.inodes,
                    Size(self.disk.minimum_free)
                )));
            }
            if !removing || waited >= CACHE_PATIENCE {
                self.cache.evict_to_fit();
                before = Some(free);
            }
            std::thread::sleep(INTERVAL);
            waited += INTERVAL;
        }
    }
}
