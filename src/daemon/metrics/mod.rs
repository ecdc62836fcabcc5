//! Metrics: numbers that Prometheus fetches, as OpenMetrics text.
//!
//! 1. What is counted on the way of a call or an action is an atomic number: no lock is taken.
//! 2. A daemon's sources are asked when the metrics are fetched. Values of labels come from closed sets, or
//!    from one that its source bounds, so that clients cannot make a server of metrics keep more.
//!
//! `histogram` counts durations, `calls` counts gRPC calls; `exposition` is what sources write to, `registry`
//! has all of them.

mod calls;
mod exposition;
mod histogram;
mod registry;

pub(super) use calls::CountedCall;
pub use calls::failure_code;
pub use exposition::{Exposition, Labels};
pub use histogram::{Counts, DURATION_BOUNDS, Durations, Histogram};
pub use registry::Metrics;

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, while the process lives.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
