//! What a scheduler asks a slot to do, parsed at the edge.

use std::time::Duration;

use prost_types::{Any, Timestamp};

use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::{self, Attempt, TraceContext},
    proto::{
        self,
        reapi::{Action, ExecuteResponse},
        remoteworker::desired_state::Executing,
        rpc,
    },
};

/// One action to run. Its Command and inputs are yet to be fetched.
#[derive(Clone, Debug, PartialEq)]
pub struct AssignedTask {
    /// Where the action's blobs and its result are.
    pub instance: InstanceName,
    /// Of all digests in the action, too.
    pub function: DigestFunction,
    pub digest: Digest,
    pub action: Action,
    /// Of the command alone, by the worker's clock.
    pub timeout: Duration,
    /// For ExecutedActionMetadata.queued_timestamp.
    pub queued_timestamp: Option<Timestamp>,
    /// Comes before the worker's own in ExecutedActionMetadata.auxiliary_metadata.
    pub auxiliary_metadata: Vec<Any>,
    /// Which handing-out of the task this is, if the scheduler tells.
    pub attempt: Option<Attempt>,
    /// The scheduler's span, if it has the action recorded.
    pub trace: Option<TraceContext>,
}

impl AssignedTask {
    /// The task, for a worker that serves `prefix`; or what to answer instead of running it.
    pub fn parse(
        prefix: &InstanceName,
        executing: Executing,
    ) -> Result<Self, Box<ExecuteResponse>> {
        let refuse = |reason: String| {
            Box::new(ExecuteResponse {
                status: Some(proto::status(
                    rpc::Code::InvalidArgument,
                    format!("Failed to understand the scheduler: {reason}"),
                )),
                ..Default::default()
            })
        };
        let suffix = InstanceName::parse(&executing.instance_name_suffix)
            .map_err(|error| refuse(error.to_string()))?;
        let function = DigestFunction::from_proto(executing.digest_function)
            .map_err(|error| refuse(error.to_string()))?;
        let digest = Digest::parse_required(function, executing.action_digest.as_ref())
            .map_err(|error| refuse(error.to_string()))?;
        let header = |name: &str| executing.w3c_trace_context.get(name).map(String::as_str);
        let attempt = Attempt::of_headers(header);
        let trace = header(metadata::TRACEPARENT)
            .and_then(TraceContext::parse)
            .filter(|trace| trace.is_sampled);
        let action = executing
            .action
            .ok_or_else(|| refuse("no action was given".to_owned()))?;
        let timeout = action
            .timeout
            .as_ref()
            .and_then(proto::duration)
            .ok_or_else(|| refuse("the action's timeout is absent or negative".to_owned()))?;
        Ok(AssignedTask {
            instance: prefix.join(&suffix),
            function: digest.function(),
            digest,
            action,
            timeout,
            queued_timestamp: executing.queued_timestamp,
            auxiliary_metadata: executing.auxiliary_metadata,
            attempt,
            trace,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executing() -> Executing {
        Executing {
            action_digest: Some(DigestFunction::Sha256.digest_of(b"action").to_proto()),
            action: Some(Action {
                timeout: Some(proto::proto_duration(Duration::from_secs(60))),
                ..Default::default()
            }),
            instance_name_suffix: "b/c".to_owned(),
            digest_function: DigestFunction::Sha256.to_proto() as i32,
            ..Default::default()
        }
    }

    #[test]
    fn the_instance_name_is_the_prefix_and_the_suffix() {
        let prefix = InstanceName::parse("a").unwrap();
        let task = AssignedTask::parse(&prefix, executing()).unwrap();
        assert_eq!(task.instance.as_str(), "a/b/c");
        assert_eq!(task.timeout, Duration::from_secs(60));
        assert_eq!(task.digest, DigestFunction::Sha256.digest_of(b"action"));
    }

    #[test]
    fn what_no_slot_could_run_is_answered_with_invalid_argument() {
        let broken: [fn(&mut Executing); 6] = [
            |e| e.action_digest = None,
            |e| e.action = None,
            |e| e.action.as_mut().unwrap().timeout = None,
            |e| e.action.as_mut().unwrap().timeout.as_mut().unwrap().seconds = -1,
            |e| e.instance_name_suffix = "a//b".to_owned(),
            |e| e.digest_function = 4,
        ];
        for change in broken {
            let mut executing = executing();
            change(&mut executing);
            let response = AssignedTask::parse(&InstanceName::empty(), executing).unwrap_err();
            let status = response.status.unwrap();
            assert_eq!(status.code, rpc::Code::InvalidArgument as i32, "{status:?}");
        }
    }
}
