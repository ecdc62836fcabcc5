//! The loop of one slot: calls the scheduler, runs what it asks for, and obeys `slot`.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use super::{
    availability::NotReady,
    completion_log,
    execute::{ExecutionPhase, Executor},
    response_size,
    slot::{self, Answer, Desired, Slot, SlotReport, SlotStep},
    status_line::StatusLine,
    task::AssignedTask,
};
use crate::{
    daemon::{self, Channel, Heartbeat},
    instance::InstanceName,
    metadata::{self, Attempt, FencingToken, WorkerCall},
    proto::{
        self,
        reapi::{ExecuteResponse, Platform},
        remoteworker::{
            CurrentState, SynchronizeRequest, SynchronizeResponse, current_state,
            current_state::executing::ExecutionState, desired_state,
            operation_queue_client::OperationQueueClient,
        },
        rpc,
    },
    text::shorten,
};

/// A scheduler that sends more than this is none.
const MAXIMUM_RESPONSE_SIZE: usize = 80 << 20;
/// Whatever the clocks of the two hosts say, a busy slot calls at least, and at most, this often.
const MAXIMUM_INTERVAL: Duration = Duration::from_secs(10);
const MINIMUM_INTERVAL: Duration = Duration::from_millis(100);
/// A slot that cannot run anything looks again after a random time up to this.
const MAXIMUM_READINESS_PAUSE: Duration = Duration::from_secs(5);

/// How a slot presents itself.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotIdentity {
    /// Labels that no other slot of the farm has.
    pub worker_id: BTreeMap<String, String>,
    pub instance_name_prefix: InstanceName,
    /// Sorted by name, then value.
    pub platform: Platform,
    pub size_class: u32,
}

enum SlotEvent {
    Answered(Box<Result<SynchronizeResponse, Status>>),
    Finished(Box<ExecuteResponse>),
    Readiness(Result<(), NotReady>),
    Paused(Instant),
    Stopping,
    Time,
}

/// How long a slot may take to decide what is next, even on a host that is overloaded.
const DECISION_TIMEOUT: Duration = Duration::from_secs(60);
/// A call that the slot left is answered as soon as the scheduler has the next one.
const LEFT_CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it may hear nothing from the scheduler, which chooses how long it holds a call.
const SYNCHRONIZE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

struct RunningExecution {
    result: JoinHandle<Box<ExecuteResponse>>,
    phase: watch::Receiver<ExecutionPhase>,
    cancel: CancellationToken,
    /// An execution ends with its slot.
    _guard: DropGuard,
}

/// What reports say of the action besides its digest.
struct StartedTask {
    instance: InstanceName,
    attempt: Option<Attempt>,
}

type WorkerSlot = Slot<Result<AssignedTask, Box<ExecuteResponse>>, Box<ExecuteResponse>>;

type Pending<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// Serves one slot until `stopping`; then finishes the running action within `drain`, reports it,
/// and returns.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another part of the worker"
)]
pub async fn run(
    channel: Channel,
    identity: SlotIdentity,
    token: Option<FencingToken>,
    executor: Arc<Executor>,
    slot: usize,
    stopping: CancellationToken,
    drain: Duration,
    heartbeat: Heartbeat,
    status_line: Arc<StatusLine>,
) {
    let client =
        OperationQueueClient::new(channel).max_decoding_message_size(MAXIMUM_RESPONSE_SIZE);
    let mut state = WorkerSlot::new(Instant::now());
    let mut told_to_stop = false;
    let mut call: Pending<Result<SynchronizeResponse, Status>> = None;
    let mut readiness: Pending<Result<(), NotReady>> = None;
    let mut paused = executor.availability.paused();
    let mut execution: Option<RunningExecution> = None;
    // What was started last, until its result has been taken.
    let mut started: Option<StartedTask> = None;
    let mut number = WorkerCall {
        session: fastrand::u64(..),
        number: 0,
        token,
    };
    loop {
        heartbeat.beat(DECISION_TIMEOUT);
        let until = match state.next(Instant::now()) {
            SlotStep::Call(report) => {
                let phase = execution.as_ref().map(|e| *e.phase.borrow());
                number.number += 1;
                let request = request(&identity, report, phase, started.as_ref(), number);
                let (mut client, executor) = (client.clone(), executor.clone());
                call = Some(Box::pin(async move {
                    let response = client.synchronize(request).await?;
                    executor.browser_url.tell(metadata::pages_of(&response));
                    Ok(response.into_inner())
                }));
                continue;
            }
            SlotStep::AbortCall => {
                call = None;
                continue;
            }
            SlotStep::LeaveCall => {
                if let Some(call) = call.take() {
                    tokio::spawn(tokio::time::timeout(LEFT_CALL_TIMEOUT, call));
                }
                continue;
            }
            SlotStep::Start(task) => {
                started = task.as_ref().ok().map(|task| StartedTask {
                    instance: task.instance.clone(),
                    attempt: task.attempt,
                });
                execution = Some(start(executor.clone(), status_line.clone(), slot, task));
                continue;
            }
            SlotStep::Cancel => {
                if let Some(execution) = &execution {
                    execution.cancel.cancel();
                }
                continue;
            }
            SlotStep::CheckReadiness => {
                let executor = executor.clone();
                readiness = Some(Box::pin(
                    async move { executor.check_readiness(slot).await },
                ));
                continue;
            }
            SlotStep::Exit => return,
            SlotStep::Wait(until) => until,
        };
        heartbeat.beat(match until {
            Some(until) => until.saturating_duration_since(Instant::now()) + DECISION_TIMEOUT,
            None => SYNCHRONIZE_TIMEOUT,
        });
        let event = tokio::select! {
            answer = pending(&mut call) => SlotEvent::Answered(Box::new(answer)),
            result = returned(&mut execution) => SlotEvent::Finished(result),
            result = pending(&mut readiness) => SlotEvent::Readiness(result),
            () = stopping.cancelled(), if !told_to_stop => SlotEvent::Stopping,
            Ok(()) = paused.changed() => SlotEvent::Paused(*paused.borrow_and_update()),
            () = sleep_until(until) => SlotEvent::Time,
        };
        let now = Instant::now();
        match event {
            SlotEvent::Answered(answer) => {
                call = None;
                note_answer(&mut state, *answer, &identity, slot, &status_line, now);
            }
            SlotEvent::Finished(response) => {
                execution = None;
                let healthy = response
                    .status
                    .as_ref()
                    .is_none_or(|status| status.code == 0);
                state.finished(now, response, healthy);
            }
            SlotEvent::Readiness(result) => {
                readiness = None;
                note_readiness(&mut state, &result, slot, &status_line, now);
            }
            SlotEvent::Paused(until) => state.pause(until),
            SlotEvent::Stopping => {
                told_to_stop = true;
                state.stop(now + drain);
            }
            SlotEvent::Time => {}
        }
    }
}

