//! One action, from the scheduler's request to its answer.
//!
//! The order of the lines in `execute` is a promise:
//!
//! 1. Outputs are collected only after the last process of the action is gone: the runner says so, or
//!    lets go of its lock, and is there.
//! 2. Outputs are in the Content Addressable Storage before the Action Cache entry that names them.
//! 3. The Action Cache entry is written before completion is reported.
//! 4. Whatever fails, the response says who must act in its status, and has all that was
//!    collected nevertheless.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prost::Name;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    availability::{Availability, NotReady},
    browser_link::BrowserUrl,
    command::Command,
    execution_metrics::ExecutionMetrics,
    execution_spans::ExecutionSpans,
    fault::Fault,
    inputs::{InputRoot, InputRoots, LAST_PROCESS_TIMEOUT},
    live_output::RunningOutputs,
    outputs::{self, CollectedOutputs, Collector, ToldOfOutputs},
    response_size, runner_client,
    task::AssignedTask,
};
use crate::{
    config::worker::Outputs,
    daemon::{self, Channel},
    digest::Digest,
    metadata::{self, ActionContext},
    proto::{
        self, cas, reapi,
        runner::{CheckReadinessRequest, RunRequest, RunResponse, runner_client::RunnerClient},
    },
    storage::{Backend, Content, grpc},
};

const READINESS_TIMEOUT: Duration = Duration::from_secs(30);
/// What was read within the time for outputs may still be uploaded for so long.
const UPLOAD_GRACE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecutionPhase {
    FetchingInputs,
    Running,
    UploadingOutputs,
}

/// Runs actions of one runner's slots.
pub struct Executor {
    pub storage: Backend,
    pub inputs: InputRoots,
    pub runner: RunnerClient<Channel>,
    pub availability: Availability,
    /// For each slot its labels as JSON.
    pub workers: Vec<String>,
    /// The action's own win.
    pub environment_variables: BTreeMap<String, String>,
    /// As if every Command asked for TREE_AND_DIRECTORY.
    pub force_upload_trees_and_directories: bool,
    pub outputs: Outputs,
    /// For links in messages; without one there are none.
    pub browser_url: BrowserUrl,
    pub metrics: Arc<ExecutionMetrics>,
    /// What is executed now, for those who read its output meanwhile.
    pub running: Arc<RunningOutputs>,
}

/// What became of a call to the runner.
enum RunOutcome {
    Answered(Result<RunResponse, tonic::Status>),
    Late,
    /// Late, and the runner answers nothing else either.
    Silent,
    /// It has taken more than its share of the disk.
    TookDisk(Fault),
    Cancelled,
}

impl Executor {
    /// Never fails: failures are in the response's status.
    pub async fn execute(
        &self,
        slot: usize,
        task: AssignedTask,
        phase: &watch::Sender<ExecutionPhase>,
        cancel: &CancellationToken,
    ) -> reapi::ExecuteResponse {
        phase.send_replace(ExecutionPhase::FetchingInputs);
        let mut metadata = reapi::ExecutedActionMetadata {
            worker: self.workers.get(slot).cloned().unwrap_or_default(),
            queued_timestamp: task.queued_timestamp,
            worker_start_timestamp: now(),
            auxiliary_metadata: task.auxiliary_metadata.clone(),
            ..Default::default()
        };
        let mut response = reapi::ExecuteResponse {
            result: Some(reapi::ActionResult::default()),
            ..Default::default()
        };
        let began = self.availability.begin(slot);
        let client = request_metadata(&task);
        let spans = ExecutionSpans::new(&task);
        let work = self.run_and_collect(&task, phase, cancel, &spans, &mut metadata, &mut response);
        let work = grpc::on_behalf_of(client.clone(), spans.of_storage(), work);
        let fault = work.await.err();
        self.availability.ended(began, fault.as_ref());
        metadata.worker_completed_timestamp = now();
        if let Some(result) = &mut response.result {
            result.execution_metadata = Some(metadata);
        }
        response.status = fault.as_ref().map(Fault::status);
        response_size::truncate(&mut response);
        // What cannot be uploaded is not tried once more.
        if !matches!(fault, Some(Fault::Cancelled | Fault::Storage(_))) {
            let record = self.record(&task, &mut response);
            grpc::on_behalf_of(client, spans.of_storage(), record).await;
        }
        spans.record(&task, &response);
        self.metrics.executed(&response);
        response
    }

