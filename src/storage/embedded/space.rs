//! The space on disk: what goes where, how much is used, and who makes room.
//!
//! 1. `used` counts every byte that the store's files take, including those of uploads under way,
//!    before they are taken.
//! 2. Whoever needs space beyond the limit makes room first; one at a time does.
//! 3. Whoever needs a segment takes its space first, and then waits for his turn to create it.
//! 4. Room is made by giving up uploads that nobody continues, then by removing least recently used
//!    entries, then by moving what is left of the
//!    segments that have most dead space into new ones. A moved content is written before the index
//!    points to it, and its old segment is removed after that. A segment that somebody still writes
//!    to is left alone.
//! 5. A large blob's file and its entry come and go together, under its key's lock.
//!
//! Long, since taking space, giving it back and making room must agree on what is counted.

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use super::{
    super::Error,
    SMALL,
    file::{self, Draft, LargeBlob},
    index::{Found, Index, Key, Place},
    recency,
    segment::{self, End, Segment},
    uploads::Uploads,
};
use crate::config::Size;

pub struct Space {
    pub directory: PathBuf,
    pub maximum_size: u64,
    pub index: Index,
    pub segments: RwLock<BTreeMap<u32, Arc<Segment>>>,
    pub head: Mutex<Option<Head>>,
    /// Bytes on disk.
    pub used: AtomicU64,
    /// Bytes ever written, and some for time that passed: the clock of recency.
    pub written: AtomicU64,
    pub next_segment: AtomicU32,
    pub next_upload: AtomicU64,
    pub uploads: Arc<Uploads>,
    pub making_room: Mutex<()>,
    pub growing: Mutex<()>,
    pub naming: [Mutex<()>; 64],
    pub wake: Wake,
    /// Held for as long as the store is open.
    pub _lock: fs::File,
}

/// The segment that contents are appended to.
pub struct Head {
    pub segment: Arc<Segment>,
    pub end: End,
}

#[derive(Default)]
pub struct Wake {
    state: Mutex<WakeState>,
    changed: Condvar,
}

#[derive(Default)]
struct WakeState {
    room_is_short: bool,
    stopping: bool,
}

/// Bytes that are counted as used; given back when dropped, unless kept.
pub struct Reservation {
    space: Arc<Space>,
    bytes: u64,
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn grow(&mut self, bytes: u64) -> Result<(), Error> {
        self.space.take(bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    pub fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.space.give_back(self.bytes);
    }
}

impl Space {
    pub fn segment_capacity(&self) -> u64 {
        segment_capacity(self.maximum_size)
    }

    /// Making room needs room itself, for the segment that is moved to.
    fn limit(&self) -> u64 {
        self.maximum_size
            .saturating_sub(2 * segment::footprint(self.segment_capacity()))
    }

    pub fn maximum_blob_size(&self) -> u64 {
        self.limit() / 4 * 3
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The clock of recency ticks 4,096 times while the store is filled once.
    pub fn now(&self) -> u32 {
        (self.written.load(Ordering::Relaxed) / self.tick()) as u32
    }

    pub fn tick(&self) -> u64 {
        (self.maximum_size / 4096).max(1)
    }

    pub fn files(&self) -> PathBuf {
        self.directory.join("files")
    }

    fn segments_directory(&self) -> PathBuf {
        self.directory.join("segments")
    }

    pub fn fresh_upload_path(&self) -> PathBuf {
        let number = self.next_upload.fetch_add(1, Ordering::Relaxed);
        self.directory.join("uploads").join(number.to_string())
    }

    /// What a failed write means.
    pub fn write_error(&self, error: io::Error) -> Error {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Error::Full(format!(
                "the file system of {} is full, of which this store uses {}; free some space there, or lower storage.embedded.maximum_size, which is {}",
                self.directory.display(),
                Size(self.used() >> 20 << 20),
                Size(self.maximum_size),
            )),
            _ => Error::Internal(format!(
                "could not write in {}: {error}",
                self.directory.display()
            )),
        }
    }

    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, Error> {
        self.take(bytes)?;
        Ok(Reservation {
            space: self.clone(),
            bytes,
        })
    }

