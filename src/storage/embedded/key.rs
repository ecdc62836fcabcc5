//! What the store knows a content by.

use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
};

/// A digest function with the first 32 bytes of its hash; or an action with its instance name, for its
/// result or for what is known of its executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IndexKey {
    tag: u8,
    hash: [u8; 32],
}

/// On disk; numbers must stay.
const ACTION_RESULT: u8 = 128;
const PREVIOUS_EXECUTION_STATS: u8 = 129;

impl IndexKey {
    pub(super) fn blob(digest: &Digest) -> Self {
        let tag = match digest.function() {
            DigestFunction::Sha256 => 1,
            DigestFunction::Sha1 => 2,
            DigestFunction::Md5 => 3,
            DigestFunction::Sha384 => 5,
            DigestFunction::Sha512 => 6,
            DigestFunction::Sha256Tree => 8,
            DigestFunction::Blake3 => 9,
            DigestFunction::GitSha1 => 10,
        };
        let mut hash = [0; 32];
        for (to, from) in hash.iter_mut().zip(digest.hash_bytes()) {
            *to = *from;
        }
        IndexKey { tag, hash }
    }

    pub(super) fn action(instance: &InstanceName, action: &Digest) -> Self {
        IndexKey::named(ACTION_RESULT, instance, action)
    }

    pub(super) fn previous_execution_stats(instance: &InstanceName, reduced: &Digest) -> Self {
        IndexKey::named(PREVIOUS_EXECUTION_STATS, instance, reduced)
    }

    fn named(tag: u8, instance: &InstanceName, action: &Digest) -> Self {
        let name = format!("{instance}\0{action:?}");
        IndexKey {
            tag,
            ..IndexKey::blob(&DigestFunction::Sha256.digest_of(name.as_bytes()))
        }
    }

    /// Whether it has one content after another, unlike a blob.
    pub(super) fn is_mutable(&self) -> bool {
        matches!(self.tag, ACTION_RESULT | PREVIOUS_EXECUTION_STATS)
    }

    pub(super) fn to_bytes(self) -> [u8; 33] {
        let mut bytes = [self.tag; 33];
        bytes[1..].copy_from_slice(&self.hash);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; 33]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(&bytes[1..]);
        IndexKey {
            tag: bytes[0],
            hash,
        }
    }

    /// Tells keys apart well enough for recency.
    pub(super) fn short(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.hash;
        u64::from_le_bytes([a, b, c, d, e, f, g, h]) ^ u64::from(self.tag)
    }

    /// A byte that is as often one number as another.
    pub(super) fn shard_byte(&self) -> u8 {
        self.hash[8]
    }
}

impl std::hash::Hash for IndexKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.short());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_differ_by_instance_and_from_blobs() {
        let digest = DigestFunction::Sha256.digest_of(b"x");
        let of = |name| IndexKey::action(&InstanceName::parse(name).unwrap(), &digest);
        assert_ne!(of("a"), of("b"));
        assert_ne!(of(""), IndexKey::blob(&digest));
        assert_eq!(IndexKey::from_bytes(&of("a").to_bytes()), of("a"));
    }
}
