//! Which shard has a digest: rendezvous hashing, in the way of bb_storage's sharding, so that both find the
//! same blobs on the same shards when these have the same keys and weights.
//!
//! 1. What a digest's order of shards is depends on their names and weights only, not on where they are or
//!    in which order they are given.
//! 2. A shard that is added takes its share from all others, and nothing else moves.

use crate::digest::{Digest, DigestFunction};

/// A shard as it takes part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Contender {
    name_hash: u64,
    weight: u32,
}

impl Contender {
    pub(super) fn new(name: &str, weight: u32) -> Self {
        let hash = DigestFunction::Sha256.digest_of(name.as_bytes());
        Contender {
            name_hash: leading(hash.hash_bytes()),
            weight,
        }
    }

    /// The shard with the highest score has the digest; where that is out of use, the next one.
    pub(super) fn score(&self, digest: &Digest) -> u64 {
        let mixed = mix(self.name_hash ^ leading(digest.hash_bytes()));
        // -weight / log2(x), where x is between 0 and 1.
        let negative_log = (64 << 16) - log2(mixed);
        (u64::from(self.weight) << 32) / negative_log
    }
}

/// The first 8 bytes, of which every hash has more.
fn leading(hash: &[u8]) -> u64 {
    let bytes = hash.iter().take(8);
    bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The finaliser of the generator splitmix64.
fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The binary logarithm with 16 bits after the point, by a table of 64 values between 1 and 2 and lines
/// between them: the same on every processor. Of 0 it is 0.
fn log2(x: u64) -> u64 {
    let whole = u64::from(x.checked_ilog2().unwrap_or(0));
    // What follows the leading bit.
    let fraction = match whole {
        0 => 0,
        whole => x << (64 - whole),
    };
    let index = (fraction >> 58) as usize;
    let between = fraction << 6 >> 16;
    let base = table(index);
    let delta = u64::from(table(index + 1).wrapping_sub(base));
    let interpolated = (u64::from(base) << 48).wrapping_add(delta * between);
    whole << 16 | interpolated >> 48
}

/// log2(1 + index / 64), with 16 bits after the point; of 64 they are 0 again.
fn table(index: usize) -> u16 {
    const TABLE: [u16; 65] = [
        0x0000, 0x05ba, 0x0b5d, 0x10eb, 0x1664, 0x1bc8, 0x2119, 0x2656, 0x2b80, 0x3098, 0x359f,
        0x3a94, 0x3f78, 0x444c, 0x4910, 0x4dc5, 0x526a, 0x5700, 0x5b89, 0x6003, 0x646f, 0x68ce,
        0x6d20, 0x7165, 0x759d, 0x79ca, 0x7dea, 0x81ff, 0x8608, 0x8a06, 0x8dfa, 0x91e2, 0x95c0,
        0x9994, 0x9d5e, 0xa11e, 0xa4d4, 0xa881, 0xac24, 0xafbe, 0xb350, 0xb6d9, 0xba59, 0xbdd1,
        0xc140, 0xc4a8, 0xc807, 0xcb5f, 0xceaf, 0xd1f7, 0xd538, 0xd872, 0xdba5, 0xded0, 0xe1f5,
        0xe513, 0xe82a, 0xeb3b, 0xee45, 0xf149, 0xf446, 0xf73e, 0xfa2f, 0xfd1a, 0x0000,
    ];
    TABLE[index]
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use super::*;

    #[test]
    fn the_table_has_the_logarithm() {
        for index in 0..64 {
            let exact = (1.0 + index as f64 / 64.0).log2() * 65536.0;
            assert_eq!(table(index), exact.round() as u16, "{index}");
        }
        assert_eq!(log2(1), 0);
        assert_eq!(log2(2), 1 << 16);
        assert_eq!(log2(3 << 40), (41 << 16) + 0x95c0);
        assert_eq!(log2(u64::MAX) >> 16, 63);
    }

    fn winner(shards: &[(&str, u32)], digest: &Digest) -> usize {
        // Of equal ones the first name, wherever it stands.
        let rank = |i: &usize| {
            let (name, weight) = shards[*i];
            (Contender::new(name, weight).score(digest), Reverse(name))
        };
        (0..shards.len()).max_by_key(rank).unwrap()
    }

    #[test]
    fn shares_follow_weights_and_a_new_shard_moves_only_its_own() {
        let digests: Vec<Digest> = (0..20_000u32)
            .map(|i| DigestFunction::Sha256.digest_of(&i.to_le_bytes()))
            .collect();
        let before = [("a", 1), ("b", 1), ("c", 2)];
        let after = [("new", 1), ("c", 2), ("a", 1), ("b", 1)];
        let mut counts = [0i32; 3];
        let mut moved = 0;
        for digest in &digests {
            let first = winner(&before, digest);
            counts[first] += 1;
            match winner(&after, digest) {
                0 => moved += 1,
                now => assert_eq!(after[now].0, before[first].0),
            }
        }
        for (count, expected) in counts.into_iter().zip([5000, 5000, 10_000]) {
            assert!((count - expected).abs() < 400, "{counts:?}");
        }
        assert!((3600..4400).contains(&moved), "{moved}");
    }

    /// As the function of bb-storage's pkg/blobstore/sharding gives it.
    #[test]
    fn orders_are_those_of_bb_storage() {
        for (content, scores) in [
            ("", [21035, 147883, 81008]),
            ("a", [1024, 240277, 1702662]),
            ("hello", [35082, 28839, 1476187]),
            ("bb", [31609, 2457075, 34754]),
        ] {
            let digest = DigestFunction::Sha256.digest_of(content.as_bytes());
            for ((name, weight), expected) in [("a", 1), ("b", 1), ("c", 2)].into_iter().zip(scores)
            {
                assert_eq!(Contender::new(name, weight).score(&digest), expected);
            }
        }
    }
}
