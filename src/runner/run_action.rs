//! One action, from its command to its last process, as one straight function.
//!
//! When it returns, no process of the action lives, its directory is closed and unlocked, and nothing that it
//! made outside of its own directories exists. `Unkillable` is the exception: then the directory stays locked, and
//! the user is not used again.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Gid;
use tokio::sync::oneshot;

use super::{
    action_directory_lock::{ActionDirectoryError, LockedActionDirectory},
    action_mounts::{ActionMounts, ActionMountsError, c_string},
    build_directory::{BuildDirectory, BuildDirectoryError},
    counts::RunCounts,
    idle_invoker::{IdleInvoker, IdleInvokerGuard},
    input_root_chroot::InputRootChrootError,
    log_size_limit::{CHECK_INTERVAL, LimitedStdioFile},
    run_cancellation::RunCancellation,
    run_spec::{Deadline, Executable, RunSpec},
    sandbox::{
        ActionCgroup, CgroupUsage, Layers, MemoryUsage, NamespaceEnd, Sandbox, SandboxContext,
        SandboxError, SandboxPool, SeccompFilter,
    },
    server_logs::ServerLog,
    spawn::{
        Exit, InheritedState, PathBase, PidNamespaces, Process, SetupStep, SpawnError, SpawnSpec,
        SpawnStage, WaitOutcome,
    },
    user_cleanup,
    user_pool::ActionUser,
};
use crate::{
    config::{
        Size,
        runner::{Config, Root},
    },
    daemon::message_id,
};

/// How long processes that were killed may take to be gone; those that hang in a system call, such
/// as on a dead network file system, may take forever.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What all actions of a runner share.
#[derive(Debug)]
pub(super) struct RunContext {
    pub counts: Arc<RunCounts>,
    pub config: Config,
    pub sandboxes: SandboxPool,
    pub null: File,
    pub inherited: InheritedState,
    /// The PID namespace of this daemon.
    pub pid_namespace: OwnedFd,
    pub seccomp_filter: Option<SeccompFilter>,
    pub supplementary_groups: Vec<Gid>,
    pub emulator: Vec<CString>,
    /// `None` when nothing is to be cleaned around actions.
    pub idle_invoker: Option<IdleInvoker>,
}

/// How an action ended.
#[derive(Clone, Copy)]
pub(super) struct ActionExit {
    /// How its command's process ended, and what that used.
    pub command: Exit,
    /// What all of its processes used, where it had a control group.
    pub cgroup: Option<CgroupUsage>,
}

/// Why an action has no exit code.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(transparent)]
    BuildDirectory(#[from] BuildDirectoryError),
    #[error(transparent)]
    ActionDirectory(ActionDirectoryError),
    #[error(transparent)]
    Mounts(ActionMountsError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// No directory of the action's PATH has its executable: the action must be changed.
    #[error("Cannot find executable {name:?} in search paths {path:?}")]
    NotFound { name: String, path: String },
    #[error("Failed to start process: {} {subject:?}: {error}{}", verb(.stage), hint(.stage, .error))]
    Start {
        stage: SpawnStage,
        subject: String,
        error: io::Error,
    },
    #[error("Failed to start process: could not {what}: {error}")]
    Prepare {
        what: &'static str,
        error: io::Error,
    },
    #[error("Failed to wait for process: {0}")]
    Wait(io::Error),
    /// Somebody else killed the action, so that what it had done until then says nothing about it.
    #[error("The action was killed from outside: {0}")]
    Killed(&'static str),
    #[error(
        "Processes of the action were still there {KILL_TIMEOUT:?} after they were killed; user \
         {user} is not used again until bb_runner is restarted"
    )]
    Unkillable { user: u32 },
    #[error("The call was cancelled; everything that it had started was killed")]
    Cancelled,
}

impl From<ActionDirectoryError> for RunError {
    fn from(error: ActionDirectoryError) -> Self {
        match error {
            ActionDirectoryError::Cancelled => RunError::Cancelled,
            ActionDirectoryError::Open(error) => RunError::BuildDirectory(error),
            error => RunError::ActionDirectory(error),
        }
    }
}

impl From<ActionMountsError> for RunError {
    fn from(error: ActionMountsError) -> Self {
        match error {
            ActionMountsError::Open(error) => RunError::BuildDirectory(error),
            error => RunError::Mounts(error),
        }
    }
}

