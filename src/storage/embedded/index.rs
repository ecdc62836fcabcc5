//! What the store holds and where, in memory.
//!
//! 1. A key names one place; whoever moves or removes an entry names the place that it saw, so that
//!    two who race cannot undo one another.
//! 2. Looking something up makes it recently used. Recency is a number of the store's own clock,
//!    which advances as bytes are written: an atomic store, no list to relink.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU32, Ordering},
};

use parking_lot::RwLock;

use super::{
    file,
    instance_limits::LimitId,
    key::IndexKey,
    segment::{self, Record},
};

/// Where a content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Location {
    /// With what is needed to read it without looking at its slot.
    Segment {
        number: u32,
        slot: u32,
        offset: u32,
        checksum: u32,
    },
    /// A file of its own.
    File,
}

impl Location {
    /// Of what a segment has a record of.
    pub(super) fn of_record(number: u32, slot: u32, record: &Record) -> Self {
        Location::Segment {
            number,
            slot,
            offset: record.offset,
            checksum: record.checksum,
        }
    }
}

/// There are millions of them, so that each takes one cache line with its key.
#[derive(Debug)]
struct StoredEntry {
    /// `FILE` for a file of its own.
    segment: u32,
    slot: u32,
    /// The lower half of the size.
    size: u32,
    /// Of a content in a segment, which is smaller than 4 GiB, its offset; of a file, the upper half of its size.
    offset: u32,
    checksum: u32,
    used: AtomicU32,
    limit: LimitId,
}

/// No segment has this number.
const FILE: u32 = u32::MAX;

/// A copy of an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct IndexEntry {
    pub key: IndexKey,
    pub size: u64,
    pub place: Location,
    pub used: u32,
    pub limit: LimitId,
}

impl IndexEntry {
    /// Bytes that it takes on disk.
    pub(super) fn footprint(&self) -> u64 {
        match self.place {
            Location::Segment { .. } => segment::weight(self.size),
            Location::File => file::footprint(self.size),
        }
    }
}

impl StoredEntry {
    fn new(entry: &IndexEntry) -> Self {
        let size = entry.size as u32;
        let (segment, slot, offset, checksum) = match entry.place {
            Location::Segment {
                number,
                slot,
                offset,
                checksum,
            } => (number, slot, offset, checksum),
            Location::File => (FILE, 0, (entry.size >> 32) as u32, 0),
        };
        StoredEntry {
            segment,
            slot,
            size,
            offset,
            checksum,
            used: AtomicU32::new(entry.used),
            limit: entry.limit,
        }
    }

    fn place(&self) -> Location {
        match self.segment {
            FILE => Location::File,
            number => Location::Segment {
                number,
                slot: self.slot,
                offset: self.offset,
                checksum: self.checksum,
            },
        }
    }

    fn size(&self) -> u64 {
        let upper = match self.segment {
            FILE => self.offset,
            _ => 0,
        };
        u64::from(upper) << 32 | u64::from(self.size)
    }

    fn found(&self, key: IndexKey) -> IndexEntry {
        IndexEntry {
            key,
            size: self.size(),
            place: self.place(),
            used: self.used.load(Ordering::Relaxed),
            limit: self.limit,
        }
    }
}

const SHARDS: usize = 64;

pub(super) struct Index {
    shards: [RwLock<HashMap<IndexKey, StoredEntry>>; SHARDS],
}

impl Index {
    pub(super) fn new() -> Self {
        Index {
            shards: std::array::from_fn(|_| RwLock::default()),
        }
    }

    fn shard(&self, key: &IndexKey) -> &RwLock<HashMap<IndexKey, StoredEntry>> {
        &self.shards[usize::from(key.shard_byte()) % SHARDS]
    }

    /// Looks up, and makes recently used as of `now`.
    pub(super) fn find(&self, key: &IndexKey, now: u32) -> Option<IndexEntry> {
        let shard = self.shard(key).read();
        let entry = shard.get(key)?;
        if entry.used.load(Ordering::Relaxed) != now {
            entry.used.store(now, Ordering::Relaxed);
        }
        Some(entry.found(*key))
    }

    /// What was there before; it is replaced.
    pub(super) fn insert(&self, new: &IndexEntry) -> Option<IndexEntry> {
        let entry = StoredEntry::new(new);
        let old = self.shard(&new.key).write().insert(new.key, entry);
        old.map(|entry| entry.found(new.key))
    }

    /// False when the entry is no longer what was seen.
    pub(super) fn relocate(&self, seen: &IndexEntry, place: Location) -> bool {
        match self.shard(&seen.key).write().get_mut(&seen.key) {
            Some(entry) if entry.place() == seen.place => {
                let moved = entry.found(seen.key);
                *entry = StoredEntry::new(&IndexEntry { place, ..moved });
                true
            }
            _ => false,
        }
    }

