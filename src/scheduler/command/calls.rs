//! Calls of a scheduler that commands make: lists, page by page.

use std::collections::{BTreeMap, BTreeSet};

use tonic::{Code, Response, Status};

use super::super::control::MOST_OLDEST;
use crate::{
    daemon::{CommandChannel, CommandError},
    proto::{
        buildqueuestate::{
            self as wire, build_queue_state_client::BuildQueueStateClient, list_operations_request,
            list_workers_request,
        },
        control::{
            KillOperationRequest, KilledOperations, ListDrainedQueuesRequest,
            ListOldestOperationsRequest, ListTerminatingWorkersRequest,
            scheduler_control_client::SchedulerControlClient,
        },
        reapi::execution_stage::Value as StageValue,
    },
};

const PAGE: u32 = 1_000;
/// Completed operations have whole responses.
const LARGEST_ANSWER: usize = 64 << 20;

/// What was told. `None` where nothing of the kind is: Buildbarn's scheduler does not know our calls.
fn known<T>(answer: Result<Response<T>, Status>) -> Result<Option<T>, CommandError> {
    match answer {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(status) if status.code() == Code::Unimplemented => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// A scheduler that runs.
pub(super) struct SchedulerCalls(CommandChannel);

impl SchedulerCalls {
    pub(super) fn new(channel: CommandChannel) -> Self {
        SchedulerCalls(channel)
    }

    pub(super) fn state(&self) -> BuildQueueStateClient<CommandChannel> {
        BuildQueueStateClient::new(self.0.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub(super) fn control(&self) -> SchedulerControlClient<CommandChannel> {
        SchedulerControlClient::new(self.0.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// All size-class queues.
    pub(super) async fn queues(&self) -> Result<Vec<wire::SizeClassQueueName>, CommandError> {
        let listed = self.state().list_platform_queues(()).await?.into_inner();
        let names = listed.platform_queues.into_iter().flat_map(|queue| {
            let name = queue.name;
            queue
                .size_class_queues
                .into_iter()
                .map(move |size| wire::SizeClassQueueName {
                    platform_queue_name: name.clone(),
                    size_class: size.size_class,
                })
        });
        Ok(names.collect())
    }

    /// Those that have drains, though they may be gone for want of workers.
    pub(super) async fn drained_queues(
        &self,
    ) -> Result<Vec<wire::SizeClassQueueName>, CommandError> {
        let request = ListDrainedQueuesRequest {};
        match known(self.control().list_drained_queues(request).await)? {
            Some(drained) => Ok(drained.queues),
            None => self.queues().await,
        }
    }

    /// The labels of workers that were told to terminate, as far as that is told.
    pub(super) async fn terminating_workers(
        &self,
    ) -> Result<BTreeSet<BTreeMap<String, String>>, CommandError> {
        let request = ListTerminatingWorkersRequest {};
        let listed = known(self.control().list_terminating_workers(request).await)?;
        let workers = listed.unwrap_or_default().workers.into_iter();
        Ok(workers.map(|worker| worker.worker_id).collect())
    }

    /// Ends an operation, and all others of its action. `None` where that is not told.
    pub(super) async fn kill_operation(
        &self,
        operation_name: String,
        reason: String,
    ) -> Result<Option<KilledOperations>, CommandError> {
        let request = KillOperationRequest {
            operation_name,
            reason,
        };
        known(self.control().kill_operation(request).await)
    }

    /// All workers of a queue; none when it is gone by now.
    pub(super) async fn workers(
        &self,
        queue: &wire::SizeClassQueueName,
    ) -> Result<Vec<wire::WorkerState>, CommandError> {
        let mut workers: Vec<wire::WorkerState> = Vec::new();
        loop {
            let request = wire::ListWorkersRequest {
                filter: Some(list_workers_request::Filter {
                    r#type: Some(list_workers_request::filter::Type::All(queue.clone())),
                }),
                page_size: PAGE,
                start_after: workers.last().map(|last| list_workers_request::StartAfter {
                    worker_id: last.id.clone(),
                }),
            };
            let page = match self.state().list_workers(request).await {
                Err(status) if status.code() == tonic::Code::NotFound => return Ok(workers),
                page => page?.into_inner().workers,
            };
            if page.is_empty() {
                return Ok(workers);
            }
            workers.extend(page);
        }
    }

    /// The oldest operations at a stage, if it is said, and no more than so many; with how many there are
    /// in all.
    pub(super) async fn oldest_operations(
        &self,
        stage: Option<StageValue>,
        limit: usize,
    ) -> Result<(Vec<wire::OperationState>, usize), CommandError> {
        if limit <= MOST_OLDEST {
            let request = ListOldestOperationsRequest {
                limit: u32::try_from(limit).unwrap_or_default(),
                stage: stage.map_or(0, |stage| stage as i32),
            };
            if let Some(listed) = known(self.control().list_oldest_operations(request).await)? {
                return Ok((listed.operations, listed.total as usize));
            }
        }
        let (mut operations, total) = self.operations(stage).await?;
        operations.sort_by_key(|operation| {
            let queued = operation.queued_timestamp.unwrap_or_default();
            (queued.seconds, queued.nanos)
        });
        operations.truncate(limit);
        Ok((operations, total))
    }

    /// All operations at a stage, if it is said, by their names.
    async fn operations(
        &self,
        stage: Option<StageValue>,
    ) -> Result<(Vec<wire::OperationState>, usize), CommandError> {
        let mut operations: Vec<wire::OperationState> = Vec::new();
        loop {
            let request = wire::ListOperationsRequest {
                page_size: PAGE,
                start_after: operations
                    .last()
                    .map(|last| list_operations_request::StartAfter {
                        operation_name: last.name.clone(),
                    }),
                filter_stage: stage.map_or(0, |stage| stage as i32),
                ..Default::default()
            };
            let page = self.state().list_operations(request).await?.into_inner();
            let total = page.pagination_info.unwrap_or_default().total_entries as usize;
            if page.operations.is_empty() {
                return Ok((operations, total));
            }
            operations.extend(page.operations);
        }
    }
}
