//! Blobs are read in groups that fit into memory.

use crate::storage::batch;

/// What one batch of reads brings into memory; REAPI servers accept 4 MiB.
const BATCH_SIZE: u64 = 3 << 20;
const BATCH_BLOBS: usize = 1_000;

/// Groups that can each be read into memory by one call.
pub(super) fn batches<T>(items: Vec<T>, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    batch::split(items, BATCH_SIZE, BATCH_BLOBS, size)
}
