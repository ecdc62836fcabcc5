//! The Execution service: what clients ask becomes operations of the queue, and those streams.
//!
//! 1. An operation is called by an `OperationName`. `WaitExecution` of one that the queue does not know is
//!    a request like Execute, under the UUID that the name has; a plain UUID that it does not know is
//!    NOT_FOUND, as with Buildbarn.
//! 2. What was there before a request is given only when all of its outputs are in the CAS, and never to a
//!    request that skips the look-up.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::Stream;
use prost::{Message, Name};
use prost_types::Any;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tracing::Instrument;
use uuid::Uuid;

use super::{
    action_routing::{ActionRouting, Routed},
    action_trace::trace_of,
    live_output::LiveOutput,
    operation_name::{OperationName, ParsedName},
    queue::{self, InvocationKeys, Platform, QueuedAction, Stage},
    routing::execution_timeout,
    shared_queue::{SharedQueue, Waiter},
    size_class::{Analyzer, Selector},
    statistics_store::StatisticsStore,
    status::{self, invalid},
    web::CacheLookups,
};
use crate::{
    config,
    daemon::{self, Access, CallConnection, LogRateLimit},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::{REQUEST_METADATA_HEADER, TraceContext},
    proto::{self, auth::AuthenticationMetadata, longrunning::Operation, reapi},
    storage::{Backend, InlineHints},
};

/// What clients call.
#[derive(Clone)]
pub(super) struct ExecutionService {
    pub queue: Arc<SharedQueue>,
    pub storage: Backend,
    pub scheduling: Arc<config::scheduling::Scheduling>,
    pub routing: Arc<ActionRouting>,
    pub analyzer: Analyzer,
    pub statistics: Arc<StatisticsStore>,
    pub lookups: Arc<CacheLookups>,
    pub live: Arc<LiveOutput>,
    /// In the names of operations: which scheduler gave them.
    pub scheduler: u64,
    /// How many of the actions are recorded whose clients say nothing of it.
    pub trace_sample_ratio: f64,
    pub started: Instant,
    pub stopping: CancellationToken,
}

pub(super) type Operations = Pin<Box<dyn Stream<Item = Result<Operation, Status>> + Send>>;

/// An action to be executed, and who asks.
pub(super) struct Asked {
    name: OperationName,
    /// It is an operation of a scheduler before this one.
    resumes: bool,
    /// The header of RequestMetadata, encoded.
    header: Option<bytes::Bytes>,
    user: Option<AuthenticationMetadata>,
    /// Where a client calls from that did not prove who it is.
    address: Option<String>,
    /// For the log.
    client: String,
    connection: CallConnection,
    /// What is to be in the result beside its digests.
    inline: InlineHints,
    /// The client's span, if it names one.
    trace: Option<TraceContext>,
}

/// A request for the queue, but for the platform, of which there may be several that would do.
struct Routable {
    request: queue::Request,
    platforms: Vec<Platform>,
}

impl Asked {
    /// An operation of a scheduler before this one, as its name has it.
    pub(super) fn again<T>(name: OperationName, request: &Request<T>) -> Self {
        Asked {
            resumes: true,
            header: request_metadata_header(request.metadata()),
            user: status::user(request),
            address: daemon::client_address(request),
            client: daemon::client_name(request),
            connection: CallConnection::of(request),
            inline: InlineHints::default(),
            trace: TraceContext::of(request.metadata().as_ref()),
            name,
        }
    }
}

#[tonic::async_trait]
impl reapi::execution_server::Execution for ExecutionService {
    type ExecuteStream = Operations;
    type WaitExecutionStream = Operations;

    async fn execute(
        &self,
        request: Request<reapi::ExecuteRequest>,
    ) -> Result<Response<Operations>, Status> {
        let log = RefusalLog::new(&request, request.get_ref());
        let span = daemon::action_span(&log.action, None, None);
        async {
            let result = match self.parse(request) {
                Ok(asked) => self.take(asked).await,
                Err(status) => Err(status),
            };
            if let Err(status) = &result {
                log.refused(status);
            }
            result.map(Response::new)
        }
        .instrument(span)
        .await
    }

