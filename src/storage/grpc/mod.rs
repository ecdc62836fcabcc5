//! A client of any REAPI CAS and AC: batching, bounded concurrency, retries with back-off, typed
//! errors, single flight. `read` and `write` have whole blobs, `read_stream` and `write_stream` one blob
//! by ByteStream, `chunks` one blob by its chunks, `find` FindMissingBlobs; `limits` is how much a server takes in one call, `call` and
//! `status` what becomes of one.
//!
//! 1. Whatever is returned has been verified against its digest.
//! 2. A peer that restarts within the time of `retry` is not noticed, except by the delay.
//! 3. Every call ends: an answer that does not come within its time is an error. A stream that moves
//!    is not cut, however slow it is.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tonic::{Code, Status, service::interceptor::InterceptedService};

use self::{
    call::CalledServer,
    limits::{Announced, AnnouncedChunks, CallLimits},
    local_chunks::LocalChunks,
    on_behalf::AddCarriedHeaders,
};
use super::{
    Error, chunking::ChunkingFunction, compression, retry::RetryPolicy, seen_outputs::SeenOutputs,
    single_flight::SingleFlight,
};
use crate::{
    config::Endpoint,
    daemon::{self, Credentials},
    digest::Digest,
    instance::InstanceName,
    proto::{
        bytestream::byte_stream_client::ByteStreamClient,
        reapi::{
            ActionResult, GetActionResultRequest, GetCapabilitiesRequest,
            UpdateActionResultRequest, action_cache_client::ActionCacheClient,
            capabilities_client::CapabilitiesClient,
            content_addressable_storage_client::ContentAddressableStorageClient,
        },
    },
    resource::Compressor,
};

mod call;
mod chunks;
mod find;
mod initial_size_class_cache;
mod limits;
mod local_chunks;
mod on_behalf;
mod read;
mod read_stream;
mod status;
mod write;
mod write_stream;

pub use initial_size_class_cache::InitialSizeClassCacheClient;
pub use local_chunks::LocalFiles;
pub use on_behalf::on_behalf_of;
pub(super) use read_stream::verified;
pub use write_stream::ForwardedUpload;

/// How much a client asks for at a time, and how long it waits.
#[derive(Clone, Debug)]
pub struct Options {
    /// Downloads at a time.
    pub download_concurrency: NonZeroUsize,
    /// Uploads at a time.
    pub upload_concurrency: NonZeroUsize,
    /// How long it waits for what.
    pub timeouts: Timeouts,
    /// Whom it trusts, and who it is.
    pub credentials: Credentials,
    /// Whether blobs travel compressed, where their server announces that they may.
    pub compression: When,
    /// Whether large blobs travel as chunks, where their server announces that they may.
    pub chunks: When,
    /// How calls that fail are tried again.
    pub retry: RetryPolicy,
    /// What is put before the instance name of each call.
    pub instance_name_prefix: InstanceName,
}

/// When a client saves bytes on the wire for time on its processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// If the server is on another host: a loopback is faster than a compressor.
    #[default]
    BetweenHosts,
    /// Always.
    Always,
    /// Never.
    Never,
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

impl When {
    fn holds_for(self, server: &Endpoint) -> bool {
        match self {
            When::BetweenHosts => !server.is_local(),
            When::Always => true,
            When::Never => false,
        }
    }
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
            credentials: Credentials::default(),
            compression: When::default(),
            chunks: When::default(),
            retry: RetryPolicy::default(),
            instance_name_prefix: InstanceName::empty(),
        }
    }
}

type CarryingChannel = InterceptedService<daemon::Channel, AddCarriedHeaders>;

/// Cheap to clone.
#[derive(Clone)]
pub struct Client(Arc<ClientState>);

/// Whose blob is read, and which.
type FlightKey = (InstanceName, Digest);

