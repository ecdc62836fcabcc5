//! A client of any REAPI CAS and AC: batching, bounded concurrency, retries with back-off, typed
//! errors, single flight.
//!
//! 1. Whatever is returned has been verified against its digest.
//! 2. A peer that restarts within `PATIENCE` is not noticed, except by the delay.
//! 3. Every call ends: an answer that does not come within its time is an error. A stream that moves
//!    is not cut, however slow it is.

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
use tokio::sync::Semaphore;
use tonic::{Code, Status};

use self::{
    flight::{Flights, Seat},
    limits::Limits,
};
use super::Error;
use crate::{
    config::Endpoint,
    daemon::{self, Channel},
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

mod flight;
mod limits;
mod read;
mod retry;
mod write;

#[derive(Clone, Debug)]
pub struct Options {
    pub download_concurrency: NonZeroUsize,
    pub upload_concurrency: NonZeroUsize,
    pub timeouts: Timeouts,
}

/// How long a peer may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From a unary call to its answer.
    pub call: Duration,
    /// Between two messages of a stream; one that moves has no other limit.
    pub idle: Duration,
    /// Until it has said what it can.
    pub capabilities: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            call: Duration::from_secs(60),
            idle: Duration::from_secs(60),
            capabilities: Duration::from_secs(10),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        const CALLS: NonZeroUsize = NonZeroUsize::new(32).unwrap();
        Options {
            download_concurrency: CALLS,
            upload_concurrency: CALLS,
            timeouts: Timeouts::default(),
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
    limits: Limits,
    timeouts: Timeouts,
    downloads: Semaphore,
    uploads: Semaphore,
    reads: Flights,
}

/// Blobs of at most this size travel in batches, if the server's batches are not smaller still.
const SMALL: u64 = 1 << 20;

/// What a digest, a status and their tags add to a blob in a batch, at most.
const OVERHEAD: u64 = 200;

/// Answers, even of servers that exceed their own limit.
const MAX_MESSAGE_SIZE: usize = 64 << 20;

const CONNECTIONS: usize = 4;

impl Client {
    /// Connects at the first call, so that it never fails here.
    pub fn connect(cas: &Endpoint, action_cache: &Endpoint, options: Options) -> Self {
        let permits = |n: NonZeroUsize| Semaphore::new(n.get().min(Semaphore::MAX_PERMITS));
        Client {
            shared: Arc::new(Shared {
                cas: (0..CONNECTIONS).map(|_| daemon::connect(cas)).collect(),
                next: AtomicUsize::new(0),
                action_cache: daemon::connect(action_cache),
                limits: Limits::default(),
                timeouts: options.timeouts,
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
            self.shared.timeouts.capabilities,
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
            Err(status) if status.code() == Code::Unimplemented => Err(Error::Invalid(
                "what answers there is no Content Addressable Storage".to_owned(),
            )),
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
            .filter(|digest| !digest.is_empty_blob() && seen.insert(**digest))
            .copied()
            .collect();
        // One call has digests of one function.
        let mut calls: Vec<Vec<Digest>> = Vec::new();
        for run in distinct.chunk_by(|a, b| a.function() == b.function()) {
            let most = self.shared.limits.digests();
            calls.extend(run.chunks(most).map(<[Digest]>::to_vec));
        }
        let answers: Vec<Vec<Digest>> = stream::iter(calls)
            .map(|digests| self.find_missing_of(instance, digests))
            .buffered(4)
            .try_collect()
            .await?;
        Ok(answers.concat())
    }

    /// Of digests of one function; in halves when the server does not take so many.
    async fn find_missing_of(
        &self,
        instance: &InstanceName,
        digests: Vec<Digest>,
    ) -> Result<Vec<Digest>, Error> {
        let mut missing = Vec::new();
        let (mut refused, mut accepted) = (false, 0);
        let mut open = vec![digests];
        while let Some(mut digests) = open.pop() {
            let count = digests.len();
            match self.find_missing_once(instance, &digests).await? {
                Ok(found) => {
                    accepted = accepted.max(count);
                    missing.extend(found);
                }
                Err(status) if count <= 1 => return Err(retry::error(&status, None)),
                Err(_) => {
                    refused = true;
                    let later = digests.split_off(count / 2);
                    open.extend([later, digests]);
                }
            }
        }
        if refused && accepted > 0 {
            self.shared.limits.learn_digests(accepted);
        }
        Ok(missing)
    }

    /// The inner error is a refusal that a smaller call may not get.
    async fn find_missing_once(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Result<Vec<Digest>, Status>, Error> {
        let Some(function) = digests.first().map(Digest::function) else {
            return Ok(Ok(Vec::new()));
        };
        let request = FindMissingBlobsRequest {
            instance_name: instance.to_string(),
            blob_digests: digests.iter().map(Digest::to_proto).collect(),
            digest_function: function.to_proto() as i32,
        };
        let answer = retry::divisible(self.shared.timeouts.call, || {
            let (mut client, request) = (self.cas(), request.clone());
            async move { client.find_missing_blobs(request).await }
        });
        let missing = match answer.await? {
            Ok(answer) => answer.missing_blob_digests,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if missing.is_empty() {
            return Ok(Ok(Vec::new()));
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
        let of_ours = digests.iter().filter(|digest| missing.contains(digest));
        Ok(Ok(of_ours.copied().collect()))
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
        let limit = self.shared.timeouts.call;
        let result = retry::unary(limit, Some(action), || {
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
        let answer = retry::unary(self.shared.timeouts.call, None, || {
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

    /// Bytes of blobs that fit into one batch, each with its overhead.
    async fn batch_size(&self, instance: &InstanceName) -> u64 {
        self.ask_for_limits(instance).await;
        self.shared.limits.batch_size()
    }

    /// Bytes of the largest blob that the CAS takes; the most there is when it does not say.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        self.ask_for_limits(instance).await;
        self.shared.limits.blob_size()
    }

    async fn ask_for_limits(&self, instance: &InstanceName) {
        let ask = async {
            let request = GetCapabilitiesRequest {
                instance_name: instance.to_string(),
            };
            let mut client = CapabilitiesClient::new(self.channel());
            let answer = client.get_capabilities(request);
            let answer = retry::timely(self.shared.timeouts.capabilities, answer).await?;
            let cache = answer.into_inner().cache_capabilities.unwrap_or_default();
            Ok((
                cache.max_batch_total_size_bytes,
                cache.max_cas_blob_size_bytes,
            ))
        };
        self.shared.limits.announced(ask).await;
    }
}

/// A batch that went through, as what `group` may make so large. Servers count only the blobs, or the
/// whole message, whose other parts are about half of what `OVERHEAD` allows.
fn weight(blobs: usize, total: u64) -> u64 {
    total.max((total + OVERHEAD * blobs as u64) / 2)
}

/// In two, of about the same size.
fn halve<T>(mut blobs: Vec<T>, size: impl Fn(&T) -> u64) -> [Vec<T>; 2] {
    let total: u64 = blobs.iter().map(|blob| size(blob) + OVERHEAD).sum();
    let mut before = 0;
    let middle = blobs.iter().position(|blob| {
        before += size(blob) + OVERHEAD;
        before > total / 2
    });
    // Neither is empty.
    let most = blobs.len().saturating_sub(1).max(1);
    let later = blobs.split_off(middle.unwrap_or(most).clamp(1, most));
    [blobs, later]
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
