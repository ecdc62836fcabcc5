//! A back end over gRPC: ContentAddressableStorage (`cas`, `tree` for its GetTree, and `chunks`), ByteStream,
//! ActionCache; and the Capabilities of the whole farm.
//!
//! 1. A client that asks for much, and reads slowly, holds a piece of it in memory, not all: answers
//!    that are made as a whole are made when there is room for them (`daemon::serve`).
//! 2. A call's blobs, and a message, have limits; the error names them.
//! 3. Compressed blobs are decompressed as they come, and compressed as they are read (`compression`);
//!    what that takes has limits, also for each caller (`coder_budget`).

use prost::Message;
use tonic::{Code, Status, codec::CompressionEncoding};

use super::{Backend, Error, UploadError, compression::DecodeError};
use crate::{
    daemon::{BudgetReservation, LogRateLimit, ResponseBudget, Services},
    digest::{Digest, DigestError, DigestFunction},
    instance::{InstanceName, InstanceNameError},
    proto::{
        bytestream::byte_stream_server::{ByteStream, ByteStreamServer},
        reapi::{
            self, action_cache_server::ActionCacheServer,
            content_addressable_storage_server::ContentAddressableStorageServer,
        },
        rpc,
    },
    resource::ResourceNameError,
};

use action_cache::ActionCacheService;
pub use bytestream::ByteStreamService;
pub use capabilities::{Announcement, capabilities};
use cas::CasService;
pub use chunks::serves_chunks;

mod action_cache;
mod bytestream;
mod capabilities;
mod cas;
mod chunks;
mod coder_budget;
mod compressed_write;
mod tree;

/// REAPI: CacheCapabilities.max_batch_total_size_bytes. With its digests a batch stays below 4 MiB,
/// which many clients take as the largest message.
pub const MAXIMUM_BATCH_SIZE: u64 = (4 << 20) - (256 << 10);

/// gRPC's default for the largest message that a client takes. Of many small blobs it is their digests
/// that weigh.
const MAXIMUM_RESPONSE_SIZE: u64 = 4 << 20;

/// Large enough for 200,000 digests in one FindMissingBlobs.
const MAXIMUM_REQUEST_SIZE: usize = 16 << 20;

/// Adds CAS, ByteStream and Action Cache.
pub fn add_to(services: Services, backend: &Backend) -> Services {
    let bytes = byte_stream(ByteStreamService {
        backend: backend.clone(),
    });
    add_beside_byte_stream(services, backend).add(bytes)
}

/// A service of streams, with the limits of this one.
pub fn byte_stream<S: ByteStream>(service: S) -> ByteStreamServer<S> {
    ByteStreamServer::new(service)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE)
}

/// Adds CAS and Action Cache, for a server whose ByteStream has more than blobs.
pub fn add_beside_byte_stream(services: Services, backend: &Backend) -> Services {
    let backend = || backend.clone();
    let cas = ContentAddressableStorageServer::new(CasService { backend: backend() })
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE);
    let actions = ActionCacheServer::new(ActionCacheService { backend: backend() })
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAXIMUM_REQUEST_SIZE);
    services.add(cas).add(actions)
}

/// Room for an answer; `None` outside of a server of ours.
async fn reserve(
    answers: Option<ResponseBudget>,
    bytes: u64,
) -> Result<Option<BudgetReservation>, Status> {
    match answers {
        Some(answers) => answers.reserve(bytes).await.map(Some),
        None => Ok(None),
    }
}

/// Bytes of an answer that is there.
fn encoded_size(message: &impl Message) -> u64 {
    message.encoded_len() as u64
}

fn instance(name: &str) -> Result<InstanceName, Status> {
    Ok(InstanceName::parse(name)?)
}

fn function(value: i32) -> Result<Option<DigestFunction>, Status> {
    Ok(DigestFunction::from_proto(value)?)
}

fn digest(function_value: i32, digest: Option<&reapi::Digest>) -> Result<Digest, Status> {
    Ok(Digest::parse_required(function(function_value)?, digest)?)
}

/// Lines about refusals, of which there is one for each blob.
static REFUSALS: LogRateLimit = LogRateLimit::new(5, std::time::Duration::from_secs(60));

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Missing(_) => Code::NotFound,
            Error::Corrupt { .. } | Error::TooLarge { .. } | Error::Invalid(_) => {
                Code::InvalidArgument
            }
            Error::Unavailable(_) => Code::Unavailable,
            Error::Full(_) => Code::ResourceExhausted,
            Error::Internal(_) => Code::Internal,
        };
        if let Error::Full(_) | Error::Internal(_) = &error
            && let Some(lines_withheld) = REFUSALS.admit(std::time::Instant::now())
        {
            tracing::warn!(%error, lines_withheld, "the store refused a blob");
        }
        Status::new(code, error.to_string())
    }
}

impl From<UploadError> for Status {
    fn from(error: UploadError) -> Self {
        let code = match error {
            UploadError::Storage(error) => return error.into(),
            UploadError::TakenOver | UploadError::GivenUp => Code::Aborted,
            UploadError::Offset { .. } | UploadError::Unfinished { .. } => Code::InvalidArgument,
        };
        Status::new(code, error.to_string())
    }
}

impl From<DecodeError> for Status {
    fn from(error: DecodeError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<DigestError> for Status {
    fn from(error: DigestError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<InstanceNameError> for Status {
    fn from(error: InstanceNameError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<ResourceNameError> for Status {
    fn from(error: ResourceNameError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// The status of one blob of a batch.
fn status_of(result: Result<(), Error>) -> rpc::Status {
    match result {
        Ok(()) => rpc::Status::default(),
        Err(error) => {
            let status = Status::from(error);
            rpc::Status {
                code: status.code() as i32,
                message: status.message().to_owned(),
                details: Vec::new(),
            }
        }
    }
}
