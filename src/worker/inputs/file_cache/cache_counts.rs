//! How the cache was used, and how much of it was read to verify it, for metrics and the log.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::daemon::Counter;

/// How often cached files were wanted for files that a root lacked, since the start, and were there or not; and how many
/// bytes were asked of the storage for those that were not.
#[derive(Debug, Default)]
pub struct CacheUses {
    pub hits: Counter,
    pub misses: Counter,
    pub fetched_bytes: Counter,
}

/// What was read to verify cached files since the start.
#[derive(Debug, Default)]
pub struct VerificationCounts {
    pub files: AtomicU64,
    pub bytes: AtomicU64,
    pub wrong: AtomicU64,
}

impl fmt::Display for VerificationCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        write!(
            f,
            "{} cached files of {} bytes, of which {} were wrong",
            of(&self.files),
            of(&self.bytes),
            of(&self.wrong),
        )
    }
}
