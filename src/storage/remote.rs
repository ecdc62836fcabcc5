//! A client of any REAPI CAS and AC: batching, bounded concurrency, retries with back-off, typed
//! errors, single flight.
//!
//! 1. Whatever is returned has been verified against its digest.
//! 2. A peer that restarts within `PATIENCE` is not noticed, except by the delay.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::{OnceCell, Semaphore};
use tonic::{Code, transport::Channel};

use self::flight::{Flights, Seat};
use super::Error;
use crate::{
    config::Endpoint,
    daemon,
    digest::Digest,
    instance::InstanceName,
    proto::{
        bytestream::byte_stream_client::ByteStreamClient,
        reapi::{
            ActionResult, FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest,
            UpdateActionResultRequest, action_cache_client::ActionCacheClient,
            capabilities_client::CapabilitiesClient,
            content_addressable_storage_client::ContentAddressableStorageClient,
        },
    },
};

mod download;
mod flight;
mod retry;
mod upload;

#[derive(Clone, Debug)]
pub struct Options {
    pub download_concurrency: NonZeroUsize,
    pub upload_concurrency: NonZeroUsize,
}

impl Default for Options {
    fn default() -> Self {
        const CALLS: NonZeroUsize = NonZeroUsize::new(32).unwrap();
        Options {
            download_concurrency: CALLS,
            upload_concurrency: CALLS,
        }
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    /// Several connections, since each is driven by one thread at each end.
    cas: Vec<Channel>,
    next: AtomicUsize,
    action_cache: Channel,
    /// Once the server said so.
    announced: OnceCell<Announced>,
    downloads: Semaphore,
    uploads: Semaphore,
    reads: Flights,
}

/// The limits that a server gives in its capabilities, in bytes; 0 where it gives none.
#[derive(Clone, Copy, Default)]
struct Announced {
    /// Of all blobs of one batch.
    batch_size: u64,
    /// Of one blob.
    blob_size: u64,
}

/// Blobs of at most this size travel in batches, if the server's batches are not smaller still.
const SMALL: u64 = 1 << 20;

/// Most servers and clients take messages of 4 MiB.
const DEFAULT_BATCH_SIZE: u64 = 4 << 20;

/// What a digest, a status and their tags add to a blob in a batch, at most.
const OVERHEAD: u64 = 200;

/// Answers, even of servers that exceed their own limit.
const MAX_MESSAGE_SIZE: usize = 64 << 20;

const CONNECTIONS: usize = 4;

/// A server that does not answer by then is one that announces nothing.
const CAPABILITIES_TIMEOUT: Duration = Duration::from_secs(10);

/// Digests of one FindMissingBlobs.
const DIGESTS: usize = 20_000;

impl Client {
    /// Connects at the first call, so that it never fails here.
    pub fn connect(cas: &Endpoint, action_cache: &Endpoint, options: Options) -> Self {
        let permits = |n: NonZeroUsize| Semaphore::new(n.get().min(Semaphore::MAX_PERMITS));
        Client {
            shared: Arc::new(Shared {
                cas: (0..CONNECTIONS).map(|_| daemon::connect(cas)).collect(),
                next: AtomicUsize::new(0),
                action_cache: daemon::connect(action_cache),
                announced: OnceCell::new(),
                downloads: permits(options.download_concurrency),
                uploads: permits(options.upload_concurrency),
                reads: Flights::default(),
            }),
        }
    }

    /// One GetCapabilities, for `--check`: is there a CAS at the other end?
    pub async fn probe(&self) -> Result<(), Error> {
        let request = GetCapabilitiesRequest::default();
        let answer = tokio::time::timeout(
            Duration::from_secs(10),
            CapabilitiesClient::new(self.channel()).get_capabilities(request),
        )
        .await
        .map_err(|_| Error::Unavailable("the CAS did not answer within 10 seconds".to_owned()))?;
        match answer {
            Ok(answer) if answer.get_ref().cache_capabilities.is_none() => Err(Error::Invalid(
                "the server announces no cache_capabilities, so it is no CAS".to_owned(),
            )),
            Ok(_) => Ok(()),
            // An instance name may be demanded, which is not known here; it did answer.
            Err(status) if matches!(status.code(), Code::InvalidArgument | Code::NotFound) => {
                Ok(())
            }
            Err(status) => Err(retry::error(&status, None)),
        }
    }

    /// The digests that the CAS lacks, in the order given, without repetition.
    pub async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        let mut seen = std::collections::HashSet::new();
        let distinct: Vec<Digest> = digests
            .iter()
            .filter(|digest| !is_the_empty_blob(digest) && seen.insert(**digest))
            .copied()
            .collect();
        // One call has digests of one function.
        let mut calls: Vec<Vec<Digest>> = Vec::new();
        for run in distinct.chunk_by(|a, b| a.function() == b.function()) {
            calls.extend(run.chunks(DIGESTS).map(<[Digest]>::to_vec));
        }
        let answers: Vec<Vec<Digest>> = stream::iter(calls)
            .map(|digests| self.find_missing_once(instance, digests))
            .buffered(4)
            .try_collect()
            .await?;
        Ok(answers.concat())
    }