    /// Fills in what there is to tell, on failure too.
    async fn run_and_collect(
        &self,
        task: &AssignedTask,
        phase: &watch::Sender<ExecutionPhase>,
        cancel: &CancellationToken,
        spans: &ExecutionSpans,
        metadata: &mut reapi::ExecutedActionMetadata,
        response: &mut reapi::ExecuteResponse,
    ) -> Result<(), Fault> {
        metadata.input_fetch_start_timestamp = now();
        let (command, mut root) = tokio::select! {
            ready = self.inputs.prepare(task) => ready?,
            () = cancel.cancelled() => return Err(Fault::Cancelled),
        };
        metadata.input_fetch_completed_timestamp = now();

        phase.send_replace(ExecutionPhase::Running);
        let mut client = self.runner.clone();
        let context = ActionContext {
            action: task.digest.hash_hex(),
            attempt: task.attempt,
            worker: Some(metadata.worker.clone()),
            trace: spans.of_run(),
        };
        let request = || {
            let request = self.run_request(&command, &root);
            let mut request = context.request(request);
            if root.has_private_files() {
                metadata::set_private_inputs(&mut request);
            }
            request
        };
        metadata.execution_start_timestamp = now();
        let readable = self
            .running
            .insert(&task.digest, root.directory(), metadata);
        let mut start = Instant::now();
        let mut run = async || {
            // Whatever does not answer first is dropped, and the runner sees its call cancelled.
            tokio::select! {
                answer = client.run(request()) => RunOutcome::Answered(answer.map(tonic::Response::into_inner)),
                () = tokio::time::sleep(task.timeout) => RunOutcome::Late,
                fault = root.disk_excess() => RunOutcome::TookDisk(fault),
                () = cancel.cancelled() => RunOutcome::Cancelled,
            }
        };
        let mut ended = run().await;
        // The runner was leaving, or had left; its successor takes it.
        if let RunOutcome::Answered(Err(status)) = &ended
            && runner_client::was_never_sent(status)
            && runner_client::answers(&self.runner).await
        {
            metadata.execution_start_timestamp = now();
            start = Instant::now();
            ended = run().await;
        }
        metadata.virtual_execution_duration = Some(proto::proto_duration(start.elapsed()));
        metadata.execution_completed_timestamp = now();
        // A runner that is stopped says nothing of a command, which may have ended long ago.
        if matches!(ended, RunOutcome::Late) && !runner_client::answers(&self.runner).await {
            ended = RunOutcome::Silent;
        }
        let was_run = matches!(ended, RunOutcome::Answered(Ok(_)));
        if matches!(ended, RunOutcome::Answered(Err(_)) | RunOutcome::Silent) {
            root.discard_after_use();
        }
        let took_disk = matches!(ended, RunOutcome::TookDisk(_));
        let ran = self.take_answer(ended, task, metadata, response);
        if ran == Err(Fault::Cancelled) {
            root.await_unlocked().await;
            return ran;
        }
        if !was_run && !self.is_quiet(&root).await {
            root.discard_after_use();
            return Err(ran.err().filter(Fault::is_unavailable).unwrap_or_else(|| {
                Fault::Unavailable(format!(
                    "the runner did not end all processes of the action within {} s; what they left was not collected",
                    LAST_PROCESS_TIMEOUT.as_secs()
                ))
            }));
        }

        drop(readable);
        if took_disk {
            // What is short is not kept for longer than it takes to remove it.
            root.discard_after_use();
            return ran;
        }
        phase.send_replace(ExecutionPhase::UploadingOutputs);
        metadata.output_upload_start_timestamp = now();
        let timeout = self.outputs.timeout.get();
        let uploaded = tokio::select! {
            uploaded = self.upload(task, command, root, was_run, cancel, response) => uploaded,
            () = tokio::time::sleep(timeout + UPLOAD_GRACE) => Err(outputs::late(timeout)),
            () = cancel.cancelled() => Err(Fault::Cancelled),
        };
        metadata.output_upload_completed_timestamp = now();
        ran.and(uploaded)
    }

    /// Whether nothing of an action lives whose runner did not say so.
    ///
    /// The runner holds the lock of the action's directory for as long as anything lives, but a runner that was
    /// killed lets go of it at once. One that answers afterwards either is the same, and let go
    /// by itself, or is its successor, which answers nobody before it has killed what was left.
    async fn is_quiet(&self, root: &InputRoot) -> bool {
        root.await_unlocked().await && runner_client::answers(&self.runner).await
    }

    fn run_request(&self, command: &Command, root: &InputRoot) -> RunRequest {
        let within = |part: &str| format!("{}/{part}", root.name());
        let mut environment_variables = self.environment_variables.clone();
        environment_variables.extend(command.environment.clone());
        RunRequest {
            arguments: command.arguments.clone(),
            environment_variables,
            working_directory: match command.working_directory.is_root() {
                true => String::new(),
                false => command.working_directory.to_string(),
            },
            stdout_path: within("stdout"),
            stderr_path: within("stderr"),
            input_root_directory: within("root"),
            temporary_directory: within("tmp"),
            server_logs_directory: within("server_logs"),
        }
    }

