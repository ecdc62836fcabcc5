//! RepMaxCDC (REAPI: RepMaxCdcParams; github.com/buildbarn/go-cdc).
//!
//! A chunk ends where the Gear hash of the bytes before is greatest, of the first such places; where that is
//! so far away that another chunk fits in between, the search is repeated among the places that leave room
//! for it. So all chunks have `minimum` bytes to one less than twice that, but a blob's only one.
//!
//! 1. Whether a place is chosen depends only on those where the hash is greater than at all before them,
//!    from the first place that is allowed on: the *records*. They are kept, since those beyond the next
//!    chunk's first place are records there, too; only the ones before them must be looked for again.

use std::sync::LazyLock;

use md5::{Digest as _, Md5};

/// Bytes that the hash depends on.
pub(super) const HASHED: usize = 64;

/// The high 64 bits of the MD5 of each byte, 64 times: REAPI says it of the byte alone, but every
/// implementation that it names has these.
static GEAR: LazyLock<[u64; 256]> = LazyLock::new(|| {
    std::array::from_fn(|byte| {
        let hash: [u8; 16] = Md5::digest([byte as u8; HASHED]).into();
        let [a, b, c, d, e, f, g, h, ..] = hash;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    })
});

/// A place after so many bytes from where the next chunk begins, with the hash of those before.
#[derive(Clone, Copy)]
struct CutPoint {
    at: usize,
    hash: u64,
}

pub(super) struct RepMaxCutter {
    minimum: usize,
    records: Vec<CutPoint>,
    /// The last place that was looked at.
    reached: CutPoint,
}

impl RepMaxCutter {
    /// `minimum` is at least `HASHED`.
    pub(super) fn new(minimum: usize) -> Self {
        RepMaxCutter {
            minimum,
            records: Vec::new(),
            reached: CutPoint { at: 0, hash: 0 },
        }
    }

    /// The length of the next chunk, which begins where `ahead` does. Each call has what the one before had
    /// ahead, without the chunk that was cut, and perhaps more.
    pub(super) fn cut(&mut self, ahead: &[u8]) -> usize {
        let minimum = self.minimum;
        if ahead.len() < 2 * minimum {
            return ahead.len();
        }
        // What follows the cut must be a chunk, too.
        let last = ahead.len() - minimum;
        self.find_first_records(ahead);
        let best = self.records.last().map_or(0, |record| record.hash);
        self.reached = scan(ahead, self.reached, last, best, &mut self.records);
        let mut records = self.records.iter().rev();
        let mut cut = records.next().map_or(minimum, |record| record.at);
        while cut >= 2 * minimum {
            let latest = cut - minimum;
            let earlier = records.find(|record| record.at <= latest);
            cut = earlier.map_or(minimum, |record| record.at);
        }
        // Those of the next chunk.
        self.records.retain_mut(|record| {
            let stays = record.at >= cut + minimum;
            record.at = record.at.saturating_sub(cut);
            stays
        });
        self.reached.at = self.reached.at.saturating_sub(cut);
        cut
    }

    /// Records from the first place that is allowed to the first one that is kept.
    fn find_first_records(&mut self, ahead: &[u8]) {
        let minimum = self.minimum;
        if self.records.first().is_some_and(|kept| kept.at == minimum) {
            return;
        }
        let hashed = ahead[minimum - HASHED..minimum].iter();
        let hash = hashed.fold(0, |hash, byte| next_hash(hash, *byte));
        let first = CutPoint { at: minimum, hash };
        let mut records = vec![first];
        match self.records.first() {
            Some(kept) => {
                scan(ahead, first, kept.at - 1, hash, &mut records);
            }
            None => {
                // What was looked at has no record any more.
                let to = self.reached.at.max(minimum);
                self.reached = scan(ahead, first, to, hash, &mut records);
            }
        }
        records.append(&mut self.records);
        self.records = records;
    }
}

fn next_hash(hash: u64, byte: u8) -> u64 {
    (hash << 1).wrapping_add(GEAR[usize::from(byte)])
}

