//! The SchedulerControl service: what operators are told beyond BuildQueueState, and what they may ask of
//! the embedded store.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::stream::BoxStream;
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    queue::{EncodedResponse, Explanation, KILLED, Queue, UnknownOperation},
    shared_queue::{OPERATIONS_PER_LOCK, SharedQueue},
    state::{
        LARGEST_STATUS, ShownParts, Times, operation_name, operation_state, size_class_queue_name,
        stage_kind,
    },
    status::{self, invalid},
};
use crate::{
    daemon,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{
        self,
        control::{
            ActionDescription, CheckStoreRequest, DrainedQueues, ExecutingReason,
            ExplainOperationRequest, GetActionRequest, GetStatusRequest, GetStoreUsageRequest,
            InstanceUsage, KillOperationRequest, KilledOperations, ListDrainedQueuesRequest,
            ListOldestOperationsRequest, ListTerminatingWorkersRequest, OldestOperations,
            OperationExplanation, QueuedReason, RemoveActionResultRequest,
            RemoveActionResultResponse, SchedulerStatus, SizeClassQueueStatus, StoreCheck,
            StoreUsage, TerminatingWorker, TerminatingWorkers, operation_explanation,
            scheduler_control_server::SchedulerControl,
        },
        reapi,
    },
    storage::{Backend, embedded},
};

/// Of an Action or a Command.
const LARGEST_MESSAGE: u64 = 16 << 20;
/// Operations of one list by age, and bytes of it.
pub(super) const MOST_OLDEST: usize = 10_000;
const LARGEST_LIST: usize = 32 << 20;
/// Of one action.
const MOST_OPERATIONS: usize = 100;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// What operators call, beside BuildQueueState.
#[derive(Clone)]
pub(super) struct ControlService {
    pub queue: Arc<SharedQueue>,
    pub storage: Backend,
    pub started: SystemTime,
    pub addresses: BTreeMap<String, String>,
    pub stopping: CancellationToken,
}

