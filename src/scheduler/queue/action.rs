//! What clients ask for, and what they hear.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use prost::{Message, Name};
use prost_types::{Any, Timestamp};
use uuid::Uuid;

use super::{Platform, WorkerId};
use crate::{
    digest::Digest,
    instance::InstanceName,
    metadata::{TRACEPARENT, TraceContext},
    proto::{self, reapi, remoteworker::desired_state::Executing, rpc},
    scheduler::size_class::Selector,
};

/// Whose actions share with others at one level of the invocation tree: an encoded
/// google.protobuf.Any, which the queue does not look into.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvocationKey(Arc<[u8]>);

impl InvocationKey {
    pub fn new(any: &Any) -> Self {
        InvocationKey(any.encode_to_vec().into())
    }

    pub fn from_bytes(any: &[u8]) -> Self {
        InvocationKey(any.into())
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Empty when the bytes are no Any.
    pub fn any(&self) -> Any {
        Any::decode(self.as_bytes()).unwrap_or_default()
    }
}

impl fmt::Debug for InvocationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

/// Keys of all levels of the invocation tree, outermost first. Without any, all actions of a
/// size-class queue are in one line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvocationKeys(Arc<[InvocationKey]>);

impl InvocationKeys {
    pub fn new(keys: impl IntoIterator<Item = InvocationKey>) -> Self {
        InvocationKeys(keys.into_iter().collect())
    }

    pub fn as_slice(&self) -> &[InvocationKey] {
        &self.0
    }
}

impl Default for InvocationKeys {
    fn default() -> Self {
        InvocationKeys::new([])
    }
}

/// The names of the span that an operation is in the trace of its action, and of the one that it is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActionTrace {
    pub context: TraceContext,
    /// The client's span.
    pub parent: Option<u64>,
}

impl ActionTrace {
    const PARENT: &str = "parent";

    fn encode(self) -> BTreeMap<String, String> {
        let parent = self.parent.map(|parent| parent.to_string());
        let parent = parent.map(|parent| (Self::PARENT.to_owned(), parent));
        let context = (TRACEPARENT.to_owned(), self.context.to_string());
        [context].into_iter().chain(parent).collect()
    }

    fn decode(encoded: &BTreeMap<String, String>) -> Option<Self> {
        Some(ActionTrace {
            context: TraceContext::parse(encoded.get(TRACEPARENT)?)?,
            parent: encoded
                .get(Self::PARENT)
                .and_then(|parent| parent.parse().ok()),
        })
    }
}

/// What a worker is handed. The messages in it are kept encoded, as there may be a million.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedAction {
    pub instance: InstanceName,
    pub digest: Digest,
    pub do_not_cache: bool,
    /// The action's own, or the default.
    pub timeout: Duration,
    pub queued_timestamp: Timestamp,
    /// An `Executing` that has the action, the auxiliary metadata and the trace; RequestMetadata is without
    /// its type's name, as nearly every action has one.
    encoded: Box<[u8]>,
}

impl QueuedAction {
    /// `timeout` takes the place of the action's.
    pub fn new(
        instance: InstanceName,
        digest: Digest,
        action: reapi::Action,
        timeout: Duration,
        mut auxiliary_metadata: Vec<Any>,
        queued_timestamp: Timestamp,
        trace: Option<ActionTrace>,
    ) -> Self {
        let request_metadata = reapi::RequestMetadata::type_url();
        for any in &mut auxiliary_metadata {
            if any.type_url == request_metadata {
                any.type_url.clear();
            }
        }
        QueuedAction {
            instance,
            digest,
            do_not_cache: action.do_not_cache,
            timeout,
            queued_timestamp,
            encoded: Executing {
                action: Some(reapi::Action {
                    timeout: None,
                    ..action
                }),
                auxiliary_metadata,
                w3c_trace_context: trace.map(ActionTrace::encode).unwrap_or_default(),
                ..Default::default()
            }
            .encode_to_vec()
            .into(),
        }
    }

    /// How many bytes of what a client sent it holds.
    pub fn size(&self) -> usize {
        self.encoded.len()
    }

    fn decode(&self) -> Executing {
        let mut executing = Executing::decode(&*self.encoded).unwrap_or_default();
        for any in &mut executing.auxiliary_metadata {
            if any.type_url.is_empty() {
                any.type_url = reapi::RequestMetadata::type_url();
            }
        }
        executing
    }