struct ClientState {
    /// Several connections, since each is driven by one thread at each end.
    cas: Vec<CarryingChannel>,
    next: AtomicUsize,
    action_cache: CarryingChannel,
    cas_server: CalledServer,
    action_cache_server: CalledServer,
    limits: CallLimits,
    timeouts: Timeouts,
    instance_name_prefix: InstanceName,
    /// Where the CAS announces it.
    compresses: bool,
    chunks: bool,
    local_chunks: LocalChunks,
    local_files: OnceLock<LocalFiles>,
    downloads: Arc<Semaphore>,
    uploads: Semaphore,
    reads: SingleFlight<FlightKey, Result<Bytes, Error>>,
    seen_outputs: SeenOutputs,
}

/// Blobs of at most this size travel in batches, if the server's batches are not smaller still.
const LARGEST_BATCHED: u64 = 1 << 20;

/// What a digest, a status and their tags add to a blob in a batch, at most.
const OVERHEAD: u64 = 200;

/// Answers, even of servers that exceed their own limit.
const MAX_MESSAGE_SIZE: usize = 64 << 20;

const CONNECTIONS: usize = 4;

impl Client {
    /// Connects at the first call, so that it never fails here.
    pub fn connect(cas: &Endpoint, action_cache: &Endpoint, options: Options) -> Self {
        let connect = |endpoint| {
            let channel = daemon::connect_with(endpoint, &options.credentials);
            InterceptedService::new(channel, AddCarriedHeaders)
        };
        let permits = |n: NonZeroUsize| Semaphore::new(n.get().min(Semaphore::MAX_PERMITS));
        let called =
            |endpoint| CalledServer::new(endpoint, options.timeouts.call, options.retry.clone());
        Client(Arc::new(ClientState {
            cas: (0..CONNECTIONS).map(|_| connect(cas)).collect(),
            next: AtomicUsize::new(0),
            action_cache: connect(action_cache),
            limits: CallLimits::default(),
            cas_server: called(cas),
            action_cache_server: called(action_cache),
            timeouts: options.timeouts,
            instance_name_prefix: options.instance_name_prefix,
            compresses: options.compression.holds_for(cas),
            chunks: options.chunks.holds_for(cas),
            local_chunks: LocalChunks::default(),
            local_files: OnceLock::new(),
            downloads: Arc::new(permits(options.download_concurrency)),
            uploads: permits(options.upload_concurrency),
            reads: SingleFlight::default(),
            seen_outputs: SeenOutputs::default(),
        }))
    }