    /// False when the entry is no longer what was seen.
    pub(super) fn remove(&self, seen: &IndexEntry) -> bool {
        let mut shard = self.shard(&seen.key).write();
        match shard.get(&seen.key) {
            Some(entry) if entry.place() == seen.place && entry.limit == seen.limit => {
                shard.remove(&seen.key);
                true
            }
            _ => false,
        }
    }

    /// Looks up without making it recently used.
    pub(super) fn peek(&self, key: &IndexKey) -> Option<IndexEntry> {
        let shard = self.shard(key).read();
        shard.get(key).map(|entry| entry.found(*key))
    }

    /// All that are in a segment.
    pub(super) fn entries_in(&self, segment: u32) -> Vec<IndexEntry> {
        let mut entries = Vec::new();
        self.for_each(|found| {
            if matches!(found.place, Location::Segment { number, .. } if number == segment) {
                entries.push(found);
            }
        });
        entries
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }

    pub(super) fn for_each(&self, mut f: impl FnMut(IndexEntry)) {
        for shard in &self.shards {
            for (key, entry) in shard.read().iter() {
                f(entry.found(*key));
            }
        }
    }

    /// Removes the least recently used entries among those that `may_go`, of at least `bytes` bytes on disk
    /// together, and returns them.
    pub(super) fn evict(
        &self,
        bytes: u64,
        may_go: impl Fn(&IndexEntry) -> bool,
    ) -> Vec<IndexEntry> {
        let mut ages = Vec::new();
        self.for_each(|found| {
            if may_go(&found) {
                ages.push((found.used, found.footprint()));
            }
        });
        ages.sort_unstable_by_key(|(used, _)| *used);
        let mut sum = 0;
        let mut cut = None;
        // Of those as old as the cut, only as many as are needed.
        let mut at_cut = 0;
        for (used, weight) in ages {
            if sum >= bytes {
                break;
            }
            if cut != Some(used) {
                cut = Some(used);
                at_cut = 0;
            }
            sum += weight;
            at_cut += weight;
        }
        let Some(cut) = cut else {
            return Vec::new();
        };
        let mut evicted = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.write();
            shard.retain(|key, entry| {
                let found = entry.found(*key);
                if found.used > cut || !may_go(&found) {
                    return true;
                }
                if found.used == cut {
                    let weight = found.footprint();
                    if at_cut == 0 {
                        return true;
                    }
                    at_cut = at_cut.saturating_sub(weight);
                }
                evicted.push(found);
                false
            });
        }
        evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    fn entry(key: IndexKey, used: u32) -> IndexEntry {
        IndexEntry {
            key,
            size: 10,
            place: Location::File,
            used,
            limit: LimitId::NONE,
        }
    }

    fn key(i: u64) -> IndexKey {
        IndexKey::blob(&DigestFunction::Sha256.digest_of(&i.to_le_bytes()))
    }

    #[test]
    fn the_least_recently_used_entries_are_evicted_and_no_more_than_needed() {
        let index = Index::new();
        for i in 0..100 {
            index.insert(&entry(key(i), i as u32 / 10));
        }
        index.find(&key(3), 50);
        let each = entry(key(0), 0).footprint();
        let evicted = index.evict(15 * each, |_| true);
        assert_eq!(evicted.len(), 15);
        assert!(evicted.iter().all(|found| found.used <= 1));
        assert_eq!(index.len(), 85);
        assert!(index.peek(&key(3)).is_some());
        let of_one = index.evict(1, |found| found.key == key(99));
        assert_eq!(of_one.len(), 1);
        assert!(index.peek(&key(99)).is_none());
    }

    #[test]
    fn an_entry_takes_a_cache_line_and_is_found_as_it_was_put() {
        assert_eq!(size_of::<(IndexKey, StoredEntry)>(), 64);
        let index = Index::new();
        let segment = Location::Segment {
            number: 7,
            slot: u32::MAX,
            offset: u32::MAX,
            checksum: u32::MAX,
        };
        for (size, place) in [
            (u64::MAX, Location::File),
            (0, Location::File),
            (u64::from(u32::MAX), segment),
            (0, segment),
        ] {
            let put = IndexEntry {
                size,
                place,
                ..entry(key(1), u32::MAX)
            };
            index.insert(&put);
            let found = index.peek(&key(1)).unwrap();
            assert_eq!((found.size, found.place), (size, place));
            assert_eq!((found.used, found.limit), (put.used, put.limit));
        }
    }

    #[test]
    fn whoever_saw_an_old_place_changes_nothing() {
        let index = Index::new();
        index.insert(&entry(key(1), 0));
        let seen = index.peek(&key(1)).unwrap();
        let place = Location::Segment {
            number: 1,
            slot: 2,
            offset: 3,
            checksum: 4,
        };
        assert!(index.relocate(&seen, place));
        assert!(!index.relocate(&seen, Location::File));
        assert!(!index.remove(&seen));
        assert_eq!(index.peek(&key(1)).unwrap().place, place);
    }
}
