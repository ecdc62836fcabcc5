//! What a scheduler records of an action in its trace: the operation from its queueing to its end, and in it
//! the time in the queue.
//!
//! The trace is the client's, if it names one (W3C Trace Context); else the operation's UUID is its number.

use std::time::SystemTime;

use prost::Message;
use uuid::Uuid;

use super::queue::{ActionTrace, EncodedResponse, QueuedAction};
use crate::{
    daemon::traces::{self, Attribute, Span},
    metadata::TraceContext,
    proto::{
        self,
        reapi::{ExecuteResponse, ExecutedActionMetadata},
        rpc::Code,
    },
};

/// The trace of a new operation, when it is to be recorded: as its client says, or else as many as
/// `sample_ratio` says.
pub(super) fn trace_of(
    operation: Uuid,
    client: Option<TraceContext>,
    sample_ratio: f64,
) -> Option<ActionTrace> {
    let (trace, parent) = match client {
        Some(client) if client.is_sampled => (client.trace, Some(client.span)),
        Some(_) => return None,
        None if traces::is_on() && fastrand::f64() < sample_ratio => (operation.as_u128(), None),
        None => return None,
    };
    Some(ActionTrace {
        context: TraceContext {
            trace,
            span: span_of(operation),
            is_sampled: true,
        },
        parent,
    })
}

/// An operation's span has its name from the operation, so that it is found by either.
fn span_of(operation: Uuid) -> u64 {
    (operation.as_u128() as u64).max(1)
}

/// Has an operation that is over recorded, if its action is and it is the one that began it.
pub(super) fn record(operation: Uuid, queued: &QueuedAction, outcome: &EncodedResponse) {
    if !traces::is_on() {
        return;
    }
    let Some(ActionTrace { context, parent }) = queued.trace() else {
        return;
    };
    if context.span != span_of(operation) {
        return;
    }
    let now = SystemTime::now();
    let start = proto::system_time(&queued.queued_timestamp).unwrap_or(now);
    let response = ExecuteResponse::decode(&*outcome.response).unwrap_or_default();
    let metadata: ExecutedActionMetadata = response
        .result
        .and_then(|result| result.execution_metadata)
        .unwrap_or_default();
    let assigned = metadata.worker_start_timestamp.as_ref();
    traces::record(Span {
        context: TraceContext {
            span: traces::new_span(),
            ..context
        },
        parent: Some(context.span),
        name: "queued".to_owned(),
        is_server: false,
        start,
        end: assigned.and_then(proto::system_time).unwrap_or(now),
        attributes: Vec::new(),
        error: None,
    });
    let failed = outcome.code != Code::Ok as i32;
    traces::record(Span {
        context,
        parent,
        name: "action".to_owned(),
        is_server: false,
        start,
        end: now,
        attributes: vec![
            ("bb.action", Attribute::Text(queued.digest.hash_hex())),
            ("bb.operation", Attribute::Text(operation.to_string())),
            (
                "bb.instance",
                Attribute::Text(queued.instance.as_str().to_owned()),
            ),
            ("bb.target", Attribute::Text(queued.target_id())),
            ("bb.worker", Attribute::Text(outcome.worker.clone())),
            (
                "rpc.grpc.status_code",
                Attribute::Integer(outcome.code.into()),
            ),
        ],
        error: failed.then(|| response.status.unwrap_or_default().message),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_part_of_its_clients_trace_if_that_is_recorded() {
        let operation = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);
        let client = |is_sampled| {
            Some(TraceContext {
                trace: 7,
                span: 8,
                is_sampled,
            })
        };
        let trace = trace_of(operation, client(true), 0.0).unwrap();
        assert_eq!((trace.context.trace, trace.parent), (7, Some(8)));
        assert_eq!(trace.context.span, 0x8123_4567_89ab_cdef);
        assert_eq!(trace_of(operation, client(false), 1.0), None);
        // Nothing is recorded in this process.
        assert_eq!(trace_of(operation, None, 1.0), None);
    }
}
