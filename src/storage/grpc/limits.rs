//! How much a peer takes in one call: what it announces, and what its refusals taught.
//!
//! REAPI's max_batch_total_size_bytes of 0 is no limit; a server may have one nevertheless. bb_storage
//! announces none, and refuses batches beyond its maximum_message_size_bytes, which is 2 MiB in its
//! examples. What is refused is sent again in halves, at last one by one and by ByteStream; and what
//! went through then is what is sent from there on.

use std::{
    collections::HashMap,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tonic::Status;

use crate::{instance::InstanceName, storage::chunking::ChunkingFunction};

/// Most servers and clients take messages of 4 MiB.
const DEFAULT_BATCH_SIZE: u64 = 4 << 20;

/// Digests of one FindMissingBlobs.
const DEFAULT_DIGESTS: u64 = 20_000;

/// No refusal teaches less than this, in bytes of a batch or digests of a FindMissingBlobs: what is refused below it
/// was refused for something else than its size, and would make calls small for good.
const SMALLEST_LEARNT: u64 = 16 << 10;
const SMALLEST_LEARNT_DIGESTS: u64 = 100;

/// A peer that did not say what it takes is not asked again for so long.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Instance names whose largest blob is remembered. Clients choose them.
const MAXIMUM_INSTANCES: usize = 1_000;

#[derive(Debug)]
pub(super) struct CallLimits {
    announcement: tokio::sync::Mutex<AnnouncementState>,
    batch_size: AtomicU64,
    /// By instance name, since some have a limit of their own.
    blob_sizes: Mutex<HashMap<InstanceName, u64>>,
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
enum AnnouncementState {
    /// Not before this time.
    NotYet(Option<Instant>),
    Answered,
}

impl AnnouncementState {
    /// Whether the peer is to be asked now.
    fn is_due(&self) -> bool {
        matches!(self, AnnouncementState::NotYet(not_before) if not_before.is_none_or(|at| at <= Instant::now()))
    }

    fn is_known(&self) -> bool {
        matches!(self, AnnouncementState::Answered)
    }
}

impl Default for CallLimits {
    fn default() -> Self {
        CallLimits {
            announcement: tokio::sync::Mutex::new(AnnouncementState::NotYet(None)),
            batch_size: AtomicU64::new(DEFAULT_BATCH_SIZE),
            blob_sizes: Mutex::default(),
            digests: AtomicU64::new(DEFAULT_DIGESTS),
            zstd_streams: AtomicBool::new(false),
            zstd_batches: AtomicBool::new(false),
            chunks: OnceLock::new(),
        }
    }
}

impl CallLimits {
    /// Learns what the peer announces, unless that is known. `ask` gets it for this instance name; one call at a
    /// time does, and the others wait for its answer.
    pub(super) async fn announced(
        &self,
        instance: &InstanceName,
        ask: impl Future<Output = Result<Announced, Status>>,
    ) {
        let mut announcement = self.announcement.lock().await;
        if announcement.is_due() {
            *announcement = self.learn(instance, ask).await;
        }
    }

    /// Bytes of the largest blob; the most there is while none is announced. `ask` as above.
    pub(super) async fn blob_size(
        &self,
        instance: &InstanceName,
        ask: impl Future<Output = Result<Announced, Status>>,
    ) -> u64 {
        let known = || self.blob_sizes.lock().get(instance).copied();
        if let Some(size) = known() {
            return size;
        }
        let mut announcement = self.announcement.lock().await;
        if known().is_none() && (announcement.is_due() || announcement.is_known()) {
            *announcement = self.learn(instance, ask).await;
        }
        known().unwrap_or(u64::MAX)
    }

    async fn learn(
        &self,
        instance: &InstanceName,
        ask: impl Future<Output = Result<Announced, Status>>,
    ) -> AnnouncementState {
        let Ok(said) = ask.await else {
            return AnnouncementState::NotYet(Some(Instant::now() + ASK_AGAIN_AFTER));
        };
        self.zstd_streams
            .store(said.zstd_streams, Ordering::Relaxed);
        self.zstd_batches
            .store(said.zstd_batches, Ordering::Relaxed);
        // The first answer counts.
        let _ = self.chunks.set(said.chunks);
        let limit = |announced| u64::try_from(announced).ok().filter(|limit| *limit > 0);
        if let Some(batch_size) = limit(said.batch_size) {
            self.batch_size.fetch_min(batch_size, Ordering::Relaxed);
        }
        let mut blob_sizes = self.blob_sizes.lock();
        if blob_sizes.len() >= MAXIMUM_INSTANCES {
            blob_sizes.clear();
        }
        blob_sizes.insert(instance.clone(), limit(said.blob_size).unwrap_or(u64::MAX));
        AnnouncementState::Answered
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

    /// Bytes of blobs that fit into one batch, each with its overhead.
    pub(super) fn batch_size(&self) -> u64 {
        let limit = self.batch_size.load(Ordering::Relaxed);
        // Room for the message's own fields, such as a long instance name.
        limit - (limit / 64).min(8 << 10)
    }

    /// A larger batch was refused, and so many bytes of blobs were the most that went through.
    pub(super) fn learn_batch_size(&self, size: u64) {
        let size = size.max(SMALLEST_LEARNT);
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
        let count = (count as u64).max(SMALLEST_LEARNT_DIGESTS);
        self.digests.fetch_min(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(name: &str) -> InstanceName {
        InstanceName::parse(name).unwrap()
    }

    #[tokio::test]
    async fn a_peer_that_does_not_say_is_asked_once_and_the_default_holds() {
        let limits = CallLimits::default();
        let silent = async { Err(Status::deadline_exceeded("")) };
        limits.announced(&instance(""), silent).await;
        assert_eq!(limits.batch_size(), DEFAULT_BATCH_SIZE - (8 << 10));
        let again = async { panic!("asked again") };
        limits.announced(&instance(""), again).await;
        let again = async { panic!("asked again") };
        assert_eq!(limits.blob_size(&instance("a"), again).await, u64::MAX);
    }

    #[tokio::test]
    async fn what_is_announced_and_what_was_learnt_both_hold() {
        let limits = CallLimits::default();
        limits.learn_batch_size(640 << 10);
        let any = instance("");
        let nothing = async { Ok(Announced::default()) };
        limits.announced(&any, nothing).await;
        assert_eq!(limits.batch_size(), 632 << 10);
        limits.learn_batch_size(1 << 20);
        limits.announced(&any, async { panic!() }).await;
        assert_eq!(limits.batch_size(), 632 << 10);
        assert_eq!(limits.blob_size(&any, async { panic!() }).await, u64::MAX);
        let limits = CallLimits::default();
        let said = Announced {
            batch_size: 64 << 10,
            blob_size: 1 << 30,
            zstd_streams: true,
            ..Default::default()
        };
        limits.announced(&any, async { Ok(said) }).await;
        assert!(limits.zstd_streams() && !limits.zstd_batches());
        assert_eq!(limits.batch_size(), 63 << 10);
        assert_eq!(limits.blob_size(&any, async { panic!() }).await, 1 << 30);
    }

    #[test]
    fn a_refusal_of_little_does_not_make_calls_small_for_good() {
        let limits = CallLimits::default();
        limits.learn_batch_size(230);
        limits.learn_digests(1);
        assert_eq!(limits.batch_size(), SMALLEST_LEARNT - SMALLEST_LEARNT / 64);
        assert_eq!(limits.digests() as u64, SMALLEST_LEARNT_DIGESTS);
    }

    #[tokio::test]
    async fn each_instance_has_its_largest_blob_and_is_asked_for_it_once() {
        let limits = CallLimits::default();
        for (name, blob_size) in [("", 1 << 30), ("a", 1 << 20), ("b", 0)] {
            let said = Announced {
                blob_size,
                ..Default::default()
            };
            let expected = if blob_size == 0 {
                u64::MAX
            } else {
                blob_size as u64
            };
            let told = limits.blob_size(&instance(name), async { Ok(said) }).await;
            assert_eq!(told, expected);
            let told = limits.blob_size(&instance(name), async { panic!() }).await;
            assert_eq!(told, expected);
        }
        for number in 0..2 * MAXIMUM_INSTANCES {
            let said = async { Ok(Announced::default()) };
            limits.blob_size(&instance(&number.to_string()), said).await;
        }
        assert!(limits.blob_sizes.lock().len() <= MAXIMUM_INSTANCES);
    }
}
