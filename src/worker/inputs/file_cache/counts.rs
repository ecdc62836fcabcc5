//! How much of the cache was read to verify it, for the log.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

/// What was read since the start.
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
