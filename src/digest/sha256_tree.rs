//! SHA256TREE (REAPI: DigestFunction.Value): SHA-256 of pieces of 1 KiB, and of those a Merkle tree.
//!
//! 1. The left part of each node is the largest power of two that is smaller than the whole.
//! 2. A stack has the complete subtrees so far, the larger ones first, and the last piece waits in the
//!    buffer: whether it is the right part of a node, and of which, is known when more comes, or nothing.

use sha2::{Digest as _, Sha256, block_api::compress256};

/// Bytes of a leaf.
const LEAF: usize = 1024;

/// The first bits of the fractional parts of the square roots of the primes from 23 to 53.
const INITIAL: [u32; 8] = [
    0xcbbb_9d5d,
    0x629a_292a,
    0x9159_015a,
    0x152f_ecd8,
    0x6733_2667,
    0x8eb4_4a87,
    0xdb0c_2e0d,
    0x47b5_481d,
];

/// Computes a hash piece by piece.
#[derive(Default)]
pub(super) struct Sha256Tree {
    leaf: Sha256,
    /// Bytes of the leaf that is not complete, or not known to be followed by another.
    filled: usize,
    /// Leaves that are complete and followed by others.
    leaves: u64,
    /// One subtree for each bit that is set in `leaves`.
    subtrees: Vec<[u8; 32]>,
}

impl Sha256Tree {
    pub(super) fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.filled == LEAF {
                self.push_leaf();
            }
            let (piece, rest) = data.split_at(data.len().min(LEAF - self.filled));
            self.leaf.update(piece);
            self.filled += piece.len();
            data = rest;
        }
    }

    fn push_leaf(&mut self) {
        let mut node: [u8; 32] = self.leaf.finalize_reset().into();
        self.filled = 0;
        self.leaves += 1;
        for _ in 0..self.leaves.trailing_zeros() {
            if let Some(left) = self.subtrees.pop() {
                node = parent(&left, &node);
            }
        }
        self.subtrees.push(node);
    }

    pub(super) fn finish(self) -> [u8; 32] {
        let last: [u8; 32] = self.leaf.finalize().into();
        let lefts = self.subtrees.iter().rev();
        lefts.fold(last, |right, left| parent(left, &right))
    }
}

/// What the block cipher makes of both, without the addition of its initial values.
fn parent(left: &[u8; 32], right: &[u8; 32]) -> [u8; 32] {
    let mut block = [0; 64];
    block[..32].copy_from_slice(left);
    block[32..].copy_from_slice(right);
    let mut state = INITIAL;
    compress256(&mut state, &[block]);
    let mut node = [0; 32];
    for (to, (word, initial)) in node.chunks_exact_mut(4).zip(state.into_iter().zip(INITIAL)) {
        to.copy_from_slice(&word.wrapping_sub(initial).to_be_bytes());
    }
    node
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::push_hex;

    /// Of as many bytes of 0, 1, … 250, 0, 1, …; those of the API's repository.
    const VECTORS: [(usize, &str); 18] = [
        (
            1_025,
            "36c0998b21839ef74300b9de47d96d1f62323dc81f2b4231e98ce70cd6ffe750",
        ),
        (
            2_048,
            "b584996386f01793751c5cf0c39561f51b7e9924b818943b3cb2f6928cea0fa9",
        ),
        (
            2_049,
            "7318d2029b0392edf4cf109edb5a086b4bdadbb7950f710a1483eb881d9e5d44",
        ),
        (
            3_072,
            "dfc61c0a041f79d55d53bfe31c6cda7df77fdc8e6fbac1143d70b7144fdf6937",
        ),
        (
            3_073,
            "517d20c0e5835f060a1bd6388ed68574f63424bdac2a2c3a35a5c2ef859d8fe2",
        ),
        (
            4_096,
            "2f72bb93880012168c027f6781527ff08177c7c8dccb443f4d2c6389c186633d",
        ),
        (
            4_097,
            "c3ec942c1b8f4580320d3a06bcf4f8fe1f5db2be797ab67061ea4c2a95f208f2",
        ),
        (
            5_120,
            "a76924f6535b4b473377c285ec27acc84cc58e95ab1e9e29b1bb6a4a3fb9d0b3",
        ),
        (
            5_121,
            "98f987c3e9fc057a70873715b679b89a663d0df806859b6ce73f8379b06a10ff",
        ),
        (
            6_144,
            "372f988af412041b680ab236feef45626380062beb7514bbf93607aedd28fc9a",
        ),
        (
            6_145,
            "6dc4b78efd770453417b2ffdc74b27054793efe6122ecd7ee098670ed7c4651c",
        ),
        (
            7_168,
            "43686312c0cabccf9d5ad509efa096e3d743c63c7a51f122473c57949e4dd9a0",
        ),
        (
            7_169,
            "ad729297ab36cd099665b27c4247474a5518e4cd0be443f5f31d95edda08429b",
        ),
        (
            8_192,
            "fcfdde6fe59178e17708c5ba647919c3b141a44c9d1970782e597e1465266932",
        ),
        (
            8_193,
            "113c6e3a2452f388b6fad13dfab66ee0bff597a0a9a517ad8d0165f7190b603e",
        ),
        (
            16_384,
            "a7a10149a8cb00be537000560edb83b196306b780b72fad8af218f369f75fc19",
        ),
        (
            31_744,
            "2cdf7662636c173d4b236f6ea03bf84c65e7f6487b53b2a61c420e26cf8a98c7",
        ),
        (
            102_400,
            "0668d69e5331840d2f1823d717b7b3f5d1fdc8a09504cddb692b87ff83d50e5f",
        ),
    ];

    #[test]
    fn hashes_are_those_of_the_vectors_however_the_data_comes() {
        for (length, expected) in VECTORS {
            let data: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            for piece in [1, 63, 1024, 1025, 4096, length] {
                let mut hasher = Sha256Tree::default();
                for part in data.chunks(piece) {
                    hasher.update(part);
                }
                let mut hex = String::new();
                push_hex(&mut hex, &hasher.finish());
                assert_eq!(hex, expected, "{length} bytes in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_is_no_more_than_a_leaf_has_the_hash_of_sha256() {
        for length in [0, 1, 1023, 1024] {
            let data = vec![7; length];
            let mut hasher = Sha256Tree::default();
            hasher.update(&data);
            assert_eq!(hasher.finish(), <[u8; 32]>::from(Sha256::digest(&data)));
        }
    }
}
