//! The Execution service: what clients ask becomes operations of the queue, and those streams.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::{Stream, stream};
use prost::{Message, Name};
use prost_types::Any;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::Instrument;
use uuid::Uuid;

use super::{
    queue::{
        self, EncodedResponse, InvocationKey, InvocationKeys, Platform, Progress, QueuedAction,
        Stage,
    },
    shared_queue::{SharedQueue, Waiter},
    size_class::Analyzer,
    status::{self, invalid},
};
use crate::{
    config,
    daemon::{self, Access, LogRateLimit, Peer},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::REQUEST_METADATA_HEADER,
    proto::{
        self,
        longrunning::{self, Operation},
        reapi::{self, execution_stage::Value as StageValue},
        rpc,
    },
    storage::Backend,
};

/// Commands may be longer than Actions; only those of clients before REAPI 2.2 are read.
const LARGEST_COMMAND: u64 = 16 << 20;

/// What clients call.
pub(super) struct ExecutionService {
    pub queue: Arc<SharedQueue>,
    pub storage: Backend,
    pub scheduling: config::scheduler::Scheduling,
    pub stopping: CancellationToken,
}

type Operations = Pin<Box<dyn Stream<Item = Result<Operation, Status>> + Send>>;

#[tonic::async_trait]
impl reapi::execution_server::Execution for ExecutionService {
    type ExecuteStream = Operations;
    type WaitExecutionStream = Operations;

    async fn execute(
        &self,
        request: Request<reapi::ExecuteRequest>,
    ) -> Result<Response<Operations>, Status> {
        let asked = RefusalLog::new(&request);
        let span = daemon::action_span(&asked.action, None, None);
        async {
            let result = self.take(request).await;
            if let Err(status) = &result {
                asked.refused(status);
            }
            result
        }
        .instrument(span)
        .await
    }

    async fn wait_execution(
        &self,
        request: Request<reapi::WaitExecutionRequest>,
    ) -> Result<Response<Operations>, Status> {
        self.refuse_when_stopping()?;
        let access = Access::of(&request);
        let name = request.into_inner().name;
        let waiter = Uuid::try_parse(&name)
            .ok()
            .and_then(|operation| self.queue.wait(operation))
            .ok_or_else(|| {
                let name = crate::text::shorten(&name);
                Status::not_found(format!("Operation with name {name:?} not found"))
            })?;
        access.require(&waiter.attached.action.instance)?;
        Ok(Response::new(self.watch(waiter)))
    }
}

impl ExecutionService {
    async fn take(
        &self,
        request: Request<reapi::ExecuteRequest>,
    ) -> Result<Response<Operations>, Status> {
        self.refuse_when_stopping()?;
        let header = request
            .metadata()
            .get_bin(REQUEST_METADATA_HEADER)
            .and_then(|value| value.to_bytes().ok());
        let access = Access::of(&request);
        let request = request.into_inner();
        let instance = InstanceName::parse(&request.instance_name).map_err(invalid)?;
        access.require(&instance)?;
        let function = DigestFunction::from_proto(request.digest_function).map_err(invalid)?;
        let digest = Digest::parse_required(function, request.action_digest.as_ref())
            .map_err(|error| invalid(format!("Invalid action digest: {error}")))?;
        let action: reapi::Action = self
            .message(
                &instance,
                &digest,
                self.scheduling.maximum_message_size.0,
                "action",
            )
            .await?;
        let platform = self.platform(&instance, &digest, &action).await?;
        let timeout = self.timeout(action.timeout.as_ref())?;
        let (auxiliary_metadata, metadata) = request_metadata(header);
        let invocation = Any {
            type_url: reapi::RequestMetadata::type_url(),
            value: reapi::RequestMetadata {
                tool_invocation_id: metadata.tool_invocation_id,
                ..Default::default()
            }
            .encode_to_vec(),
        };
        let queued = queue::Request {
            name: Uuid::new_v4(),
            resumes: false,
            platform,
            priority: request.execution_policy.map_or(0, |policy| policy.priority),
            invocation: InvocationKeys::new([InvocationKey::new(&invocation)]),
            skip_cache_lookup: request.skip_cache_lookup,
            selector: Analyzer::Fallback.selector(timeout, None, SystemTime::now()),
            action: Arc::new(QueuedAction::new(
                instance,
                digest,
                action,
                timeout,
                auxiliary_metadata,
                proto::timestamp(SystemTime::now()),
            )),
        };
        let waiter = self.queue.execute(queued).map_err(status::not_queued)?;
        Ok(Response::new(self.watch(waiter)))
    }

