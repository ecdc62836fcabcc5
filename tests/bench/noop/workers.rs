//! Workers that do nothing but wait.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon,
    metadata::{Attempt, WorkerCall},
    proto::{
        reapi::{self, ActionResult, ExecuteResponse},
        remoteworker::{
            CurrentState, SynchronizeRequest, current_state, current_state::executing,
            desired_state, operation_queue_client::OperationQueueClient,
        },
    },
};
use tonic::Request;

use super::{Place, Shared};
use crate::soak::Scheduler;

/// Slots that share a connection.
const SLOTS: usize = 64;

/// Serves a scheduler of somebody else's, and says now and then how much was done.
pub(super) async fn only_workers(endpoint: &str, place: Place, count: usize, milliseconds: usize) {
    let Ok(endpoint) = endpoint.parse() else {
        eprintln!("endpoint=grpc://HOST:PORT says which scheduler the workers are of");
        std::process::exit(2);
    };
    let shared = Arc::new(Shared::default());
    shared
        .milliseconds
        .store(milliseconds as u64, Ordering::Relaxed);
    let _workers = spawn_workers_of(&endpoint, &place, count, &shared);
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        // Nobody asks which they were.
        shared.executions.lock().unwrap().clear();
        let done = shared.completed.load(Ordering::Relaxed);
        println!(
            "workers: {done} actions, {:.1} a second",
            (done - before) as f64 / 10.0
        );
        before = done;
    }
}

pub(super) fn spawn_workers(
    scheduler: &Scheduler,
    count: usize,
    shared: &Arc<Shared>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let endpoint = format!("grpc://{}", scheduler.workers).parse().unwrap();
    spawn_workers_of(&endpoint, &Place::default(), count, shared)
}

fn spawn_workers_of(
    endpoint: &Endpoint,
    place: &Place,
    count: usize,
    shared: &Arc<Shared>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let mut channel = daemon::connect(endpoint);
    (0..count)
        .map(|number| {
            if number % SLOTS == 0 {
                channel = daemon::connect(endpoint);
            }
            let place = place.clone();
            tokio::spawn(work(number, place, channel.clone(), shared.clone()))
        })
        .collect()
}

/// One slot, as bb_worker's: it numbers its calls, says which attempt it reports, and keeps a call open
/// while it executes.
pub async fn work(number: usize, place: Place, channel: daemon::Channel, shared: Arc<Shared>) {
    use current_state::WorkerState;
    let mut client = OperationQueueClient::new(channel);
    let mut calls = 0;
    let mut ask = async |state: WorkerState, attempt: Option<Attempt>| {
        loop {
            calls += 1;
            let mut request = Request::new(SynchronizeRequest {
                worker_id: [("slot".to_owned(), number.to_string())].into(),
                instance_name_prefix: place.instance_name_prefix.clone(),
                platform: Some(place.platform.clone()),
                current_state: Some(CurrentState {
                    worker_state: Some(state.clone()),
                }),
                ..Default::default()
            });
            let call = WorkerCall {
                session: number as u64 + 1,
                number: calls,
                token: None,
            };
            call.attach_to(&mut request);
            if let Some(attempt) = attempt {
                attempt.attach_to(&mut request);
            }
            match client.synchronize(request).await {
                Ok(answer) => return answer.into_inner(),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    let executing = |digest: &reapi::Digest, state| {
        WorkerState::Executing(current_state::Executing {
            action_digest: Some(digest.clone()),
            execution_state: Some(state),
        })
    };
    let (mut state, mut attempt) = (WorkerState::Idle(()), None);
    loop {
        let answer = ask(state, attempt).await;
        attempt = None;
        state = match answer.desired_state.and_then(|state| state.worker_state) {
            None | Some(desired_state::WorkerState::Idle(())) => WorkerState::Idle(()),
            Some(desired_state::WorkerState::Executing(task)) => {
                let digest = task.action_digest.unwrap_or_default();
                shared.handed(&digest.hash);
                attempt = task
                    .w3c_trace_context
                    .get("traceparent")
                    .and_then(|trace| Attempt::parse(trace));
                let end = Instant::now()
                    + Duration::from_millis(shared.milliseconds.load(Ordering::Relaxed));
                while let Some(left) = end.checked_duration_since(Instant::now()) {
                    // Tells that it is alive, as every worker does.
                    tokio::time::sleep(left.min(Duration::from_secs(5))).await;
                    if Instant::now() < end {
                        let running = executing(&digest, executing::ExecutionState::Running(()));
                        let report = ask(running, attempt);
                        let _ = tokio::time::timeout_at(end.into(), report).await;
                    }
                }
                shared.completed.fetch_add(1, Ordering::Relaxed);
                let response = ExecuteResponse {
                    message: digest.hash.clone(),
                    result: Some(ActionResult::default()),
                    ..Default::default()
                };
                executing(&digest, executing::ExecutionState::Completed(response))
            }
        };
    }
}
