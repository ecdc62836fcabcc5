//! The OperationQueue service: what workers report, and what they are told to do.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    action_routing::ActionRouting,
    queue::{
        self, DesiredWorkerState, EncodedResponse, Platform, ReportedAction, ReportedDigest,
        SizeClassQueueKey, WorkerActivity, WorkerCaller, WorkerId,
    },
    shared_queue::SharedQueue,
    status::{self, invalid},
};
use crate::{
    daemon::{self, Access, Peer},
    digest::Digest,
    instance::InstanceName,
    metadata,
    proto::{
        self,
        remoteworker::{
            DesiredState, SynchronizeRequest, SynchronizeResponse, current_state,
            current_state::executing::ExecutionState, desired_state,
            operation_queue_server::OperationQueue,
        },
    },
};

/// Of a worker's ID: how many labels, and bytes of them all.
const MOST_LABELS: usize = 64;
const LARGEST_LABELS: usize = 4 << 10;

/// What workers call.
pub(super) struct OperationQueueService {
    pub queue: Arc<SharedQueue>,
    pub routing: Arc<ActionRouting>,
    pub idle_interval: Duration,
    /// Where the pages are, for links in messages of workers.
    pub pages: Option<String>,
    pub stopping: CancellationToken,
}

#[tonic::async_trait]
impl OperationQueue for OperationQueueService {
    async fn synchronize(
        &self,
        request: Request<SynchronizeRequest>,
    ) -> Result<Response<SynchronizeResponse>, Status> {
        // Whatever a worker brings is for the scheduler that comes next: this one's clients are
        // gone.
        if self.stopping.is_cancelled() {
            return Err(status::stopping());
        }
        let instance = metadata::instance_of(&request);
        let (peer, access) = (peer_of(&request), Access::of(&request));
        let call = metadata::WorkerCall::of(&request);
        let attempt = metadata::Attempt::of(&request);
        let (mut queue_key, id, report) = parse_worker(request.into_inner(), instance, attempt)?;
        queue_key.platform = self.routing.offered(&queue_key.platform);
        access.require(&queue_key.prefix)?;
        let caller = WorkerCaller { id, peer, call };
        let idle_wait = random_below(self.idle_interval);
        let instruction = self
            .queue
            .synchronize(
                &queue_key,
                &caller,
                report,
                idle_wait,
                self.stopping.cancelled(),
            )
            .await
            .map_err(status::refused)?
            .ok_or_else(status::stopping)?;
        if let DesiredWorkerState::Execute {
            action: queued,
            attempt,
            ..
        } = &instruction.desired
        {
            let worker = serde_json::to_string(caller.id.labels()).ok();
            let action = queued.digest.hash_hex();
            daemon::action_span(&action, Some(attempt.operation), worker.as_deref()).in_scope(
                || {
                    tracing::debug!(
                        instance = queued.instance.as_str(),
                        target = queued.target_id(),
                        "handed to a worker"
                    );
                },
            );
        }
        let mut response = Response::new(synchronize_response(instruction));
        if let Some(pages) = &self.pages {
            metadata::set_pages(&mut response, pages);
        }
        Ok(response)
    }
}

/// The other end of the connection.
fn peer_of<T>(request: &Request<T>) -> Arc<str> {
    match request.extensions().get::<Peer>() {
        Some(Peer::Tcp(Some(address))) => address.to_string().into(),
        Some(Peer::Unix {
            pid: Some(pid),
            uid,
            ..
        }) => format!("process {pid} of user {uid}").into(),
        Some(Peer::Unix { uid, .. }) => format!("user {uid}").into(),
        Some(Peer::Tcp(None)) | None => "an unknown address".into(),
    }
}

fn parse_worker(
    request: SynchronizeRequest,
    instance: Option<InstanceName>,
    attempt: Option<metadata::Attempt>,
) -> Result<(SizeClassQueueKey, WorkerId, queue::WorkerReport), Status> {
    let prefix = InstanceName::parse(&request.instance_name_prefix).map_err(invalid)?;
    let platform = Platform::parse(request.platform.as_ref()).map_err(invalid)?;
    let state = request
        .current_state
        .and_then(|state| state.worker_state)
        .ok_or_else(|| invalid("The worker does not say what it does: current_state is absent"))?;
    let activity = match state {
        current_state::WorkerState::Idle(()) => WorkerActivity::Idle,
        current_state::WorkerState::Executing(executing) => {
            let digest = Digest::parse_required(None, executing.action_digest.as_ref()).map_err(
                |error| invalid(format!("Invalid digest of the worker's action: {error}")),
            )?;
            let action = ReportedAction {
                digest: ReportedDigest::from(&digest),
                instance,
                attempt,
            };
            match executing.execution_state {
                Some(ExecutionState::Completed(response)) => {
                    WorkerActivity::Completed(action, Arc::new(EncodedResponse::new(&response)))
                }
                Some(_) => WorkerActivity::Executing(action),
                None => {
                    return Err(invalid("The worker does not say how far its action is"));
                }
            }
        }
    };
    let key = SizeClassQueueKey {
        platform,
        prefix,
        size_class: request.size_class,
    };
    let report = queue::WorkerReport {
        activity,
        prefer_being_idle: request.prefer_being_idle,
    };
    Ok((key, worker_id(request.worker_id)?, report))
}

/// The labels are kept, and shown, for as long as the worker is known.
fn worker_id(labels: BTreeMap<String, String>) -> Result<WorkerId, Status> {
    let size: usize = labels
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    match labels.len() <= MOST_LABELS && size <= LARGEST_LABELS {
        true => Ok(WorkerId::new(labels)),
        false => Err(invalid(format!(
            "worker_id has {} labels of {size} bytes together, and not at most {MOST_LABELS} of {LARGEST_LABELS}: leave some out in the worker's configuration",
            labels.len()
        ))),
    }
}

fn synchronize_response(instruction: queue::Instruction) -> SynchronizeResponse {
    use desired_state::WorkerState;
    let state = match instruction.desired {
        DesiredWorkerState::Unchanged => None,
        DesiredWorkerState::Idle => Some(WorkerState::Idle(())),
        DesiredWorkerState::Execute {
            action: queued,
            suffix,
            attempt,
            timeout,
        } => {
            let (action, auxiliary_metadata, trace) = queued.for_worker(timeout);
            let headers =
                metadata::trace_headers(Some(attempt), trace.map(|trace| trace.context).as_ref());
            Some(WorkerState::Executing(desired_state::Executing {
                action_digest: Some(queued.digest.to_proto()),
                action: Some(action),
                queued_timestamp: Some(queued.queued_timestamp),
                auxiliary_metadata,
                instance_name_suffix: suffix.as_str().to_owned(),
                digest_function: queued.digest.function().to_proto() as i32,
                w3c_trace_context: headers
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect(),
            }))
        }
    };
    SynchronizeResponse {
        next_synchronization_at: Some(proto::timestamp(SystemTime::now() + instruction.next)),
        desired_state: state.map(|state| DesiredState {
            worker_state: Some(state),
        }),
    }
}

fn random_below(limit: Duration) -> Duration {
    limit.mul_f64(fastrand::f64())
}
