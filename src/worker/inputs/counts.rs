//! What laying out cost, for the log.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{builder::Shared, plan::Plan, pool::StashedTree, tree::Node};

/// What was done since the start.
#[derive(Debug, Default)]
pub struct LayOutCounts {
    pub roots: AtomicU64,
    /// Entries of all roots, and those of them that had to be made.
    pub entries: AtomicU64,
    pub links: AtomicU64,
    /// Directories that were made, and those that came out of the pool with all that is in them.
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

impl Shared {
    pub(super) fn count(&self, tree: &Node, plan: &Plan<StashedTree>) {
        let add = |count: &AtomicU64, more: u64| {
            count.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.counts.roots, 1);
        add(&self.counts.entries, tree.entries);
        add(&self.counts.links, plan.links.len() as u64);
        add(&self.counts.made, plan.made.len() as u64);
        add(&self.counts.unstashed, plan.taken.len() as u64);
    }
}
