//! What laying out cost, for the log.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{merkle_tree::Node, plan::LayOutPlan};

/// What was done since the start.
#[derive(Debug, Default)]
pub struct LayOutCounts {
    pub roots: AtomicU64,
    /// Entries of all roots, and those of them that had to be made.
    pub entries: AtomicU64,
    pub links: AtomicU64,
    /// Directories that were made, and those that came from the idle roots with all that is in them.
    pub made: AtomicU64,
    pub unstashed: AtomicU64,
    /// Spent on planning and laying out.
    pub nanoseconds: AtomicU64,
}

impl std::fmt::Display for LayOutCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        write!(
            f,
            "{} input roots with {} entries: linked {} files, made {} directories, used {} stashed subtrees, in {} ms",
            of(&self.roots),
            of(&self.entries),
            of(&self.links),
            of(&self.made),
            of(&self.unstashed),
            of(&self.nanoseconds) / 1_000_000,
        )
    }
}

impl LayOutCounts {
    pub fn add<P>(&self, tree: &Node, plan: &LayOutPlan<P>) {
        let add = |count: &AtomicU64, more: u64| {
            count.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.roots, 1);
        add(&self.entries, tree.entries);
        add(&self.links, plan.links.len() as u64);
        add(&self.made, plan.made.len() as u64);
        add(&self.unstashed, plan.taken.len() as u64);
    }

    pub fn add_time(&self, spent: Duration) {
        let nanoseconds = spent.as_nanos() as u64;
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}
