//! What laying out cost, for the log and for metrics.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{merkle_tree::Node, plan::LayOutPlan};

/// What was done to lay out input roots since the start. Plans count before they are performed.
#[derive(Debug, Default)]
pub struct LayOutCounts {
    pub roots: AtomicU64,
    /// The files, directories and symbolic links of all these roots.
    pub entries: AtomicU64,
    /// The files that plans had to create; neither empty ones nor symbolic links are among them.
    pub created_files: AtomicU64,
    /// The directories that plans had to make.
    pub new_directories: AtomicU64,
    /// The subtrees that plans took out of the stash, with all that is in them.
    pub unstashed: AtomicU64,
    /// The time spent on planning and laying out.
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
            of(&self.created_files),
            of(&self.new_directories),
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
        add(&self.created_files, plan.files_to_create.len() as u64);
        add(&self.new_directories, plan.new_directories.len() as u64);
        add(&self.unstashed, plan.unstashed.len() as u64);
    }

    pub fn add_time(&self, spent: Duration) {
        let nanoseconds = spent.as_nanos() as u64;
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}
