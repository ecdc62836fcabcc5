//! How large the store may be while others write to its file system. PURE.
//!
//! 1. While `minimum_free` is free beyond what the store uses, the store may grow into the rest.
//! 2. While it is not, the store stops growing, makes room for what is uploaded, and shrinks slowly: an
//!    action that fills the disk is gone soon, and what was evicted for its sake would be missed long
//!    after. Whoever writes faster than the store can give way fills the disk anyway.
//! 3. Free space that comes and goes does not make the store shrink faster.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

/// What the store may use of its file system.
pub(super) struct Ceiling {
    minimum_free: u64,
    bytes: u64,
    /// What it was when it was last too high, and when that was.
    shortage: Option<(u64, Instant)>,
}

/// In this time the store gives up a 64th of what it uses, or an eighth of `minimum_free` if that is
/// more.
const ROUND: Duration = Duration::from_secs(10);

/// A shortage so long ago has nothing to do with the next one.
const OVER: Duration = Duration::from_secs(600);

impl Ceiling {
    pub(super) fn new(minimum_free: u64) -> Self {
        Ceiling {
            minimum_free,
            bytes: u64::MAX,
            shortage: None,
        }
    }

    /// The bytes that may be used from now on, where `used` are used and `available` are free.
    pub(super) fn measure(&mut self, used: u64, available: u64, now: Instant) -> u64 {
        let wanted = used
            .saturating_add(available)
            .saturating_sub(self.minimum_free);
        let recent = self
            .shortage
            .filter(|(_, at)| now.saturating_duration_since(*at) < OVER);
        if wanted >= used {
            self.shortage = recent.map(|(bytes, at)| (bytes.max(used), at));
            self.bytes = wanted;
        } else {
            let most = match recent {
                None => self.bytes.min(used),
                Some((before, at)) => {
                    let step = (used / 64).max(self.minimum_free / 8);
                    let passed = now.saturating_duration_since(at).min(2 * ROUND);
                    before.saturating_sub(
                        (step as f64 * passed.div_duration_f64(ROUND)).round() as u64
                    )
                }
            };
            self.bytes = wanted.max(most);
            self.shortage = Some((self.bytes, now));
        }
        self.bytes
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests are not pure")]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn it_follows_what_is_free() {
        let mut ceiling = Ceiling::new(GIB);
        let now = Instant::now();
        assert_eq!(ceiling.measure(10 * GIB, 50 * GIB, now), 59 * GIB);
        assert_eq!(ceiling.measure(10 * GIB, 5 * GIB, now), 14 * GIB);
        assert_eq!(ceiling.measure(10 * GIB, GIB, now), 10 * GIB);
    }

    #[test]
    fn a_full_disk_of_a_minute_costs_a_small_part_of_the_store() {
        let mut ceiling = Ceiling::new(GIB);
        let start = Instant::now();
        let mut used = 64 * GIB;
        for second in 0..60 {
            let bytes = ceiling.measure(used, 0, start + Duration::from_secs(second));
            // As the store evicts, and the other takes what it gains.
            used = used.min(bytes);
        }
        assert!(used > 57 * GIB, "{used}");
        let after = ceiling.measure(used, 100 * GIB, start + Duration::from_secs(60));
        assert_eq!(after, used + 99 * GIB);
    }

    #[test]
    fn free_space_that_comes_and_goes_costs_no_more_than_what_stays_away() {
        let mut ceiling = Ceiling::new(GIB);
        let start = Instant::now();
        let mut used = 64 * GIB;
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            let bytes = ceiling.measure(used, second % 2 * 2 * GIB, now);
            if bytes < used {
                used = bytes / 8 * 7;
            }
        }
        assert!(used > 48 * GIB, "{used}");
    }

    #[test]
    fn a_disk_that_stays_full_gets_what_it_was_promised() {
        let mut ceiling = Ceiling::new(GIB);
        let start = Instant::now();
        let (mut used, mut available) = (64 * GIB, 0);
        for round in 0..20 {
            let bytes = ceiling.measure(used, available, start + ROUND * round);
            available += used - used.min(bytes);
            used = used.min(bytes);
        }
        assert!(available >= GIB, "{available}");
    }

    #[test]
    fn a_shortage_of_long_ago_is_forgotten() {
        let mut ceiling = Ceiling::new(GIB);
        let start = Instant::now();
        ceiling.measure(8 * GIB, 0, start);
        ceiling.measure(8 * GIB, 100 * GIB, start + OVER);
        let bytes = ceiling.measure(64 * GIB, 0, start + 2 * OVER);
        assert_eq!(bytes, 64 * GIB);
    }
}