    async fn wait_execution(
        &self,
        request: Request<reapi::WaitExecutionRequest>,
    ) -> Result<Response<Operations>, Status> {
        self.refuse_when_stopping()?;
        let text = &request.get_ref().name;
        let name = ParsedName::parse(text).map_err(|error| status::unknown_name(text, &error))?;
        let access = Access::of(&request);
        if let Some(mut waiter) = self.queue.wait(name.operation()) {
            let action = &waiter.attached.action;
            return match &name {
                // The UUID of one action, and the rest of another.
                ParsedName::Full(name)
                    if name.digest != action.digest || name.instance != action.instance =>
                {
                    Err(status::unknown_name(text, &"it is of another action"))
                }
                _ => {
                    access.require(&action.instance)?;
                    let timeout = self.scheduling.ended_call_timeout.get();
                    waiter.waits_for(CallConnection::of(&request), timeout, &self.stopping);
                    let client = daemon::client_name(&request);
                    let inline = InlineHints::default();
                    let operations = self.watch(waiter, text.clone(), client, inline);
                    Ok(Response::new(operations))
                }
            };
        }
        match name {
            ParsedName::Plain(_) => Err(status::unknown_name(
                text,
                &"nor does the name say what it executed",
            )),
            ParsedName::Full(name) => {
                access.require(&name.instance)?;
                let span = daemon::action_span(&name.digest.hash_hex(), Some(name.operation), None);
                let asked = Asked::again(*name, &request);
                self.resume(asked).instrument(span).await.map(Response::new)
            }
        }
    }
}

impl ExecutionService {
    fn parse(&self, request: Request<reapi::ExecuteRequest>) -> Result<Asked, Status> {
        let header = request_metadata_header(request.metadata());
        let (user, access) = (status::user(&request), Access::of(&request));
        let address = daemon::client_address(&request);
        let client = daemon::client_name(&request);
        let connection = CallConnection::of(&request);
        let trace = TraceContext::of(request.metadata().as_ref());
        let request = request.into_inner();
        let inline = InlineHints::from(&request);
        let instance = InstanceName::parse(&request.instance_name).map_err(invalid)?;
        access.require(&instance)?;
        let function = DigestFunction::from_proto(request.digest_function).map_err(invalid)?;
        Ok(Asked {
            name: OperationName {
                operation: Uuid::new_v4(),
                scheduler: self.scheduler,
                instance,
                digest: Digest::parse_required(function, request.action_digest.as_ref())
                    .map_err(|error| invalid(format!("Invalid action digest: {error}")))?,
                priority: request.execution_policy.map_or(0, |policy| policy.priority),
                skip_cache_lookup: request.skip_cache_lookup,
                invocation: InvocationKeys::default(),
            },
            resumes: false,
            header,
            user,
            address,
            client,
            connection,
            inline,
            trace,
        })
    }

    pub(super) async fn resume(&self, asked: Asked) -> Result<Operations, Status> {
        if let Some(withheld) = RESUMED.admit(Instant::now()) {
            tracing::info!(
                instance = asked.name.instance.as_str(),
                of_this_scheduler = asked.name.scheduler == self.scheduler,
                lines_withheld = withheld,
                "a client waits for an operation that is not known here; it is taken up again"
            );
        }
        self.take(asked).await
    }

