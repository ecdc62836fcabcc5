//! Digests: the names of blobs.
//!
//! `hasher` computes them, by `sha256_tree` where they are of that function.
//!
//! 1. A `Digest` is well formed: its hash has the length that its function makes, its size is not
//!    negative. Nothing below the edge checks again.
//! 2. Two digests of different functions are different, even if their bytes are equal.

#![warn(missing_docs)]

use std::fmt;

use crate::{
    proto::reapi,
    text::{parse_hex, push_hex, shorten},
};

mod hasher;
mod sha256_tree;

pub use hasher::Hasher;

/// The longest hash of any function that we know, in bytes.
const LONGEST: usize = 64;

/// REAPI: DigestFunction.Value, those that this farm computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DigestFunction {
    /// SHA-256.
    Sha256,
    /// SHA-1.
    Sha1,
    /// MD5.
    Md5,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// SHA-256 of pieces of 1 KiB, and of those a Merkle tree.
    Sha256Tree,
    /// BLAKE3, with 32 bytes.
    Blake3,
    /// SHA-1 of what Git hashes of a file: a header with its size, and its content.
    GitSha1,
}

/// Why a digest, as somebody sent it, is none. The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum DigestError {
    #[error("no digest was given")]
    Absent,
    #[error("digest function {0} is not supported; supported are {names}", names = DigestFunction::names())]
    UnsupportedFunction(String),
    #[error(
        "hash {0:?} has {1} characters, which is no hash of any supported digest function: SHA-256 has 64"
    )]
    UnknownLength(String, usize),
    #[error("hash {hash:?} has {length} characters, {function} has {expected}")]
    WrongLength {
        hash: String,
        length: usize,
        function: DigestFunction,
        expected: usize,
    },
    #[error("hash {0:?} has characters other than 0-9 and a-f")]
    NotLowerCaseHexadecimal(String),
    #[error("size {0} of digest {1} is negative")]
    NegativeSize(i64, String),
}

impl DigestFunction {
    /// Every function that there is here.
    pub const ALL: [DigestFunction; 8] = [
        DigestFunction::Sha256,
        DigestFunction::Sha1,
        DigestFunction::Md5,
        DigestFunction::Sha384,
        DigestFunction::Sha512,
        DigestFunction::Sha256Tree,
        DigestFunction::Blake3,
        DigestFunction::GitSha1,
    ];

    fn names() -> String {
        Self::ALL.map(|f| f.to_string()).join(", ")
    }

    /// Bytes of a hash.
    pub const fn length(self) -> usize {
        match self {
            DigestFunction::Md5 => 16,
            DigestFunction::Sha1 | DigestFunction::GitSha1 => 20,
            DigestFunction::Sha256 | DigestFunction::Sha256Tree | DigestFunction::Blake3 => 32,
            DigestFunction::Sha384 => 48,
            DigestFunction::Sha512 => 64,
        }
    }

    /// The function's value in messages.
    pub const fn to_proto(self) -> reapi::digest_function::Value {
        use reapi::digest_function::Value;
        match self {
            DigestFunction::Sha256 => Value::Sha256,
            DigestFunction::Sha1 => Value::Sha1,
            DigestFunction::Md5 => Value::Md5,
            DigestFunction::Sha384 => Value::Sha384,
            DigestFunction::Sha512 => Value::Sha512,
            DigestFunction::Sha256Tree => Value::Sha256tree,
            DigestFunction::Blake3 => Value::Blake3,
            DigestFunction::GitSha1 => Value::Gitsha1,
        }
    }

    /// The function that a request names. `None` when it leaves it to the hash's length (REAPI:
    /// `digest_function` fields, value UNKNOWN).
    pub fn from_proto(value: i32) -> Result<Option<Self>, DigestError> {
        use reapi::digest_function::Value;
        if value == Value::Unknown as i32 {
            return Ok(None);
        }
        Self::ALL
            .into_iter()
            .find(|f| f.to_proto() as i32 == value)
            .map(Some)
            .ok_or_else(|| {
                DigestError::UnsupportedFunction(match Value::try_from(value) {
                    Ok(known) => known.as_str_name().to_owned(),
                    Err(_) => value.to_string(),
                })
            })
    }