/// What the scheduler answers to a call, or why it does not.
fn note_answer(
    state: &mut WorkerSlot,
    answer: Result<SynchronizeResponse, Status>,
    identity: &SlotIdentity,
    slot: usize,
    status_line: &StatusLine,
    now: Instant,
) {
    match answer {
        Ok(response) => {
            status_line.answered();
            state.answered(now, answer_of(identity, response, now));
        }
        Err(status) if refuses(&status) => {
            tracing::warn!(
                slot,
                code = ?status.code(),
                error = status.message(),
                "the scheduler does not take what this slot says"
            );
            let reason = shorten(status.message());
            let smaller = |response: Box<ExecuteResponse>| {
                Box::new(response_size::after_refusal(&response, &reason))
            };
            state.refused(now, fastrand::u64(..), smaller);
        }
        // Only its code tells: the words are those of the scheduler's version.
        Err(status)
            if status.code() == Code::ResourceExhausted && state.already_synchronizing(now) =>
        {
            tracing::debug!(slot, error = status.message(), "leaving; trying again");
        }
        Err(status) => {
            state.failed(now, fastrand::u64(..));
            let error = match status.code() {
                Code::Unimplemented => {
                    "the server there takes no workers; write the address that bb_scheduler.toml has as workers.listen, whose port is 8983 unless it says another"
                }
                _ => status.message(),
            };
            status_line.failed(status.code(), error, SystemTime::now());
        }
    }
}

/// Whether the runner, the storage and the disk are ready for an action.
fn note_readiness(
    state: &mut WorkerSlot,
    result: &Result<(), NotReady>,
    slot: usize,
    status_line: &StatusLine,
    now: Instant,
) {
    let pause = MAXIMUM_READINESS_PAUSE.mul_f64(fastrand::f64());
    let pause = match result {
        Ok(()) => {
            status_line.ready(slot);
            pause
        }
        Err(NotReady::Because(error)) => {
            status_line.unready(slot, error, SystemTime::now());
            pause
        }
        // What is the matter was said when the pause began.
        Err(NotReady::Paused { until }) => until.saturating_duration_since(now) + pause / 10,
    };
    state.readiness(now, result.is_ok(), pause);
}

fn start(
    executor: Arc<Executor>,
    status_line: Arc<StatusLine>,
    slot: usize,
    task: Result<AssignedTask, Box<ExecuteResponse>>,
) -> RunningExecution {
    let (sender, phase) = watch::channel(ExecutionPhase::FetchingInputs);
    let cancel = CancellationToken::new();
    let cancelled = cancel.clone();
    let span = match &task {
        Ok(task) => {
            let worker = executor.workers.get(slot).map(String::as_str);
            daemon::action_span(
                &task.digest.hash_hex(),
                task.attempt.map(|attempt| attempt.operation),
                worker,
            )
        }
        Err(_) => Span::none(),
    };
    // In a task of its own, so that a panic ends this action and not this slot.
    let work = async move {
        let _running = status_line.run();
        match task {
            Ok(task) => {
                let instance = task.instance.clone();
                let response = executor.execute(slot, task, &sender, &cancelled).await;
                completion_log::log_completion(slot, &instance, &response);
                Box::new(response)
            }
            Err(refusal) => refusal,
        }
    };
    RunningExecution {
        result: tokio::spawn(work.instrument(span)),
        phase,
        _guard: cancel.clone().drop_guard(),
        cancel,
    }
}

