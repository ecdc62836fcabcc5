//! Room for files: on the file system, and within the cache's limits.

use std::io;

use super::{CacheLimits, FileCache, FileClaim, FileKey, Index};
use crate::worker::fault::Fault;

/// Of a file system, that are left free; every directory and output of an action takes one.
const MINIMUM_FREE_INODES: u64 = 1_000;

impl Index {
    fn is_over(&self, limits: CacheLimits) -> bool {
        self.kept.weight() > limits.bytes || self.inodes() > limits.files
    }
}

impl FileCache {
    /// Sets what lets go of kept input roots when the cache is too full; once.
    pub fn on_pressure(&self, release: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.release.set(Box::new(release));
    }

    /// Whether more than the limits is here.
    pub fn is_over(&self) -> bool {
        self.state.lock().is_over(self.limits)
    }

    /// Evicts until the file system has enough free, and the limits are kept.
    pub fn evict_to_fit(&self) {
        let shortfall = self.shortfall();
        if shortfall > 0 {
            let weight = self.state.lock().kept.weight();
            self.evict(CacheLimits {
                bytes: weight.saturating_sub(shortfall),
                ..self.limits
            });
            // Once: what was evicted may be linked from kept roots, and room comes with a delay.
            if self.shortfall() > 0
                && let Some(release) = self.release.get()
            {
                release();
            }
        }
        self.enforce_limits();
    }

    /// Evicts until the limits are kept, and asks for kept input roots when that is not enough. Does
    /// not ask the file system, and so is for every single file.
    pub(super) fn enforce_limits(&self) {
        let release = || self.release.get().is_some_and(|release| release());
        while self.is_over() {
            self.remove_idle();
            // Files of kept input roots are the dearest inodes, but not so dear that no cached file
            // has room beside them.
            let crowded = self.state.lock().extra_inodes() > self.limits.files / 2;
            if crowded && self.is_over() && release() {
                continue;
            }
            self.evict(self.limits);
            if self.is_over() && !release() {
                return;
            }
        }
    }

    /// Bytes to evict, so that the file system has enough free.
    fn shortfall(&self) -> u64 {
        if self.limits.minimum_free == 0 {
            return 0;
        }
        match self.files.free() {
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

    /// Removes what is unpinned and longest unused, until the limits are kept. Returns how many.
    fn evict(&self, limits: CacheLimits) -> usize {
        let mut claim = FileClaim::new(self);
        let mut state = self.state.lock();
        let mut victims = Vec::new();
        while state.is_over(limits)
            && let Some((key, _)) = state.kept.evict_oldest()
        {
            victims.push((key, state.take_further(&key)));
            claim.add(&mut state, key);
        }
        drop(state);
        for (key, copies) in &victims {
            if let Err(error) = self.files.remove(key, *copies) {
                tracing::warn!(digest = %key.digest, %error, "could not remove a file from the cache");
            }
        }
        victims.len()
    }

    /// Frees room on a full disk; `false` when there is nothing to remove.
    pub(super) fn evict_when_full(&self, key: &FileKey) -> bool {
        let weight = self.state.lock().kept.weight();
        let room = (key.digest.size() * 2).max(64 << 20).max(weight / 16);
        let removed = self.evict(CacheLimits {
            bytes: weight.saturating_sub(room),
            ..self.limits
        });
        removed > 0 || self.release.get().is_some_and(|release| release())
    }

    pub(super) fn write_evicting<T>(
        &self,
        key: &FileKey,
        mut write: impl FnMut() -> io::Result<T>,
    ) -> Result<T, Fault> {
        let mut attempts = 0;
        loop {
            match write() {
                Ok(done) => return Ok(done),
                Err(error) if attempts < 4 && is_full(&error) && self.evict_when_full(key) => {
                    attempts += 1;
                }
                Err(error) => return Err(self.disk_fault(key, error)),
            }
        }
    }
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