impl RunError {
    /// Whether the action itself is at fault, so that it would fail again elsewhere.
    pub(super) fn is_client_error(&self) -> bool {
        match self {
            RunError::NotFound { .. } => true,
            RunError::BuildDirectory(error) => error.escapes(),
            RunError::Mounts(ActionMountsError::Root(InputRootChrootError::NoDirectory(_))) => true,
            // The administrator has chosen the emulator; its arguments are the action's.
            RunError::Start {
                stage: SpawnStage::Emulate,
                error,
                ..
            } => error.raw_os_error() == Some(libc::E2BIG),
            // Also where the interpreter that a program or script names is missing, on this host or among
            // the inputs: whoever sent the action has chosen it, and a platform that has it (Buildbarn's
            // runner: INVALID_ARGUMENT).
            RunError::Start { stage, error, .. } => {
                matches!(
                    stage,
                    SpawnStage::Execute | SpawnStage::Search | SpawnStage::WorkingDirectory
                ) && matches!(
                    error.raw_os_error(),
                    Some(
                        libc::ENOENT
                            | libc::ENOTDIR
                            | libc::EACCES
                            | libc::EPERM
                            | libc::EISDIR
                            | libc::ENOEXEC
                            | libc::ELOOP
                            | libc::ENAMETOOLONG
                            | libc::E2BIG
                            | libc::ELIBBAD
                    )
                )
            }
            _ => false,
        }
    }

    /// Whether execve(2) could not read a program or its interpreter: cut off by whoever sent the action, or
    /// on a disk that fails.
    pub(super) fn is_unreadable_program(&self) -> bool {
        matches!(
            self,
            RunError::Start {
                stage: SpawnStage::Execute | SpawnStage::Emulate,
                error,
                ..
            } if error.raw_os_error() == Some(libc::EIO)
        )
    }

    fn prepare(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| RunError::Prepare { what, error }
    }
}

/// What people need to know besides the kernel's words for an error of execve(2).
fn hint(stage: &SpawnStage, error: &io::Error) -> &'static str {
    match (stage, error.raw_os_error()) {
        (SpawnStage::Execute | SpawnStage::Emulate, Some(libc::EIO)) => {
            "; it, or what it names as interpreter, is cut off, or the disk of this host cannot read it"
        }
        (SpawnStage::Emulate, code) if code != Some(libc::E2BIG) => {
            "; bb_runner.toml names it (emulator), and it must be a program where actions run"
        }
        (SpawnStage::Execute, Some(libc::ENOENT)) => {
            "; if it is there, what its first line (#!) or its program header names as interpreter is not"
        }
        (SpawnStage::Execute, Some(libc::EACCES)) => {
            "; it, or its interpreter, is not executable: FileNode.is_executable says what is"
        }
        (SpawnStage::Execute, Some(libc::ENOEXEC)) => {
            "; it is neither a program for this host's architecture nor begins with #!"
        }
        _ => "",
    }
}

/// What the process was about to do, for people.
fn verb(stage: &SpawnStage) -> &'static str {
    match stage {
        SpawnStage::Namespaces => "enter namespaces for",
        SpawnStage::Mounts => "mount directories for",
        SpawnStage::Root => "change the root of",
        SpawnStage::Session => "begin a session for",
        SpawnStage::Descriptors => "hand descriptors to",
        SpawnStage::Limits => "set limits of",
        SpawnStage::InputRoot => "enter input root directory",
        SpawnStage::Credentials => "become the user of",
        SpawnStage::Filter => "filter system calls of",
        SpawnStage::WorkingDirectory => "chdir",
        SpawnStage::Emulate => "exec emulator",
        SpawnStage::Search | SpawnStage::Execute => "exec",
    }
}

/// Runs a command, on this thread, and answers when nothing of it is left. What can wait is done
/// after the answer.
pub(super) fn run_action(
    context: &RunContext,
    spec: &RunSpec,
    user: ActionUser,
    cancellation: &RunCancellation,
    answer: oneshot::Sender<Result<ActionExit, RunError>>,
) {
    context.counts.started.increment();
    let (result, sandbox) = match acquire(context, cancellation) {
        Ok((idle_invoker_guard, build, mut sandbox)) => {
            let result =
                run_in_sandbox(context, spec, user.id(), cancellation, &build, &mut sandbox);
            // Before anybody learns that the action is over.
            drop(idle_invoker_guard);
            (result, Some(sandbox))
        }
        Err(error) => (Err(error), None),
    };
    count(&context.counts, &result);
    let is_unkillable = matches!(result, Err(RunError::Unkillable { .. }));
    // The call may be gone.
    let _ = answer.send(result);
    drop(sandbox);
    // Last: whoever has all users back knows that all sandboxes are torn down.
    if is_unkillable {
        user.retire();
    }
}

