//! The embedded store over gRPC: ContentAddressableStorage, ByteStream, ActionCache; and the
//! Capabilities of the whole farm.
//!
//! 1. A client that asks for much, and reads slowly, holds a piece of it in memory, not all: answers
//!    that are made as a whole are made when there is room for them (`daemon::serve`).
//! 2. A call's blobs, and a message, have limits; the error names them.

use std::sync::Arc;

use prost::Message;
use tonic::{Code, Request, Response, Status, async_trait, codec::CompressionEncoding};

use super::{
    Error, blocking,
    local::{Store, TurnError},
};
use crate::{
    daemon::{Answers, LineLimit, Received, Reservation, Services, with_room},
    digest::{Digest, DigestError, DigestFunction},
    instance::{InstanceName, InstanceNameError},
    proto::{
        self,
        bytestream::byte_stream_server::ByteStreamServer,
        reapi::{
            self, ActionResult, GetActionResultRequest, GetCapabilitiesRequest, ServerCapabilities,
            UpdateActionResultRequest,
            action_cache_server::{ActionCache, ActionCacheServer},
            capabilities_server::{Capabilities, CapabilitiesServer},
            content_addressable_storage_server::ContentAddressableStorageServer,
        },
        semver::SemVer,
    },
    resource::ResourceNameError,
};

mod bytestream;
mod cas;

/// REAPI: CacheCapabilities.max_batch_total_size_bytes. With its digests a batch stays below 4 MiB,
/// which many clients take as the largest message.
pub const MAX_BATCH_TOTAL_SIZE: u64 = (4 << 20) - (256 << 10);

/// gRPC's default for the largest message that a client takes. Of many small blobs it is their digests
/// that weigh.
const LARGEST_ANSWER: u64 = 4 << 20;

/// Large enough for 200,000 digests in one FindMissingBlobs.
const MAX_MESSAGE_SIZE: usize = 16 << 20;

/// Adds CAS, ByteStream and Action Cache.
pub fn add_to(services: Services, store: &Arc<Store>) -> Services {
    let cas = ContentAddressableStorageServer::new(cas::Cas::new(store.clone()))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAX_MESSAGE_SIZE);
    let bytes = ByteStreamServer::new(bytestream::Bytes::new(store.clone()))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(MAX_MESSAGE_SIZE);
    let actions = ActionCacheServer::new(Actions {
        store: store.clone(),
    })
    .accept_compressed(CompressionEncoding::Gzip)
    .max_decoding_message_size(MAX_MESSAGE_SIZE);
    services.add(cas).add(bytes).add(actions)
}

/// What a server announces. `max_blob_size` is 0 when this server does not know.
pub fn capabilities(exec_enabled: bool, max_blob_size: u64) -> CapabilitiesServer<Announced> {
    CapabilitiesServer::new(Announced {
        exec_enabled,
        max_blob_size,
    })
    .accept_compressed(CompressionEncoding::Gzip)
}

pub struct Announced {
    exec_enabled: bool,
    max_blob_size: u64,
}

#[async_trait]
impl Capabilities for Announced {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        instance(&request.get_ref().instance_name)?;
        let functions: Vec<i32> = DigestFunction::ALL
            .iter()
            .map(|function| function.to_proto() as i32)
            .collect();
        // Clients refuse to send a priority that is not announced.
        let priorities = reapi::PriorityCapabilities {
            priorities: vec![reapi::priority_capabilities::PriorityRange {
                min_priority: i32::MIN,
                max_priority: i32::MAX,
            }],
        };
        let version = |major, minor| SemVer {
            major,
            minor,
            ..Default::default()
        };
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(reapi::CacheCapabilities {
                digest_functions: functions.clone(),
                action_cache_update_capabilities: Some(reapi::ActionCacheUpdateCapabilities {
                    update_enabled: true,
                }),
                cache_priority_capabilities: Some(priorities.clone()),
                max_batch_total_size_bytes: MAX_BATCH_TOTAL_SIZE as i64,
                symlink_absolute_path_strategy:
                    reapi::symlink_absolute_path_strategy::Value::Allowed as i32,
                max_cas_blob_size_bytes: i64::try_from(self.max_blob_size).unwrap_or(i64::MAX),
                ..Default::default()
            }),
            execution_capabilities: self.exec_enabled.then(|| reapi::ExecutionCapabilities {
                digest_function: DigestFunction::Sha256.to_proto() as i32,
                exec_enabled: true,
                execution_priority_capabilities: Some(priorities),
                digest_functions: functions,
                ..Default::default()
            }),
            deprecated_api_version: None,
            // Bazel up to 4 speaks 2.0.
            low_api_version: Some(version(2, 0)),
            high_api_version: Some(version(2, 12)),
        }))
    }
}

