//! How much a peer takes in one call: what it announces, and what its refusals taught.
//!
//! REAPI's max_batch_total_size_bytes of 0 is no limit; a server may have one nevertheless. bb_storage
//! announces none, and refuses batches beyond its maximum_message_size_bytes, which is 2 MiB in its
//! examples. What is refused is sent again in halves, at last one by one and by ByteStream; and what
//! went through then is what is sent from there on.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tonic::Status;

use crate::storage::chunking::ChunkingFunction;

/// Most servers and clients take messages of 4 MiB.
const DEFAULT_BATCH_SIZE: u64 = 4 << 20;

/// Digests of one FindMissingBlobs.
const DEFAULT_DIGESTS: u64 = 20_000;

/// A peer that did not say what it takes is not asked again for so long.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct CallLimits {
    announcement: tokio::sync::Mutex<Announcement>,
    batch_size: AtomicU64,
    blob_size: AtomicU64,
    digests: AtomicU64,
    zstd_streams: AtomicBool,
    zstd_batches: AtomicBool,
    chunks: OnceLock<AnnouncedChunks>,
}

/// What a peer says of itself; 0 is no limit.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Announced {
    pub batch_size: i64,
    pub blob_size: i64,
    /// Whether it takes and gives blobs compressed by Zstandard: by ByteStream, and in batches.
    pub zstd_streams: bool,
    pub zstd_batches: bool,
    pub chunks: AnnouncedChunks,
}

/// Whether a peer gives blobs as chunks, and by which function it wants them to be cut that it takes so.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AnnouncedChunks {
    pub split: bool,
    pub splice: Option<ChunkingFunction>,
}

#[derive(Debug)]
enum Announcement {
    /// Not before this time.
    NotYet(Option<Instant>),
    Answered,
}

impl Default for CallLimits {
    fn default() -> Self {
        CallLimits {
            announcement: tokio::sync::Mutex::new(Announcement::NotYet(None)),
            batch_size: AtomicU64::new(DEFAULT_BATCH_SIZE),
            blob_size: AtomicU64::new(u64::MAX),
            digests: AtomicU64::new(DEFAULT_DIGESTS),
            zstd_streams: AtomicBool::new(false),
            zstd_batches: AtomicBool::new(false),
            chunks: OnceLock::new(),
        }
    }
}

impl CallLimits {
    /// Learns what the peer announces, unless that is known. `ask` gets it; one call at a time does, and
    /// the others wait for its answer.
    pub(super) async fn announced(&self, ask: impl Future<Output = Result<Announced, Status>>) {
        let mut announcement = self.announcement.lock().await;
        if let Announcement::NotYet(not_before) = *announcement
            && not_before.is_none_or(|at| at <= Instant::now())
        {
            *announcement = match ask.await {
                Ok(said) => {
                    self.zstd_streams
                        .store(said.zstd_streams, Ordering::Relaxed);
                    self.zstd_batches
                        .store(said.zstd_batches, Ordering::Relaxed);
                    // Asked once, so that it is not set.
                    let _ = self.chunks.set(said.chunks);
                    for (known, announced) in [
                        (&self.batch_size, said.batch_size),
                        (&self.blob_size, said.blob_size),
                    ] {
                        if let Ok(announced @ 1..) = u64::try_from(announced) {
                            known.fetch_min(announced, Ordering::Relaxed);
                        }
                    }
                    Announcement::Answered
                }
                Err(_) => Announcement::NotYet(Some(Instant::now() + ASK_AGAIN_AFTER)),
            };
        }
    }

    /// What the peer does with chunks.
    pub(super) fn chunks(&self) -> AnnouncedChunks {
        self.chunks.get().copied().unwrap_or_default()
    }

    /// Whether streams may be compressed.
    pub(super) fn zstd_streams(&self) -> bool {
        self.zstd_streams.load(Ordering::Relaxed)
    }

    /// Whether blobs in batches may be compressed.
    pub(super) fn zstd_batches(&self) -> bool {
        self.zstd_batches.load(Ordering::Relaxed)
    }

    /// Bytes of the largest blob; the most there is while none is announced.
    pub(super) fn blob_size(&self) -> u64 {
        self.blob_size.load(Ordering::Relaxed)
    }

    /// Bytes of blobs that fit into one batch, each with its overhead.
    pub(super) fn batch_size(&self) -> u64 {
        let limit = self.batch_size.load(Ordering::Relaxed);
        // Room for the message's own fields, such as a long instance name.
        limit - (limit / 64).min(8 << 10)
    }

    /// A larger batch was refused, and so many bytes of blobs were the most that went through.
    pub(super) fn learn_batch_size(&self, size: u64) {
        let before = self.batch_size.fetch_min(size, Ordering::Relaxed);
        if size < before {
            tracing::info!(
                bytes = size,
                "the storage refuses larger batches without announcing a limit"
            );
        }
    }

    /// Digests of one FindMissingBlobs.
    pub(super) fn digests(&self) -> usize {
        usize::try_from(self.digests.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// More digests were refused, and so many were the most that went through.
    pub(super) fn learn_digests(&self, count: usize) {
        self.digests.fetch_min(count as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_does_not_say_is_asked_once_and_the_default_holds() {
        let limits = CallLimits::default();
        let silent = async { Err(Status::deadline_exceeded("")) };
        limits.announced(silent).await;
        assert_eq!(limits.batch_size(), DEFAULT_BATCH_SIZE - (8 << 10));
        limits.announced(async { panic!("asked again") }).await;
        assert_eq!(limits.blob_size(), u64::MAX);
    }

    #[tokio::test]
    async fn what_is_announced_and_what_was_learnt_both_hold() {
        let limits = CallLimits::default();
        limits.learn_batch_size(640 << 10);
        limits.announced(async { Ok(Announced::default()) }).await;
        assert_eq!(limits.batch_size(), 632 << 10);
        limits.learn_batch_size(1 << 20);
        limits.announced(async { panic!() }).await;
        assert_eq!(limits.batch_size(), 632 << 10);
        assert_eq!(limits.blob_size(), u64::MAX);
        let limits = CallLimits::default();
        let said = Announced {
            batch_size: 64 << 10,
            blob_size: 1 << 30,
            zstd_streams: true,
            ..Default::default()
        };
        limits.announced(async { Ok(said) }).await;
        assert!(limits.zstd_streams() && !limits.zstd_batches());
        assert_eq!(limits.batch_size(), 63 << 10);
        assert_eq!(limits.blob_size(), 1 << 30);
    }
}
