//! Eviction, so that the cache stays within its limits and its file system has enough free.

use std::io;

use super::{
    cache::{CacheLimits, FileCache},
    cache_directory::is_full,
    index::{CacheIndex, FileClaim},
    key::FileKey,
};

/// How many inodes of a file system are left free; every directory and output of an action takes one.
pub const MINIMUM_FREE_INODES: u64 = 1_000;
/// How often files are evicted for one that a full disk does not take.
pub(super) const EVICTION_ATTEMPTS: u32 = 4;

impl CacheIndex {
    fn is_over(&self, limits: CacheLimits) -> bool {
        self.files.weight() > limits.bytes || self.inodes() > limits.files
    }
}

impl FileCache {
    /// Sets, once, what is called to let go of idle input roots when the cache is too full.
    pub fn on_pressure(&self, reclaim: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.reclaim.set(Box::new(reclaim));
    }

    /// Whether the cache has more than its limits allow.
    pub fn is_over(&self) -> bool {
        self.index.lock().is_over(self.limits)
    }

    /// Evicts until the file system has enough free, and the limits are kept.
    pub fn evict_to_fit(&self) {
        let missing_bytes = self.missing_bytes();
        if missing_bytes > 0 {
            let weight = self.index.lock().files.weight();
            self.evict(CacheLimits {
                bytes: weight.saturating_sub(missing_bytes),
                ..self.limits
            });
            // Once: what was evicted may be linked from idle roots, and space comes with a delay.
            if self.missing_bytes() > 0
                && let Some(reclaim) = self.reclaim.get()
            {
                reclaim();
            }
        }
        self.enforce_limits();
    }

    /// Evicts until the limits are kept, and has idle input roots let go of when that is not enough. Does
    /// not ask the file system, so that it is cheap enough for every single file.
    pub(super) fn enforce_limits(&self) {
        let reclaim = || self.reclaim.get().is_some_and(|reclaim| reclaim());
        while self.is_over() {
            self.remove_unlinked_extra_inodes();
            // Files of idle input roots are the dearest inodes, but not so dear that no cached file
            // has space beside them.
            let crowded = self.index.lock().inodes_beyond_first() > self.limits.files / 2;
            if crowded && self.is_over() && reclaim() {
                continue;
            }
            self.evict(self.limits);
            if self.is_over() && !reclaim() {
                return;
            }
        }
    }

    /// How many bytes to evict, so that the file system has enough free.
    fn missing_bytes(&self) -> u64 {
        if self.limits.minimum_free == 0 {
            return 0;
        }
        match self.directory.free() {
            Ok((bytes, inodes)) if inodes < MINIMUM_FREE_INODES => {
                let (files, weight) = self.usage();
                let few = weight / files.max(1) * (MINIMUM_FREE_INODES - inodes);
                few.max(self.limits.minimum_free.saturating_sub(bytes))
                    .max(1)
            }
            Ok((bytes, _)) => self.limits.minimum_free.saturating_sub(bytes),
            Err(_) => 0,
        }
    }

    /// Removes files that are unpinned and longest unused, until the limits are kept. Returns how many.
    fn evict(&self, limits: CacheLimits) -> usize {
        let mut claim = FileClaim::new(&self.index);
        let mut index = self.index.lock();
        let mut victims = Vec::new();
        while index.is_over(limits)
            && let Some((key, _)) = index.files.evict_oldest()
        {
            victims.push((key, index.forget_extra(&key)));
            claim.add(&mut index, key);
        }
        drop(index);
        for (key, inodes) in &victims {
            if let Err(error) = self.directory.remove(key, *inodes) {
                tracing::warn!(digest = %key.digest, %error, "could not remove a file from the cache");
            }
        }
        victims.len()
    }

    /// Makes space on a full disk for a file; `false` when there is nothing to remove.
    pub(super) fn evict_when_full(&self, key: &FileKey) -> bool {
        let weight = self.index.lock().files.weight();
        let space = (key.digest.size() * 2).max(64 << 20).max(weight / 16);
        let removed = self.evict(CacheLimits {
            bytes: weight.saturating_sub(space),
            ..self.limits
        });
        removed > 0 || self.reclaim.get().is_some_and(|reclaim| reclaim())
    }

    /// Writes something for a file; tries again after having made space while the disk is full.
    pub(super) fn evicting_when_full<T>(
        &self,
        key: &FileKey,
        mut write: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let mut attempts = 0;
        loop {
            match write() {
                Err(error)
                    if attempts < EVICTION_ATTEMPTS
                        && is_full(&error)
                        && self.evict_when_full(key) =>
                {
                    attempts += 1;
                }
                result => return result,
            }
        }
    }
}