    async fn find_missing_once(
        &self,
        instance: &InstanceName,
        digests: Vec<Digest>,
    ) -> Result<Vec<Digest>, Error> {
        let Some(function) = digests.first().map(Digest::function) else {
            return Ok(Vec::new());
        };
        let request = FindMissingBlobsRequest {
            instance_name: instance.to_string(),
            blob_digests: digests.iter().map(Digest::to_proto).collect(),
            digest_function: function.to_proto() as i32,
        };
        let answer = retry::unary(None, || {
            let (mut client, request) = (self.cas(), request.clone());
            async move { client.find_missing_blobs(request).await }
        });
        let missing = answer.await?.missing_blob_digests;
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        let missing: std::collections::HashSet<Digest> = missing
            .iter()
            .map(|digest| Digest::parse(Some(function), digest))
            .collect::<Result<_, _>>()
            .map_err(|error| {
                Error::Internal(format!(
                    "the CAS answered with an ill-formed digest: {error}"
                ))
            })?;
        let mut digests = digests;
        digests.retain(|digest| missing.contains(digest));
        Ok(digests)
    }

    /// A whole blob of at most `limit` bytes, verified.
    pub async fn read(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        limit: u64,
    ) -> Result<Bytes, Error> {
        let mut one = self
            .read_many(instance, std::slice::from_ref(digest), limit)
            .await;
        one.pop()
            .unwrap_or_else(|| Err(Error::Internal("a read had no result".to_owned())))
    }

    /// `None` when there is no result.
    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let request = GetActionResultRequest {
            instance_name: instance.to_string(),
            action_digest: Some(action.to_proto()),
            digest_function: action.function().to_proto() as i32,
            ..Default::default()
        };
        let result = retry::unary(Some(action), || {
            let (mut client, request) = (self.actions(), request.clone());
            async move { client.get_action_result(request).await }
        });
        match result.await {
            Ok(result) => Ok(Some(result)),
            Err(Error::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: ActionResult,
    ) -> Result<(), Error> {
        let request = UpdateActionResultRequest {
            instance_name: instance.to_string(),
            action_digest: Some(action.to_proto()),
            action_result: Some(result),
            results_cache_policy: None,
            digest_function: action.function().to_proto() as i32,
        };
        let answer = retry::unary(None, || {
            let (mut client, request) = (self.actions(), request.clone());
            async move { client.update_action_result(request).await }
        });
        answer.await.map(drop)
    }

    fn channel(&self) -> Channel {
        let next = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.cas[next % self.shared.cas.len()].clone()
    }

    fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.channel())
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    fn bytes(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    fn actions(&self) -> ActionCacheClient<Channel> {
        ActionCacheClient::new(self.shared.action_cache.clone())
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    /// Bytes of blobs that fit into one batch, each with its overhead. REAPI:
    /// max_batch_total_size_bytes, where 0 is no limit.
    async fn batch_size(&self, instance: &InstanceName) -> u64 {
        let announced = self.announced(instance).await;
        let limit = match announced.batch_size {
            0 => DEFAULT_BATCH_SIZE,
            limit => limit.min(DEFAULT_BATCH_SIZE),
        };
        // Room for the message's own fields, such as a long instance name.
        limit - (limit / 64).min(8 << 10)
    }

    /// Bytes of the largest blob that the CAS takes; the most there is when it does not say.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        match self.announced(instance).await.blob_size {
            0 => u64::MAX,
            limit => limit,
        }
    }

    /// What the CAS says of itself; nothing while it cannot be asked.
    async fn announced(&self, instance: &InstanceName) -> Announced {
        let ask = async || {
            let request = GetCapabilitiesRequest {
                instance_name: instance.to_string(),
            };
            let mut client = CapabilitiesClient::new(self.channel());
            let answer = client.get_capabilities(request);
            let answer = tokio::time::timeout(CAPABILITIES_TIMEOUT, answer).await;
            let capabilities = answer.map_err(drop)?.map_err(drop)?.into_inner();
            let cache = capabilities.cache_capabilities.unwrap_or_default();
            let size = |limit: i64| u64::try_from(limit).unwrap_or(0);
            Ok::<_, ()>(Announced {
                batch_size: size(cache.max_batch_total_size_bytes),
                blob_size: size(cache.max_cas_blob_size_bytes),
            })
        };
        let known = self.shared.announced.get_or_try_init(ask).await;
        known.copied().unwrap_or_default()
    }
}

/// Which need not be asked for.
fn is_the_empty_blob(digest: &Digest) -> bool {
    digest.is_empty_blob() && *digest == digest.function().empty()
}

/// Groups of at most `limit` bytes, each blob counted with its overhead.
fn group<T>(blobs: Vec<T>, limit: u64, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut room = 0;
    for blob in blobs {
        let weight = size(&blob) + OVERHEAD;
        match groups.last_mut() {
            Some(last) if weight <= room => {
                room -= weight;
                last.push(blob);
            }
            _ => {
                room = limit.saturating_sub(weight);
                groups.push(vec![blob]);
            }
        }
    }
    groups
}