struct Actions {
    store: Arc<Store>,
}

#[async_trait]
impl ActionCache for Actions {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let answers = Answers::of(&request);
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        let action = digest(request.digest_function, request.action_digest.as_ref())?;
        let store = self.store.clone();
        let result = blocking(move || store.action_result(&instance, &action)).await?;
        match result? {
            Some(result) => {
                let room = room(answers, weight(&result)).await?;
                Ok(with_room(Response::new(result), room))
            }
            None => Err(Status::not_found(format!(
                "action {action} has no result whose outputs are all here"
            ))),
        }
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let (answers, _received) = (Answers::of(&request), Received::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        let action = digest(request.digest_function, request.action_digest.as_ref())?;
        let result = request
            .action_result
            .ok_or_else(|| Status::invalid_argument("no action_result was given"))?;
        check_result(action.function(), &result)?;
        let store = self.store.clone();
        let stored = blocking(move || {
            store
                .update_action_result(&instance, &action, &result)
                .map(|()| result)
        });
        let stored = stored.await??;
        let room = room(answers, weight(&stored)).await?;
        Ok(with_room(Response::new(stored), room))
    }
}

/// Every digest of a result that will be followed.
fn check_result(function: DigestFunction, result: &ActionResult) -> Result<(), Status> {
    let check = |what: &str, digest: Option<&reapi::Digest>| {
        Digest::parse_required(Some(function), digest)
            .map(drop)
            .map_err(|error| Status::invalid_argument(format!("{what}: {error}")))
    };
    for file in &result.output_files {
        check(
            &format!("output file {:?}", crate::text::shorten(&file.path)),
            file.digest.as_ref(),
        )?;
    }
    for directory in &result.output_directories {
        let what = format!(
            "output directory {:?}",
            crate::text::shorten(&directory.path)
        );
        let (tree, root) = (&directory.tree_digest, &directory.root_directory_digest);
        if tree.is_none() && root.is_none() {
            check(&what, None)?;
        }
        for digest in [tree, root].into_iter().flatten() {
            check(&what, Some(digest))?;
        }
    }
    for (what, digest) in [
        ("stdout_digest", &result.stdout_digest),
        ("stderr_digest", &result.stderr_digest),
    ] {
        if digest.is_some() {
            check(what, digest.as_ref())?;
        }
    }
    Ok(())
}

/// Room for an answer; `None` outside of a server of ours.
async fn room(answers: Option<Answers>, bytes: u64) -> Result<Option<Reservation>, Status> {
    match answers {
        Some(answers) => answers.reserve(bytes).await.map(Some),
        None => Ok(None),
    }
}

/// Bytes of an answer that is there.
fn weight(message: &impl Message) -> u64 {
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
static REFUSALS: LineLimit = LineLimit::new(5, std::time::Duration::from_secs(60));

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

impl From<TurnError> for Status {
    fn from(error: TurnError) -> Self {
        let code = match error {
            TurnError::Store(error) => return error.into(),
            TurnError::TakenOver | TurnError::GivenUp => Code::Aborted,
            TurnError::Offset { .. } | TurnError::Unfinished { .. } => Code::InvalidArgument,
        };
        Status::new(code, error.to_string())
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
fn status_of(result: Result<(), Error>) -> proto::rpc::Status {
    match result {
        Ok(()) => proto::rpc::Status::default(),
        Err(error) => {
            let status = Status::from(error);
            proto::rpc::Status {
                code: status.code() as i32,
                message: status.message().to_owned(),
                details: Vec::new(),
            }
        }
    }
}