    /// One GetCapabilities, for `--check`: is there a CAS at the other end?
    pub async fn probe(&self) -> Result<(), Error> {
        let request = GetCapabilitiesRequest {
            instance_name: self.0.instance_name_prefix.to_string(),
        };
        let limit = self.0.timeouts.capabilities;
        let answer = tokio::time::timeout(
            limit,
            CapabilitiesClient::new(self.channel()).get_capabilities(request),
        )
        .await
        .map_err(|_| {
            let seconds = limit.as_secs();
            Error::Unavailable(format!("the CAS did not answer within {seconds} seconds"))
        })?;
        match answer {
            Ok(answer) if answer.get_ref().cache_capabilities.is_none() => Err(Error::Invalid(
                "the server announces no cache_capabilities, so it is no CAS".to_owned(),
            )),
            Ok(_) => Ok(()),
            // An instance name may be demanded, which is not known here; it did answer.
            Err(status)
                if matches!(
                    status.code(),
                    Code::InvalidArgument | Code::NotFound | Code::PermissionDenied
                ) =>
            {
                Ok(())
            }
            Err(status) if status.code() == Code::Unimplemented => Err(Error::Invalid(
                "what answers there is no Content Addressable Storage".to_owned(),
            )),
            Err(status) => Err(self.0.cas_server.error(&status, None)),
        }
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
            instance_name: self.name_there(instance).to_string(),
            action_digest: Some(action.to_proto()),
            digest_function: action.function().to_proto() as i32,
            ..Default::default()
        };
        let server = &self.0.action_cache_server;
        let result = server.unary(Some(action), || {
            let (mut client, request) = (self.actions(), request.clone());
            async move { client.get_action_result(request).await }
        });
        match result.await {
            Ok(result) => Ok(Some(result)),
            Err(Error::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps an action's result in the Action Cache.
    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: ActionResult,
    ) -> Result<(), Error> {
        let request = UpdateActionResultRequest {
            instance_name: self.name_there(instance).to_string(),
            action_digest: Some(action.to_proto()),
            action_result: Some(result),
            results_cache_policy: None,
            digest_function: action.function().to_proto() as i32,
        };
        let answer = self.0.action_cache_server.unary(None, || {
            let (mut client, request) = (self.actions(), request.clone());
            async move { client.update_action_result(request).await }
        });
        answer.await.map(drop)
    }

    /// What its CAS had a moment ago.
    pub(super) fn seen_outputs(&self) -> &SeenOutputs {
        &self.0.seen_outputs
    }

    /// What the server calls an instance.
    fn name_there(&self, instance: &InstanceName) -> InstanceName {
        self.0.instance_name_prefix.join(instance)
    }

    fn channel(&self) -> CarryingChannel {
        let next = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.cas[next % self.0.cas.len()].clone()
    }

    fn cas(&self) -> ContentAddressableStorageClient<CarryingChannel> {
        ContentAddressableStorageClient::new(self.channel())
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    fn bytes(&self) -> ByteStreamClient<CarryingChannel> {
        ByteStreamClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    fn actions(&self) -> ActionCacheClient<CarryingChannel> {
        ActionCacheClient::new(self.0.action_cache.clone())
            .max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    /// Bytes of blobs that fit into one batch, each with its overhead.
    async fn batch_size(&self, instance: &InstanceName) -> u64 {
        self.ask_for_limits(instance).await;
        self.0.limits.batch_size()
    }

    /// Bytes of the largest blob that the CAS takes; the most there is when it does not say.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        self.0.limits.blob_size(instance, self.ask(instance)).await
    }

    /// How a blob of this size travels by ByteStream.
    async fn stream_compressor(&self, instance: &InstanceName, size: u64) -> Compressor {
        if !self.0.compresses || size < compression::MINIMUM {
            return Compressor::Identity;
        }
        self.ask_for_limits(instance).await;
        match self.0.limits.zstd_streams() {
            true => Compressor::Zstd,
            false => Compressor::Identity,
        }
    }

    /// Whether blobs in batches may be compressed.
    async fn compresses_batches(&self, instance: &InstanceName) -> bool {
        if !self.0.compresses {
            return false;
        }
        self.ask_for_limits(instance).await;
        self.0.limits.zstd_batches()
    }

    /// What may be done with chunks of blobs.
    async fn chunks(&self, instance: &InstanceName) -> AnnouncedChunks {
        if !self.0.chunks {
            return AnnouncedChunks::default();
        }
        self.ask_for_limits(instance).await;
        self.0.limits.chunks()
    }

    async fn ask_for_limits(&self, instance: &InstanceName) {
        self.0.limits.announced(instance, self.ask(instance)).await;
    }

    async fn ask(&self, instance: &InstanceName) -> Result<Announced, Status> {
        let request = GetCapabilitiesRequest {
            instance_name: self.name_there(instance).to_string(),
        };
        let mut client = CapabilitiesClient::new(self.channel());
        let answer = client.get_capabilities(request);
        let answer = call::timely(self.0.timeouts.capabilities, answer).await?;
        let cache = answer.into_inner().cache_capabilities.unwrap_or_default();
        let zstd = Compressor::Zstd.to_proto();
        Ok(Announced {
            batch_size: cache.max_batch_total_size_bytes,
            blob_size: cache.max_cas_blob_size_bytes,
            zstd_streams: cache.supported_compressors.contains(&zstd),
            zstd_batches: cache.supported_batch_update_compressors.contains(&zstd),
            chunks: AnnouncedChunks {
                split: cache.split_blob_support,
                splice: match cache.splice_blob_support {
                    true => ChunkingFunction::announced(&cache),
                    false => None,
                },
            },
        })
    }
}

/// A batch that went through, as what a batch may be split to. Servers count only the blobs, or the
/// whole message, whose other parts are about half of what `OVERHEAD` allows.
fn sent_size(blobs: usize, total: u64) -> u64 {
    total.max((total + OVERHEAD * blobs as u64) / 2)
}