/// Looks at the places after `from`, up to `last`, for hashes greater than `best` and all before.
fn scan(
    ahead: &[u8],
    from: CutPoint,
    last: usize,
    mut best: u64,
    records: &mut Vec<CutPoint>,
) -> CutPoint {
    if last <= from.at {
        return from;
    }
    let gear = &*GEAR;
    let mut hash = from.hash;
    for (offset, byte) in ahead[from.at..last].iter().enumerate() {
        hash = (hash << 1).wrapping_add(gear[usize::from(*byte)]);
        if hash > best {
            best = hash;
            let at = from.at + offset + 1;
            records.push(CutPoint { at, hash });
        }
    }
    CutPoint { at: last, hash }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{ChunkingFunction, tests::lengths},
        *,
    };

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..length).map(|_| next()).collect()
    }

    fn of(minimum: usize, horizon: usize) -> ChunkingFunction {
        ChunkingFunction::RepMaxCdc { minimum, horizon }
    }

    #[test]
    fn the_gear_is_that_of_fast_cdc() {
        let (theirs, _) = fastcdc::v2020::get_gear_with_seed(0);
        assert_eq!(theirs.as_ref(), GEAR.as_slice());
    }

    /// The lengths are those that go-cdc 0.0.10 makes of the same data.
    #[test]
    fn blobs_are_cut_where_go_cdc_cuts_them() {
        let expected: [(usize, usize, usize, &[usize]); 10] = [
            (
                30000,
                1024,
                8192,
                &[
                    1341, 1191, 2004, 1555, 1812, 1028, 1056, 1510, 1239, 1065, 1303, 1159, 1699,
                    1657, 1502, 1714, 1875, 1427, 1151, 1449, 1263,
                ],
            ),
            (
                30000,
                1024,
                0,
                &[
                    1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024,
                    1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024,
                    1024, 1024, 1328,
                ],
            ),
            (
                30000,
                1024,
                100,
                &[
                    1041, 1065, 1065, 1123, 1024, 1036, 1088, 1045, 1070, 1084, 1042, 1053, 1065,
                    1077, 1120, 1082, 1072, 1065, 1070, 1053, 1062, 1029, 1057, 1031, 1098, 1063,
                    1057, 1263,
                ],
            ),
            (
                30000,
                2048,
                2048,
                &[2532, 3559, 3896, 3814, 2462, 2707, 3865, 3302, 3863],
            ),
            (
                3000,
                64,
                512,
                &[
                    74, 73, 121, 68, 72, 66, 113, 72, 68, 66, 93, 80, 75, 117, 105, 78, 88, 76, 85,
                    123, 99, 84, 75, 70, 65, 95, 69, 64, 64, 69, 65, 106, 68, 89, 76, 65, 64,
                ],
            ),
            (0, 1024, 8192, &[]),
            (1, 1024, 8192, &[1]),
            (2047, 1024, 8192, &[2047]),
            (2048, 1024, 8192, &[1024, 1024]),
            (2049, 1024, 8192, &[1025, 1024]),
        ];
        for (length, minimum, horizon, chunks) in expected {
            assert_eq!(
                lengths(of(minimum, horizon), &noise(length)),
                chunks,
                "{length} {minimum} {horizon}"
            );
        }
        let zeros = [1024, 1024, 1024, 1024, 1024, 1024, 1024, 1832];
        assert_eq!(lengths(of(1024, 8192), &[0; 9000]), zeros);
    }

    /// As go-cdc's reference says it: the whole horizon is looked at for each chunk.
    fn cut_simply(minimum: usize, ahead: &[u8]) -> usize {
        if ahead.len() < 2 * minimum {
            return ahead.len();
        }
        let mut last = ahead.len() - minimum;
        loop {
            let hashed = |at: usize| ahead[at - HASHED..at].iter();
            let hash = |at: usize| hashed(at).fold(0, |hash, byte| next_hash(hash, *byte));
            let (mut best, mut cut) = (hash(minimum), minimum);
            let mut current = best;
            for at in minimum + 1..=last {
                current = next_hash(current, ahead[at - 1]);
                if current > best {
                    (best, cut) = (current, at);
                }
            }
            if cut < 2 * minimum {
                return cut;
            }
            last = cut - minimum;
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_kept_from_chunk_to_chunk_changes_nothing(
            length in 0..20_000_usize,
            minimum in 64..400_usize,
            horizon in 0..4_000_usize,
            alphabet in 1..=255_u8,
        ) {
            let data: Vec<u8> = noise(length).iter().map(|byte| byte % alphabet).collect();
            let (mut at, mut simply) = (0, Vec::new());
            while at < length {
                let window = (2 * minimum + horizon).min(length - at);
                let chunk = cut_simply(minimum, &data[at..at + window]);
                simply.push(chunk);
                at += chunk;
            }
            proptest::prop_assert_eq!(lengths(of(minimum, horizon), &data), simply);
        }
    }
}