/// Counts what became of an action.
fn count(counts: &RunCounts, result: &Result<ActionExit, RunError>) {
    match result {
        Ok(exit) => {
            counts.ended.increment();
            let memory = exit.cgroup.as_ref().and_then(|usage| usage.memory);
            if memory.as_ref().is_some_and(MemoryUsage::is_exhausted) {
                counts.out_of_memory.increment();
            }
        }
        Err(RunError::Cancelled) => counts.stopped.increment(),
        Err(_) => counts.failed.increment(),
    }
}

/// Takes what an action needs before anything is made for it alone: its turn after cleaning, the build directory as it
/// is now, and a sandbox.
fn acquire<'a>(
    context: &'a RunContext,
    cancellation: &RunCancellation,
) -> Result<(Option<IdleInvokerGuard<'a>>, BuildDirectory, Sandbox), RunError> {
    let idle_invoker_guard = match &context.idle_invoker {
        Some(idle_invoker) => {
            let guard = idle_invoker.acquire(cancellation);
            let guard = guard.map_err(RunError::prepare("clean up before the action"))?;
            Some(guard.ok_or(RunError::Cancelled)?)
        }
        None => None,
    };
    let build = BuildDirectory::open(&context.config.build_directory)?;
    let identity = build
        .identity()
        .map_err(RunError::prepare("look at the build directory"))?;
    let sandbox = match context.sandboxes.try_take(identity) {
        Some(sandbox) => sandbox,
        None => cancellation
            .block_on(context.sandboxes.take(identity))
            .ok_or(RunError::Cancelled)??,
    };
    Ok((idle_invoker_guard, build, sandbox))
}

