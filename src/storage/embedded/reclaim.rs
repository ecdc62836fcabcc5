//! Making room: uploads that nobody continues are given up, entries evicted, segments compacted.

use std::{sync::Arc, time::Instant};

use super::{
    super::Error,
    append::SpaceSource,
    index::{IndexEntry, Location},
    instance_limits::LimitId,
    segment::{NewContent, Read, Segment},
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
        // Held, so that the list has no newer one than this.
        let active = self.active.lock();
        let head = active.as_ref().map(|head| head.segment.number);
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

    /// Moves to other segments what the index says is in this one.
    fn empty_segment(&self, victim: &Arc<Segment>) -> Result<(), Error> {
        let records = victim.records().records.into_iter();
        let found = records.filter_map(|(slot, record)| {
            let place = Location::of_record(victim.number, slot, &record);
            self.index
                .peek(&record.key)
                .filter(|found| found.place == place)
        });
        self.move_contents(victim, found.collect())?;
        if victim.live() == 0 {
            return Ok(());
        }
        // Slots may be damaged whose contents are not.
        self.move_contents(victim, self.index.entries_in(victim.number))
    }

    fn move_contents(&self, victim: &Segment, found: Vec<IndexEntry>) -> Result<(), Error> {
        const AT_ONCE: u64 = 1 << 20;
        let mut seen = Vec::new();
        let mut contents = Vec::new();
        let mut length = 0;
        let count = found.len();
        for (i, found) in found.into_iter().enumerate() {
            match self.content_there(&found, Read::Waiting) {
                Some(content) => {
                    length += found.size;
                    contents.push(NewContent {
                        key: found.key,
                        limit: found.limit,
                        content,
                    });
                    seen.push(found);
                }
                None => self.forget_damaged(&found),
            }
            if length >= AT_ONCE || i + 1 == count {
                self.append(&contents, SpaceSource::Reserve, |places| {
                    for (found, place) in seen.iter().zip(places) {
                        self.count_live(*place, found.size);
                        if self.index.relocate(found, *place) {
                            victim.remove_live(found.size);
                            continue;
                        }
                        // Removed, or replaced: what was moved must not come back at the next start.
                        self.discount_live(&IndexEntry {
                            place: *place,
                            ..*found
                        });
                        if found.key.is_mutable() {
                            self.erase_slot(*place);
                        }
                    }
                })?;
                (seen, contents, length) = (Vec::new(), Vec::new(), 0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::FileExt,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::{
        super::{Store, key::IndexKey},
        *,
    };
    use crate::{
        digest::{Digest, DigestFunction},
        instance::InstanceName,
        proto::reapi::ActionResult,
    };

    fn assert_used_is_what_there_is(store: &Store) {
        let segments = store.space.segments.read();
        let disk: u64 = segments.values().map(|segment| segment.disk()).sum();
        assert_eq!(store.used(), disk);
    }

    fn damage_slot(store: &Store, of: &Digest, bytes: &[u8]) {
        let found = store.space.index.peek(&IndexKey::blob(of)).unwrap();
        let Location::Segment { number, slot, .. } = found.place else {
            panic!("not in a segment");
        };
        let segments = store.space.segments_directory();
        let path = segments.join(format!("{number:08x}.table"));
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(bytes, u64::from(slot) * 64).unwrap();
    }

    fn compact(store: &Store) {
        let _alone = store.space.reclaiming.lock();
        while store.space.compact_one() {}
    }

    fn blob(seed: u32, size: usize) -> (Digest, bytes::Bytes) {
        let mut content = vec![0; size];
        content[..4].copy_from_slice(&seed.to_le_bytes());
        (DigestFunction::Sha256.digest_of(&content), content.into())
    }

    #[test]
    fn a_segment_that_is_about_to_be_appended_to_is_not_compacted() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let _alone = store.space.reclaiming.lock();
                    store.space.compact_one();
                }
            });
            let writers: [_; 2] = [0, 1].map(|writer: u32| {
                let store = &store;
                scope.spawn(move || {
                    let blobs = (0..400u32).map(|i| blob(writer << 16 | i, 60_000));
                    // All fit: nothing is evicted.
                    let missing = blobs.filter(|blob| {
                        store.put(std::slice::from_ref(blob)).remove(0).unwrap();
                        store.read(&blob.0, 1 << 20).is_err()
                    });
                    missing.count()
                })
            });
            let missing = writers.map(|writer| writer.join());
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(missing.map(Result::unwrap), [0, 0]);
        });
        assert_used_is_what_there_is(&store);
    }

    #[test]
    fn a_result_that_was_replaced_or_removed_while_it_was_moved_stays_away_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let instance = InstanceName::empty();
        let actions: Vec<Digest> = (0..1_000).map(|i| blob(i, 10).0).collect();
        let result = |exit_code| ActionResult {
            exit_code,
            stdout_raw: vec![b'x'; 300].into(),
            ..Default::default()
        };
        for round in 0..6 {
            let store = Store::open(directory.path(), 64 << 20).unwrap();
            let update = |action: &Digest, exit_code| {
                let result = result(exit_code);
                store
                    .update_action_result(&instance, action, &result)
                    .unwrap();
            };
            actions.iter().for_each(|action| update(action, 1));
            // The segment is full, and most of it is dead.
            let rest: Vec<_> = (0..40).map(|i| blob(round << 16 | i, 30_000)).collect();
            assert!(store.put(&rest).iter().all(Result::is_ok));
            rest.iter()
                .for_each(|(digest, _)| store.forget_damaged(digest));
            std::thread::scope(|scope| {
                scope.spawn(|| compact(&store));
                for (i, action) in actions.iter().enumerate() {
                    match i % 2 {
                        0 => update(action, 2),
                        _ => assert!(store.remove_action_result(&instance, action)),
                    }
                }
            });
            drop(store);
            let store = Store::open(directory.path(), 64 << 20).unwrap();
            for (i, action) in actions.iter().enumerate() {
                let found = store.unchecked_action_result(&instance, action).unwrap();
                let expected = (i % 2 == 0).then_some(2);
                assert_eq!(found.map(|found| found.exit_code), expected);
            }
        }
    }

    #[test]
    fn a_content_whose_slot_is_damaged_is_moved_with_the_others_and_its_slot_is_mended() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let blobs: Vec<_> = (0..200).map(|i| blob(i, 10_000)).collect();
        assert!(store.put(&blobs).iter().all(Result::is_ok));
        let all = store.space.index.len();
        let reopened = || Store::open(directory.path(), 64 << 20).unwrap().count();

        // A check mends it, so that it is there after a restart.
        damage_slot(&store, &blobs[3].0, b"!!");
        damage_slot(&store, &blobs[4].0, &[0; 64]);
        assert_eq!(store.check(|_| true).removed, 0);
        damage_slot(&store, &blobs[5].0, b"!!");
        let mut scrub = super::super::scrub::Scrub::default();
        scrub.step(&store.space, 64 << 20);
        drop(store);
        assert_eq!(reopened(), all);

        let store = Store::open(directory.path(), 64 << 20).unwrap();
        damage_slot(&store, &blobs[3].0, b"!!");
        damage_slot(&store, &blobs[4].0, &[0; 64]);
        blobs[10..60]
            .iter()
            .for_each(|(digest, _)| store.forget_damaged(digest));
        compact(&store);
        for (digest, content) in [&blobs[3], &blobs[4], &blobs[100]] {
            assert_eq!(&store.read(digest, 1 << 20).unwrap(), content);
        }
        assert_used_is_what_there_is(&store);
        drop(store);
        assert_eq!(reopened(), all - 50);
    }
}
