//! Splits what is to be read from the storage into batches that fit into memory.

use crate::storage::batch;

/// How many bytes one batch of reads brings into memory; REAPI servers accept 4 MiB.
const BATCH_SIZE: u64 = 3 << 20;
const BATCH_BLOBS: usize = 1_000;

/// Splits items into batches, each of which can be read into memory by one call.
pub(super) fn batches<T>(items: Vec<T>, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    batch::split(items, BATCH_SIZE, BATCH_BLOBS, size)
}
