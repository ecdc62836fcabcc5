//! Several blobs at once. Those that lie one after another in a segment, as blobs do that were uploaded together,
//! are read together.

use bytes::Bytes;

use super::{
    super::Error,
    SMALL, Store,
    index::{IndexEntry, Location},
    segment::Read,
    space::Space,
};
use crate::digest::Digest;

/// Bytes of one read, and perhaps one blob more: what stays in a processor's cache until it is checked and sent.
/// As long as one of its blobs is in use, so much is in memory.
const READ_AT_ONCE: u32 = 64 << 10;

/// Bytes of the blobs that are read without waiting, each with a weight of its own.
const CACHED_AT_ONCE: u64 = 256 << 10;
const WEIGHT: u64 = 1 << 10;

/// An entry that is in a segment.
struct WantedContent {
    /// In the order asked for.
    position: usize,
    number: u32,
    offset: u32,
    size: u32,
    checksum: u32,
}

impl WantedContent {
    fn new(position: usize, found: &IndexEntry) -> Option<Self> {
        match found.place {
            Location::Segment {
                number,
                offset,
                checksum,
                ..
            } => Some(WantedContent {
                position,
                number,
                offset,
                size: u32::try_from(found.size).ok()?,
                checksum,
            }),
            Location::File => None,
        }
    }

    /// Whether `next` begins where this ends, and they are read together.
    fn is_read_with(&self, next: &WantedContent) -> bool {
        self.number == next.number
            && self.offset.checked_add(self.size) == Some(next.offset)
            && self.offset / READ_AT_ONCE == next.offset / READ_AT_ONCE
    }
}

impl Space {
    /// The contents of entries in segments, in the order asked for. `None` says nothing about an entry.
    fn contents(&self, found: &[Option<IndexEntry>], read: Read) -> Vec<Option<Bytes>> {
        let mut contents = vec![None; found.len()];
        let wanted = found.iter().enumerate();
        let mut wanted: Vec<WantedContent> = wanted
            .filter_map(|(position, found)| WantedContent::new(position, found.as_ref()?))
            .collect();
        wanted.sort_unstable_by_key(|it| (it.number, it.offset));
        for together in wanted.chunk_by(WantedContent::is_read_with) {
            let Some(first) = together.first() else {
                continue;
            };
            let Some(segment) = self.segment(first.number) else {
                continue;
            };
            let size = together.iter().map(|it| it.size as usize).sum();
            let Some(bytes) = segment.read(first.offset, size, read) else {
                continue;
            };
            let mut rest = bytes;
            for it in together {
                let content = rest.split_to(it.size as usize);
                if crc32fast::hash(&content) == it.checksum
                    && let Some(slot) = contents.get_mut(it.position)
                {
                    *slot = Some(content);
                }
            }
        }
        contents
    }
}

impl Store {
    /// Whole blobs of at most `limit` bytes each, in the order asked for.
    pub fn read_many(&self, digests: &[Digest], limit: u64) -> Vec<Result<Bytes, Error>> {
        let is_small = |digest: &&Digest| digest.size() <= limit.min(SMALL);
        let found: Vec<_> = digests
            .iter()
            .map(|digest| self.entry(Some(digest).filter(is_small)?))
            .collect();
        let is_there = self.require_directory().is_ok();
        let contents = match is_there {
            true => self.space.contents(&found, Read::Waiting),
            false => vec![None; digests.len()],
        };
        let contents = digests.iter().zip(contents);
        let read = contents.map(|(digest, content)| match content {
            Some(content) => {
                self.space.counts.looked_up(true);
                Ok(content)
            }
            // Whatever it is, this tells.
            None => self.read(digest, limit),
        });
        read.collect()
    }

