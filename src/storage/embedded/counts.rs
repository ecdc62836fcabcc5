//! What the store has done, for metrics; and for how long what was evicted last had not been used, which
//! tells whether the store is too small.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::index::IndexEntry;
use crate::daemon::Counter;

/// Times that are remembered of the clock of recency; the clock ticks 4,096 times while the store is filled
/// once, and every ten seconds when nothing is written.
const REMEMBERED_TICKS: usize = 8_192;

/// Counts since the store was opened.
#[derive(Debug, Default)]
pub struct StoreCounts {
    /// Lookups that found what they asked for.
    pub hits: Counter,
    /// Lookups that did not.
    pub misses: Counter,
    /// Bytes that were stored.
    pub written: Counter,
    /// Entries that made room for others.
    pub evicted: Counter,
}

impl StoreCounts {
    pub(super) fn looked_up(&self, is_hit: bool) {
        match is_hit {
            true => self.hits.increment(),
            false => self.misses.increment(),
        }
    }
}

/// When the clock of recency showed what, oldest first.
#[derive(Debug, Default)]
pub(super) struct RecencyAges {
    times: VecDeque<(u32, Instant)>,
    /// Of the last eviction, for how long what went last had not been used.
    evicted: Option<Duration>,
}

impl RecencyAges {
    /// The clock shows this now.
    pub(super) fn note(&mut self, tick: u32, now: Instant) {
        if self.times.back().is_none_or(|(last, _)| *last != tick) {
            self.times.push_back((tick, now));
            if self.times.len() > REMEMBERED_TICKS {
                self.times.pop_front();
            }
        }
    }

    /// When the clock showed this, or the first time that is known, if it was earlier.
    fn time_of(&self, tick: u32) -> Option<Instant> {
        let at = self.times.partition_point(|(known, _)| *known <= tick);
        let (_, time) = self.times.get(at.saturating_sub(1))?;
        Some(*time)
    }

    /// For how long what went last in the last eviction had not been used.
    pub(super) fn retention(&self) -> Option<Duration> {
        self.evicted
    }

    pub(super) fn evicted(&mut self, entries: &[IndexEntry], now: Instant) {
        let last = entries.iter().map(|entry| entry.used).max();
        let time = last.and_then(|tick| self.time_of(tick));
        self.evicted = time.map(|time| now.saturating_duration_since(time));
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{index::Location, instance_limits::LimitId, key::IndexKey},
        *,
    };
    use crate::digest::DigestFunction;

    #[test]
    fn the_age_of_what_was_evicted_last_is_told() {
        let (mut ages, start) = (RecencyAges::default(), Instant::now());
        let second = Duration::from_secs(1);
        for tick in 10..20 {
            ages.note(tick, start + second * tick);
        }
        let entry = |used| IndexEntry {
            key: IndexKey::blob(&DigestFunction::Sha256.digest_of(b"")),
            size: 1,
            place: Location::File,
            used,
            limit: LimitId::NONE,
        };
        ages.evicted(&[entry(11), entry(13)], start + second * 20);
        assert_eq!(ages.evicted, Some(second * 7));
        // Of before this process began, no more is known.
        ages.evicted(&[entry(3)], start + second * 20);
        assert_eq!(ages.evicted, Some(second * 10));
    }
}
