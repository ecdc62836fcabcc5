//! What laying out cost, for the log.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Shared, plan::Plan, pool::Parked};
use crate::worker::tree::Node;

/// What was done since the start.
#[derive(Debug, Default)]
pub struct Counts {
    pub roots: AtomicU64,
    /// Entries of all roots, and those of them that had to be made.
    pub entries: AtomicU64,
    pub links: AtomicU64,
    /// Directories that were made, and those that came out of the pool with all that is in them.
    pub made: AtomicU64,
    pub unparked: AtomicU64,
    /// Spent on planning and laying out.
    pub nanoseconds: AtomicU64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        write!(
            f,
            "{} input roots with {} entries: linked {} files, made {} directories, used {} parked subtrees, in {} ms",
            of(&self.roots),
            of(&self.entries),
            of(&self.links),
            of(&self.made),
            of(&self.unparked),
            of(&self.nanoseconds) / 1_000_000,
        )
    }
}

impl Shared {
    pub(super) fn count(&self, tree: &Node, plan: &Plan<Parked>) {
        let add = |count: &AtomicU64, more: u64| {
            count.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.counts.roots, 1);
        add(&self.counts.entries, tree.entries);
        add(&self.counts.links, plan.links.len() as u64);
        add(&self.counts.made, plan.made.len() as u64);
        add(&self.counts.unparked, plan.taken.len() as u64);
    }
}
