//! The space on disk: what goes where, how much is used, and who makes room.
//!
//! What a store shares is `Space`; `append` writes small contents into segments, `lookup` finds and removes
//! contents, `reclaim` makes room, and `maintenance` does so before anybody has to wait for it.
//!
//! 1. `used` counts every byte that the store's files take, including those of uploads under way,
//!    before they are taken.
//! 2. Whoever needs space beyond the limit makes room first; one at a time does.
//! 3. Whoever needs a segment waits for his turn to ask for its space, takes the space, and then waits for his turn
//!    to create it: making room needs segments, too, for which it does not ask.
//! 4. Room is made by giving up uploads that nobody continues, then by removing least recently used
//!    entries, then by moving what is left of the segments that have most dead space into new ones. A
//!    moved content is written before the index points to it, and its old segment is removed after that.
//!    A segment that somebody still writes to is left alone; its dead space is waited for, and nothing is
//!    evicted in its stead.
//! 5. Something of the file system stays free for others: the limit is lower while it is not (`ceiling`).
//! 6. A large blob's file and its entry come and go together, under its key's lock.
//! 7. What counts towards the limit of an instance name is counted with its entry, and no more when it goes.

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};

use super::{
    super::Error,
    active_segment::{ActiveSegment, SegmentRequest},
    ceiling::Ceiling,
    counts::{RecencyAges, StoreCounts},
    index::Index,
    instance_limits::InstanceLimits,
    maintenance_signal::MaintenanceSignal,
    segment::{self, SMALL, Segment},
};
use crate::{config::Size, daemon};

/// Of making room, since others may take what was made room for: 1 ms longer from one to the next.
const ATTEMPTS: u64 = 10;
/// With those that wait for writers, which have a processor now and then even on a busy host: about 2 s.
const MOST_ATTEMPTS: u64 = 200;

/// Gives up the upload that nobody continues for longest; false when there is none.
pub(super) type AbandonUpload = dyn Fn() -> bool + Send + Sync;

/// What all of an open store share.
pub(super) struct Space {
    pub directory: PathBuf,
    pub maximum_size: u64,
    /// What is left free of the file system, whoever else writes to it.
    pub minimum_free: u64,
    pub ceiling: Mutex<Ceiling>,
    /// What the store may use, as the ceiling was when it was last measured.
    pub ceiling_bytes: AtomicU64,
    pub index: Index,
    pub limits: InstanceLimits,
    pub segments: RwLock<BTreeMap<u32, Arc<Segment>>>,
    pub active: Mutex<Option<ActiveSegment>>,
    /// Bytes on disk.
    pub used: AtomicU64,
    /// Bytes ever written, and some for time that passed: the clock of recency.
    pub written: AtomicU64,
    pub next_segment: AtomicU32,
    pub next_upload: AtomicU64,
    pub abandon_upload: Box<AbandonUpload>,
    pub reclaiming: Mutex<()>,
    pub segment_request: SegmentRequest,
    pub segment_creation: Mutex<()>,
    pub file_locks: [Mutex<()>; 64],
    pub maintenance: MaintenanceSignal,
    pub counts: StoreCounts,
    pub ages: Mutex<RecencyAges>,
    /// Held for as long as the store is open.
    pub lock: fs::File,
    /// The directory was not there when it was looked for last.
    pub is_gone: AtomicBool,
}

/// Bytes that are counted as used; given back when dropped, unless kept.
pub(super) struct SpaceReservation {
    space: Arc<Space>,
    bytes: u64,
}

