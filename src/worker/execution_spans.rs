//! What a worker records of an action in its trace: the execution, and in it the fetch of inputs, the run
//! and the upload of outputs, by the times of ExecutedActionMetadata.

use std::time::SystemTime;

use prost_types::Timestamp;

use super::task::AssignedTask;
use crate::{
    daemon::traces::{self, Attribute, Span},
    metadata::TraceContext,
    proto::{
        self,
        reapi::{ExecuteResponse, ExecutedActionMetadata},
        rpc::Code,
    },
};

/// The names of an action's spans, for as long as it is executed.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExecutionSpans {
    /// The scheduler's; `None` when the action is not recorded.
    parent: Option<TraceContext>,
    execution: u64,
    run: u64,
}

impl ExecutionSpans {
    pub(super) fn new(task: &AssignedTask) -> Self {
        ExecutionSpans {
            parent: task.trace,
            execution: traces::new_span(),
            run: traces::new_span(),
        }
    }

    /// What calls to the storage are part of.
    pub(super) fn of_storage(&self) -> Option<TraceContext> {
        self.part(self.execution)
    }

    /// What the runner's call is part of.
    pub(super) fn of_run(&self) -> Option<TraceContext> {
        self.part(self.run)
    }

    /// Where this worker records nothing, its peers' spans hang below the scheduler's.
    fn part(&self, span: u64) -> Option<TraceContext> {
        let parent = self.parent?;
        Some(match traces::is_on() {
            true => TraceContext { span, ..parent },
            false => parent,
        })
    }

    /// Has all of them sent.
    pub(super) fn record(&self, task: &AssignedTask, response: &ExecuteResponse) {
        let Some(parent) = self.parent.filter(|_| traces::is_on()) else {
            return;
        };
        let result = response.result.clone().unwrap_or_default();
        let metadata = result.execution_metadata.unwrap_or_default();
        let status = response.status.clone().unwrap_or_default();
        let failed = status.code != Code::Ok as i32;
        let context = |span| TraceContext { span, ..parent };
        let part = |span, name: &str, begin: &_, end: &_, attributes| {
            if let (Some(start), Some(end)) = (moment(begin), moment(end)) {
                traces::record(Span {
                    context: context(span),
                    parent: Some(self.execution),
                    name: name.to_owned(),
                    is_server: false,
                    start,
                    end,
                    attributes,
                    error: None,
                });
            }
        };
        let ExecutedActionMetadata {
            worker,
            worker_start_timestamp,
            worker_completed_timestamp,
            input_fetch_start_timestamp,
            input_fetch_completed_timestamp,
            execution_start_timestamp,
            execution_completed_timestamp,
            output_upload_start_timestamp,
            output_upload_completed_timestamp,
            ..
        } = metadata;
        part(
            traces::new_span(),
            "fetch inputs",
            &input_fetch_start_timestamp,
            &input_fetch_completed_timestamp,
            Vec::new(),
        );
        part(
            self.run,
            "run command",
            &execution_start_timestamp,
            &execution_completed_timestamp,
            vec![(
                "process.exit.code",
                Attribute::Integer(result.exit_code.into()),
            )],
        );
        part(
            traces::new_span(),
            "upload outputs",
            &output_upload_start_timestamp,
            &output_upload_completed_timestamp,
            Vec::new(),
        );
        let now = SystemTime::now();
        traces::record(Span {
            context: context(self.execution),
            parent: Some(parent.span),
            name: "execute".to_owned(),
            is_server: false,
            start: moment(&worker_start_timestamp).unwrap_or(now),
            end: moment(&worker_completed_timestamp).unwrap_or(now),
            attributes: vec![
                ("bb.action", Attribute::Text(task.digest.hash_hex())),
                (
                    "bb.instance",
                    Attribute::Text(task.instance.as_str().to_owned()),
                ),
                ("bb.worker", Attribute::Text(worker)),
                (
                    "rpc.grpc.status_code",
                    Attribute::Integer(status.code.into()),
                ),
            ],
            error: failed.then_some(status.message),
        });
    }
}

fn moment(timestamp: &Option<Timestamp>) -> Option<SystemTime> {
    proto::system_time(timestamp.as_ref()?)
}
