//! buildbarn.runner.Runner on a Unix socket.
//!
//! 1. Nobody is answered but root and the configured users, as the kernel names them.
//! 2. A Run that was begun is finished, cleaned up and only then forgotten, whether or not its caller
//!    still waits: a call that is cancelled kills its action. A caller that did so, and needs the quiet
//!    that follows, takes the lock of the action's directory.
//! 3. A deadline that the caller sends is kept: the command is killed, and DEADLINE_EXCEEDED is the
//!    answer when nothing of it is left.
//! 4. Ready means that an action can be started: the worker sees the same build directory, and a sandbox was made
//!    now, or at most 10 s ago (`SandboxPool::last_verification`). A build directory that is not as it must be is
//!    INTERNAL, and a path that leads out of it INVALID_ARGUMENT. Whatever else keeps this host from running an
//!    action is UNAVAILABLE, so that it is tried elsewhere.

use std::{
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::{
    build_directory::{BuildDirectory, first_impassable, impassable_message},
    default_environment::AddedVariables,
    grpc_timeout,
    run_action::{ActionExit, RunContext, RunError, run_action},
    run_cancellation::RunCancellation,
    run_spec::{Deadline, RunSpec, RunSpecError},
    sandbox::{CgroupUsage, DirectoryId},
    spawn::ExitStatus,
    user_pool::UserPool,
};
use crate::{
    daemon::{self, Peer},
    metadata::{self, ActionContext},
    path::RelativePath,
    proto::{
        pack,
        resourceusage::PosixResourceUsage,
        runner::{CheckReadinessRequest, RunRequest, RunResponse, runner_server},
    },
};

/// How long a Run waits for a user when all are in use: clean-up after cancelled ones may lag.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct RunnerService {
    pub context: Arc<RunContext>,
    pub users: Arc<UserPool>,
    /// User numbers of `allowed_users`; root's is not among them.
    pub allowed: BTreeSet<u32>,
    pub added_variables: AddedVariables,
    /// Cancelled when all actions are to be killed.
    pub kill_all_actions: CancellationToken,
}

/// Cancels a Run when its call is dropped; `None` when the Run has ended.
struct CancelOnDrop(Option<RunCancellation>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancellation) = &self.0 {
            cancellation.cancel();
        }
    }
}

impl RunnerService {
    /// Refuses everybody but root and `allowed`.
    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let who = match request.extensions().get::<Peer>() {
            Some(Peer::Unix { uid: 0, .. }) => return Ok(()),
            Some(Peer::Unix { uid, .. }) if self.allowed.contains(uid) => return Ok(()),
            Some(Peer::Unix { uid, .. }) => format!("user {uid}"),
            _ => "a caller that is not on a Unix socket".to_owned(),
        };
        Err(Status::permission_denied(format!(
            "{who} may not run commands here; allowed_users of bb_runner.toml names who may"
        )))
    }

    /// Whether all of `readiness_checking_pathnames` are there.
    async fn check_paths(&self) -> Result<(), MissingPath> {
        if self.context.config.readiness_checking_pathnames.is_empty() {
            return Ok(());
        }
        let context = self.context.clone();
        let checked = tokio::task::spawn_blocking(move || find_missing(&context)).await;
        checked.ok().flatten().map_or(Ok(()), Err)
    }
}

/// One of `readiness_checking_pathnames` that is not there.
struct MissingPath {
    path: PathBuf,
    error: io::Error,
}

fn find_missing(context: &RunContext) -> Option<MissingPath> {
    let mut paths = context.config.readiness_checking_pathnames.iter();
    paths.find_map(|path| {
        fs::metadata(path).err().map(|error| MissingPath {
            path: path.clone(),
            error,
        })
    })
}

/// Whether what is configured is there, and the worker sees the same build directory, where `path` is. Returns
/// which directory that is. Blocks.
fn check_directories(context: &RunContext, path: &str) -> Result<DirectoryId, Status> {
    if let Some(MissingPath { path, error }) = find_missing(context) {
        return Err(Status::unavailable(format!("Path {path:?}: {error}")));
    }
    let build_directory = &context.config.build_directory;
    if let Some(directory) = first_impassable(build_directory) {
        return Err(Status::internal(impassable_message(&directory)));
    }
    let build = BuildDirectory::open(build_directory)
        .map_err(|error| Status::internal(error.to_string()))?;
    let resolved = RelativePath::resolve(&RelativePath::root(), path, "build directory")
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    let failed = |verb: &str, error: io::Error| {
        Status::internal(format!(
            "Failed to {verb} path {path:?} in build directory: {error}; build_directory of \
             bb_runner.toml ({}) must be the worker's",
            build_directory.display()
        ))
    };
    if let Some((parent, _)) = resolved.split_last() {
        build
            .check(&parent)
            .map_err(|error| failed("resolve", error))?;
        build
            .check(&resolved)
            .map_err(|error| failed("check existence of", error))?;
    }
    build.identity().map_err(|error| failed("look at", error))
}