impl SpaceReservation {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn grow(&mut self, bytes: u64) -> Result<(), Error> {
        self.space.take(bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    pub(super) fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for SpaceReservation {
    fn drop(&mut self) {
        self.space.give_back(self.bytes);
    }
}

impl Space {
    pub(super) fn note_age(&self) {
        self.ages.lock().note(self.now(), Instant::now());
    }

    pub(super) fn segment_capacity(&self) -> u64 {
        segment_capacity(self.maximum_size)
    }

    /// Making room needs room itself, for the segment that is moved to.
    fn without_reserve(&self, size: u64) -> u64 {
        size.saturating_sub(2 * segment::footprint(self.segment_capacity()))
    }

    /// Bytes that may be used now.
    pub(super) fn limit(&self) -> u64 {
        let ceiling = self.ceiling_bytes.load(Ordering::Relaxed);
        self.without_reserve(self.maximum_size.min(ceiling))
    }

    pub(super) fn maximum_blob_size(&self) -> u64 {
        self.without_reserve(self.maximum_size) / 4 * 3
    }

    /// Looks at what is free of the file system, and lowers or raises what may be used.
    pub(super) fn measure_free_space(&self, now: Instant) {
        if self.minimum_free == 0 {
            return;
        }
        let Some(disk) = daemon::disk::space(&self.directory) else {
            return;
        };
        let ceiling = self
            .ceiling
            .lock()
            .measure(self.used(), disk.available, now);
        let before = self.ceiling_bytes.swap(ceiling, Ordering::Relaxed);
        match (before < self.maximum_size, ceiling < self.maximum_size) {
            (false, true) => tracing::info!(
                directory = %self.directory.display(),
                available = %daemon::disk::rounded_to_mib(disk.available),
                left = %daemon::disk::rounded_to_mib(ceiling),
                "the file system has less free than the embedded store may use and \
                 storage.embedded.minimum_free, {}, together; the store stays smaller than \
                 storage.embedded.maximum_size, {}",
                Size(self.minimum_free),
                Size(self.maximum_size),
            ),
            (true, false) => tracing::info!(
                directory = %self.directory.display(),
                "the file system has enough free again for storage.embedded.maximum_size"
            ),
            _ => {}
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The clock of recency ticks 4,096 times while the store is filled once, and 256 times while the
    /// smallest limit of instance names is.
    pub(super) fn now(&self) -> u32 {
        (self.written.load(Ordering::Relaxed) / self.tick()) as u32
    }

    pub(super) fn tick(&self) -> u64 {
        let shared = self.maximum_size / 4096;
        shared.min(self.limits.smallest() / 256).max(1)
    }

    pub(super) fn files(&self) -> PathBuf {
        self.directory.join("files")
    }

    pub(super) fn segments_directory(&self) -> PathBuf {
        self.directory.join("segments")
    }

    pub(super) fn fresh_upload_path(&self) -> PathBuf {
        let number = self.next_upload.fetch_add(1, Ordering::Relaxed);
        self.directory.join("uploads").join(number.to_string())
    }

    /// What a failed write means.
    pub(super) fn write_error(&self, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::NotFound
            && let Err(gone) = self.require_directory_now()
        {
            return gone;
        }
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => self.full_file_system(),
            Some(libc::EROFS) => Error::Internal(format!(
                "could not write in {}: {error}; see what the kernel's log says of its disk, and mount it read-write again",
                self.directory.display()
            )),
            _ => Error::Internal(format!(
                "could not write in {}: {error}",
                self.directory.display()
            )),
        }
    }

    fn full_file_system(&self) -> Error {
        // Perhaps less may be used by now.
        self.maintenance.space_is_short();
        Error::Full(format!(
            "the file system of {} is full, of which this store uses {}; free some space there, or lower storage.embedded.maximum_size, which is {}",
            self.directory.display(),
            Size(self.used() >> 20 << 20),
            Size(self.maximum_size),
        ))
    }

    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<SpaceReservation, Error> {
        self.take(bytes)?;
        Ok(SpaceReservation {
            space: self.clone(),
            bytes,
        })
    }

    /// Counts bytes as used, after making room for them if need be.
    pub(super) fn take(&self, bytes: u64) -> Result<(), Error> {
        let limit = self.limit();
        for attempt in 0..MOST_ATTEMPTS {
            let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if used > limit / 32 * 31 && used <= limit {
                self.maintenance.space_is_short();
            }
            if used <= limit {
                return Ok(());
            }
            self.reclaim();
            if self.used() <= limit {
                return Ok(());
            }
            self.give_back(bytes);
            if attempt >= ATTEMPTS && !self.has_dead_space_in_writing() {
                break;
            }
            std::thread::sleep(Duration::from_millis(attempt.min(ATTEMPTS)));
        }
        if self.ceiling_bytes.load(Ordering::Relaxed) < self.maximum_size {
            return Err(Error::Full(format!(
                "the file system of {} has too little free: storage.embedded.minimum_free, {}, must stay \
                 free beyond what the store uses, {}; free some space there, or lower it",
                self.directory.display(),
                Size(self.minimum_free),
                Size(self.used() >> 20 << 20),
            )));
        }
        Err(Error::Full(format!(
            "the store in {} is full of uploads under way; try again later, or raise storage.embedded.maximum_size, which is {}",
            self.directory.display(),
            Size(self.maximum_size),
        )))
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

pub(super) fn segment_capacity(maximum_size: u64) -> u64 {
    // No more than 8,192 segments, each of which is two open files.
    let most = (64 << 20).max(maximum_size / 8192);
    // Offsets have 32 bits.
    (maximum_size / 64).clamp(4 * SMALL, most).min(1 << 31)
}
