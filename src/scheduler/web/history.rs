//! What the farm did in the last hour: a sample now and then, in memory.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

use crate::scheduler::{
    queue::{Queue, QueueCounts, Totals},
    shared_queue::SharedQueue,
};

/// Between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);
/// Samples of an hour.
pub(super) const KEPT: usize = 360;

/// How it was at one time, and what has happened since the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sample {
    pub queued: usize,
    pub executing: usize,
    pub idle: usize,
    pub completed: u64,
    pub failed: u64,
    pub hits: u64,
    pub lookups: u64,
}

/// How often the Action Cache was asked for clients, and had what they want.
#[derive(Debug, Default)]
pub(in crate::scheduler) struct CacheLookups {
    pub hits: AtomicU64,
    pub all: AtomicU64,
}

/// The samples.
#[derive(Default)]
pub(in crate::scheduler) struct History {
    samples: Mutex<VecDeque<Sample>>,
    pub lookups: Arc<CacheLookups>,
}

/// What had happened by some time.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    completed: u64,
    failed: u64,
    hits: u64,
    lookups: u64,
}

impl CacheLookups {
    pub(in crate::scheduler) fn count(&self, is_hit: bool) {
        self.all.fetch_add(1, Ordering::Relaxed);
        self.hits.fetch_add(u64::from(is_hit), Ordering::Relaxed);
    }
}

impl History {
    /// Takes samples; never returns.
    pub(in crate::scheduler) async fn run(&self, queue: &SharedQueue) {
        let mut before = Before::default();
        let mut timer = tokio::time::interval(SAMPLE_INTERVAL);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            timer.tick().await;
            let (counts, totals) = queue.look(|queue| (queue.counts(), queue.totals()));
            self.take(counts, totals, &mut before);
        }
    }

    fn take(&self, counts: QueueCounts, totals: Totals, before: &mut Before) {
        let now = Before {
            completed: totals.completed,
            failed: totals.failed,
            hits: self.lookups.hits.load(Ordering::Relaxed),
            lookups: self.lookups.all.load(Ordering::Relaxed),
        };
        let sample = Sample {
            queued: counts.queued,
            executing: counts.executing_workers,
            idle: counts.workers.saturating_sub(counts.executing_workers),
            completed: now.completed - before.completed,
            failed: now.failed - before.failed,
            hits: now.hits - before.hits,
            lookups: now.lookups - before.lookups,
        };
        *before = now;
        let mut samples = self.samples.lock();
        if samples.len() == KEPT {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// The newest last.
    pub(super) fn samples(&self) -> Vec<Sample> {
        self.samples.lock().iter().copied().collect()
    }
}

/// Counts of the queue as it is now.
pub(super) fn now(queue: &SharedQueue) -> QueueCounts {
    queue.look(Queue::counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_is_kept_and_each_sample_has_what_happened_since_the_one_before() {
        let history = History::default();
        let mut before = Before::default();
        for number in 1..=400 {
            history.lookups.count(number % 2 == 0);
            let totals = Totals {
                completed: number * 3,
                failed: number,
                ..Totals::default()
            };
            history.take(QueueCounts::default(), totals, &mut before);
        }
        let samples = history.samples();
        assert_eq!(samples.len(), KEPT);
        assert!(
            samples
                .iter()
                .all(|sample| (sample.completed, sample.failed) == (3, 1))
        );
        assert_eq!(samples.iter().map(|sample| sample.hits).sum::<u64>(), 180);
    }
}