/// Runs a command in its sandbox, and returns when nothing of it is left but the sandbox itself.
fn run_in_sandbox(
    context: &RunContext,
    spec: &RunSpec,
    user: u32,
    cancellation: &RunCancellation,
    build: &BuildDirectory,
    sandbox: &mut Sandbox,
) -> Result<ActionExit, RunError> {
    // Before anything of the action exists, and closed after everything of it is gone.
    let directory = LockedActionDirectory::open(build, spec, user, cancellation)?;
    let limits = &context.config.limits;
    let mut stdout = LimitedStdioFile::new(build.create_stdio_file(&spec.stdout)?, limits.log_size);
    let mut stderr = LimitedStdioFile::new(build.create_stdio_file(&spec.stderr)?, limits.log_size);
    if let Some(mounts) = &sandbox.mounts {
        let written = mounts.account_files.write_entry(user, &spec.home);
        written.map_err(RunError::prepare("name the action's user"))?;
    }
    let sandbox_mounts = sandbox.mounts.as_ref();
    let mut mounts = ActionMounts::prepare(spec, &context.config.root, build, sandbox_mounts)?;
    let steps = std::mem::take(&mut mounts.steps);
    let setup: Vec<SetupStep<'_>> = sandbox.setup_steps().chain(steps).collect();
    let (executables, search) = match &spec.executable {
        Executable::Path(path) => (std::slice::from_ref(path), false),
        Executable::Search { candidates, .. } => (candidates.as_slice(), true),
    };
    let start = Instant::now();
    let spawned = Process::spawn(&SpawnSpec {
        arguments: &spec.arguments,
        environment: &spec.environment,
        executables,
        search,
        emulator: &context.emulator,
        working_directory: &c_string(spec.working_directory.to_string()),
        input_root: &mounts.input_root,
        base: match (&mounts.base, sandbox_mounts) {
            (Some(path), _) => PathBase::Path(path),
            (None, Some(mounts)) => PathBase::Directory(mounts.build_directory.as_fd()),
            (None, None) => PathBase::Directory(build.as_fd()),
        },
        stdio: [
            context.null.as_fd(),
            stdout.file.as_fd(),
            stderr.file.as_fd(),
        ],
        user,
        supplementary_groups: &context.supplementary_groups,
        process_limit: limits.processes,
        inherited: context.inherited,
        cgroup: sandbox.cgroup.as_ref().map(ActionCgroup::as_fd),
        pid_namespaces: sandbox.init.as_ref().map(|init| PidNamespaces {
            inside: init.namespace(),
            daemon: context.pid_namespace.as_fd(),
        }),
        setup: &setup,
        seccomp_filter: context.seccomp_filter.as_ref().map(SeccompFilter::program),
    });
    drop(setup);
    context.sandboxes.refill();
    let mut killed_processes = Vec::new();
    let ended = spawned
        .map_err(|error| start_error(spec, context, error))
        .and_then(|process| {
            let stdio_files = [&mut stdout, &mut stderr];
            wait(context, process, cancellation, stdio_files, || {
                killed_processes = user_cleanup::list_processes(user);
            })
        });
    let elapsed = start.elapsed();

    // Also when it never started: by now nothing may be left.
    let Some(namespace) = kill_all(sandbox, user) else {
        // Whoever waits for the lock must not find that nothing stirs.
        std::mem::forget(directory);
        if let Some(network) = &mut sandbox.network {
            network.retire();
        }
        tracing::error!(
            message_id = message_id::UNKILLABLE,
            user,
            "processes of an action could not be killed; its user is not used again"
        );
        return Err(RunError::Unkillable { user });
    };
    stdout.finish(user);
    stderr.finish(user);
    let cgroup = sandbox.cgroup.as_ref().map(ActionCgroup::usage);
    if let (Ok(_), Some(usage)) = (&ended, &cgroup) {
        explain_limits(&stderr, usage, limits.processes);
    }
    let result = classify_exit(ended, cgroup, namespace);
    if let Some(server_logs) = &spec.server_logs {
        let record = ServerLog {
            kill_reason: result
                .as_ref()
                .err()
                .and_then(|error| kill_reason(error, spec)),
            limits,
            timeout: spec.deadline.map(|deadline| deadline.limit),
            elapsed,
            usage: cgroup.as_ref(),
            killed_processes: &killed_processes,
        };
        // While nobody else is in there.
        record.write(build, server_logs);
    }
    remove_shared(context.sandboxes.context(), user);
    drop(mounts);
    drop(directory);
    result
}

/// Waits for the end of an action's command process; that of its others is to come. `before_termination` is called
/// before that process is told to end.
fn wait(
    context: &RunContext,
    mut process: Process,
    cancellation: &RunCancellation,
    mut stdio_files: [&mut LimitedStdioFile; 2],
    before_termination: impl FnOnce(),
) -> Result<Exit, RunError> {
    loop {
        match process.wait(cancellation, CHECK_INTERVAL) {
            WaitOutcome::Exited => return process.reap().map_err(RunError::Wait),
            WaitOutcome::Cancelled | WaitOutcome::PollFailed => {
                before_termination();
                let grace = context.config.termination_grace.get();
                if !grace.is_zero() {
                    process.terminate();
                    let deadline = Instant::now() + grace;
                    while !process.ends_within(rest_of(deadline)) && Instant::now() < deadline {
                        truncate(&mut stdio_files);
                    }
                }
                return Err(RunError::Cancelled);
            }
            WaitOutcome::TimedOut => truncate(&mut stdio_files),
        }
    }
}

/// What is left of a time, but no more than until the logs are to be looked at.
fn rest_of(deadline: Instant) -> Duration {
    let rest = deadline.saturating_duration_since(Instant::now());
    rest.min(CHECK_INTERVAL)
}

fn truncate(stdio_files: &mut [&mut LimitedStdioFile; 2]) {
    for file in stdio_files {
        file.truncate();
    }
}

/// Kills all processes of an action, by each of the ways that there are to know them. Returns how their namespace
/// ended, if they had one; `None` when some are left.
fn kill_all(sandbox: &mut Sandbox, user: u32) -> Option<Option<NamespaceEnd>> {
    let namespace = match &mut sandbox.init {
        Some(init) => Some(init.end(KILL_TIMEOUT)?),
        None => None,
    };
    // First by their user, which every kernel can; cgroup.kill came with Linux 5.14.
    let of_user = user_cleanup::kill_processes(user, KILL_TIMEOUT);
    let cgroup = sandbox.cgroup.as_ref();
    let of_cgroup = cgroup.is_none_or(|cgroup| cgroup.kill_all(KILL_TIMEOUT));
    (of_user && of_cgroup).then_some(namespace)
}