    /// The same without waiting for the disk. `None` says nothing about them.
    pub fn read_many_cached(
        &self,
        digests: &[Digest],
        limit: u64,
    ) -> Option<Vec<Result<Bytes, Error>>> {
        let weights = digests.iter().map(|digest| WEIGHT + digest.size());
        let is_small =
            |digest: &Digest| digest.size() <= limit.min(SMALL) && !digest.is_empty_blob();
        if weights.fold(0, u64::saturating_add) > CACHED_AT_ONCE || !digests.iter().all(is_small) {
            return None;
        }
        self.space.require_directory().ok()?;
        let found: Vec<_> = digests.iter().map(|digest| self.entry(digest)).collect();
        let contents = self.space.contents(&found, Read::Cached);
        let is_not_cached = |(found, content): (&Option<IndexEntry>, &Option<Bytes>)| {
            found.is_some() && content.is_none()
        };
        if found.iter().zip(&contents).any(is_not_cached) {
            return None;
        }
        let contents = digests.iter().zip(contents);
        let read = contents.map(|(digest, content)| {
            self.space.counts.looked_up(content.is_some());
            content.ok_or_else(|| Error::Missing(vec![*digest]))
        });
        Some(read.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    /// Blobs of 0 to 80,000 bytes: small ones that lie one after another over several reads, and files.
    fn blobs() -> Vec<(Digest, Bytes)> {
        let sizes = (0..600).map(|i| (i * i * 7919) % 1_500 + if i % 50 == 9 { 64_000 } else { 0 });
        let blob = |(i, size): (usize, usize)| {
            let content: Vec<u8> = (0..size).map(|at| (at * 31 + i) as u8).collect();
            (
                DigestFunction::Sha256.digest_of(&content),
                Bytes::from(content),
            )
        };
        let all = sizes.chain([0, 80_000, 65_536, 65_537]).enumerate();
        all.map(blob).collect()
    }

    #[test]
    fn many_are_read_as_each_of_them_is_in_any_order() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let mut blobs = blobs();
        let absent = DigestFunction::Sha256.digest_of(b"absent");
        assert!(store.put(&blobs).iter().all(Result::is_ok));
        for round in 0..4 {
            let mut digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
            digests.insert(round * 100, absent);
            let read = store.read_many(&digests, 70_000);
            for (digest, read) in digests.iter().zip(&read) {
                match blobs.iter().find(|(of, _)| of == digest) {
                    Some((_, content)) if content.len() <= 70_000 => {
                        assert_eq!(read.as_ref().unwrap(), content);
                    }
                    Some(_) => assert!(matches!(read, Err(Error::TooLarge { .. }))),
                    None => assert!(matches!(read, Err(Error::Missing(_)))),
                }
            }
            // One twice, and those between it and its neighbour.
            blobs.rotate_left(77 + round);
            let twice = blobs[round].clone();
            blobs.push(twice);
        }
    }

    #[test]
    fn what_is_damaged_is_missing_and_those_beside_it_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let blobs: Vec<_> = blobs()
            .into_iter()
            .filter(|(_, content)| (1..2_000).contains(&content.len()))
            .collect();
        assert!(store.put(&blobs).iter().all(Result::is_ok));
        let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
        let found = store.entry(&digests[50]).unwrap();
        let Location::Segment { number, offset, .. } = found.place else {
            panic!("not in a segment");
        };
        let path = directory.path().join(format!("segments/{number:08x}.data"));
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"!!", offset.into()).unwrap();

        assert!(store.read_many_cached(&digests[..60], 2_000).is_none());
        for (position, read) in store.read_many(&digests, 2_000).into_iter().enumerate() {
            match position {
                50 => assert!(matches!(read, Err(Error::Missing(_)))),
                _ => assert_eq!(read.unwrap(), blobs[position].1),
            }
        }
        if let Some(read) = store.read_many_cached(&digests[..60], 2_000) {
            assert!(matches!(read[50], Err(Error::Missing(_))));
            assert_eq!(read.iter().flatten().count(), 59);
        }
    }
}
