//! The line in the log that tells how an operation ended, and its span in the trace.

use prost::Message;
use uuid::Uuid;

use super::{
    action_trace,
    queue::{EncodedResponse, QueuedAction},
};
use crate::{
    daemon,
    proto::{reapi, rpc},
};

/// `client` is who waits for it, if somebody does.
///
/// A failure of the farm is a warning, with its reason and its worker; one of the action or its client
/// is nobody's business here.
pub(super) fn log_completion(
    operation: Uuid,
    queued: &QueuedAction,
    outcome: &EncodedResponse,
    client: Option<&str>,
) {
    let instance = queued.instance.as_str();
    let worker = Some(outcome.worker.as_str()).filter(|worker| !worker.is_empty());
    let span = daemon::action_span(&queued.digest.hash_hex(), Some(operation), worker);
    let _entered = span.enter();
    action_trace::record(operation, queued, outcome);
    let code = rpc::Code::try_from(outcome.code).unwrap_or(rpc::Code::Unknown);
    match code {
        rpc::Code::Unavailable
        | rpc::Code::Internal
        | rpc::Code::Unknown
        | rpc::Code::DataLoss
        | rpc::Code::ResourceExhausted => {
            let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap_or_default();
            tracing::warn!(
                message_id = daemon::message_id::OPERATION_FAILED,
                instance,
                client,
                target = queued.target_id(),
                code = code.as_str_name(),
                error = response.status.unwrap_or_default().message,
                "an operation failed"
            );
        }
        _ => tracing::info!(
            instance,
            client,
            target = queued.target_id(),
            code = code.as_str_name(),
            "operation completed"
        ),
    }
}
