//! The BuildQueueState service: what there is in the queue, for portals, autoscalers and operators; and
//! what these may do: kill operations, drain workers, terminate them.
//!
//! As Buildbarn's, with these additions: a name of an operation may be the whole one that clients have;
//! a status that kills must be an error; a page ends early when its answer grows large, or at a thousand
//! rows; a drain may come before its queue; a drain that
//! could not be kept for the next start is an error, though it holds.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use prost::Message;
use prost_types::{Any, Timestamp};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    drain_file::DrainFile,
    operation_name::ParsedName,
    queue::{
        Drain, EncodedResponse, InvocationFilter, InvocationKey, InvocationKeys, InvocationRow,
        ListPage, OperationFilter, OperationRow, Platform, QueuedCursor, SizeClassQueueKey,
        SizeClassQueueRow, Stage, StageKind, UnknownOperation, WorkerFilter, WorkerId,
        WorkerPattern, WorkerRow,
    },
    shared_queue::SharedQueue,
    status::{self, invalid},
};
use crate::{
    daemon,
    instance::InstanceName,
    proto::{
        self,
        buildqueuestate::{
            self as wire, build_queue_state_server::BuildQueueState, kill_operations_request,
            list_invocation_children_request, list_workers_request, operation_state,
        },
        reapi::{self, execution_stage::Value as StageValue, platform::Property},
        rpc,
    },
};

/// Of an answer, in bytes: rows that have no room any more are the next page's.
pub(super) const LARGEST_PAGE: usize = 2 << 20;
/// In rows.
const LONGEST_PAGE: usize = 1_000;
/// Of a status that kills.
pub(super) const LARGEST_STATUS: usize = 64 << 10;

/// What operators call.
#[derive(Clone)]
pub(super) struct StateService {
    pub queue: Arc<SharedQueue>,
    pub drains: Arc<DrainFile>,
    pub stopping: CancellationToken,
}

/// Turns the queue's time into that of clocks.
#[derive(Clone, Copy)]
pub(super) struct Times {
    queue: Instant,
    clock: SystemTime,
}

impl Times {
    pub(super) fn new(queue: Instant) -> Self {
        Times {
            queue,
            clock: SystemTime::now(),
        }
    }

    fn timestamp(self, at: Instant) -> Timestamp {
        let later = at.saturating_duration_since(self.queue);
        let earlier = self.queue.saturating_duration_since(at);
        proto::timestamp(self.clock + later - earlier)
    }
}

#[tonic::async_trait]
impl BuildQueueState for StateService {
    async fn get_operation(
        &self,
        request: Request<wire::GetOperationRequest>,
    ) -> Result<Response<wire::GetOperationResponse>, Status> {
        let name = operation_name(&request.get_ref().operation_name)?;
        let found = self
            .queue
            .look_now(|queue, now| Some((queue.operation(name)?, Times::new(now))));
        let (row, times) = found.ok_or_else(|| status::unknown_operation(UnknownOperation))?;
        if let Some(explanation) = self.queue.explain(name) {
            tracing::debug!(operation = %name, %explanation, "an operation was asked for");
        }
        Ok(Response::new(wire::GetOperationResponse {
            operation: Some(wire::OperationState {
                name: String::new(),
                ..operation_state(row, times, ShownParts::ALL)
            }),
        }))
    }

