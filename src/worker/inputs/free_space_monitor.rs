//! Whether the file system that actions write to has enough free, when a command starts and while it runs. A command
//! whose writes failed for want of it may exit with 0 all the same, with outputs that are cut.
//!
//! 1. No command starts unless `cache.minimum_free` is free.
//! 2. A command during which hardly anything was free has no result, whoever took it: one sample is
//!    taken every `FREE_SPACE_INTERVAL` while any command runs, and one at the end.
//! 3. A command that has taken more than `minimum_free` itself, which is what each of them found, and at least half of
//!    what was free lately, has taken more than its share once little is left: it is ended before its neighbours are
//!    short, and told that it is at fault, so that it does not fill one host after another. One at a time, the
//!    largest. None is blamed for what others hide, in files without a name.
//!
//! With a `minimum_free` of 0 nothing of this is looked at.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::{
    disk_usage::{self, DiskUsage},
    file_cache::MINIMUM_FREE_INODES,
};
use crate::{config::Size, worker::fault::Fault};

/// The time between two samples of what is free.
pub(super) const FREE_SPACE_INTERVAL: Duration = Duration::from_millis(50);
// With fewer bytes free than this part of `minimum_free`, or at most so many, or with fewer inodes, a write may have
// failed.
const FULL_DIVISOR: u64 = 8;
const FULL_AT_MOST: u64 = 64 << 20;
const FULL_INODES: u64 = 16;
/// With less than this part of what a command is to find, whoever has taken too much is looked for.
const LITTLE_DIVISOR: u64 = 2;
/// How long what a command left, which was ended for it, may take to be removed until another one is looked for.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(2);
/// What was free before this long says little of what a command could take.
const RECENT: Duration = Duration::from_secs(600);
/// Looking for one takes no more than this part of a processor.
const SEARCH_DIVISOR: u32 = 4;

/// Looks how much is free on the file system that actions write to.
pub(super) struct FreeSpaceMonitor {
    path: PathBuf,
    directory: OwnedFd,
    minimum_free: u64,
    commands: Arc<Commands>,
    /// What commands found that began lately.
    most_free: Mutex<RecentMaximum>,
    /// How many samples found hardly anything free.
    full_samples: AtomicU64,
}

/// What the sampling thread waits for; apart from the monitor, so that the thread does not keep that.
#[derive(Default)]
struct Commands {
    running: Mutex<Vec<Arc<RunningCommand>>>,
    /// Notified when a command starts, or the monitor is dropped.
    changed: Condvar,
}

/// A command, and where to find what it writes.
struct RunningCommand {
    action_directory: OwnedFd,
    /// What it had when it was found to have too much, with what was free then.
    excess: watch::Sender<Option<(DiskUsage, Free)>>,
}

/// What unprivileged users can still take on the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Free {
    pub bytes: u64,
    pub inodes: u64,
}

impl Free {
    fn max(self, other: Self) -> Self {
        Free {
            bytes: self.bytes.max(other.bytes),
            inodes: self.inodes.max(other.inodes),
        }
    }
}

/// The most that was free in the last `RECENT` to twice that.
#[derive(Debug, Default)]
struct RecentMaximum {
    since: Option<Instant>,
    current: Free,
    previous: Free,
}

impl RecentMaximum {
    fn add(&mut self, free: Free, now: Instant) {
        let is_over = |since| now.saturating_duration_since(since) >= RECENT;
        if self.since.is_none_or(is_over) {
            self.since = Some(now);
            self.previous = std::mem::take(&mut self.current);
        }
        self.current = self.current.max(free);
    }

    fn most(&self) -> Free {
        self.current.max(self.previous)
    }
}

/// Has samples taken, for a command that runs, until it is dropped.
pub(super) struct FreeSpaceWatch {
    monitor: Arc<FreeSpaceMonitor>,
    command: Arc<RunningCommand>,
    /// `FreeSpaceMonitor::full_samples` when it began.
    full_samples_before: u64,
}