    fn take_answer(
        &self,
        ended: RunOutcome,
        task: &AssignedTask,
        metadata: &mut reapi::ExecutedActionMetadata,
        response: &mut reapi::ExecuteResponse,
    ) -> Result<(), Fault> {
        match ended {
            RunOutcome::Answered(Ok(answer)) => {
                if let Some(result) = &mut response.result {
                    result.exit_code = i32::try_from(answer.exit_code).unwrap_or(-1);
                }
                metadata.auxiliary_metadata.extend(answer.resource_usage);
                Ok(())
            }
            RunOutcome::Answered(Err(status)) => {
                let text = format!("Failed to run command: {}", status.message());
                Err(match status.code() {
                    _ if !runner_client::is_answer(&status) => Fault::Unavailable(format!(
                        "{text}; bb_runner on the worker's host went away"
                    )),
                    Code::InvalidArgument
                    | Code::FailedPrecondition
                    | Code::OutOfRange
                    | Code::DeadlineExceeded => Fault::Runner {
                        code: status.code() as i32,
                        text,
                    },
                    // It cannot tell whether the action's program or the disk is at fault.
                    Code::DataLoss => Fault::Contended(text),
                    // Whatever else it is that a runner cannot do: not the client's fault.
                    _ => Fault::Unavailable(text),
                })
            }
            RunOutcome::Late => Err(Fault::Late(format!(
                "Failed to run command: it did not end within its timeout of {}",
                humantime::format_duration(task.timeout)
            ))),
            RunOutcome::Silent => Err(Fault::Unavailable(
                "Failed to run command: bb_runner on the worker's host does not answer".to_owned(),
            )),
            RunOutcome::TookDisk(fault) => Err(fault),
            RunOutcome::Cancelled => Err(Fault::Cancelled),
        }
    }

    /// Collects outputs, and uploads them meanwhile.
    async fn upload(
        &self,
        task: &AssignedTask,
        command: Command,
        mut root: InputRoot,
        was_run: bool,
        cancel: &CancellationToken,
        response: &mut reapi::ExecuteResponse,
    ) -> Result<(), Fault> {
        let (sender, mut collected) = mpsc::channel(2);
        let timeout = self.outputs.timeout.get();
        let limits = outputs::OutputLimits {
            size: self.outputs.maximum_size.get(),
            blob_size: self.storage.maximum_blob_size(&task.instance).await,
            timeout,
            deadline: Instant::now() + timeout,
        };
        // Whoever stops waiting for this also ends the reading.
        let cancel = cancel.child_token();
        let _stop = cancel.clone().drop_guard();
        let (cache, function) = (self.inputs.cache.clone(), task.function);
        let shared = !root.has_private_files();
        let told = ToldOfOutputs {
            directories: command.store_directories || self.force_upload_trees_and_directories,
            node_properties: command.node_properties,
        };
        drop(daemon::spawn_blocking(move || {
            let reliable = root.check();
            // Nobody receives any more when the call is given up.
            let send = |batch| drop(sender.blocking_send(Collected::Batch(batch)));
            let mut found = Collector::new(function, &cache, told, limits, &cancel, send).collect(
                root.directory(),
                root.root(),
                &command,
                was_run,
            );
            root.set_adopted_output_inodes(std::mem::take(&mut found.adopted_output_inodes));
            if found.by_a_privileged_user && shared {
                root.discard_all_after_privileged_action();
            }
            let clean = root.into_cleaning();
            drop(sender.blocking_send(Collected::All(reliable, Box::new(found))));
            clean();
        }));
        let mut uploaded = Ok(());
        let (reliable, found) = loop {
            match collected.recv().await {
                // After a failed upload the rest is collected all the same.
                Some(Collected::Batch(_)) if uploaded.is_err() => {}
                Some(Collected::Batch(batch)) => {
                    let upload = self.storage.upload(&task.instance, batch).await;
                    uploaded =
                        upload.map_err(|error| Fault::of_storage("upload the outputs", error));
                }
                Some(Collected::All(reliable, found)) => break (reliable, *found),
                None => {
                    return Err(Fault::Internal(
                        "could not collect outputs: the thread that did so panicked".to_owned(),
                    ));
                }
            }
        };
        let uploaded = fill_response(found, uploaded, response);
        reliable.and(uploaded)
    }