    /// REAPI: the function of a hash of this length, where the request names none.
    pub fn from_hash_length(hash: &str) -> Result<Self, DigestError> {
        match hash.len() {
            32 => Ok(DigestFunction::Md5),
            40 => Ok(DigestFunction::Sha1),
            64 => Ok(DigestFunction::Sha256),
            96 => Ok(DigestFunction::Sha384),
            128 => Ok(DigestFunction::Sha512),
            length => Err(DigestError::UnknownLength(shorten(hash), length)),
        }
    }

    /// Whether the hash's length names this function, so that resource names leave it out (REAPI:
    /// `Read`'s resource names).
    pub fn is_told_by_length(self) -> bool {
        self == self.told_by_length()
    }

    /// The function that a hash of this one's length is of, where none is named.
    pub const fn told_by_length(self) -> DigestFunction {
        match self {
            DigestFunction::Sha256Tree | DigestFunction::Blake3 => DigestFunction::Sha256,
            DigestFunction::GitSha1 => DigestFunction::Sha1,
            itself => itself,
        }
    }

    /// The name in lower case, as in resource names, links to a browser, and files of the worker's
    /// cache.
    pub const fn name(self) -> &'static str {
        match self {
            DigestFunction::Sha256 => "sha256",
            DigestFunction::Sha1 => "sha1",
            DigestFunction::Md5 => "md5",
            DigestFunction::Sha384 => "sha384",
            DigestFunction::Sha512 => "sha512",
            DigestFunction::Sha256Tree => "sha256tree",
            DigestFunction::Blake3 => "blake3",
            DigestFunction::GitSha1 => "gitsha1",
        }
    }

    /// Hashes what is given piece by piece, `size` bytes in all: some functions hash the size ahead. Of
    /// another number of bytes, the digest is that of no blob.
    pub fn hasher(self, size: u64) -> Hasher {
        Hasher::new(self, size)
    }

    /// The digest of data that is all there.
    pub fn digest_of(self, data: &[u8]) -> Digest {
        let mut hasher = self.hasher(data.len() as u64);
        hasher.update(data);
        hasher.finish()
    }

    /// The digest of the empty blob.
    pub fn empty(self) -> Digest {
        self.digest_of(&[])
    }
}

impl fmt::Display for DigestFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().to_ascii_uppercase())
    }
}

/// REAPI: Digest, with the function that made it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest {
    function: DigestFunction,
    /// Zero beyond the function's length.
    hash: [u8; LONGEST],
    size: u64,
}

impl std::hash::Hash for Digest {
    /// All of it: peers choose digests, and those that a table cannot tell apart make it as slow as a list.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write(self.hash_bytes());
        state.write_u64(self.size);
    }
}

impl Digest {
    /// Panics when `hash` has not the function's length: for hashes that we computed or stored.
    pub fn new(function: DigestFunction, hash: &[u8], size: u64) -> Self {
        let mut bytes = [0; LONGEST];
        bytes[..function.length()].copy_from_slice(hash);
        Digest {
            function,
            hash: bytes,
            size,
        }
    }

    /// A digest as a request carries it, of the function that the request names, if it names one.
    pub fn parse(
        function: Option<DigestFunction>,
        digest: &reapi::Digest,
    ) -> Result<Self, DigestError> {
        Self::parse_parts(function, &digest.hash, digest.size_bytes)
    }

    /// As `parse_parts`, of a field that must be there.
    pub fn parse_required(
        function: Option<DigestFunction>,
        digest: Option<&reapi::Digest>,
    ) -> Result<Self, DigestError> {
        Self::parse(function, digest.ok_or(DigestError::Absent)?)
    }

    /// The digest with this hash and size; its function is `function`, or else what the hash's length says.
    pub fn parse_parts(
        function: Option<DigestFunction>,
        hash: &str,
        size: i64,
    ) -> Result<Self, DigestError> {
        let function = match function {
            Some(function) => function,
            None => DigestFunction::from_hash_length(hash)?,
        };
        if hash.len() != 2 * function.length() {
            return Err(DigestError::WrongLength {
                hash: shorten(hash),
                length: hash.len(),
                function,
                expected: 2 * function.length(),
            });
        }
        let mut bytes = [0; LONGEST];
        if !parse_hex(hash, &mut bytes[..function.length()]) {
            return Err(DigestError::NotLowerCaseHexadecimal(shorten(hash)));
        }
        let size =
            u64::try_from(size).map_err(|_| DigestError::NegativeSize(size, hash.to_owned()))?;
        Ok(Digest {
            function,
            hash: bytes,
            size,
        })
    }