/// Decides whether the end of an action's command process is a result, or says only that others killed it.
fn classify_exit(
    ended: Result<Exit, RunError>,
    cgroup: Option<CgroupUsage>,
    namespace: Option<NamespaceEnd>,
) -> Result<ActionExit, RunError> {
    let memory = cgroup.and_then(|usage| usage.memory);
    if memory.is_some_and(|memory| memory.is_external_oom()) {
        return ended.and(Err(RunError::Killed("this host ran out of memory")));
    }
    if namespace == Some(NamespaceEnd::KilledByOthers)
        && !memory.is_some_and(|memory| memory.is_exhausted())
        && !matches!(ended, Err(RunError::Cancelled))
    {
        return Err(RunError::Killed(
            "somebody sent SIGKILL to the first process of its namespace, or to its control group",
        ));
    }
    ended.map(|command| ActionExit { command, cgroup })
}

/// Why an action was killed, for people; `None` when the error does not say that it was.
fn kill_reason(error: &RunError, spec: &RunSpec) -> Option<String> {
    match error {
        RunError::Killed(_) => Some(error.to_string()),
        RunError::Cancelled => Some(match spec.deadline {
            Some(Deadline { at, limit }) if at <= Instant::now() => {
                format!("its time of {} s was over, and it was killed", limit.as_secs_f64())
            }
            _ => "it was killed when the call for it ended: its time was over, nobody wanted its result any more, \
                  or bb_runner was stopped"
                .to_owned(),
        }),
        _ => None,
    }
}

/// Tells whoever reads the action's output of limits that it has reached.
fn explain_limits(stderr: &LimitedStdioFile, usage: &CgroupUsage, processes: u64) {
    if let Some(memory) = usage.memory.filter(MemoryUsage::is_exhausted) {
        let peak = memory.peak.map_or_else(String::new, |peak| {
            format!(" and it used up to {}", Size(peak))
        });
        stderr.append_line(&format!(
            "the action ran out of memory: its limit is {}{peak}",
            Size(memory.limit.unwrap_or_default())
        ));
    }
    if usage.pids_max_events > 0 {
        stderr.append_line(&format!(
            "the action could not make more processes: its limit is {processes}"
        ));
    }
}

/// Removes what an action left in what it shares with others, where it has nothing of its own.
fn remove_shared(sandbox_context: &SandboxContext, user: u32) {
    if !sandbox_context.layers.contains(Layers::MOUNTS) {
        user_cleanup::remove_files(user, &sandbox_context.shared());
    }
    if !sandbox_context.layers.contains(Layers::IPC) {
        user_cleanup::remove_system_v_ipc(user);
        user_cleanup::remove_message_queues(user);
    }
}

/// The error of a process that was not made, or did not get as far as its command.
fn start_error(spec: &RunSpec, context: &RunContext, error: SpawnError) -> RunError {
    let (stage, error, executable) = match error {
        SpawnError::Clone(error) => {
            return RunError::Prepare {
                what: "create a process",
                error,
            };
        }
        SpawnError::Start {
            stage,
            error,
            executable,
        } => (stage, error, executable),
    };
    let subject = match (stage, &spec.executable) {
        (SpawnStage::Search, Executable::Search { name, path, .. }) => {
            return RunError::NotFound {
                name: name.clone(),
                path: path.clone(),
            };
        }
        (SpawnStage::WorkingDirectory, _) => spec.working_directory.to_string(),
        (SpawnStage::InputRoot, _) => spec.input_root.to_string(),
        (SpawnStage::Emulate, _) => context
            .emulator
            .first()
            .map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
        (_, Executable::Path(path)) => path.to_string_lossy().into_owned(),
        (_, Executable::Search { candidates, .. }) => executable
            .and_then(|index| candidates.get(index))
            .or(spec.arguments.first())
            .map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
    };
    // Where actions see their input roots alone, the emulator is one of the inputs.
    let stage = match stage {
        SpawnStage::Emulate if context.config.root == Root::Input => SpawnStage::Execute,
        stage => stage,
    };
    RunError::Start {
        stage,
        subject,
        error,
    }
}
