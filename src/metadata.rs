//! Request metadata: what travels in headers beside a message, between this project's daemons or
//! from its clients.

#![warn(missing_docs)]

use prost::Message;
use tonic::{Request, metadata::MetadataValue};
use uuid::Uuid;

use crate::{instance::InstanceName, proto::reapi::RequestMetadata};

/// REAPI: RequestMetadata, serialised.
pub const REQUEST_METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// Between this project's worker and runner: whose the input files are.
const INPUTS_HEADER: &str = "bb-inputs";
const PRIVATE: &str = "private";

/// Between this project's worker and scheduler: whose blobs the reported action works with.
/// Buildbarn's worker does not say, and its scheduler does not ask.
const INSTANCE_HEADER: &str = "bb-instance-name-bin";

/// W3C Trace Context: in a header, and among desired_state.Executing.w3c_trace_context.
pub const TRACEPARENT: &str = "traceparent";

/// Between this project's worker and runner: which worker asks.
const WORKER_HEADER: &str = "bb-worker-bin";
/// Longer ones are left out, since all headers of a call are at most 16 KiB.
const LONGEST_WORKER: usize = 2 << 10;

/// Says of which instance the action is that a worker reports.
pub fn set_instance<T>(request: &mut Request<T>, instance: &InstanceName) {
    let value = MetadataValue::from_bytes(instance.as_str().as_bytes());
    request.metadata_mut().insert_bin(INSTANCE_HEADER, value);
}

/// The instance that `set_instance` set; `None` when the header is absent or no instance name.
pub fn instance_of<T>(request: &Request<T>) -> Option<InstanceName> {
    let value = request.metadata().get_bin(INSTANCE_HEADER)?;
    let data = value.to_bytes().ok()?;
    InstanceName::parse(std::str::from_utf8(&data).ok()?).ok()
}

/// What a request is made for, so that all daemons' logs name an action alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActionContext {
    /// The hash of the action's digest (REAPI: RequestMetadata.action_id); empty when it is unknown.
    pub action: String,
    /// A client's operation that waits for the action, if one is known.
    pub operation: Option<Uuid>,
    /// A worker's labels as JSON, as in ExecutedActionMetadata.worker.
    pub worker: Option<String>,
}

impl ActionContext {
    /// A request whose headers say all this.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let metadata = RequestMetadata {
            action_id: self.action.clone(),
            ..Default::default()
        };
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        headers.insert_bin(REQUEST_METADATA_HEADER, value);
        if let Some(operation) = self.operation
            && let Ok(value) = traceparent(operation).parse()
        {
            headers.insert(TRACEPARENT, value);
        }
        if let Some(worker) = &self.worker
            && worker.len() <= LONGEST_WORKER
        {
            headers.insert_bin(WORKER_HEADER, MetadataValue::from_bytes(worker.as_bytes()));
        }
        request
    }

    /// What `request` attached, as far as it did.
    pub fn of<T>(request: &Request<T>) -> Self {
        let headers = request.metadata();
        let bytes = |name: &str| headers.get_bin(name)?.to_bytes().ok();
        let metadata = bytes(REQUEST_METADATA_HEADER)
            .and_then(|data| RequestMetadata::decode(data).ok())
            .unwrap_or_default();
        let trace = headers
            .get(TRACEPARENT)
            .and_then(|value| value.to_str().ok());
        ActionContext {
            action: metadata.action_id,
            operation: trace.and_then(operation_of),
            worker: bytes(WORKER_HEADER).and_then(|data| String::from_utf8(data.into()).ok()),
        }
    }
}

/// An operation as a trace, which is not recorded (W3C Trace Context, version 00): the name of an
/// operation is a trace's ID, and its second half that of the span that caused the call.
pub fn traceparent(operation: Uuid) -> String {
    let (_, span) = operation.as_u64_pair();
    format!("00-{}-{span:016x}-00", operation.simple())
}

/// The operation whose trace it is.
pub fn operation_of(traceparent: &str) -> Option<Uuid> {
    let (_version, rest) = traceparent.split_once('-')?;
    let (trace, _) = rest.split_once('-')?;
    Uuid::try_parse(trace).ok().filter(|trace| !trace.is_nil())
}

/// Says that nobody else has the files in the input root, so that they may become the action's.
pub fn set_private_inputs<T>(request: &mut Request<T>) {
    let private = MetadataValue::from_static(PRIVATE);
    request.metadata_mut().insert(INPUTS_HEADER, private);
}

/// Whether the worker called `set_private_inputs`.
pub fn has_private_inputs<T>(request: &Request<T>) -> bool {
    let value = request.metadata().get(INPUTS_HEADER);
    value.is_some_and(|value| value.as_bytes() == PRIVATE.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_survives_as_a_trace() {
        let operation = Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef);
        let text = traceparent(operation);
        assert_eq!(
            text,
            "00-123456789abc4def8123456789abcdef-8123456789abcdef-00"
        );
        assert_eq!(operation_of(&text), Some(operation));
        for bad in [
            "",
            "00",
            "00-0-0-00",
            "00-00000000000000000000000000000000-1-00",
        ] {
            assert_eq!(operation_of(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_request_says_for_which_action_it_is_made() {
        let context = ActionContext {
            action: "abc".to_owned(),
            operation: Some(Uuid::from_u128(7)),
            worker: Some("{\"hostname\":\"ä\"}".to_owned()),
        };
        assert_eq!(ActionContext::of(&context.request(())), context);
        assert_eq!(
            ActionContext::of(&Request::new(())),
            ActionContext::default()
        );
    }
}