    fn refuse_when_stopping(&self) -> Result<(), Status> {
        match self.stopping.is_cancelled() {
            true => Err(status::stopping()),
            false => Ok(()),
        }
    }

    async fn message<M: Message + Default>(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        limit: u64,
        what: &str,
    ) -> Result<M, Status> {
        let data = self
            .storage
            .read(instance, digest, limit)
            .await
            .map_err(|error| status::storage(&format!("Failed to obtain {what}"), error))?;
        M::decode(data)
            .map_err(|error| invalid(format!("Failed to obtain {what}: blob {digest}: {error}")))
    }

    /// REAPI: Action.platform; clients before 2.2 set Command.platform instead.
    async fn platform(
        &self,
        instance: &InstanceName,
        action_digest: &Digest,
        action: &reapi::Action,
    ) -> Result<Platform, Status> {
        let place = |platform: Option<&reapi::Platform>| {
            Platform::parse(platform)
                .map_err(|error| invalid(format!("Failed to route action: {error}")))
        };
        if action.platform.is_some() {
            return place(action.platform.as_ref());
        }
        let function = Some(action_digest.function());
        let digest = Digest::parse_required(function, action.command_digest.as_ref())
            .map_err(|error| invalid(format!("Invalid command digest: {error}")))?;
        let command: reapi::Command = self
            .message(instance, &digest, LARGEST_COMMAND, "command")
            .await?;
        #[expect(deprecated, reason = "clients before REAPI 2.2 fill it")]
        place(command.platform.as_ref())
    }

    /// A timeout of zero is none: no client means that its action shall not run.
    fn timeout(&self, asked: Option<&prost_types::Duration>) -> Result<Duration, Status> {
        let default = self.scheduling.default_execution_timeout.get();
        let maximum = self.scheduling.maximum_execution_timeout;
        let Some(asked) = asked else {
            return Ok(default);
        };
        match proto::duration(asked) {
            Some(Duration::ZERO) => Ok(default),
            Some(timeout) if timeout <= maximum.get() => Ok(timeout),
            _ => Err(invalid(format!(
                "Invalid execution timeout: {} s and {} ns is not between 0 s and {maximum}",
                asked.seconds, asked.nanos
            ))),
        }
    }

    /// The operation now, at each change, and now and then; the stream ends with its completion.
    fn watch(&self, waiter: Waiter) -> Operations {
        let interval = self.scheduling.execution_update_interval.get();
        let state = Some((waiter, self.stopping.clone(), None));
        Box::pin(stream::unfold(state, move |state| async move {
            let (mut waiter, stopping, seen) = state?;
            if let Some(seen) = seen {
                let stops = tokio::select! {
                    biased;
                    _ = waiter.news.wait_for(|news| news.version > seen) => false,
                    () = stopping.cancelled() => true,
                    () = tokio::time::sleep(interval) => false,
                };
                if stops {
                    return Some((Err(status::stopping()), None));
                }
            }
            let progress = waiter.progress();
            let operation = operation(
                waiter.attached.operation,
                &waiter.attached.action,
                &progress,
            );
            let next = match &progress.stage {
                Stage::Completed(outcome) => {
                    log_completion(waiter.attached.operation, &waiter.attached.action, outcome);
                    None
                }
                _ => Some((waiter, stopping, Some(progress.version))),
            };
            Some((Ok(operation), next))
        }))
    }
}

