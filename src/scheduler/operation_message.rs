//! An operation as clients see it (REAPI: Execution.Execute).

use prost::Name;
use prost_types::Any;
use uuid::Uuid;

use super::{
    output_stream::StreamName,
    queue::{EncodedResponse, Explanation, Progress, QueuedAction, Stage},
};
use crate::{
    digest::Digest,
    proto::{
        self,
        live_output::Output,
        longrunning::{self, Operation},
        reapi::{self, execution_stage::Value as StageValue},
    },
};

/// Why a client is told of its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Update {
    /// It is new to the client, or has changed.
    News,
    /// Nothing has changed for long.
    StillThere,
}

/// What is known of an operation that is not completed.
#[derive(Clone, Debug, Default)]
pub(super) struct Details {
    /// Why it is where it is.
    pub explanation: Option<Explanation>,
    /// What its worker says.
    pub metadata: Option<reapi::ExecutedActionMetadata>,
}

/// `uuid` is the operation's in the queue.
pub(super) fn of_progress(
    name: String,
    uuid: Uuid,
    action: &QueuedAction,
    progress: &Progress,
    details: Details,
) -> Operation {
    let (stage, completed) = match &progress.stage {
        Stage::Queued => (StageValue::Queued, None),
        Stage::Executing => (StageValue::Executing, None),
        Stage::Completed(outcome) => (StageValue::Completed, Some(&**outcome)),
    };
    let explanation = details
        .explanation
        .map(|explanation| explanation.to_string());
    let is_known = explanation.is_some() || details.metadata.is_some();
    let partial = is_known.then(|| reapi::ExecutedActionMetadata {
        queued_timestamp: Some(action.queued_timestamp),
        // REAPI has no field for it: those who print the metadata of an operation see it here.
        auxiliary_metadata: explanation.iter().map(|text| string(text)).collect(),
        ..details.metadata.unwrap_or_default()
    });
    let streams = (stage == StageValue::Executing).then(|| {
        [Output::Stdout, Output::Stderr].map(|output| {
            let name = StreamName {
                instance: action.instance.clone(),
                operation: uuid,
                output,
            };
            name.to_string()
        })
    });
    operation(name, &action.digest, stage, completed, partial, streams)
}

pub(super) fn operation(
    name: String,
    digest: &Digest,
    stage: StageValue,
    completed: Option<&EncodedResponse>,
    partial: Option<reapi::ExecutedActionMetadata>,
    streams: Option<[String; 2]>,
) -> Operation {
    let [stdout, stderr] = streams.unwrap_or_default();
    let metadata = reapi::ExecuteOperationMetadata {
        stage: stage as i32,
        action_digest: Some(digest.to_proto()),
        digest_function: digest.function().to_proto() as i32,
        partial_execution_metadata: partial,
        stdout_stream_name: stdout,
        stderr_stream_name: stderr,
    };
    let response = completed.map(|outcome| Any {
        type_url: reapi::ExecuteResponse::type_url(),
        value: outcome.response.clone(),
    });
    Operation {
        name,
        metadata: Some(proto::pack(&metadata)),
        done: response.is_some(),
        result: response.map(longrunning::operation::Result::Response),
    }
}

/// A google.protobuf.StringValue.
fn string(text: &str) -> Any {
    Any {
        type_url: "type.googleapis.com/google.protobuf.StringValue".to_owned(),
        value: prost::Message::encode_to_vec(&text.to_owned()),
    }
}
