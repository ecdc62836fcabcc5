//! How long things took: counts in buckets, as Buildbarn has them.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper bounds in seconds: three for each power of ten, from a millisecond to a quarter of an hour
/// (Buildbarn: DecimalExponentialBuckets(-3, 6, 2)).
pub const DURATION_BOUNDS: [f64; 19] = [
    0.001,
    0.002_154,
    0.004_642,
    0.01,
    0.021_544,
    0.046_416,
    0.1,
    0.215_443,
    0.464_159,
    1.0,
    2.154_435,
    4.641_589,
    10.0,
    21.544_347,
    46.415_888,
    100.0,
    215.443_469,
    464.158_883,
    1000.0,
];

/// Upper bounds of small numbers (Buildbarn: LinearBuckets(0, 1, 11)).
const COUNT_BOUNDS: [f64; 11] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];

/// A histogram of small numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// For each bound, and beyond the last one.
    counts: [u64; COUNT_BOUNDS.len() + 1],
    sum: u64,
}

impl Counts {
    /// Counts one.
    pub fn observe(&mut self, number: u32) {
        let bucket = (number as usize).min(COUNT_BOUNDS.len());
        self.counts[bucket] += 1;
        self.sum += u64::from(number);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Of all together.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Each bound, with the count between it and the one before.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = COUNT_BOUNDS.into_iter().chain([f64::INFINITY]);
        bounds.zip(self.counts).collect()
    }
}

const BUCKETS: usize = DURATION_BOUNDS.len() + 1;

/// A histogram that one at a time writes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    /// For each bound, and beyond the last one.
    counts: [u64; BUCKETS],
    sum: Duration,
}

/// A histogram that many write to.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

fn bucket_of(duration: Duration) -> usize {
    let seconds = duration.as_secs_f64();
    DURATION_BOUNDS.partition_point(|bound| *bound < seconds)
}

impl Durations {
    /// Counts one.
    pub fn observe(&mut self, duration: Duration) {
        self.counts[bucket_of(duration)] += 1;
        self.sum = self.sum.saturating_add(duration);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Of all together.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// Each bound, with the count between it and the one before.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = DURATION_BOUNDS.into_iter().chain([f64::INFINITY]);
        bounds.zip(self.counts).collect()
    }
}

impl Histogram {
    /// Counts one.
    pub fn observe(&self, duration: Duration) {
        self.counts[bucket_of(duration)].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn read(&self) -> Durations {
        let count = |number: usize| self.counts[number].load(Ordering::Relaxed);
        Durations {
            counts: std::array::from_fn(count),
            sum: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_counted_below_the_bound_that_it_equals() {
        let mut counts = Counts::default();
        for number in [0, 0, 1, 10, 11, 4_000_000_000] {
            counts.observe(number);
        }
        let counted: Vec<(f64, u64)> = counts.buckets();
        let counted: Vec<_> = counted
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        assert_eq!(counted, [(0.0, 2), (1.0, 1), (10.0, 1), (f64::INFINITY, 2)]);
        assert_eq!((counts.count(), counts.sum()), (6, 4_000_000_022));
    }

    #[test]
    fn a_duration_is_counted_below_the_first_bound_that_it_does_not_exceed() {
        let histogram = Histogram::default();
        for seconds in [0.0, 0.001, 0.0011, 1.0, 999.0, 5000.0] {
            histogram.observe(Duration::from_secs_f64(seconds));
        }
        let read = histogram.read();
        let counted: Vec<(f64, u64)> = read
            .buckets()
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        let expected = [
            (0.001, 2),
            (0.002_154, 1),
            (1.0, 1),
            (1000.0, 1),
            (f64::INFINITY, 1),
        ];
        assert_eq!(counted, expected);
        assert_eq!(read.count(), 6);
    }
}
