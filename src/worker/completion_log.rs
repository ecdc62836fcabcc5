//! The line in the log that tells what became of an action, within its span.

use std::time::Duration;

use prost_types::Timestamp;

use crate::{
    instance::InstanceName,
    proto::{self, reapi::ExecuteResponse, rpc::Code},
};

/// A failure of the farm is a warning; one of the action or its client is nobody's business here.
pub(super) fn log_completion(slot: usize, instance: &InstanceName, response: &ExecuteResponse) {
    let result = response.result.clone().unwrap_or_default();
    let metadata = result.execution_metadata.unwrap_or_default();
    let fetch_ms = between(
        &metadata.input_fetch_start_timestamp,
        &metadata.input_fetch_completed_timestamp,
    );
    let run_ms = between(
        &metadata.execution_start_timestamp,
        &metadata.execution_completed_timestamp,
    );
    let upload_ms = between(
        &metadata.output_upload_start_timestamp,
        &metadata.output_upload_completed_timestamp,
    );
    let instance = instance.as_str();
    let status = response.status.clone().unwrap_or_default();
    match Code::try_from(status.code).unwrap_or(Code::Unknown) {
        Code::Ok => tracing::info!(
            instance,
            slot,
            exit_code = result.exit_code,
            fetch_ms,
            run_ms,
            upload_ms,
            "action done"
        ),
        code @ (Code::Cancelled
        | Code::DeadlineExceeded
        | Code::FailedPrecondition
        | Code::InvalidArgument) => {
            tracing::info!(
                instance,
                slot,
                fetch_ms,
                run_ms,
                upload_ms,
                code = code.as_str_name(),
                error = status.message,
                "action ended without a result"
            );
        }
        code => tracing::warn!(
            instance,
            slot,
            fetch_ms,
            run_ms,
            upload_ms,
            code = code.as_str_name(),
            error = status.message,
            "could not finish an action"
        ),
    }
}

/// Milliseconds; 0 for what did not happen.
fn between(begin: &Option<Timestamp>, end: &Option<Timestamp>) -> f64 {
    let moment = |timestamp: &Option<Timestamp>| proto::system_time(timestamp.as_ref()?);
    let length = match (moment(begin), moment(end)) {
        (Some(begin), Some(end)) => end.duration_since(begin).unwrap_or_default(),
        _ => Duration::ZERO,
    };
    (length.as_secs_f64() * 10_000.0).round() / 10.0
}