#[tonic::async_trait]
impl runner_server::Runner for RunnerService {
    async fn check_readiness(
        &self,
        request: Request<CheckReadinessRequest>,
    ) -> Result<Response<()>, Status> {
        self.admit(&request)?;
        if self.users.all_retired() {
            return Err(Status::unavailable(
                "No users are left, as actions' processes could not be killed; restart bb_runner, \
                 or this host",
            ));
        }
        let path = request.into_inner().path;
        let context = self.context.clone();
        let checked = tokio::task::spawn_blocking(move || {
            let build_directory = check_directories(&context, &path)?;
            Ok::<_, Status>(context.sandboxes.last_verification(build_directory))
        });
        let checked = checked.await;
        let known = checked.map_err(|error| Status::unavailable(error.to_string()))??;
        let can_build = match known {
            Some(known) => known,
            None => self.context.sandboxes.verify_can_build().await,
        };
        can_build.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(()))
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        self.admit(&request)?;
        let ActionContext {
            action,
            attempt,
            worker,
            trace: _,
        } = ActionContext::of(&request);
        let span = daemon::action_span(
            &action,
            attempt.map(|attempt| attempt.operation),
            worker.as_deref(),
        );
        self.run_command(request).instrument(span).await
    }
}

impl RunnerService {
    async fn run_command(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<RunResponse>, Status> {
        let deadline = grpc_timeout::of(request.metadata()).map(|limit| Deadline {
            at: Instant::now() + limit,
            limit,
        });
        let private_inputs = metadata::has_private_inputs(&request);
        let mut spec =
            RunSpec::parse(request.into_inner(), &self.added_variables).map_err(refused)?;
        spec.private_inputs = private_inputs;
        spec.deadline = deadline;
        let user = self
            .users
            .take(USER_TIMEOUT)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let id = user.id();
        let cancellation = RunCancellation::new()
            .map_err(|error| Status::unavailable(format!("Failed to run: {error}")))?;
        let mut cancel_on_drop = CancelOnDrop(Some(cancellation.clone()));
        let (answer, mut answered) = oneshot::channel();
        let context = self.context.clone();
        let cancelled = cancellation.clone();
        daemon::spawn_blocking(move || run_action(&context, &spec, user, &cancelled, answer));
        let over = async {
            match deadline {
                Some(Deadline { at, limit }) => {
                    tokio::time::sleep_until(at.into()).await;
                    limit
                }
                None => std::future::pending().await,
            }
        };
        let mut exceeded = None;
        let result = tokio::select! {
            result = &mut answered => result,
            () = self.kill_all_actions.cancelled() => {
                cancellation.cancel();
                answered.await
            }
            limit = over => {
                exceeded = Some(limit);
                cancellation.cancel();
                answered.await
            }
        };
        cancel_on_drop.0 = None;
        if let Ok(Ok(exit)) = &result {
            tracing::debug!(user = id, cause = ?exit.command.status, "command ended");
        }
        let result =
            result.unwrap_or_else(|_| Err(RunError::Wait(io::Error::other("the thread panicked"))));
        if !matches!(&result, Ok(exit) if exit.command.status == ExitStatus::Code(0))
            && let Err(MissingPath { path, error }) = self.check_paths().await
        {
            return Err(Status::unavailable(format!(
                "One or more required files disappeared during execution: Path {path:?}: {error}"
            )));
        }
        match result {
            Ok(exit) => Ok(Response::new(response(&exit))),
            Err(RunError::Cancelled) if let Some(limit) = exceeded => {
                Err(Status::deadline_exceeded(format!(
                    "The command did not end within {limit:?}; everything that it had started was killed"
                )))
            }
            Err(RunError::Cancelled) if self.kill_all_actions.is_cancelled() => Err(
                Status::unavailable("The runner was stopped, and the action with it"),
            ),
            Err(error) => Err(failed(error)),
        }
    }
}

/// The status of a Run whose request cannot be run.
fn refused(error: RunSpecError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The status of a Run without an exit code.
fn failed(error: RunError) -> Status {
    let message = error.to_string();
    if error.is_client_error() {
        return Status::invalid_argument(message);
    }
    match error {
        RunError::Cancelled => Status::cancelled(message),
        _ if error.is_unreadable_program() => Status::data_loss(message),
        RunError::Killed(_) => {
            tracing::warn!(error = message, "an action was lost");
            Status::unavailable(message)
        }
        _ => {
            tracing::warn!(error = message, "could not run a command");
            Status::unavailable(message)
        }
    }
}

fn response(exit: &ActionExit) -> RunResponse {
    let (exit_code, termination_signal) = match exit.command.status {
        ExitStatus::Code(code) => (i64::from(code), String::new()),
        // As Buildbarn's: an exit code that no process can have.
        ExitStatus::Signal(signal) => (-1, signal_name(signal)),
    };
    let usage = &exit.command.usage;
    let time = |time: libc::timeval| {
        Some(prost_types::Duration {
            seconds: time.tv_sec,
            nanos: time.tv_usec as i32 * 1000,
        })
    };
    let usage = PosixResourceUsage {
        user_time: time(usage.ru_utime),
        system_time: time(usage.ru_stime),
        maximum_resident_set_size: resident(exit),
        page_reclaims: usage.ru_minflt,
        page_faults: usage.ru_majflt,
        swaps: usage.ru_nswap,
        block_input_operations: usage.ru_inblock,
        block_output_operations: usage.ru_oublock,
        messages_sent: usage.ru_msgsnd,
        messages_received: usage.ru_msgrcv,
        signals_received: usage.ru_nsignals,
        voluntary_context_switches: usage.ru_nvcsw,
        involuntary_context_switches: usage.ru_nivcsw,
        termination_signal,
    };
    let mut resource_usage = vec![pack(&usage)];
    resource_usage.extend(exit.cgroup.as_ref().map(cgroup_usage));
    RunResponse {
        exit_code,
        resource_usage,
    }
}

/// The maximum resident set size of an action's command, in bytes. Where the kernel's figure is this daemon's own,
/// the action's is at most that, and at most what all of its processes had together.
fn resident(exit: &ActionExit) -> i64 {
    let figure = exit.command.usage.ru_maxrss.saturating_mul(1024);
    let together = exit.cgroup.and_then(|usage| usage.memory?.peak);
    match together.map(i64::try_from) {
        Some(Ok(together)) if exit.command.maxrss_may_be_daemons => figure.min(together),
        _ => figure,
    }
}

/// What a control group says, as a google.protobuf.Struct, since Buildbarn has no message for it.
fn cgroup_usage(usage: &CgroupUsage) -> prost_types::Any {
    use prost_types::value::Kind;
    let mut fields = std::collections::BTreeMap::new();
    let mut tell = |name: &str, kind| {
        fields.insert(name.to_owned(), prost_types::Value { kind: Some(kind) });
    };
    let number = |bytes: u64| Kind::NumberValue(bytes as f64);
    if let Some(cpu) = usage.cpu {
        for (name, time) in [
            ("cpu_user_seconds", cpu.user),
            ("cpu_system_seconds", cpu.system),
            ("cpu_throttled_seconds", cpu.throttled),
        ] {
            tell(name, Kind::NumberValue(time.as_secs_f64()));
        }
    }
    if let Some(memory) = usage.memory {
        if let Some(peak) = memory.peak {
            tell("memory_peak_bytes", number(peak));
        }
        if let Some(limit) = memory.limit {
            tell("memory_limit_bytes", number(limit));
        }
        tell("out_of_memory", Kind::BoolValue(memory.is_exhausted()));
    }
    if let Some(io) = usage.io {
        tell("io_read_bytes", number(io.read));
        tell("io_written_bytes", number(io.written));
    }
    tell(
        "process_limit_reached",
        Kind::BoolValue(usage.pids_max_events > 0),
    );
    let usage = prost_types::Struct { fields };
    prost_types::Any {
        type_url: "type.googleapis.com/google.protobuf.Struct".to_owned(),
        value: prost::Message::encode_to_vec(&usage),
    }
}

/// The name of a signal without SIG, as Buildbarn has it; the number of a real-time signal, which has no name.
fn signal_name(signal: i32) -> String {
    match nix::sys::signal::Signal::try_from(signal) {
        Ok(signal) => signal.as_str().trim_start_matches("SIG").to_owned(),
        Err(_) => signal.to_string(),
    }
}