    /// What a worker is told that has so long, and the trace that it takes part in.
    pub fn for_worker(&self, timeout: Duration) -> (reapi::Action, Vec<Any>, Option<ActionTrace>) {
        let Executing {
            action,
            auxiliary_metadata,
            w3c_trace_context,
            ..
        } = self.decode();
        let action = reapi::Action {
            timeout: Some(proto::proto_duration(timeout)),
            do_not_cache: self.do_not_cache,
            ..action.unwrap_or_default()
        };
        let trace = ActionTrace::decode(&w3c_trace_context);
        (action, auxiliary_metadata, trace)
    }

    /// The trace that it is recorded in, if it is.
    pub fn trace(&self) -> Option<ActionTrace> {
        ActionTrace::decode(&self.decode().w3c_trace_context)
    }

    /// What its client said of itself; empty when it said nothing.
    pub fn request_metadata(&self) -> reapi::RequestMetadata {
        let metadata = self.decode().auxiliary_metadata.into_iter();
        let mut of_type = metadata.filter(|any| any.type_url == reapi::RequestMetadata::type_url());
        of_type
            .next()
            .and_then(|any| reapi::RequestMetadata::decode(&*any.value).ok())
            .unwrap_or_default()
    }

    /// RequestMetadata.target_id, for those who look at the queue.
    pub fn target_id(&self) -> String {
        self.request_metadata().target_id
    }
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// What its operation is called, unless it joins one of its invocation.
    pub name: Uuid,
    /// The name is that of an operation that a scheduler before this one had: what a worker brings of
    /// it is its own, whatever `skip_cache_lookup` says.
    pub resumes: bool,
    pub action: Arc<QueuedAction>,
    pub platform: Platform,
    /// Chooses the size class.
    pub selector: Selector,
    /// Lower is earlier (REAPI: ExecutionPolicy).
    pub priority: i32,
    pub invocation: InvocationKeys,
    /// It is given no result that was there before it asked (REAPI: ExecuteRequest).
    pub skip_cache_lookup: bool,
}

/// How a task ended: an ExecuteResponse, encoded once for all who wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedResponse {
    pub response: Vec<u8>,
    /// Of the response's status.
    pub code: i32,
    /// Its worker says that it is the storage that is unavailable.
    pub is_fault_of_storage: bool,
    /// Who says so: ExecutedActionMetadata.worker.
    pub worker: String,
    pub exit_code: i32,
    /// What the execution took: ExecutedActionMetadata.virtual_execution_duration, or else the time
    /// between its timestamps.
    pub duration: Duration,
}

impl EncodedResponse {
    pub fn new(response: &reapi::ExecuteResponse) -> Self {
        let result = response.result.as_ref();
        let metadata = result.and_then(|result| result.execution_metadata.as_ref());
        EncodedResponse {
            response: response.encode_to_vec(),
            code: response.status.as_ref().map_or(0, |status| status.code),
            is_fault_of_storage: (response.status.as_ref())
                .is_some_and(proto::is_storage_unavailable),
            worker: metadata.map_or_else(String::new, |metadata| metadata.worker.clone()),
            exit_code: result.map_or(0, |result| result.exit_code),
            duration: metadata.and_then(execution_duration).unwrap_or_default(),
        }
    }

    pub fn failure(code: rpc::Code, message: String) -> Self {
        EncodedResponse::new(&reapi::ExecuteResponse {
            status: Some(proto::status(code, message)),
            ..Default::default()
        })
    }
}

impl EncodedResponse {
    /// The same failure, of a task that workers were lost with before.
    pub(super) fn after_lost(&self, lost: &[WorkerId]) -> Self {
        let response = reapi::ExecuteResponse::decode(&*self.response).unwrap_or_default();
        let message = response.status.unwrap_or_default().message;
        let workers: Vec<String> = lost.iter().map(WorkerId::to_string).collect();
        let workers = workers.join(", ");
        EncodedResponse::new(&reapi::ExecuteResponse {
            status: Some(rpc::Status {
                code: self.code,
                message: format!("{message}; these disappeared while it was executing: {workers}"),
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    Queued,
    Executing,
    Completed(Arc<EncodedResponse>),
}

/// What those who wait for a task see. A higher version is later news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub version: u64,
    pub stage: Stage,
}

fn execution_duration(metadata: &reapi::ExecutedActionMetadata) -> Option<Duration> {
    if let Some(duration) = &metadata.virtual_execution_duration {
        return proto::duration(duration);
    }
    let start = metadata.execution_start_timestamp.as_ref()?;
    let end = metadata.execution_completed_timestamp.as_ref()?;
    // Whoever may write results chooses both.
    let nanos =
        |time: &Timestamp| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let nanos = nanos(end) - nanos(start);
    u64::try_from(nanos).ok().map(Duration::from_nanos)
}