    /// The function that made the hash.
    pub fn function(&self) -> DigestFunction {
        self.function
    }

    /// The hash itself, not in hexadecimal digits.
    pub fn hash_bytes(&self) -> &[u8] {
        &self.hash[..self.function.length()]
    }

    /// Lower-case hexadecimal.
    pub fn hash_hex(&self) -> String {
        let mut hex = String::with_capacity(2 * self.function.length());
        push_hex(&mut hex, self.hash_bytes());
        hex
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether this is the empty blob, which every storage has without being given it. Its own hash
    /// names it, not just any hash with the size 0.
    pub fn is_empty_blob(&self) -> bool {
        self.size == 0 && *self == self.function.empty()
    }

    /// The digest as a message.
    pub fn to_proto(&self) -> reapi::Digest {
        reapi::Digest {
            hash: self.hash_hex(),
            // Parsing accepts no more than an i64 holds, and no blob that we hash is longer.
            size_bytes: self.size as i64,
        }
    }
}

/// `HASH/SIZE`, as in resource names.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.hash_hex(), self.size)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{self}", self.function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_tell_digests_apart_that_differ_in_their_size_or_in_their_last_byte_alone() {
        use std::hash::{BuildHasher, RandomState};
        let keys = RandomState::new();
        let digest = |last, size| {
            let mut hash = [7; 32];
            hash[31] = last;
            Digest::new(DigestFunction::Sha256, &hash, size)
        };
        let values = (0..100).flat_map(|i| [(i, 0), (0, u64::from(i) + 1)]);
        let values = values.map(|(last, size)| keys.hash_one(digest(last, size)));
        let distinct: std::collections::HashSet<u64> = values.collect();
        assert_eq!(distinct.len(), 200);
    }

    #[test]
    fn every_function_hashes_the_empty_blob_as_its_standard_says() {
        let hashes = [
            (DigestFunction::Md5, "d41d8cd98f00b204e9800998ecf8427e"),
            (
                DigestFunction::Sha1,
                "da39a3ee5e6b4b0d3255bfef95601890afd80709",
            ),
            (
                DigestFunction::Sha256,
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                DigestFunction::Sha256Tree,
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                DigestFunction::GitSha1,
                "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
            ),
            (
                DigestFunction::Blake3,
                "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
            ),
        ];
        for (function, hash) in hashes {
            assert_eq!(function.empty().hash_hex(), hash);
            let parsed = Digest::parse_parts(Some(function), hash, 0).unwrap();
            assert_eq!(parsed, function.empty());
        }
    }

    #[test]
    fn a_digest_survives_the_wire() {
        for function in DigestFunction::ALL {
            let digest = function.digest_of(b"some bytes");
            assert_eq!(
                Digest::parse(Some(function), &digest.to_proto()),
                Ok(digest)
            );
            if function.is_told_by_length() {
                assert_eq!(Digest::parse(None, &digest.to_proto()), Ok(digest));
            }
        }
    }

    #[test]
    fn ill_formed_digests_are_refused_with_the_reason() {
        let hash = "a".repeat(64);
        let parse = |hash: &str, size| Digest::parse_parts(None, hash, size).unwrap_err();
        assert!(matches!(parse("", 0), DigestError::UnknownLength(_, 0)));
        assert!(matches!(parse(&hash, -1), DigestError::NegativeSize(-1, _)));
        assert!(matches!(
            parse(&"A".repeat(64), 0),
            DigestError::NotLowerCaseHexadecimal(_)
        ));
        assert!(matches!(
            parse(&"ü".repeat(32), 0),
            DigestError::NotLowerCaseHexadecimal(_)
        ));
        assert!(matches!(
            Digest::parse_parts(Some(DigestFunction::Sha1), &hash, 0),
            Err(DigestError::WrongLength { expected: 40, .. })
        ));
        assert!(
            matches!(DigestFunction::from_proto(4), Err(DigestError::UnsupportedFunction(name)) if name == "VSO")
        );
        assert!(parse(&"a".repeat(1 << 20), 0).to_string().len() < 600);
    }
}