impl Drop for FreeSpaceWatch {
    fn drop(&mut self) {
        let mut running = self.monitor.commands.running.lock();
        running.retain(|command| !Arc::ptr_eq(command, &self.command));
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
            most_free: Mutex::default(),
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

    /// Returns what is free, if it is little.
    fn take_sample(&self) -> Option<Free> {
        if self.minimum_free == 0 {
            return None;
        }
        let free = self.free().ok()?;
        if free.bytes < self.full_threshold() || free.inodes < FULL_INODES {
            self.full_samples.fetch_add(1, Ordering::SeqCst);
        }
        let is_little = free.bytes < self.minimum_free / LITTLE_DIVISOR
            || free.inodes < MINIMUM_FREE_INODES / LITTLE_DIVISOR;
        is_little.then_some(free)
    }

    /// How much a command has of what is short, bytes or inodes, if that is more than each of them is to find, and at
    /// least half of what was free lately.
    fn excess_of(&self, usage: DiskUsage, free: Free) -> Option<u64> {
        let most = self.most_free.lock().most();
        let (taken, share, most) = match free.bytes < self.minimum_free / LITTLE_DIVISOR {
            true => (usage.bytes, self.minimum_free, most.bytes),
            false => (usage.inodes, MINIMUM_FREE_INODES, most.inodes),
        };
        (taken > share && taken >= most / 2).then_some(taken)
    }

    /// Looks for the command that has taken most, and has it ended if that is more than its share. False when there is
    /// none. Samples are taken all the while.
    fn end_largest(&self, free: Free) -> bool {
        let running = self.commands.running.lock().clone();
        if running.iter().any(|it| it.excess.borrow().is_some()) {
            return true;
        }
        let mut sampled = Instant::now();
        let mut largest: Option<(u64, DiskUsage, &RunningCommand)> = None;
        for command in &running {
            let usage = self.measure(command, || {
                if sampled.elapsed() >= FREE_SPACE_INTERVAL {
                    self.take_sample();
                    sampled = Instant::now();
                }
            });
            if let Some(taken) = self.excess_of(usage, free)
                && largest.is_none_or(|(most, ..)| taken > most)
            {
                largest = Some((taken, usage, command));
            }
        }
        let Some((_, usage, command)) = largest else {
            return false;
        };
        command.excess.send_replace(Some((usage, free)));
        true
    }

    fn measure(&self, command: &RunningCommand, mut on_entry: impl FnMut()) -> DiskUsage {
        let directory = command.action_directory.as_fd();
        disk_usage::measure(directory, rustix::process::geteuid(), || {
            on_entry();
            true
        })
    }

    /// The fault of a command that took so much.
    fn excess_fault(&self, (usage, free): (DiskUsage, Free)) -> Fault {
        Fault::Invalid(format!(
            "the action had written {} bytes in {} files and directories when {} bytes and {} inodes were left on the file system of {} on the worker's host; an action that needs more than {} (cache.minimum_free in bb_worker.toml) or {MINIMUM_FREE_INODES} inodes has no result where that is all there is: have it write less, or give the worker a larger disk",
            usage.bytes,
            usage.inodes,
            free.bytes,
            free.inodes,
            self.path.display(),
            Size(self.minimum_free)
        ))
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

    /// Has samples taken until what is returned is dropped, for a command that found so much free and writes beneath
    /// `action_directory`.
    pub(super) fn watch(
        self: &Arc<Self>,
        action_directory: OwnedFd,
        found: Free,
    ) -> FreeSpaceWatch {
        self.most_free.lock().add(found, Instant::now());
        let command = Arc::new(RunningCommand {
            action_directory,
            excess: watch::Sender::new(None),
        });
        self.commands.running.lock().push(command.clone());
        self.commands.changed.notify_all();
        FreeSpaceWatch {
            full_samples_before: self.full_samples.load(Ordering::SeqCst),
            monitor: self.clone(),
            command,
        }
    }
}

impl FreeSpaceWatch {
    /// Waits until the command is found to have taken more than its share, and is to be ended; else for ever.
    pub(super) async fn excess(&self) -> Fault {
        let mut excess = self.command.excess.subscribe();
        match excess.wait_for(Option::is_some).await.map(|it| *it) {
            Ok(Some(found)) => self.monitor.excess_fault(found),
            // The sender is this command's.
            _ => std::future::pending().await,
        }
    }

    /// The fault of the command when the disk is full, or was since this watch began. Blocks.
    pub(super) fn fault(&self) -> Option<Fault> {
        let free = self.monitor.take_sample();
        if self.monitor.full_samples.load(Ordering::SeqCst) == self.full_samples_before {
            return None;
        }
        // One that ends as soon as it has filled the disk would else fill that of the next host.
        if let Some(free) = free {
            let usage = self.monitor.measure(&self.command, || ());
            if self.monitor.excess_of(usage, free).is_some() {
                return Some(self.monitor.excess_fault((usage, free)));
            }
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
    let mut next_search = Instant::now();
    loop {
        let mut running = commands.running.lock();
        while running.is_empty() && monitor.strong_count() > 0 {
            // Not without end: the monitor may be dropped between the condition and the wait.
            commands
                .changed
                .wait_for(&mut running, FREE_SPACE_INTERVAL * 20);
        }
        drop(running);
        match monitor.upgrade() {
            Some(monitor) => {
                let began = Instant::now();
                if let Some(free) = monitor.take_sample()
                    && began >= next_search
                {
                    let pause = match monitor.end_largest(free) {
                        true => REMOVAL_TIMEOUT,
                        false => began.elapsed() * SEARCH_DIVISOR,
                    };
                    next_search = Instant::now() + pause;
                }
            }
            None => return,
        }
        std::thread::sleep(FREE_SPACE_INTERVAL);
    }
}
