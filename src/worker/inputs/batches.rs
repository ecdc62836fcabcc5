//! Blobs are read in groups that fit into memory.

/// What one batch of reads brings into memory; REAPI servers accept 4 MiB.
const BATCH_SIZE: u64 = 3 << 20;
const BATCH_BLOBS: usize = 1_000;

/// Groups that can each be read into memory by one call.
pub fn batches<T>(items: Vec<T>, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut batches = Vec::new();
    let mut batch = Vec::new();
    let mut bytes = 0_u64;
    for item in items {
        let more = size(&item);
        if !batch.is_empty() && (bytes + more > BATCH_SIZE || batch.len() == BATCH_BLOBS) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes = bytes.saturating_add(more);
        batch.push(item);
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}
