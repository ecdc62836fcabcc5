//! Computing digests.

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha384, Sha512};

use super::{Digest, DigestFunction, sha256_tree::Sha256Tree};

/// Computes a digest piece by piece.
pub struct Hasher {
    function: DigestFunction,
    state: HashState,
    size: u64,
}

enum HashState {
    Sha256(Sha256),
    Sha1(Sha1),
    Md5(Md5),
    Sha384(Sha384),
    Sha512(Sha512),
    Sha256Tree(Sha256Tree),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    pub(super) fn new(function: DigestFunction, size: u64) -> Self {
        let state = match function {
            DigestFunction::Sha256 => HashState::Sha256(Sha256::new()),
            DigestFunction::Sha1 => HashState::Sha1(Sha1::new()),
            DigestFunction::Md5 => HashState::Md5(Md5::new()),
            DigestFunction::Sha384 => HashState::Sha384(Sha384::new()),
            DigestFunction::Sha512 => HashState::Sha512(Sha512::new()),
            DigestFunction::Sha256Tree => HashState::Sha256Tree(Sha256Tree::default()),
            DigestFunction::Blake3 => HashState::Blake3(Box::default()),
            DigestFunction::GitSha1 => {
                HashState::Sha1(Sha1::new_with_prefix(format!("blob {size}\0")))
            }
        };
        Hasher {
            function,
            state,
            size: 0,
        }
    }

    /// Hashes the next piece.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.state {
            HashState::Sha256(h) => h.update(data),
            HashState::Sha1(h) => h.update(data),
            HashState::Md5(h) => h.update(data),
            HashState::Sha384(h) => h.update(data),
            HashState::Sha512(h) => h.update(data),
            HashState::Sha256Tree(h) => h.update(data),
            HashState::Blake3(h) => {
                h.update(data);
            }
        }
        self.size += data.len() as u64;
    }

    /// Bytes seen so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all pieces.
    pub fn finish(self) -> Digest {
        let digest = |hash: &[u8]| Digest::new(self.function, hash, self.size);
        match self.state {
            HashState::Sha256(h) => digest(&h.finalize()),
            HashState::Sha1(h) => digest(&h.finalize()),
            HashState::Md5(h) => digest(&h.finalize()),
            HashState::Sha384(h) => digest(&h.finalize()),
            HashState::Sha512(h) => digest(&h.finalize()),
            HashState::Sha256Tree(h) => digest(&h.finish()),
            HashState::Blake3(h) => digest(h.finalize().as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_hash_that_git_gives_it() {
        let content = b"what is up, doc?";
        let digest = DigestFunction::GitSha1.digest_of(content);
        assert_eq!(
            digest.hash_hex(),
            "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
        );
        assert_eq!(digest.size(), 16);
        let mut wrong = DigestFunction::GitSha1.hasher(17);
        wrong.update(content);
        assert_ne!(wrong.finish(), digest);
    }
}