    /// Counts bytes as used, after making room for them if need be.
    fn take(&self, bytes: u64) -> Result<(), Error> {
        let limit = self.limit();
        // Others may take what was made room for.
        for attempt in 0..10 {
            let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if used > limit / 32 * 31 && used <= limit {
                self.wake.state.lock().room_is_short = true;
                self.wake.changed.notify_all();
            }
            if used <= limit {
                return Ok(());
            }
            self.make_room();
            if self.used() <= limit {
                return Ok(());
            }
            self.give_back(bytes);
            std::thread::sleep(Duration::from_millis(attempt));
        }
        Err(Error::Full(format!(
            "the store in {} is full of uploads under way; try again later, or raise storage.embedded.maximum_size, which is {}",
            self.directory.display(),
            Size(self.maximum_size),
        )))
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Stores contents that proved right. On an error some of them may have been stored.
    pub fn store_small(&self, contents: &[(Key, Bytes)]) -> Result<(), Error> {
        self.append(contents, Room::Take, |places| {
            let now = self.now();
            for ((key, content), place) in contents.iter().zip(places) {
                self.point_to(*key, content.len() as u64, *place, now);
            }
        })
    }

    /// Makes the index point to a content that has been written.
    pub fn point_to(&self, key: Key, size: u64, place: Place, used: u32) {
        self.count_live(place, size);
        if let Some(old) = self.index.insert(key, size, place, used) {
            self.discount_live(&old);
            match old.place {
                // Somebody else wrote the same file.
                Place::File => self.give_back(file::footprint(size)),
                // An older action result must not come back when the store is opened again after
                // the newer one was evicted.
                Place::Segment { number, slot } if key.is_action_result() => {
                    if let Some(segment) = self.segment(number) {
                        let _ = segment.erase(slot);
                    }
                }
                Place::Segment { .. } => {}
            }
        }
    }

    fn count_live(&self, place: Place, size: u64) {
        if let Place::Segment { number, .. } = place
            && let Some(segment) = self.segment(number)
        {
            segment.add_live(size);
        }
    }

    fn discount_live(&self, found: &Found) {
        if let Place::Segment { number, .. } = found.place
            && let Some(segment) = self.segment(number)
        {
            segment.remove_live(found.size);
        }
    }

    fn segment(&self, number: u32) -> Option<Arc<Segment>> {
        self.segments.read().get(&number).cloned()
    }

    /// Appends, and tells the places of what has been appended as far as it went well.
    fn append(
        &self,
        contents: &[(Key, Bytes)],
        room: Room,
        appended: impl FnOnce(&[Place]),
    ) -> Result<(), Error> {
        let mut places = Vec::with_capacity(contents.len());
        // Until the index points to what was written.
        let mut writing = Vec::new();
        let mut rest = contents;
        let result = loop {
            if rest.is_empty() {
                break Ok(());
            }
            match self.append_some(rest, room, &mut places) {
                Ok((count, still)) => {
                    writing.push(still);
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) => break Err(error),
            }
        };
        appended(&places);
        result
    }

    /// Appends as many contents as fit into one segment, at least one.
    fn append_some(
        &self,
        contents: &[(Key, Bytes)],
        room: Room,
        places: &mut Vec<Place>,
    ) -> Result<(usize, Writing), Error> {
        let first = contents
            .first()
            .map_or(0, |(_, content)| content.len() as u64);
        let (writing, at, count, length) = loop {
            let mut head = self.head.lock();
            if let Some(reserved) = head.as_mut().and_then(|head| head.take(contents)) {
                break reserved;
            }
            drop(head);
            self.new_head(first, room)?;
        };
        self.written.fetch_add(length, Ordering::Relaxed);
        let some = contents.get(..count).unwrap_or_default();
        writing
            .0
            .write(at, some, self.now())
            .map_err(|error| self.write_error(error))?;
        places.extend((at.slot..).take(count).map(|slot| Place::Segment {
            number: writing.0.number,
            slot,
        }));
        Ok((count, writing))
    }

    /// Puts a new segment in place of a full one; it has room for a content of this size.
    fn new_head(&self, size: u64, room: Room) -> Result<(), Error> {
        let capacity = self.segment_capacity().max(size);
        let footprint = segment::footprint(capacity);
        match room {
            Room::Take => self.take(footprint)?,
            Room::Spare => {
                self.used.fetch_add(footprint, Ordering::Relaxed);
            }
        }
        let _turn = self.growing.lock();
        let fits = self
            .head
            .lock()
            .as_ref()
            .is_some_and(|head| head.fits(size));
        if fits {
            // Somebody else was first.
            self.give_back(footprint);
            return Ok(());
        }
        let number = self.next_segment.fetch_add(1, Ordering::Relaxed);
        let segment = match Segment::create(&self.segments_directory(), number, capacity) {
            Ok(segment) => Arc::new(segment),
            Err(error) => {
                self.give_back(footprint);
                return Err(self.write_error(error));
            }
        };
        self.segments.write().insert(number, segment.clone());
        let mut head = self.head.lock();
        let old = head.replace(Head {
            segment,
            end: End { offset: 0, slot: 0 },
        });
        drop(head);
        if let Some(old) = old {
            match old.segment.seal(old.end) {
                Ok(freed) => self.give_back(freed),
                Err(error) => tracing::warn!(%error, "could not cut a full segment"),
            }
        }
        Ok(())
    }

    /// The content of an entry in a segment. `None` when it is gone or damaged.
    pub fn content(&self, mut found: Found) -> Option<Bytes> {
        loop {
            let Place::Segment { number, slot } = found.place else {
                return None;
            };
            let content = self.segment(number).and_then(|segment| {
                let record = segment.record(slot)?;
                (record.key == found.key && record.size == found.size)
                    .then(|| segment.content(&record))?
            });
            if content.is_some() {
                return content;
            }
            // Perhaps it was moved in between.
            let again = self.index.peek(&found.key)?;
            if again.place == found.place {
                self.forget_damaged(&found);
                return None;
            }
            found = again;
        }
    }

    /// `None` when it is gone or damaged.
    pub fn large(&self, found: &Found) -> Result<Option<LargeBlob>, Error> {
        let path = file::path(&self.files(), &found.key, found.size);
        for _ in 0..2 {
            match LargeBlob::open(&path, found.size) {
                Ok(blob) => return Ok(Some(blob)),
                Err(error) => match error.kind() {
                    io::ErrorKind::InvalidData => break,
                    // Evicted just now, and perhaps uploaded again.
                    io::ErrorKind::NotFound if self.index.peek(&found.key).is_none() => {
                        return Ok(None);
                    }
                    io::ErrorKind::NotFound => {}
                    _ => {
                        return Err(Error::Internal(format!(
                            "could not read {}: {error}",
                            path.display()
                        )));
                    }
                },
            }
        }
        self.forget_damaged(found);
        Ok(None)
    }

    /// Removes an entry whose content is not what it should be.
    pub fn forget_damaged(&self, found: &Found) {
        if !self.index.remove(found) {
            return;
        }
        match found.place {
            Place::Segment { number, slot } => {
                self.discount_live(found);
                if let Some(segment) = self.segment(number) {
                    let _ = segment.erase(slot);
                }
                tracing::error!(
                    segment = number,
                    slot,
                    "removed a blob that was damaged on disk"
                );
            }
            Place::File => {
                let path = file::path(&self.files(), &found.key, found.size);
                self.unlink_large(found);
                tracing::error!(path = %path.display(), "removed a blob that was damaged on disk");
            }
        }
    }

    /// Gives a file that was written its name, and an entry.
    pub fn commit_large(&self, draft: Draft, key: Key, size: u64) -> io::Result<()> {
        let _lock = self.naming_lock(&key);
        draft.commit(&self.files(), &key)?;
        self.written.fetch_add(size, Ordering::Relaxed);
        self.point_to(key, size, Place::File, self.now());
        Ok(())
    }

    /// Removes the file of an entry that has been removed.
    fn unlink_large(&self, found: &Found) {
        let _lock = self.naming_lock(&found.key);
        self.give_back(file::footprint(found.size));
        if self.index.peek(&found.key).is_some() {
            // It was uploaded again in between; the file is the new one.
            return;
        }
        let path = file::path(&self.files(), &found.key, found.size);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = %path.display(), %error, "could not remove a blob");
            }
            _ => {}
        }
    }

    fn naming_lock(&self, key: &Key) -> MutexGuard<'_, ()> {
        self.naming[key.short() as usize % self.naming.len()].lock()
    }

    /// Gives up uploads that nobody continues, then evicts and compacts until a sixteenth of the space
    /// is free.
    pub fn make_room(&self) {
        let _alone = self.making_room.lock();
        let limit = self.limit();
        while self.used() > limit / 32 * 31 && self.uploads.give_up_one(Instant::now()) {}
        if self.used() <= limit / 32 * 31 {
            return;
        }
        self.evict(limit / 8 * 7);
        while self.used() > limit / 16 * 15 && self.compact_one() {}
    }

    /// Removes entries until what remains could be packed into `target` bytes.
    fn evict(&self, target: u64) {
        let segments = self.segments.read();
        let dead: u64 = segments.values().map(|segment| segment.dead()).sum();
        drop(segments);
        let packed = self.used().saturating_sub(dead);
        let evicted = self
            .index
            .evict(packed.saturating_sub(target), |found| match found.place {
                Place::Segment { .. } => segment::weight(found.size),
                Place::File => file::footprint(found.size),
            });
        for found in &evicted {
            match found.place {
                Place::Segment { .. } => self.discount_live(found),
                Place::File => self.unlink_large(found),
            }
        }
        tracing::debug!(count = evicted.len(), "evicted");
    }

    /// Moves what is live out of the segment with most dead space, and removes it. False when
    /// there is none from which anything could be gained.
    fn compact_one(&self) -> bool {
        let head = self.head.lock().as_ref().map(|head| head.segment.number);
        let victim = self
            .segments
            .read()
            .values()
            .filter(|segment| Some(segment.number) != head && !segment.is_being_written())
            .max_by_key(|segment| segment.dead())
            .cloned();
        let Some(victim) = victim else {
            return false;
        };
        if victim.dead() <= victim.disk() / 16 {
            return false;
        }
        if let Err(error) = self.empty_segment(&victim) {
            tracing::error!(%error, "could not compact a segment");
            return false;
        }
        self.segments.write().remove(&victim.number);
        if let Err(error) = victim.unlink() {
            tracing::error!(%error, "could not remove a segment");
            return false;
        }
        self.give_back(victim.disk());
        true
    }

    fn empty_segment(&self, victim: &Arc<Segment>) -> Result<(), Error> {
        const AT_ONCE: u64 = 1 << 20;
        let mut seen = Vec::new();
        let mut contents = Vec::new();
        let mut length = 0;
        let (records, _) = victim.records();
        let count = records.len();
        for (i, (slot, record)) in records.into_iter().enumerate() {
            let place = Place::Segment {
                number: victim.number,
                slot,
            };
            if let Some(found) = self.index.peek(&record.key)
                && found.place == place
            {
                match victim.content(&record) {
                    Some(content) => {
                        length += record.size;
                        contents.push((record.key, content));
                        seen.push(found);
                    }
                    None => self.forget_damaged(&found),
                }
            }
            if length >= AT_ONCE || i + 1 == count {
                self.append(&contents, Room::Spare, |places| {
                    for (found, place) in seen.iter().zip(places) {
                        self.count_live(*place, found.size);
                        if self.index.relocate(found, *place) {
                            victim.remove_live(found.size);
                        } else {
                            self.discount_live(&Found {
                                place: *place,
                                ..*found
                            });
                        }
                    }
                })?;
                (seen, contents, length) = (Vec::new(), Vec::new(), 0);
            }
        }
        Ok(())
    }
}

