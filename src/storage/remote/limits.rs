//! How much a peer takes in one call: what it announces, and what its refusals taught.
//!
//! REAPI's max_batch_total_size_bytes of 0 is no limit; a server may have one nevertheless. bb_storage
//! announces none, and refuses batches beyond its maximum_message_size_bytes, which is 2 MiB in its
//! examples. What is refused is sent again in halves, at last one by one and by ByteStream; and what
//! went through then is what is sent from there on.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tonic::{Code, Status};

use super::retry;

/// Most servers and clients take messages of 4 MiB.
const DEFAULT_BATCH_SIZE: u64 = 4 << 20;

/// Digests of one FindMissingBlobs.
const DEFAULT_DIGESTS: u64 = 20_000;

/// A peer that did not say what it takes is not asked again for so long.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Limits {
    asked: tokio::sync::Mutex<Asked>,
    batch_size: AtomicU64,
    digests: AtomicU64,
}

#[derive(Debug)]
enum Asked {
    /// Not before this time.
    NotYet(Option<Instant>),
    Answered,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            asked: tokio::sync::Mutex::new(Asked::NotYet(None)),
            batch_size: AtomicU64::new(DEFAULT_BATCH_SIZE),
            digests: AtomicU64::new(DEFAULT_DIGESTS),
        }
    }
}

impl Limits {
    /// Bytes of blobs that fit into one batch, each with its overhead. `ask` gets what the peer
    /// announces; one call at a time does, and the others wait for its answer.
    pub async fn batch_size(&self, ask: impl Future<Output = Result<i64, Status>>) -> u64 {
        let mut asked = self.asked.lock().await;
        if let Asked::NotYet(not_before) = *asked
            && not_before.is_none_or(|at| at <= Instant::now())
        {
            *asked = match ask.await {
                Ok(announced) => {
                    if let Ok(announced @ 1..) = u64::try_from(announced) {
                        self.batch_size.fetch_min(announced, Ordering::Relaxed);
                    }
                    Asked::Answered
                }
                Err(_) => Asked::NotYet(Some(Instant::now() + SILENCE)),
            };
        }
        drop(asked);
        let limit = self.batch_size.load(Ordering::Relaxed);
        // Room for the message's own fields, such as a long instance name.
        limit - (limit / 64).min(8 << 10)
    }

    /// A larger batch was refused, and one of this size went through.
    pub fn learn_batch_size(&self, size: u64) {
        let before = self.batch_size.fetch_min(size, Ordering::Relaxed);
        if size < before {
            tracing::info!(
                bytes = size,
                "the storage refuses larger batches without announcing a limit"
            );
        }
    }

    /// Digests of one FindMissingBlobs.
    pub fn digests(&self) -> usize {
        usize::try_from(self.digests.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// More digests were refused, and so many went through.
    pub fn learn_digests(&self, count: usize) {
        self.digests.fetch_min(count as u64, Ordering::Relaxed);
    }
}

/// Whether a call of more than one item may have been too large, so that parts of it may pass.
///
/// gRPC libraries refuse large messages with RESOURCE_EXHAUSTED, as others refuse when a disk is
/// full; they are told apart by their words.
pub fn may_be_too_large(status: &Status) -> bool {
    if retry::is_of_the_connection(status) {
        return false;
    }
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => true,
        Code::ResourceExhausted => {
            let text = status.message();
            ["larger than max", "exceeds maximum", "too large"]
                .iter()
                .any(|words| text.contains(words))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_does_not_say_is_asked_once_and_the_default_holds() {
        let limits = Limits::default();
        let silent = async { Err(Status::deadline_exceeded("")) };
        let size = limits.batch_size(silent).await;
        assert_eq!(size, DEFAULT_BATCH_SIZE - (8 << 10));
        let never = async { panic!("asked again") };
        assert_eq!(limits.batch_size(never).await, size);
    }

    #[tokio::test]
    async fn what_is_announced_and_what_was_learnt_both_hold() {
        let limits = Limits::default();
        limits.learn_batch_size(640 << 10);
        assert_eq!(limits.batch_size(async { Ok(0) }).await, 630 << 10);
        limits.learn_batch_size(1 << 20);
        assert_eq!(limits.batch_size(async { panic!() }).await, 630 << 10);
        let limits = Limits::default();
        assert_eq!(limits.batch_size(async { Ok(64 << 10) }).await, 63 << 10);
    }

    #[test]
    fn a_full_disk_is_no_large_message() {
        let full = Status::resource_exhausted("No space left on device");
        assert!(!may_be_too_large(&full));
        let large = "grpc: received message larger than max (5242880 vs. 4194304)";
        assert!(may_be_too_large(&Status::resource_exhausted(large)));
        assert!(may_be_too_large(&Status::invalid_argument("anything")));
        assert!(!may_be_too_large(&Status::unavailable("too large")));
    }
}