/// What a client asked for, for the log.
struct RefusalLog {
    action: String,
    instance: String,
    client: String,
}

/// Lines about refusals, which a client can cause as fast as it can call.
static REFUSALS: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));

impl RefusalLog {
    fn new(request: &Request<reapi::ExecuteRequest>) -> Self {
        let client = match request.extensions().get::<Peer>() {
            Some(Peer::Tcp(Some(address))) => address.to_string(),
            Some(Peer::Unix { uid, .. }) => format!("user {uid}"),
            Some(Peer::Tcp(None)) | None => "unknown".to_owned(),
        };
        let request = request.get_ref();
        let action = request.action_digest.as_ref();
        RefusalLog {
            action: action.map(|digest| digest.hash.clone()).unwrap_or_default(),
            instance: request.instance_name.clone(),
            client,
        }
    }

    fn refused(&self, status: &Status) {
        if let Some(withheld) = REFUSALS.admit(Instant::now()) {
            tracing::info!(
                instance = self.instance,
                client = self.client,
                code = ?status.code(),
                error = status.message(),
                lines_withheld = withheld,
                "refused an action"
            );
        }
    }
}

/// A failure of the farm is a warning, with its reason and its worker; one of the action or its client
/// is nobody's business here.
fn log_completion(operation: Uuid, queued: &QueuedAction, outcome: &EncodedResponse) {
    let (instance, target) = (queued.instance.as_str(), queued.target_id());
    let worker = Some(outcome.worker.as_str()).filter(|worker| !worker.is_empty());
    let span = daemon::action_span(&queued.digest.hash_hex(), Some(operation), worker);
    let _entered = span.enter();
    let code = rpc::Code::try_from(outcome.code).unwrap_or(rpc::Code::Unknown);
    match code {
        rpc::Code::Unavailable
        | rpc::Code::Internal
        | rpc::Code::Unknown
        | rpc::Code::DataLoss
        | rpc::Code::ResourceExhausted => {
            let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap_or_default();
            tracing::warn!(
                instance,
                target,
                code = code.as_str_name(),
                error = response.status.unwrap_or_default().message,
                "an operation failed"
            );
        }
        _ => tracing::info!(
            instance,
            target,
            code = code.as_str_name(),
            "operation completed"
        ),
    }
}

fn operation(name: Uuid, queued: &QueuedAction, progress: &Progress) -> Operation {
    let stage = match progress.stage {
        Stage::Queued => StageValue::Queued,
        Stage::Executing => StageValue::Executing,
        Stage::Completed(_) => StageValue::Completed,
    };
    let metadata = reapi::ExecuteOperationMetadata {
        stage: stage as i32,
        action_digest: Some(queued.digest.to_proto()),
        digest_function: queued.digest.function().to_proto() as i32,
        ..Default::default()
    };
    Operation {
        name: name.to_string(),
        metadata: Some(proto::pack(&metadata)),
        done: matches!(progress.stage, Stage::Completed(_)),
        result: match &progress.stage {
            Stage::Completed(outcome) => {
                Some(longrunning::operation::Result::Response(response(outcome)))
            }
            _ => None,
        },
    }
}

fn response(outcome: &EncodedResponse) -> Any {
    Any {
        type_url: reapi::ExecuteResponse::type_url(),
        value: outcome.response.clone(),
    }
}

/// For the worker, and for routing. A header that is none is as good as an absent one.
fn request_metadata(header: Option<bytes::Bytes>) -> (Vec<Any>, reapi::RequestMetadata) {
    let decoded = header.and_then(|data| {
        let metadata = reapi::RequestMetadata::decode(data.clone()).ok()?;
        Some((data, metadata))
    });
    match decoded {
        None => (Vec::new(), reapi::RequestMetadata::default()),
        Some((data, metadata)) => {
            let any = Any {
                type_url: reapi::RequestMetadata::type_url(),
                value: data.to_vec(),
            };
            (vec![any], metadata)
        }
    }
}