async fn returned(execution: &mut Option<RunningExecution>) -> Box<ExecuteResponse> {
    let Some(execution) = execution else {
        return std::future::pending().await;
    };
    match (&mut execution.result).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "could not finish an action: a defect of the worker");
            Box::new(ExecuteResponse {
                status: Some(proto::status(
                    rpc::Code::Internal,
                    "Failed to finish the action: a defect of the worker; see its journal",
                )),
                ..Default::default()
            })
        }
    }
}

async fn pending<T>(future: &mut Pending<T>) -> T {
    match future {
        Some(future) => future.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

fn request(
    identity: &SlotIdentity,
    report: SlotReport<Box<ExecuteResponse>>,
    phase: Option<ExecutionPhase>,
    last: Option<&StartedTask>,
    number: WorkerCall,
) -> tonic::Request<SynchronizeRequest> {
    use current_state::WorkerState;
    let executing = |digest, state| {
        WorkerState::Executing(current_state::Executing {
            action_digest: Some(digest),
            execution_state: Some(state),
        })
    };
    let started = matches!(
        report.activity,
        slot::Activity::Executing(_) | slot::Activity::Completed(..)
    );
    let state = match report.activity {
        slot::Activity::Idle => WorkerState::Idle(()),
        slot::Activity::Started(digest) => executing(digest, ExecutionState::Started(())),
        slot::Activity::Executing(digest) => executing(
            digest,
            match phase {
                None => ExecutionState::Started(()),
                Some(ExecutionPhase::FetchingInputs) => ExecutionState::FetchingInputs(()),
                Some(ExecutionPhase::Running) => ExecutionState::Running(()),
                Some(ExecutionPhase::UploadingOutputs) => ExecutionState::UploadingOutputs(()),
            },
        ),
        slot::Activity::Completed(digest, response) => {
            executing(digest, ExecutionState::Completed(*response))
        }
    };
    let mut request = tonic::Request::new(SynchronizeRequest {
        worker_id: identity.worker_id.clone(),
        instance_name_prefix: identity.instance_name_prefix.as_str().to_owned(),
        platform: Some(identity.platform.clone()),
        size_class: identity.size_class,
        current_state: Some(CurrentState {
            worker_state: Some(state),
        }),
        prefer_being_idle: report.prefer_being_idle,
    });
    number.attach_to(&mut request);
    if let Some(task) = last.filter(|_| started) {
        metadata::set_instance(&mut request, &task.instance);
        if let Some(attempt) = task.attempt {
            attempt.attach_to(&mut request);
        }
    }
    request
}

fn answer_of(
    identity: &SlotIdentity,
    response: SynchronizeResponse,
    now: Instant,
) -> Answer<Result<AssignedTask, Box<ExecuteResponse>>> {
    use desired_state::WorkerState;
    let busy;
    let desired = match response.desired_state.and_then(|state| state.worker_state) {
        None => {
            busy = true;
            Desired::Unchanged
        }
        Some(WorkerState::Idle(())) => {
            busy = false;
            Desired::Idle
        }
        Some(WorkerState::Executing(executing)) => {
            busy = true;
            let digest = executing.action_digest.clone().unwrap_or_default();
            Desired::Executing(
                digest,
                AssignedTask::parse(&identity.instance_name_prefix, executing),
            )
        }
    };
    let asked = response
        .next_synchronization_at
        .as_ref()
        .and_then(proto::system_time)
        .and_then(|at| at.duration_since(SystemTime::now()).ok())
        .unwrap_or_default()
        .min(MAXIMUM_INTERVAL);
    let interval = if busy {
        asked.max(MINIMUM_INTERVAL)
    } else {
        asked
    };
    Answer {
        desired,
        due: now + interval,
    }
}

/// Whether a call failed because of what it said, so that it would fail again: its content is not
/// understood, or it is larger than the scheduler receives.
fn refuses(status: &Status) -> bool {
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => true,
        // gRPC for Go, C++ and Java, in this order; other limits pass.
        Code::ResourceExhausted => {
            let text = status.message().to_lowercase();
            text.contains("message larger than max") || text.contains("exceeds maximum size")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_would_fail_again_is_taken_for_a_refusal() {
        for refusal in [
            Status::out_of_range("Error, decoded message length too large"),
            Status::resource_exhausted("grpc: received message larger than max (5 vs. 4)"),
            Status::resource_exhausted("gRPC message exceeds maximum size 4: 5"),
        ] {
            assert!(refuses(&refusal), "{refusal}");
        }
        for passing in [
            Status::unavailable("The scheduler is stopping"),
            Status::resource_exhausted(
                "A worker with the same worker ID is already synchronizing with the scheduler",
            ),
            Status::deadline_exceeded(""),
            Status::permission_denied(""),
            Status::unknown("transport error"),
        ] {
            assert!(!refuses(&passing), "{passing}");
        }
    }
}
