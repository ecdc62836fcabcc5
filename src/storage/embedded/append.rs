//! Small contents are appended to the active segment, which a new one replaces when it is full.

use std::sync::{Arc, atomic::Ordering};

use super::{
    super::Error,
    active_segment::{ActiveSegment, SegmentWrite},
    file,
    index::{IndexEntry, Location},
    instance_limits::LimitId,
    segment::{self, AppendPosition, NewContent, Segment},
    space::Space,
};

/// Where the space of a new segment comes from.
#[derive(Clone, Copy)]
pub(super) enum SpaceSource {
    /// From what all may use, after making room if need be.
    Shared,
    /// From what the limit leaves to whoever makes room.
    Reserve,
}

impl Space {
    /// Stores contents that proved right. On an error some of them may have been stored.
    pub(super) fn store_small(&self, contents: &[NewContent]) -> Result<(), Error> {
        // Files that are open take what nobody would find at the next start.
        self.require_directory_now()?;
        for new in contents {
            self.limits.admit(new.limit, new.content.len() as u64)?;
        }
        let result = self.append(contents, SpaceSource::Shared, |places| {
            let used = self.now();
            for (new, place) in contents.iter().zip(places) {
                let size = new.content.len() as u64;
                self.counts.written.add(size);
                self.set_location(&IndexEntry {
                    key: new.key,
                    size,
                    place: *place,
                    used,
                    limit: new.limit,
                });
            }
        });
        let mut limits: Vec<LimitId> = contents.iter().map(|new| new.limit).collect();
        limits.dedup();
        for limit in limits {
            self.keep_limit(limit);
        }
        result
    }

    /// Makes the index point to a content that has been written.
    pub(super) fn set_location(&self, new: &IndexEntry) {
        self.count_live(new.place, new.size);
        self.limits.add(new.limit, new.footprint());
        if let Some(old) = self.index.insert(new) {
            self.discount_live(&old);
            self.limits.subtract(old.limit, old.footprint());
            match old.place {
                // Somebody else wrote the same file.
                Location::File => self.give_back(file::footprint(new.size)),
                // An older action result must not come back when the store is opened again after
                // the newer one was evicted.
                Location::Segment { .. } if new.key.is_mutable() => self.erase_slot(old.place),
                Location::Segment { .. } => {}
            }
        }
    }

    /// Forgets what is at a place, also for those who open the store later.
    pub(super) fn erase_slot(&self, place: Location) {
        if let Location::Segment { number, slot, .. } = place
            && let Some(segment) = self.segment(number)
        {
            let _ = segment.erase(slot);
        }
    }

    pub(super) fn count_live(&self, place: Location, size: u64) {
        if let Location::Segment { number, .. } = place
            && let Some(segment) = self.segment(number)
        {
            segment.add_live(size);
        }
    }

    pub(super) fn discount_live(&self, found: &IndexEntry) {
        if let Location::Segment { number, .. } = found.place
            && let Some(segment) = self.segment(number)
        {
            segment.remove_live(found.size);
        }
    }

    pub(super) fn segment(&self, number: u32) -> Option<Arc<Segment>> {
        self.segments.read().get(&number).cloned()
    }

    /// Appends, and tells the places of what has been appended as far as it went well.
    pub(super) fn append(
        &self,
        contents: &[NewContent],
        source: SpaceSource,
        appended: impl FnOnce(&[Location]),
    ) -> Result<(), Error> {
        let mut places = Vec::with_capacity(contents.len());
        // Until the index points to what was written.
        let mut writing = Vec::new();
        let mut rest = contents;
        let result = loop {
            if rest.is_empty() {
                break Ok(());
            }
            match self.append_some(rest, source, &mut places) {
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

    fn fits_active(&self, size: u64) -> bool {
        let active = self.active.lock();
        active.as_ref().is_some_and(|active| active.fits(size))
    }

    /// Appends as many contents as fit into one segment, at least one.
    fn append_some(
        &self,
        contents: &[NewContent],
        source: SpaceSource,
        places: &mut Vec<Location>,
    ) -> Result<(usize, SegmentWrite), Error> {
        let first = contents.first().map_or(0, |new| new.content.len() as u64);
        let (writing, at, count, length) = loop {
            let mut active = self.active.lock();
            if let Some(reserved) = active.as_mut().and_then(|active| active.take(contents)) {
                break reserved;
            }
            drop(active);
            self.replace_active(first, source)?;
        };
        self.written.fetch_add(length, Ordering::Relaxed);
        let some = contents.get(..count).unwrap_or_default();
        let segment = &writing.0;
        let records = segment
            .write(at, some, self.now())
            .map_err(|error| self.write_error(error))?;
        let slots = (at.slot..).zip(&records);
        places
            .extend(slots.map(|(slot, record)| Location::of_record(segment.number, slot, record)));
        Ok((count, writing))
    }

    /// Puts a new segment in place of a full one; it has room for a content of this size.
    fn replace_active(&self, size: u64, source: SpaceSource) -> Result<(), Error> {
        let capacity = self.segment_capacity().max(size);
        let footprint = segment::footprint(capacity);
        // If each of many took the space of a segment, of which one is needed, as much would be evicted for them.
        let _request;
        match source {
            SpaceSource::Shared => {
                let refused = self.segment_request.refusals();
                let request = self.segment_request.lock();
                if self.fits_active(size) {
                    return Ok(());
                }
                if let Some(error) = request.refused_since(refused) {
                    return Err(error);
                }
                if let Err(error) = self.take(footprint) {
                    request.refuse(error.clone());
                    return Err(error);
                }
                _request = request;
            }
            SpaceSource::Reserve => {
                self.used.fetch_add(footprint, Ordering::Relaxed);
            }
        }
        let _alone = self.segment_creation.lock();
        if self.fits_active(size) {
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
        // Whoever makes room sees it as the active one, or not at all, and the old one as written to until it is cut.
        let mut active = self.active.lock();
        self.segments.write().insert(number, segment.clone());
        let old = active.replace(ActiveSegment {
            segment,
            end: AppendPosition { offset: 0, slot: 0 },
        });
        let old = old.map(|old| (SegmentWrite::begin(&old.segment), old.end));
        drop(active);
        if let Some((old, end)) = old {
            match old.0.seal(end) {
                Ok(freed) => self.give_back(freed),
                Err(error) => tracing::warn!(%error, "could not cut a full segment"),
            }
        }
        Ok(())
    }
}
