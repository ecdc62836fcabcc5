//! An operation as clients see it (REAPI: Execution.Execute).

use prost::Name;
use prost_types::Any;

use super::queue::{EncodedResponse, Explanation, Progress, QueuedAction, Stage};
use crate::{
    digest::Digest,
    proto::{
        self,
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

/// `explanation` says why it is where it is.
pub(super) fn of_progress(
    name: String,
    action: &QueuedAction,
    progress: &Progress,
    explanation: Option<&Explanation>,
) -> Operation {
    let (stage, completed) = match &progress.stage {
        Stage::Queued => (StageValue::Queued, None),
        Stage::Executing => (StageValue::Executing, None),
        Stage::Completed(outcome) => (StageValue::Completed, Some(&**outcome)),
    };
    let details = explanation.map(|explanation| reapi::ExecutedActionMetadata {
        queued_timestamp: Some(action.queued_timestamp),
        // REAPI has no field for it: those who print the metadata of an operation see it here.
        auxiliary_metadata: vec![string(&explanation.to_string())],
        ..Default::default()
    });
    operation(name, &action.digest, stage, completed, details)
}

pub(super) fn operation(
    name: String,
    digest: &Digest,
    stage: StageValue,
    completed: Option<&EncodedResponse>,
    details: Option<reapi::ExecutedActionMetadata>,
) -> Operation {
    let metadata = reapi::ExecuteOperationMetadata {
        stage: stage as i32,
        action_digest: Some(digest.to_proto()),
        digest_function: digest.function().to_proto() as i32,
        partial_execution_metadata: details,
        ..Default::default()
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