    /// Keeps a good result for everybody, or a bad one for whoever follows the link.
    async fn record(&self, task: &AssignedTask, response: &mut reapi::ExecuteResponse) {
        let succeeded =
            response.status.is_none() && response.result.as_ref().is_some_and(|r| r.exit_code == 0);
        let action = &task.digest;
        if succeeded && !task.action.do_not_cache {
            let result = response.result.clone().unwrap_or_default();
            let update = self
                .storage
                .update_action_result(&task.instance, action, result);
            match update.await {
                Ok(()) => self.link(task, "cached result", "action", action, response),
                Err(error) => {
                    let fault = Fault::of_storage("store the result in the action cache", error);
                    response.status = Some(fault.status());
                }
            }
        } else if self.browser_url.get().is_some() {
            // Without a link nobody could find it.
            let historical = cas::HistoricalExecuteResponse {
                action_digest: Some(action.to_proto()),
                execute_response: Some(response.clone()),
            };
            let data = bytes::Bytes::from(prost::Message::encode_to_vec(&historical));
            let digest = task.function.digest_of(&data);
            let blob = vec![(digest, Content::Bytes(data))];
            match self.storage.upload(&task.instance, blob).await {
                Ok(()) => {
                    let kind = "historical_execute_response";
                    self.link(task, "uncached result", kind, &digest, response);
                }
                Err(error) => {
                    let fault = Fault::of_storage("store the response", error);
                    response.status.get_or_insert_with(|| fault.status());
                }
            }
        }
    }

    fn link(
        &self,
        task: &AssignedTask,
        what: &str,
        kind: &str,
        digest: &Digest,
        response: &mut reapi::ExecuteResponse,
    ) {
        let Some(browser) = self.browser_url.get() else {
            return;
        };
        let mut url = browser.trim_end_matches('/').to_owned();
        if !task.instance.is_empty() {
            url = format!("{url}/{}", task.instance);
        }
        response.message = format!(
            "Action details ({what}): {url}/blobs/{}/{kind}/{}-{}/",
            task.function.name(),
            digest.hash_hex(),
            digest.size()
        );
    }

    /// Whether this slot can run actions; the text says why not.
    pub async fn check_readiness(&self, slot: usize) -> Result<(), NotReady> {
        let checked = self.check_runner().await;
        self.availability.admit(slot, checked)
    }

    async fn check_runner(&self) -> Result<(), String> {
        let made = self.inputs.prepare_readiness_check().await;
        let (_root, path) = made.map_err(|fault| fault.to_string())?;
        let mut runner = self.runner.clone();
        let check = runner.check_readiness(CheckReadinessRequest { path });
        match tokio::time::timeout(READINESS_TIMEOUT, check).await {
            Ok(Ok(_)) => Ok(()),
            // As Buildbarn's runner says it.
            Ok(Err(status)) if status.message().contains("ermission denied") => Err(format!(
                "the runner is not ready: {}; if it is no bb_runner of this project and not this worker's user, name a group of its user as runners.group in bb_worker.toml",
                status.message()
            )),
            Ok(Err(status)) => Err(format!("the runner is not ready: {}", status.message())),
            Err(_) => Err("the runner does not answer".to_owned()),
        }
    }
}

/// What the thread that collects outputs sends: batches of blobs as they are found, and at last what it found in all,
/// with `InputRoot::check`'s answer.
enum Collected {
    Batch(Vec<(Digest, Content)>),
    All(Result<(), Fault>, Box<CollectedOutputs>),
}

/// Puts what was found into the response. When not all of it could be uploaded, what refers to
/// blobs is left out.
#[expect(deprecated, reason = "clients of REAPI 2.0 read the older lists")]
fn fill_response(
    found: CollectedOutputs,
    uploaded: Result<(), Fault>,
    response: &mut reapi::ExecuteResponse,
) -> Result<(), Fault> {
    let result = response.result.get_or_insert_default();
    result.output_symlinks = found.symlinks;
    result.output_file_symlinks = found.file_symlinks;
    result.output_directory_symlinks = found.directory_symlinks;
    if uploaded.is_ok() {
        result.output_files = found.files;
        result.output_directories = found.directories;
        result.stdout_digest = found.stdout.map(|digest| digest.to_proto());
        result.stderr_digest = found.stderr.map(|digest| digest.to_proto());
        response.server_logs = found.server_logs;
    }
    match found.fault {
        Some(fault) => Err(fault),
        None => uploaded,
    }
}

/// What the client said of itself, encoded.
fn request_metadata(task: &AssignedTask) -> Option<bytes::Bytes> {
    let name = reapi::RequestMetadata::type_url();
    let found = task
        .auxiliary_metadata
        .iter()
        .find(|any| any.type_url == name);
    found.map(|any| bytes::Bytes::from(any.value.clone()))
}

fn now() -> Option<prost_types::Timestamp> {
    Some(proto::timestamp(SystemTime::now()))
}