    async fn take(&self, asked: Asked) -> Result<Operations, Status> {
        self.refuse_when_stopping()?;
        let (instance, digest) = (asked.name.instance.clone(), asked.name.digest);
        let action = self.action(&instance, &digest).await?;
        let may_look_up = self.scheduling.action_cache_lookup && !action.do_not_cache;
        if may_look_up
            && !asked.name.skip_cache_lookup
            && let Some(mut result) = self.look_up(&instance, &digest).await
        {
            let function = digest.function();
            let inlining = asked
                .inline
                .apply(&self.storage, &instance, function, &mut result);
            inlining.await;
            return Ok(self.answer_from_cache(&asked.name, result, &asked.client));
        }
        let Routable {
            mut request,
            platforms,
        } = self.route(&asked, action).await?;
        let workers = self.started + self.scheduling.worker_registration_timeout.get();
        let waiter = tokio::select! {
            biased;
            () = self.stopping.cancelled() => return Err(status::stopping()),
            decided = self.queue.execute_with_first_workers(&platforms, &mut request, workers) => {
                decided.map_err(status::execute)?
            }
        };
        let name = OperationName {
            priority: request.priority,
            invocation: request.invocation.clone(),
            ..asked.name
        };
        let mut waiter = self.without_incomplete_result(waiter, request).await?;
        let timeout = self.scheduling.ended_call_timeout.get();
        waiter.waits_for(asked.connection, timeout, &self.stopping);
        let name = OperationName {
            operation: waiter.attached.operation,
            ..name
        };
        Ok(self.watch(waiter, name.to_string(), asked.client, asked.inline))
    }

    /// Ends an operation of a scheduler before this one that nobody has taken up here.
    pub(super) async fn cancel_unknown(&self, asked: Asked) -> Result<(), Status> {
        self.refuse_when_stopping()?;
        let action = self
            .action(&asked.name.instance, &asked.name.digest)
            .await?;
        let Routable { request, platforms } = self.route(&asked, action).await?;
        let ended = self.queue.cancel_unknown(&platforms, request);
        ended.map_err(status::execute)
    }

    /// What is queued, and for which workers.
    async fn route(&self, asked: &Asked, mut action: reapi::Action) -> Result<Routable, Status> {
        let Asked {
            name,
            resumes,
            header,
            user,
            address,
            trace,
            ..
        } = asked;
        let (instance, digest) = (name.instance.clone(), name.digest);
        let (mut auxiliary_metadata, metadata) = request_metadata(header.clone());
        let route = self
            .routing
            .route(Routed {
                instance: &instance,
                digest: &digest,
                action: &action,
                metadata: &metadata,
                user: user.as_ref(),
                address: address.as_deref(),
                claimed: (*resumes).then_some(&name.invocation),
            })
            .await?;
        if let Some(changed) = route.action {
            action = changed;
        }
        if let Some(user) = user.as_ref().filter(|user| user.public.is_some()) {
            auxiliary_metadata.insert(
                0,
                proto::pack(&AuthenticationMetadata {
                    public: user.public.clone(),
                    ..Default::default()
                }),
            );
        }
        let timeout =
            execution_timeout(action.timeout.as_ref(), &self.scheduling).map_err(invalid)?;
        let selector = self.selector(name, &action, timeout).await;
        let request = queue::Request {
            name: name.operation,
            resumes: *resumes,
            platform: Platform::default(),
            priority: self.scheduling.priority(name.priority),
            invocation: route.invocation,
            skip_cache_lookup: name.skip_cache_lookup,
            selector,
            action: Arc::new(QueuedAction::new(
                instance,
                digest,
                action,
                timeout,
                auxiliary_metadata,
                proto::timestamp(SystemTime::now()),
                trace_of(name.operation, *trace, self.trace_sample_ratio),
            )),
        };
        Ok(Routable {
            request,
            platforms: route.platforms,
        })
    }

    /// On workers of which size it is executed.
    async fn selector(
        &self,
        name: &OperationName,
        action: &reapi::Action,
        timeout: Duration,
    ) -> Selector {
        let function = name.digest.function();
        let key = self
            .analyzer
            .statistics_key(&name.instance, function, action);
        let statistics = match key {
            None => None,
            Some(key) => self.statistics.read(&key).await.map(|known| (key, known)),
        };
        self.analyzer
            .selector(timeout, statistics, SystemTime::now())
    }

