//! Making room: uploads that nobody continues are given up, entries evicted, segments compacted.

use std::{sync::Arc, time::Instant};

use super::{
    super::Error,
    append::SpaceSource,
    index::{IndexEntry, Location},
    instance_limits::LimitId,
    segment::{NewContent, Segment},
    space::Space,
};

impl Space {
    /// Gives up uploads that nobody continues, then evicts and compacts until a sixteenth of the space
    /// is free.
    pub(super) fn reclaim(&self) {
        let _alone = self.reclaiming.lock();
        let limit = self.limit();
        while self.used() > limit / 32 * 31 && (self.abandon_upload)() {}
        if self.used() <= limit / 32 * 31 {
            return;
        }
        self.evict_to(limit / 8 * 7);
        while self.used() > limit / 16 * 15 && self.compact_one() {}
    }

    /// Evicts of what counts towards a limit until a sixteenth of it is free, if it is exceeded.
    pub(super) fn keep_limit(&self, limit: LimitId) {
        if self.limits.excess(limit).is_none() {
            return;
        }
        let _alone = self.reclaiming.lock();
        if let Some(excess) = self.limits.excess(limit) {
            self.evict(excess, |found| found.limit == limit);
        }
    }

    /// Removes entries until what remains could be packed into `target` bytes.
    fn evict_to(&self, target: u64) {
        let dead: u64 = self.full_segments().iter().map(|it| it.dead()).sum();
        let packed = self.used().saturating_sub(dead);
        self.evict(packed.saturating_sub(target), |_| true);
    }

    /// Removes entries of so many bytes together among those that may go, the least recently used ones.
    fn evict(&self, bytes: u64, may_go: impl Fn(&IndexEntry) -> bool) {
        let evicted = self.index.evict(bytes, may_go);
        for found in &evicted {
            self.limits.subtract(found.limit, found.footprint());
            match found.place {
                Location::Segment { .. } => self.discount_live(found),
                Location::File => self.unlink_large(found),
            }
        }
        self.counts.evicted.add(evicted.len() as u64);
        if !evicted.is_empty() {
            self.ages.lock().evicted(&evicted, Instant::now());
        }
        tracing::debug!(count = evicted.len(), "evicted");
    }

    /// All segments but the one that is appended to, whose dead space is used up by what is to come, and may be
    /// more than a small store has.
    fn full_segments(&self) -> Vec<Arc<Segment>> {
        let head = self.active.lock().as_ref().map(|head| head.segment.number);
        let segments = self.segments.read();
        let full = segments
            .values()
            .filter(|segment| Some(segment.number) != head);
        full.cloned().collect()
    }

    /// Whether somebody still writes to a segment whose dead space can be gained when he has.
    pub(super) fn has_dead_space_in_writing(&self) -> bool {
        let full = self.full_segments();
        full.iter().any(|it| it.is_being_written() && it.dead() > 0)
    }

    /// Moves what is live out of the segment with most dead space, and removes it. False when
    /// there is none from which anything could be gained.
    fn compact_one(&self) -> bool {
        let full = self.full_segments().into_iter();
        let victim = full
            .filter(|segment| !segment.is_being_written())
            .max_by_key(|it| it.dead());
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
        // Somebody may have removed its files meanwhile.
        if self.segments.write().remove(&victim.number).is_none() {
            return true;
        }
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
            let place = Location::of_record(victim.number, slot, &record);
            if let Some(found) = self.index.peek(&record.key)
                && found.place == place
            {
                match victim.content(&record) {
                    Some(content) => {
                        length += record.size;
                        contents.push(NewContent {
                            key: record.key,
                            limit: record.limit,
                            content,
                        });
                        seen.push(found);
                    }
                    None => self.forget_damaged(&found),
                }
            }
            if length >= AT_ONCE || i + 1 == count {
                self.append(&contents, SpaceSource::Reserve, |places| {
                    for (found, place) in seen.iter().zip(places) {
                        self.count_live(*place, found.size);
                        if self.index.relocate(found, *place) {
                            victim.remove_live(found.size);
                        } else {
                            self.discount_live(&IndexEntry {
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