#[tonic::async_trait]
impl SchedulerControl for ControlService {
    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<SchedulerStatus>, Status> {
        let (rows, totals) = self
            .queue
            .look(|queue| (queue.platform_queues(), queue.totals()));
        let drained = self.queue.look(|queue| queue.drained_queues());
        let drained_queues = drained.iter().map(size_class_queue_name).collect();
        let rows = rows.iter().flat_map(|row| &row.size_classes);
        let queues: Vec<SizeClassQueueStatus> = rows
            .map(|row| {
                let queued = (row.root.queued_directly + row.root.queued_indirectly) as u64;
                let executing = row.root.executing_workers as u64;
                SizeClassQueueStatus {
                    name: Some(size_class_queue_name(&row.key)),
                    workers: row.workers as u64,
                    executing_workers: executing,
                    idle_workers: row.root.idle_synchronizing_workers as u64,
                    drains: row.drains as u64,
                    queued_operations: queued,
                    oldest_queued_timestamp: self
                        .queue
                        .look(|queue: &Queue<_, _>| queue.oldest_queued(&row.key)),
                    wanted_workers: queued + executing,
                }
            })
            .collect();
        let sum = |count: fn(&SizeClassQueueStatus) -> u64| queues.iter().map(count).sum();
        let oldest = queues
            .iter()
            .filter_map(|queue| queue.oldest_queued_timestamp);
        Ok(Response::new(SchedulerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            start_time: Some(proto::timestamp(self.started)),
            serving: !self.stopping.is_cancelled(),
            addresses: self.addresses.clone(),
            workers: sum(|queue| queue.workers),
            executing_workers: sum(|queue| queue.executing_workers),
            idle_workers: sum(|queue| queue.idle_workers),
            queued_operations: sum(|queue| queue.queued_operations),
            oldest_queued_timestamp: oldest.min_by_key(|time| (time.seconds, time.nanos)),
            operations: totals.operations,
            actions: totals.tasks,
            completed_actions: totals.completed,
            store: match self.storage.embedded() {
                Some(store) => Some(usage(store.clone()).await?),
                None => None,
            },
            queues,
            drained_queues,
        }))
    }

    async fn explain_operation(
        &self,
        request: Request<ExplainOperationRequest>,
    ) -> Result<Response<OperationExplanation>, Status> {
        let name = operation_name(&request.get_ref().operation_name)?;
        let found = self.queue.look_now(|queue, now| {
            let explanation = queue.explain(now, name)?;
            Some((queue.operation(name)?, explanation, Times::new(now)))
        });
        let (row, explanation, times) =
            found.ok_or_else(|| status::unknown_operation(UnknownOperation))?;
        let text = explanation.to_string();
        let reason = match explanation {
            Explanation::Queued(queued) => {
                Some(operation_explanation::Reason::Queued(QueuedReason {
                    operations_before: queued.before_it as u64,
                    invocations_before: queued
                        .invocations_before
                        .iter()
                        .map(|count| *count as u64)
                        .collect(),
                    queued_operations: queued.queued as u64,
                    workers: queued.workers.all as u64,
                    executing_workers: queued.workers.executing as u64,
                    drained_workers: queued.workers.drained as u64,
                    silent_workers: queued.workers.overdue as u64,
                    expected_wait: queued.expected_wait.map(proto::proto_duration),
                    lost_workers: queued.lost as u64,
                }))
            }
            Explanation::Executing {
                worker,
                elapsed,
                lost,
            } => Some(operation_explanation::Reason::Executing(ExecutingReason {
                worker_id: worker.labels().clone(),
                elapsed: Some(proto::proto_duration(elapsed)),
                lost_workers: lost as u64,
            })),
            Explanation::AwaitingReport { .. } | Explanation::Completed => None,
        };
        Ok(Response::new(OperationExplanation {
            text,
            operation: Some(operation_state(row, times, ShownParts::ALL)),
            reason,
        }))
    }

    async fn list_oldest_operations(
        &self,
        request: Request<ListOldestOperationsRequest>,
    ) -> Result<Response<OldestOperations>, Status> {
        let request = request.into_inner();
        let stage = stage_kind(request.stage)?;
        let limit = usize::try_from(request.limit).unwrap_or(MOST_OLDEST);
        let limit = limit.clamp(1, MOST_OLDEST);
        let (names, total) = self.queue.oldest_operations(stage, limit).await;
        let (mut operations, mut size) = (Vec::new(), 0);
        'pieces: for names in names.chunks(OPERATIONS_PER_LOCK) {
            let (rows, times) = self.queue.look_now(|queue, now| {
                let rows = names.iter().filter_map(|name| queue.operation(*name));
                (rows.collect::<Vec<_>>(), Times::new(now))
            });
            for row in rows {
                let state = operation_state(row, times, ShownParts::ALL);
                size += state.encoded_len() + 8;
                if size > LARGEST_LIST {
                    break 'pieces;
                }
                operations.push(state);
            }
            tokio::task::yield_now().await;
        }
        Ok(Response::new(OldestOperations {
            operations,
            total: total as u64,
        }))
    }

    async fn kill_operation(
        &self,
        request: Request<KillOperationRequest>,
    ) -> Result<Response<KilledOperations>, Status> {
        let client = daemon::client_name(&request);
        let KillOperationRequest {
            operation_name: text,
            reason,
        } = request.into_inner();
        let name = operation_name(&text)?;
        if reason.len() > LARGEST_STATUS {
            return Err(invalid("reason has more than 64 KiB"));
        }
        let response = Arc::new(EncodedResponse::failure(KILLED, reason.clone()));
        let killed = self.queue.kill_operation(name, response);
        let (names, total) = killed.map_err(status::unknown_operation)?;
        tracing::info!(operation = %name, operations = total, client, reason, "an operation was killed");
        Ok(Response::new(KilledOperations {
            operation_names: names.iter().map(Uuid::to_string).collect(),
            total: total as u64,
        }))
    }

    async fn list_drained_queues(
        &self,
        _: Request<ListDrainedQueuesRequest>,
    ) -> Result<Response<DrainedQueues>, Status> {
        let drained = self.queue.look(|queue| queue.drained_queues());
        Ok(Response::new(DrainedQueues {
            queues: drained.iter().map(size_class_queue_name).collect(),
        }))
    }

    async fn list_terminating_workers(
        &self,
        _: Request<ListTerminatingWorkersRequest>,
    ) -> Result<Response<TerminatingWorkers>, Status> {
        let workers = self.queue.terminating_workers().await.into_iter();
        let workers = workers.map(|worker| TerminatingWorker {
            worker_id: worker.labels().clone(),
        });
        Ok(Response::new(TerminatingWorkers {
            workers: workers.collect(),
        }))
    }

    async fn get_action(
        &self,
        request: Request<GetActionRequest>,
    ) -> Result<Response<ActionDescription>, Status> {
        let request = request.into_inner();
        let instance = InstanceName::parse(&request.instance_name).map_err(invalid)?;
        let digest = self.action_digest(request.digest_function, request.action_digest.as_ref())?;
        let failed = |error| status::storage("The action could not be read", error);
        let read = async |digest| self.storage.read(&instance, digest, LARGEST_MESSAGE).await;
        let action = match read(&digest).await {
            Err(crate::storage::Error::Missing(_)) => return Err(status::unknown_action(&digest)),
            read => read.map_err(failed)?,
        };
        let action =
            reapi::Action::decode(action).map_err(|error| status::no_action(&digest, &error))?;
        // What has other fields only can be taken for an Action that has nothing in it.
        if action == reapi::Action::default() && digest.size() > 0 {
            return Err(status::no_action(
                &digest,
                &"it has none of an Action's fields",
            ));
        }
        let command = match &action.command_digest {
            Some(command) => {
                let command = Digest::parse_required(Some(digest.function()), Some(command));
                let command = command.map_err(|error| status::no_action(&digest, &error))?;
                read(&command).await.ok()
            }
            None => None,
        };
        let action_result = self.storage.action_result(&instance, &digest).await;
        Ok(Response::new(ActionDescription {
            command: command.and_then(|command| reapi::Command::decode(command).ok()),
            action_result: action_result.map_err(failed)?,
            operation_names: self.operations_of(&instance, &digest).await,
            action: Some(action),
        }))
    }

    async fn get_store_usage(
        &self,
        _: Request<GetStoreUsageRequest>,
    ) -> Result<Response<StoreUsage>, Status> {
        Ok(Response::new(usage(self.store()?).await?))
    }

    type CheckStoreStream = BoxStream<'static, Result<StoreCheck, Status>>;

    async fn check_store(
        &self,
        _: Request<CheckStoreRequest>,
    ) -> Result<Response<Self::CheckStoreStream>, Status> {
        let store = self.store()?;
        let (tell, told) = tokio::sync::mpsc::channel(4);
        tracing::info!("checking the embedded store");
        daemon::spawn_blocking(move || {
            let mut last = std::time::Instant::now();
            let progress = store.check(|progress| {
                if last.elapsed() > PROGRESS_INTERVAL {
                    last = std::time::Instant::now();
                    // One that is full is read later.
                    let _ = tell.try_send(Ok(store_check(progress, false)));
                }
                !tell.is_closed()
            });
            tracing::info!(
                entries = progress.entries,
                bytes = progress.bytes,
                removed = progress.removed,
                "checked the embedded store"
            );
            let _ = tell.blocking_send(Ok(store_check(progress, true)));
        });
        let stream = futures::stream::unfold(told, async |mut told| {
            let progress = told.recv().await?;
            Some((progress, told))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn remove_action_result(
        &self,
        request: Request<RemoveActionResultRequest>,
    ) -> Result<Response<RemoveActionResultResponse>, Status> {
        let client = daemon::client_name(&request);
        let request = request.into_inner();
        let instance = InstanceName::parse(&request.instance_name).map_err(invalid)?;
        let digest = self.action_digest(request.digest_function, request.action_digest.as_ref())?;
        let store = self.storage.embedded_action_cache().cloned();
        let store = store.ok_or_else(status::no_action_cache)?;
        let place = instance.clone();
        let removed =
            daemon::spawn_blocking(move || store.remove_action_result(&place, &digest)).await;
        match removed {
            Ok(true) => {
                let (action, instance) = (digest.hash_hex(), instance.as_str());
                tracing::info!(
                    action,
                    instance,
                    client,
                    "the result of an action was removed"
                );
                Ok(Response::new(RemoveActionResultResponse {}))
            }
            Ok(false) => Err(status::no_result(&digest, &instance)),
            Err(error) => Err(status::failed_task(&error)),
        }
    }
}

impl ControlService {
    /// Logs have no sizes; the embedded store knows them.
    fn action_digest(
        &self,
        function: i32,
        digest: Option<&reapi::Digest>,
    ) -> Result<Digest, Status> {
        let function = DigestFunction::from_proto(function).map_err(invalid)?;
        let digest = Digest::parse_required(function, digest).map_err(invalid)?;
        if digest.size() > 0 {
            return Ok(digest);
        }
        let store = self.storage.embedded();
        let size = store.and_then(|store| store.size_of(&digest));
        let size = size.ok_or_else(|| status::unknown_action(&digest))?;
        Ok(Digest::new(digest.function(), digest.hash_bytes(), size))
    }

    fn store(&self) -> Result<Arc<embedded::Store>, Status> {
        let store = self.storage.embedded().cloned();
        store.ok_or_else(status::no_store)
    }

    async fn operations_of(&self, instance: &InstanceName, digest: &Digest) -> Vec<String> {
        let mut names = Vec::new();
        let mut last: Option<Uuid> = None;
        loop {
            let rows: Vec<(Uuid, bool)> = self.queue.look(|queue| {
                let rows = queue.operations(last).take(OPERATIONS_PER_LOCK);
                rows.map(|row| {
                    let is_it = row.action.digest == *digest && row.action.instance == *instance;
                    (row.name, is_it)
                })
                .collect()
            });
            let Some((end, _)) = rows.last() else {
                return names;
            };
            last = Some(*end);
            names.extend(
                rows.iter()
                    .filter(|(_, is_it)| *is_it)
                    .map(|(name, _)| name.to_string()),
            );
            if names.len() >= MOST_OPERATIONS {
                names.truncate(MOST_OPERATIONS);
                return names;
            }
            tokio::task::yield_now().await;
        }
    }
}

async fn usage(store: Arc<embedded::Store>) -> Result<StoreUsage, Status> {
    let usage = daemon::spawn_blocking(move || store.usage()).await;
    let usage = usage.map_err(|error| status::failed_task(&error))?;
    Ok(StoreUsage {
        directory: usage.directory.display().to_string(),
        used_bytes: usage.used,
        maximum_bytes: usage.maximum,
        free_bytes: usage.free,
        entries: usage.entries as u64,
        instances: usage
            .instances
            .into_iter()
            .map(|of| InstanceUsage {
                instance_name_prefix: of.prefix.to_string(),
                used_bytes: of.used,
                maximum_bytes: of.maximum,
            })
            .collect(),
    })
}

fn store_check(progress: embedded::CheckProgress, done: bool) -> StoreCheck {
    StoreCheck {
        entries: progress.entries,
        bytes: progress.bytes,
        removed_entries: progress.removed,
        done,
    }
}