    /// A result that was there before the request is none without its outputs.
    async fn without_incomplete_result(
        &self,
        waiter: Waiter,
        request: queue::Request,
    ) -> Result<Waiter, Status> {
        let Stage::Completed(outcome) = &waiter.attached.progress.stage else {
            return Ok(waiter);
        };
        let result = reapi::ExecuteResponse::decode(&*outcome.response)
            .unwrap_or_default()
            .result;
        let (instance, digest) = (&request.action.instance, &request.action.digest);
        let Some(result) = result else {
            return Ok(waiter);
        };
        let complete = self
            .storage
            .is_complete(instance, digest.function(), &result);
        if complete.await.unwrap_or(false) {
            return Ok(waiter);
        }
        tracing::info!(
            "a result from before a restart is incomplete by now; the action is executed again"
        );
        let again = queue::Request {
            name: Uuid::new_v4(),
            resumes: false,
            ..request
        };
        self.queue.execute(again).map_err(status::execute)
    }

    pub(super) fn refuse_when_stopping(&self) -> Result<(), Status> {
        match self.stopping.is_cancelled() {
            true => Err(status::stopping()),
            false => Ok(()),
        }
    }

    async fn action(
        &self,
        instance: &InstanceName,
        digest: &Digest,
    ) -> Result<reapi::Action, Status> {
        let limit = self.scheduling.maximum_message_size.get();
        let data = self
            .storage
            .read(instance, digest, limit)
            .await
            .map_err(|error| status::storage("Failed to obtain action", error))?;
        reapi::Action::decode(data)
            .map_err(|error| invalid(format!("Failed to obtain action: blob {digest}: {error}")))
    }

    /// A cache that cannot be asked has nothing.
    async fn look_up(
        &self,
        instance: &InstanceName,
        digest: &Digest,
    ) -> Option<reapi::ActionResult> {
        match self.storage.complete_action_result(instance, digest).await {
            Ok(result) => {
                self.lookups.count(result.is_some());
                result
            }
            Err(error) => {
                if let Some(withheld) = FAILED_LOOK_UPS.admit(Instant::now()) {
                    tracing::warn!(
                        %error,
                        lines_withheld = withheld,
                        "could not look into the Action Cache; the action is executed"
                    );
                }
                None
            }
        }
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
static RESUMED: LogRateLimit = LogRateLimit::new(20, Duration::from_secs(10));
static FAILED_LOOK_UPS: LogRateLimit = LogRateLimit::new(5, Duration::from_secs(60));

impl RefusalLog {
    fn new<T>(call: &Request<T>, request: &reapi::ExecuteRequest) -> Self {
        let action = request.action_digest.as_ref();
        RefusalLog {
            action: action.map(|digest| digest.hash.clone()).unwrap_or_default(),
            instance: request.instance_name.clone(),
            client: daemon::client_name(call),
        }
    }

    fn refused(&self, status: &Status) {
        let Some(withheld) = REFUSALS.admit(Instant::now()) else {
            return;
        };
        macro_rules! tell {
            ($level:ident) => {
                tracing::$level!(
                    instance = self.instance,
                    client = self.client,
                    code = ?status.code(),
                    error = status.message(),
                    lines_withheld = withheld,
                    "refused an action"
                )
            };
        }
        // Such as a storage that does not answer: the client can do nothing about it.
        let is_ours = matches!(
            status.code(),
            Code::Unavailable | Code::Internal | Code::Unknown | Code::DataLoss
        );
        match is_ours && status.message() != status::stopping().message() {
            true => tell!(warn),
            false => tell!(info),
        }
    }
}

fn request_metadata_header(headers: &MetadataMap) -> Option<bytes::Bytes> {
    headers.get_bin(REQUEST_METADATA_HEADER)?.to_bytes().ok()
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
