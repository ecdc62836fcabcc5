//! What a client that waits for an operation is sent: the operation as it is now, at each change, now and then, and
//! with its result.

use std::sync::Arc;

use futures::stream;
use prost::Message;
use uuid::Uuid;

use super::{
    completion_log::log_completion,
    execution::{ExecutionService, Operations},
    live_output::Wanted,
    operation_message::{self, Details, Update},
    operation_name::OperationName,
    queue::{EncodedResponse, QueuedAction, Stage},
    shared_queue::Waiter,
    status,
};
use crate::{
    proto::{
        live_output::Output,
        longrunning::{Operation, operation},
        reapi::{self, execution_stage::Value as StageValue},
        rpc,
    },
    storage::{Backend, InlineHints},
};

impl ExecutionService {
    /// What the Action Cache has, as an operation that is completed.
    pub(super) fn answer_from_cache(
        &self,
        name: &OperationName,
        result: reapi::ActionResult,
        client: &str,
    ) -> Operations {
        tracing::debug!(
            instance = name.instance.as_str(),
            client,
            "answered from the Action Cache"
        );
        let response = EncodedResponse::new(&reapi::ExecuteResponse {
            result: Some(result),
            cached_result: true,
            status: Some(rpc::Status::default()),
            ..Default::default()
        });
        let operation = |stage: StageValue, completed: Option<&EncodedResponse>| {
            let text = name.to_string();
            Ok(operation_message::operation(
                text,
                &name.digest,
                stage,
                completed,
                None,
                None,
            ))
        };
        Box::pin(stream::iter([
            operation(StageValue::CacheCheck, None),
            operation(StageValue::Completed, Some(&response)),
        ]))
    }

    /// What is known of an operation that goes on.
    pub(super) async fn details(&self, operation: Uuid) -> Details {
        let row = self.queue.look(|queue| queue.operation(operation));
        let running = row.and_then(|row| Some((row.live_slot()?, row.action.digest)));
        let metadata = match running {
            None => None,
            Some((worker, action)) => {
                let wanted = Wanted {
                    output: Output::Unspecified,
                    offset: 0,
                    size: 0,
                };
                let answer = self.live.ask(&worker, &action, wanted).await;
                answer.and_then(|answer| answer.metadata)
            }
        };
        Details {
            explanation: self.queue.explain(operation),
            metadata,
        }
    }

    /// The operation now, at each change, and now and then; the stream ends with its completion.
    pub(super) fn watch(
        &self,
        waiter: Waiter,
        name: String,
        client: String,
        inline: InlineHints,
    ) -> Operations {
        let interval = self.scheduling.execution_update_interval.get();
        let client: Arc<str> = client.into();
        let state = Some((waiter, name, None));
        let (service, stopping) = (self.clone(), self.stopping.clone());
        let inline = Arc::new(inline);
        Box::pin(stream::unfold(state, move |state| {
            let (service, stopping) = (service.clone(), stopping.clone());
            let (client, inline) = (client.clone(), inline.clone());
            async move {
                let (mut waiter, name, seen) = state?;
                let mut update = Update::News;
                if let Some(seen) = seen {
                    tokio::select! {
                        biased;
                        _ = waiter.news.wait_for(|news| news.version > seen) => {}
                        () = stopping.cancelled() => return Some((Err(status::stopping()), None)),
                        () = tokio::time::sleep(interval) => update = Update::StillThere,
                    }
                }
                let progress = waiter.progress();
                let attached = &waiter.attached;
                let details = match update {
                    // Nobody can read it as fast as a queue moves on.
                    Update::News => Details::default(),
                    Update::StillThere => service.details(attached.operation).await,
                };
                let mut operation = operation_message::of_progress(
                    name.clone(),
                    attached.operation,
                    &attached.action,
                    &progress,
                    details,
                );
                let next = match &progress.stage {
                    Stage::Completed(outcome) => {
                        log_completion(
                            attached.operation,
                            &attached.action,
                            outcome,
                            Some(&client),
                        );
                        let storage = &service.storage;
                        inline_outputs(&mut operation, &inline, storage, &attached.action).await;
                        None
                    }
                    _ => Some((waiter, name, Some(progress.version))),
                };
                Some((Ok(operation), next))
            }
        }))
    }
}

/// Puts what the client asked for into the result of an operation that is done.
async fn inline_outputs(
    operation: &mut Operation,
    hints: &InlineHints,
    storage: &Backend,
    action: &QueuedAction,
) {
    let Some(operation::Result::Response(any)) = &mut operation.result else {
        return;
    };
    if hints.is_empty() {
        return;
    }
    let mut response = reapi::ExecuteResponse::decode(&*any.value).unwrap_or_default();
    let Some(result) = &mut response.result else {
        return;
    };
    let function = action.digest.function();
    let inlining = hints.apply(storage, &action.instance, function, result);
    inlining.await;
    any.value = response.encode_to_vec();
}