    async fn list_operations(
        &self,
        request: Request<wire::ListOperationsRequest>,
    ) -> Result<Response<wire::ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let after = request.start_after.as_ref();
        let after = after.map(|after| operation_name(&after.operation_name));
        let stage = stage_kind(request.filter_stage)?;
        let filter = OperationFilter {
            invocation: request
                .filter_invocation_id
                .as_ref()
                .map(InvocationKey::new),
            stage,
        };
        let times = self.queue.look_now(|_, now| Times::new(now));
        let page = self
            .queue
            .list_operations(after.transpose()?, &filter, page_size(request.page_size))
            .await;
        let (operations, pagination_info) =
            fitting(page, |row| operation_state(row, times, ShownParts::ALL));
        Ok(Response::new(wire::ListOperationsResponse {
            operations,
            pagination_info,
        }))
    }

    async fn kill_operations(
        &self,
        request: Request<wire::KillOperationsRequest>,
    ) -> Result<Response<()>, Status> {
        use kill_operations_request::filter::Type;
        let client = daemon::client_name(&request);
        let request = request.into_inner();
        let status = request.status.unwrap_or_default();
        if status.code == rpc::Code::Ok as i32 {
            return Err(invalid(
                "status: clients would take an operation for done that was killed; give an error, such as UNAVAILABLE",
            ));
        }
        if status.encoded_len() > LARGEST_STATUS {
            return Err(invalid("status has more than 64 KiB"));
        }
        let (code, message) = (status.code, status.message.clone());
        let response = Arc::new(EncodedResponse::new(&reapi::ExecuteResponse {
            status: Some(status),
            ..Default::default()
        }));
        let filter = request.filter.and_then(|filter| filter.r#type);
        match filter.ok_or_else(|| invalid("filter: it is not said what to kill"))? {
            Type::OperationName(text) => {
                let name = operation_name(&text)?;
                let killed = self.queue.kill_operation(name, response);
                let (_, operations) = killed.map_err(status::unknown_operation)?;
                tracing::info!(operation = %name, operations, client, code, error = message, "an operation was killed");
            }
            Type::SizeClassQueueWithoutWorkers(queue) => {
                let key = queue_key(Some(queue))?;
                self.queue
                    .kill_queued(&key, response)
                    .map_err(status::kill)?;
                let (instance, platform) = (key.prefix.as_str(), key.platform.to_string());
                tracing::info!(
                    instance,
                    platform,
                    client,
                    code,
                    error = message,
                    "the queued operations of a queue without workers were killed"
                );
            }
        }
        Ok(Response::new(()))
    }

    async fn list_platform_queues(
        &self,
        _: Request<()>,
    ) -> Result<Response<wire::ListPlatformQueuesResponse>, Status> {
        let (rows, times) = self
            .queue
            .look_now(|queue, now| (queue.platform_queues(), Times::new(now)));
        let queues = rows.into_iter().map(|row| wire::PlatformQueueState {
            name: Some(platform_queue_name(&row.prefix, &row.platform)),
            size_class_queues: row
                .size_classes
                .into_iter()
                .map(|row| size_class_queue_state(&row, times))
                .collect(),
        });
        Ok(Response::new(wire::ListPlatformQueuesResponse {
            platform_queues: queues.collect(),
        }))
    }

    async fn list_invocation_children(
        &self,
        request: Request<wire::ListInvocationChildrenRequest>,
    ) -> Result<Response<wire::ListInvocationChildrenResponse>, Status> {
        use list_invocation_children_request::Filter;
        let request = request.into_inner();
        let filter = match Filter::try_from(request.filter) {
            Ok(Filter::All) => InvocationFilter::All,
            Ok(Filter::Active) => InvocationFilter::Active,
            Ok(Filter::Queued) => InvocationFilter::Queued,
            Err(_) => return Err(invalid("filter is none of ALL, ACTIVE and QUEUED")),
        };
        let (key, parent) = invocation(request.invocation_name)?;
        let rows = self
            .queue
            .look(|queue| queue.invocation_children(&key, &parent, filter))
            .map_err(status::unknown_invocation)?;
        let children = rows
            .into_iter()
            .map(|(id, row)| wire::InvocationChildState {
                id: Some(id.any()),
                state: Some(invocation_state(&row)),
            });
        Ok(Response::new(wire::ListInvocationChildrenResponse {
            children: children.collect(),
        }))
    }

    async fn list_queued_operations(
        &self,
        request: Request<wire::ListQueuedOperationsRequest>,
    ) -> Result<Response<wire::ListQueuedOperationsResponse>, Status> {
        let request = request.into_inner();
        let (key, keys) = invocation(request.invocation_name)?;
        let after = request.start_after.map(|after| {
            let expected = after.expected_duration.unwrap_or_default();
            Ok::<_, Status>(QueuedCursor {
                priority: after.priority,
                expected_duration: proto::duration(&expected)
                    .ok_or_else(|| invalid("start_after.expected_duration is none"))?,
                queued_timestamp: after.queued_timestamp.unwrap_or_default(),
            })
        });
        let (after, page_size) = (after.transpose()?, page_size(request.page_size));
        let (page, times) = self.queue.look_now(|queue, now| {
            let page = queue.queued_operations(&key, &keys, after, page_size);
            (page, Times::new(now))
        });
        let page = page.map_err(status::unknown_invocation)?;
        let (queued_operations, pagination_info) = fitting(page, |row| {
            operation_state(row, times, ShownParts::NO_INVOCATION)
        });
        Ok(Response::new(wire::ListQueuedOperationsResponse {
            queued_operations,
            pagination_info,
        }))
    }

    async fn list_workers(
        &self,
        request: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<wire::ListWorkersResponse>, Status> {
        use list_workers_request::filter::Type;
        let request = request.into_inner();
        let filter = request.filter.and_then(|filter| filter.r#type);
        let (key, filter) = match filter.ok_or_else(|| invalid("filter: it is not said which"))? {
            Type::All(queue) => (queue_key(Some(queue))?, WorkerFilter::All),
            Type::Executing(name) => {
                let (key, keys) = invocation(Some(name))?;
                (key, WorkerFilter::Executing(keys))
            }
            Type::IdleSynchronizing(name) => {
                let (key, keys) = invocation(Some(name))?;
                (key, WorkerFilter::IdleSynchronizing(keys))
            }
        };
        let after = request.start_after;
        let after = after.map(|after| WorkerId::new(after.worker_id));
        let (page, times) = self.queue.look_now(|queue, now| {
            let page_size = page_size(request.page_size);
            let page = queue.workers(&key, &filter, after.as_ref(), page_size);
            (page, Times::new(now))
        });
        let page = page.map_err(status::unknown_invocation)?;
        let (workers, pagination_info) = fitting(page, |row| worker_state(row, times));
        Ok(Response::new(wire::ListWorkersResponse {
            workers,
            pagination_info,
        }))
    }

    async fn terminate_workers(
        &self,
        request: Request<wire::TerminateWorkersRequest>,
    ) -> Result<Response<()>, Status> {
        let client = daemon::client_name(&request);
        let pattern = WorkerPattern::new(request.into_inner().worker_id_pattern);
        tracing::info!(workers = %pattern, client, "workers are to terminate when they have done what they execute");
        tokio::select! {
            () = self.queue.terminate_workers(&pattern) => Ok(Response::new(())),
            () = self.stopping.cancelled() => Err(status::stopping()),
        }
    }

    async fn list_drains(
        &self,
        request: Request<wire::ListDrainsRequest>,
    ) -> Result<Response<wire::ListDrainsResponse>, Status> {
        let key = queue_key(request.into_inner().size_class_queue_name)?;
        let drains = self
            .queue
            .look(|queue| queue.drains(&key))
            .map_err(status::unknown_queue)?;
        let drains = drains.into_iter().map(|drain| wire::DrainState {
            worker_id_pattern: drain.pattern.labels().clone(),
            created_timestamp: Some(drain.created),
        });
        Ok(Response::new(wire::ListDrainsResponse {
            drains: drains.collect(),
        }))
    }

    async fn add_drain(
        &self,
        request: Request<wire::AddOrRemoveDrainRequest>,
    ) -> Result<Response<()>, Status> {
        let client = daemon::client_name(&request);
        let (key, pattern) = drain(request.into_inner())?;
        let (instance, platform) = (key.prefix.as_str().to_owned(), key.platform.to_string());
        let workers = pattern.to_string();
        let added = self.queue.add_drain(Drain {
            key,
            pattern,
            created: proto::timestamp(SystemTime::now()),
        });
        added.map_err(status::drain)?;
        tracing::info!(workers, instance, platform, client, "workers are drained");
        self.keep_drains().await
    }

    async fn remove_drain(
        &self,
        request: Request<wire::AddOrRemoveDrainRequest>,
    ) -> Result<Response<()>, Status> {
        let client = daemon::client_name(&request);
        let (key, pattern) = drain(request.into_inner())?;
        self.queue
            .remove_drain(&key, &pattern)
            .map_err(status::unknown_queue)?;
        let (instance, platform) = (key.prefix.as_str(), key.platform.to_string());
        tracing::info!(workers = %pattern, instance, platform, client, "workers are drained no longer");
        self.keep_drains().await
    }
}

impl StateService {
    async fn keep_drains(&self) -> Result<Response<()>, Status> {
        match self.drains.write(&self.queue).await {
            Ok(()) => Ok(Response::new(())),
            Err(error) => {
                tracing::warn!("{error}");
                Err(status::not_kept(&error))
            }
        }
    }
}

pub(super) fn operation_name(text: &str) -> Result<Uuid, Status> {
    let name = ParsedName::parse(text).map_err(|error| status::unknown_name(text, &error))?;
    Ok(name.operation())
}

/// Which stage is meant; `None` for all.
pub(super) fn stage_kind(stage: i32) -> Result<Option<StageKind>, Status> {
    Ok(match StageValue::try_from(stage) {
        Ok(StageValue::Unknown) => None,
        Ok(StageValue::Queued) => Some(StageKind::Queued),
        Ok(StageValue::Executing) => Some(StageKind::Executing),
        Ok(StageValue::Completed) => Some(StageKind::Completed),
        Ok(StageValue::CacheCheck) | Err(_) => {
            return Err(invalid("No operation is ever listed in this stage"));
        }
    })
}

fn queue_key(name: Option<wire::SizeClassQueueName>) -> Result<SizeClassQueueKey, Status> {
    let name = name.ok_or_else(|| invalid("size_class_queue_name is absent"))?;
    let queue = name
        .platform_queue_name
        .ok_or_else(|| invalid("size_class_queue_name.platform_queue_name is absent"))?;
    Ok(SizeClassQueueKey {
        platform: Platform::parse(queue.platform.as_ref()).map_err(invalid)?,
        prefix: InstanceName::parse(&queue.instance_name_prefix).map_err(invalid)?,
        size_class: name.size_class,
    })
}

fn invocation(
    name: Option<wire::InvocationName>,
) -> Result<(SizeClassQueueKey, InvocationKeys), Status> {
    let name = name.ok_or_else(|| invalid("invocation_name is absent"))?;
    let keys = name.ids.iter().map(InvocationKey::new);
    Ok((
        queue_key(name.size_class_queue_name)?,
        InvocationKeys::new(keys),
    ))
}

fn drain(
    request: wire::AddOrRemoveDrainRequest,
) -> Result<(SizeClassQueueKey, WorkerPattern), Status> {
    Ok((
        queue_key(request.size_class_queue_name)?,
        WorkerPattern::new(request.worker_id_pattern),
    ))
}

/// The rows of a page that one answer has room for, one at least.
fn fitting<R, M: Message>(
    page: ListPage<R>,
    state: impl Fn(R) -> M,
) -> (Vec<M>, Option<wire::PaginationInfo>) {
    let info = wire::PaginationInfo {
        start_index: count(page.start_index),
        total_entries: count(page.total),
    };
    let mut size = 0;
    let rows = page.rows.into_iter().map(state).take_while(|row| {
        let first = size == 0;
        size += row.encoded_len() + 8;
        first || size <= LARGEST_PAGE
    });
    (rows.collect(), Some(info))
}

/// What is looked at under one lock has a bound; there is more where a page is full.
fn page_size(asked: u32) -> usize {
    usize::try_from(asked).map_or(LONGEST_PAGE, |asked| asked.min(LONGEST_PAGE))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn platform_queue_name(prefix: &InstanceName, platform: &Platform) -> wire::PlatformQueueName {
    let properties = platform.properties().iter().map(|(name, value)| Property {
        name: name.clone(),
        value: value.clone(),
    });
    wire::PlatformQueueName {
        instance_name_prefix: prefix.as_str().to_owned(),
        platform: Some(reapi::Platform {
            properties: properties.collect(),
        }),
    }
}

pub(super) fn size_class_queue_name(key: &SizeClassQueueKey) -> wire::SizeClassQueueName {
    wire::SizeClassQueueName {
        platform_queue_name: Some(platform_queue_name(&key.prefix, &key.platform)),
        size_class: key.size_class,
    }
}

fn size_class_queue_state(row: &SizeClassQueueRow, times: Times) -> wire::SizeClassQueueState {
    wire::SizeClassQueueState {
        size_class: row.key.size_class,
        timeout: row.removal.map(|at| times.timestamp(at)),
        workers_count: count(row.workers),
        drains_count: count(row.drains),
        root_invocation: Some(invocation_state(&row.root)),
    }
}

fn invocation_state(row: &InvocationRow) -> wire::InvocationState {
    wire::InvocationState {
        queued_operations_count: Some(wire::invocation_state::InvocationObjectCount {
            direct: count(row.queued_directly),
            indirect: count(row.queued_indirectly),
        }),
        executing_workers_count: count(row.executing_workers),
        idle_workers_count: count(row.idle_workers),
        idle_synchronizing_workers_count: count(row.idle_synchronizing_workers),
        children_count: count(row.children),
        active_children_count: count(row.active_children),
        queued_children_count: count(row.queued_children),
    }
}

/// Which parts of an operation its place in an answer leaves open.
#[derive(Clone, Copy)]
pub(super) struct ShownParts {
    invocation: bool,
    stage: bool,
}

impl ShownParts {
    pub(super) const ALL: Self = ShownParts {
        invocation: true,
        stage: true,
    };
    const NO_INVOCATION: Self = ShownParts {
        invocation: false,
        stage: true,
    };
    const OF_WORKER: Self = ShownParts {
        invocation: false,
        stage: false,
    };
}

pub(super) fn operation_state(
    row: OperationRow,
    times: Times,
    details: ShownParts,
) -> wire::OperationState {
    let stage = match &row.stage {
        Stage::Queued => operation_state::Stage::Queued(()),
        Stage::Executing => operation_state::Stage::Executing(()),
        Stage::Completed(outcome) => operation_state::Stage::Completed(
            reapi::ExecuteResponse::decode(&*outcome.response).unwrap_or_default(),
        ),
    };
    let ids = row.invocation.as_slice().iter();
    let ids: Vec<Any> = ids.map(InvocationKey::any).collect();
    wire::OperationState {
        name: row.name.to_string(),
        invocation_name: details.invocation.then(|| wire::InvocationName {
            size_class_queue_name: Some(size_class_queue_name(&row.key)),
            ids,
        }),
        queued_timestamp: Some(row.action.queued_timestamp),
        action_digest: Some(row.action.digest.to_proto()),
        timeout: row.removal.map(|at| times.timestamp(at)),
        stage: details.stage.then_some(stage),
        target_id: row.action.target_id(),
        priority: row.priority,
        instance_name_suffix: row.suffix.as_str().to_owned(),
        expected_duration: Some(proto::proto_duration(row.expected_duration)),
        digest_function: row.action.digest.function().to_proto() as i32,
    }
}

fn worker_state(row: WorkerRow, times: Times) -> wire::WorkerState {
    let id: BTreeMap<String, String> = row.id.labels().clone();
    wire::WorkerState {
        id,
        timeout: row.removal.map(|at| times.timestamp(at)),
        current_operation: row
            .operation
            .map(|operation| operation_state(operation, times, ShownParts::OF_WORKER)),
        drained: row.drained,
    }
}