pub fn segment_capacity(maximum_size: u64) -> u64 {
    // No more than 8,192 segments, each of which is two mappings (vm.max_map_count is 65,530).
    let most = (64 << 20).max(maximum_size / 8192);
    (maximum_size / 64).clamp(4 * SMALL, most)
}

/// Makes room before anybody has to wait for it, and saves recency now and then.
pub struct Janitor {
    space: Arc<Space>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Janitor {
    pub fn start(space: Arc<Space>) -> Self {
        let own = space.clone();
        let thread = std::thread::Builder::new()
            .name("storage".to_owned())
            .spawn(move || own.keep_tidy())
            .inspect_err(|error| tracing::error!(%error, "could not start a thread"))
            .ok();
        Janitor { space, thread }
    }

    pub fn stop(self) {
        self.space.wake.state.lock().stopping = true;
        self.space.wake.changed.notify_all();
        if let Some(thread) = self.thread {
            let _ = thread.join();
        }
    }
}

impl Space {
    fn keep_tidy(&self) {
        const ROUND: Duration = Duration::from_secs(10);
        const ROUNDS_PER_SAVING: u32 = 30;
        let mut rounds = 0;
        loop {
            let mut state = self.wake.state.lock();
            let quiet = !state.stopping
                && !state.room_is_short
                && self.wake.changed.wait_for(&mut state, ROUND).timed_out();
            let stopping = state.stopping;
            state.room_is_short = false;
            drop(state);
            if quiet {
                // So that order in time shows even when nothing is written.
                self.written.fetch_add(self.tick(), Ordering::Relaxed);
                rounds += 1;
            }
            if stopping || rounds >= ROUNDS_PER_SAVING {
                rounds = 0;
                if let Err(error) = recency::save(self) {
                    tracing::warn!(%error, "could not save when blobs were used");
                }
            }
            if stopping {
                return;
            }
            self.uploads.expire(Instant::now());
            self.make_room();
        }
    }
}

/// A segment that somebody writes to.
struct Writing(Arc<Segment>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.end_writing();
    }
}

/// Where the space of a new segment comes from.
#[derive(Clone, Copy)]
enum Room {
    /// From all, after making room if need be.
    Take,
    /// From what the limit leaves to whoever makes room.
    Spare,
}

impl Head {
    fn fits(&self, size: u64) -> bool {
        self.end.offset + size <= self.segment.capacity()
            && self.end.slot < self.segment.slot_count()
    }

    /// Reserves room for as many contents as fit. `None` when the first does not.
    fn take(&mut self, contents: &[(Key, Bytes)]) -> Option<(Writing, End, usize, u64)> {
        let at = self.end;
        let mut count = 0;
        for (_, content) in contents {
            let size = content.len() as u64;
            if !self.fits(size) {
                break;
            }
            self.end = End {
                offset: self.end.offset + size,
                slot: self.end.slot + 1,
            };
            count += 1;
        }
        if count == 0 {
            return None;
        }
        self.segment.begin_writing();
        let writing = Writing(self.segment.clone());
        Some((writing, at, count, self.end.offset - at.offset))
    }
}
