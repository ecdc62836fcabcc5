//! Reading all that the store has, over and over at a bounded rate, so that damage is found before
//! somebody needs what is damaged. What is found is removed, as by any other reader.
//!
//! A round goes over the segments by their numbers, then over the large blobs by their directories. What
//! comes or goes meanwhile is seen in the next one.

use super::{
    file::{self, BlobFile, LargeBlob, PIECE},
    index::Location,
    segment::{Read, Records},
    space::Space,
};

/// Bytes that are read in a step.
pub(super) const STEP: u64 = 40 << 20;

/// Where a round is.
pub(super) enum Scrub {
    /// At this slot of the first segment that has at least this number.
    Segments { number: u32, slot: u32 },
    /// In a directory of large blobs: those that are left of it, of the last of which so many bytes were
    /// read. `None`: it has yet to be listed.
    Files {
        directory: u8,
        left: Option<Vec<LargeBlob>>,
        at: u64,
    },
}

impl Default for Scrub {
    fn default() -> Self {
        Scrub::Segments { number: 0, slot: 0 }
    }
}

impl Scrub {
    /// Reads on, about `budget` bytes or to the end of the round.
    pub(super) fn step(&mut self, space: &Space, budget: u64) {
        let mut read = 0;
        while read < budget {
            *self = match std::mem::take(self) {
                Scrub::Segments { number, slot } => {
                    segment(space, (number, slot), budget, &mut read)
                }
                Scrub::Files {
                    directory,
                    left: None,
                    ..
                } => Scrub::Files {
                    directory,
                    left: Some(file::list_one(&space.files(), directory).unwrap_or_default()),
                    at: 0,
                },
                Scrub::Files {
                    directory,
                    left: Some(mut left),
                    at,
                } => match left.last() {
                    Some(blob) => {
                        let at = large(space, *blob, at, budget - read, &mut read);
                        if at.is_none() {
                            left.pop();
                        }
                        Scrub::Files {
                            directory,
                            left: Some(left),
                            at: at.unwrap_or(0),
                        }
                    }
                    None => match directory.checked_add(1) {
                        Some(directory) => Scrub::Files {
                            directory,
                            left: None,
                            at: 0,
                        },
                        None => return,
                    },
                },
            };
        }
    }
}

/// Reads contents of a segment that the index points to; where to go on.
fn segment(space: &Space, (number, slot): (u32, u32), budget: u64, read: &mut u64) -> Scrub {
    let next = space
        .segments
        .read()
        .range(number..)
        .next()
        .map(|(_, segment)| segment.clone());
    let Some(segment) = next else {
        return Scrub::Files {
            directory: 0,
            left: None,
            at: 0,
        };
    };
    let first = if segment.number == number { slot } else { 0 };
    let Records {
        records, damaged, ..
    } = segment.records();
    if first == 0 && !damaged.is_empty() {
        mend_slots(space, segment.number, &damaged);
    }
    for (slot, record) in records {
        if slot < first {
            continue;
        }
        let place = Location::of_record(segment.number, slot, &record);
        let found = space.index.peek(&record.key);
        if let Some(found) = found.filter(|found| found.place == place) {
            *read += record.size;
            if space.content_there(&found, Read::Waiting).is_none() {
                space.forget_damaged(&found);
            }
        }
        if *read >= budget {
            return Scrub::Segments {
                number: segment.number,
                slot: slot + 1,
            };
        }
    }
    Scrub::Segments {
        number: segment.number.saturating_add(1),
        slot: 0,
    }
}

/// Writes those of damaged slots again that the index knows; others were erased, or never finished.
fn mend_slots(space: &Space, number: u32, damaged: &[u32]) {
    for found in space.index.entries_in(number) {
        if matches!(found.place, Location::Segment { slot, .. } if damaged.binary_search(&slot).is_ok())
        {
            space.mend_slot(&found);
        }
    }
}

/// Reads about `budget` bytes of a large blob; where to go on in it, if there is more.
fn large(
    space: &Space,
    (key, size, limit): LargeBlob,
    at: u64,
    budget: u64,
    read: &mut u64,
) -> Option<u64> {
    let found = space.index.peek(&key)?;
    if found.place != Location::File || found.size != size || found.limit != limit {
        return None;
    }
    let end = at.saturating_add(budget).next_multiple_of(PIECE).min(size);
    *read += end - at;
    let blob = BlobFile::open(&file::path(&space.files(), &key, size, limit), size);
    let is_right = match blob {
        Ok(blob) => (at..end)
            .step_by(PIECE as usize)
            .all(|start| blob.read(start, (start + PIECE).min(end)).is_some()),
        // It may have been evicted just now; else the next reader says what is wrong.
        Err(error) => error.kind() != std::io::ErrorKind::InvalidData,
    };
    if !is_right {
        space.forget_damaged(&found);
        return None;
    }
    (end < size).then_some(end)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::{
        digest::DigestFunction,
        storage::embedded::{Store, instance_limits::LimitId, key::IndexKey},
    };

    #[test]
    fn a_round_finds_what_is_damaged_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 1 << 30).unwrap();
        let mut digests = Vec::new();
        for (seed, size) in [100, 5_000, 60_000, 100_000, 900_000, 3_000_000]
            .into_iter()
            .enumerate()
        {
            let content = vec![seed as u8 + 1; size];
            let digest = DigestFunction::Sha256.digest_of(&content);
            store.put(&[(digest, content.into())]).remove(0).unwrap();
            digests.push(digest);
        }
        let rounds = |budget: u64| {
            let mut scrub = Scrub::default();
            for _ in 0..2_000 {
                scrub.step(&store.space, budget);
            }
            store.find_missing(&digests)
        };
        assert_eq!(rounds(50_000), []);
        // One small content, and the middle of a large one.
        let segment = directory.path().join("segments/00000000.data");
        let open = |path| std::fs::OpenOptions::new().write(true).open(path).unwrap();
        open(segment).write_all_at(b"x", 150).unwrap();
        let key = IndexKey::blob(&digests[5]);
        let path = file::path(
            &directory.path().join("files"),
            &key,
            3_000_000,
            LimitId::NONE,
        );
        open(path).write_all_at(b"x", 1_500_000).unwrap();
        assert_eq!(rounds(50_000), [digests[1], digests[5]]);
    }
}
