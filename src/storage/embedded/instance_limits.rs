//! How much of the store the uploads of some instance names may take (`storage.embedded.instance_limits`).
//!
//! 1. An entry counts towards one limit at most: of the instance name that it was uploaded with first, the one of
//!    the longest prefix. Equal blobs are stored once, so that whoever uploads or uses it later has it for nothing.
//! 2. Beyond a limit, the least recently used of its entries are evicted, and none of others.
//! 3. Which limit an entry counts towards is on disk beside it, as a hash of the limit's prefix: limits may come in
//!    another order, and what was stored under one that is gone, or before there was one, counts towards none.
//! 4. Of a store that is the cache of a CAS of objects, blobs count towards none: who uploads one to the service, and
//!    who reads it there, may be anybody, here and at other hosts.

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::Error;
use crate::{
    config::{Size, storage::InstanceLimit as Configured},
    daemon::Failure,
    digest::DigestFunction,
    instance::InstanceName,
};

const KEY: &str = "storage.embedded.instance_limits";

/// Which limit an entry counts towards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LimitId(u32);

impl LimitId {
    /// That of entries that count towards none.
    pub const NONE: LimitId = LimitId(0);

    fn of_prefix(prefix: &InstanceName) -> Self {
        let digest = DigestFunction::Sha256.digest_of(prefix.as_str().as_bytes());
        let start = digest.hash_bytes().first_chunk().copied();
        LimitId(u32::from_le_bytes(start.unwrap_or_default()).max(1))
    }

    pub(super) fn to_u32(self) -> u32 {
        self.0
    }

    pub(super) fn from_u32(number: u32) -> Self {
        LimitId(number)
    }
}

/// All limits of a store.
#[derive(Debug, Default)]
pub(super) struct InstanceLimits {
    /// In the order of their identifiers.
    limits: Vec<InstanceLimit>,
}

#[derive(Debug)]
struct InstanceLimit {
    id: LimitId,
    prefix: InstanceName,
    maximum: u64,
    used: AtomicU64,
}

/// What the uploads of some instance names take, and may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceUsage {
    /// Of their names.
    pub prefix: InstanceName,
    /// Bytes of their entries.
    pub used: u64,
    /// Of `used`.
    pub maximum: u64,
}

impl InstanceLimits {
    pub(super) fn new(configured: &[Configured]) -> Result<Self, Failure> {
        let failure = |message: String| Failure::Configuration { key: KEY, message };
        let parse = |limit: &Configured| {
            let prefix = InstanceName::parse(&limit.instance_name_prefix)
                .map_err(|error| failure(error.to_string()))?;
            Ok(InstanceLimit {
                id: LimitId::of_prefix(&prefix),
                prefix,
                maximum: limit.maximum_size.0,
                used: AtomicU64::new(0),
            })
        };
        let mut limits: Vec<InstanceLimit> = configured
            .iter()
            .map(parse)
            .collect::<Result<_, Failure>>()?;
        limits.sort_by_key(|limit| limit.id);
        for pair in limits.windows(2) {
            if let [one, other] = pair
                && one.id == other.id
            {
                return Err(failure(format!(
                    "{:?} and {:?} cannot both have a limit, since their hashes are equal; leave one of them out",
                    one.prefix.as_str(),
                    other.prefix.as_str()
                )));
            }
        }
        Ok(InstanceLimits { limits })
    }

    fn get(&self, id: LimitId) -> Option<&InstanceLimit> {
        let at = self.limits.binary_search_by_key(&id, |limit| limit.id);
        self.limits.get(at.ok()?)
    }

    /// Which limit the uploads of an instance name count towards.
    pub(super) fn of(&self, instance: &InstanceName) -> LimitId {
        let own = self.limits.iter();
        let own = own.filter(|limit| instance.strip_prefix(&limit.prefix).is_some());
        let longest = own.max_by_key(|limit| limit.prefix.as_str().len());
        longest.map_or(LimitId::NONE, |limit| limit.id)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = LimitId> {
        self.limits.iter().map(|limit| limit.id)
    }

    /// Bytes of the largest content that a limit has room for: what is beyond it would evict all else.
    pub(super) fn largest(&self, id: LimitId) -> u64 {
        self.get(id).map_or(u64::MAX, |limit| limit.maximum / 4 * 3)
    }

    /// Refuses what a limit has no room for, whatever is evicted.
    pub(super) fn admit(&self, id: LimitId, bytes: u64) -> Result<(), Error> {
        let Some(limit) = self.get(id).filter(|_| bytes > self.largest(id)) else {
            return Ok(());
        };
        Err(Error::Full(format!(
            "{bytes} bytes are more than three quarters of what instance names that begin with {:?} may take of this store, {}; send less at once, or raise maximum_size in {KEY}",
            limit.prefix.as_str(),
            Size(limit.maximum),
        )))
    }

    pub(super) fn add(&self, id: LimitId, bytes: u64) {
        if let Some(limit) = self.get(id) {
            limit.used.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn subtract(&self, id: LimitId, bytes: u64) {
        if let Some(limit) = self.get(id) {
            limit.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that must go so that a sixteenth of a limit is free, once it is exceeded.
    pub(super) fn excess(&self, id: LimitId) -> Option<u64> {
        let limit = self.get(id)?;
        let used = limit.used.load(Ordering::Relaxed);
        (used > limit.maximum).then(|| used - limit.maximum / 16 * 15)
    }

    /// The least bytes that any limit grants.
    pub(super) fn smallest(&self) -> u64 {
        let maxima = self.limits.iter().map(|limit| limit.maximum);
        maxima.min().unwrap_or(u64::MAX)
    }

    /// By prefix.
    pub(super) fn usage(&self) -> Vec<InstanceUsage> {
        let mut usage: Vec<InstanceUsage> = self
            .limits
            .iter()
            .map(|limit| InstanceUsage {
                prefix: limit.prefix.clone(),
                used: limit.used.load(Ordering::Relaxed),
                maximum: limit.maximum,
            })
            .collect();
        usage.sort_by(|one, other| one.prefix.cmp(&other.prefix));
        usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_name_has_the_limit_of_its_longest_prefix() {
        let limit = |prefix: &str, mib| Configured {
            instance_name_prefix: prefix.to_owned(),
            maximum_size: Size::mib(mib),
        };
        let limits = InstanceLimits::new(&[limit("a", 16), limit("a/b", 32)]).unwrap();
        let of = |name: &str| limits.of(&InstanceName::parse(name).unwrap());
        assert_eq!(of(""), LimitId::NONE);
        assert_eq!(of("ab"), LimitId::NONE);
        assert_eq!(of("a"), of("a/x/y"));
        assert_eq!(of("a/b"), of("a/b/c"));
        assert_ne!(of("a"), of("a/b"));
        assert_eq!(limits.largest(of("a")), 12 << 20);
        assert_eq!(limits.largest(of("")), u64::MAX);
        assert!(limits.admit(of("a"), 13 << 20).is_err());
        // In another order, with others.
        let other = InstanceLimits::new(&[limit("", 64), limit("a/b", 1), limit("a", 1)]).unwrap();
        assert_eq!(other.of(&InstanceName::parse("a/b").unwrap()), of("a/b"));
        assert_ne!(other.of(&InstanceName::empty()), LimitId::NONE);
    }
}
