//! bb_runner: runs commands as other Unix users, confined, and leaves nothing behind.
//!
//! In the order to read it, from the top down:
//!
//! - `service`: what a worker asks for over a Unix socket; `early_response_headers`: keeps the gRPC library from ending
//!   a Run at its deadline by itself; `check_command`: what `--check` says;
//! - `metrics`: what is told of it, and `status_command`, which asks for that; `counts` has what became of actions;
//! - `run_action`: one action, from its command to its last process, with `idle_invoker` around several,
//!   `log_size_limit`, which truncates its stdout and stderr files, `server_logs` for what is told of it,
//!   `action_directory_lock` (flock(2), mode, home directory; with `input_ownership`) and `action_mounts` (with `input_root_chroot`) for what it is in;
//! - `build_directory`: where workers lay out actions;
//! - `run_spec`, `default_environment`: what to run, parsed;
//! - `sandbox`: the layers of containment, made ahead;
//! - `spawn`: making a process and waiting for it;
//! - `user_pool`, `user_range_lock`, `user_cleanup`: the users that actions run as, and what is left of one;
//! - `host_requirements`, `proc_self_status`: what the host must have, and what the kernel says of this process;
//!   `grpc_timeout`: a caller's deadline; `run_cancellation`: the way to tell a Run to end; `sys`: system calls.
//!
//! What an action can and cannot do to whom: bb-remote-execution(7), SECURITY.

use std::{ffi::CString, fs, io, sync::Arc, time::Duration};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use rustix::process::Gid;
use tokio_util::sync::CancellationToken;

use crate::{
    config::runner::{Config, Root},
    daemon::{
        self, Failure, Lifecycle, Observation, Program, Services, SocketPermissions,
        traces::TraceExporter,
    },
};

mod action_directory_lock;
mod action_mounts;
mod build_directory;
mod check_command;
mod counts;
mod default_environment;
mod early_response_headers;
mod grpc_timeout;
mod host_requirements;
mod idle_invoker;
mod input_ownership;
mod input_root_chroot;
mod log_size_limit;
mod metrics;
mod proc_self_status;
mod run_action;
mod run_cancellation;
mod run_spec;
mod sandbox;
mod server_logs;
mod service;
mod spawn;
mod status_command;
mod sys;
mod user_cleanup;
mod user_pool;
mod user_range_lock;

pub use check_command::{check_host, warnings};
use counts::RunCounts;
use default_environment::{AddedVariables, BuildDirectoryView};
use early_response_headers::EarlyHeadersService;
use idle_invoker::IdleInvoker;
use metrics::RunnerSources;
use run_action::RunContext;
use sandbox::{Layers, SandboxContext, SandboxPool, SeccompFilter};
use service::RunnerService;
use spawn::InheritedState;
pub use status_command::run_status;
use user_pool::UserPool;
use user_range_lock::{UserRangeError, UserRangeLock};

pub const PROGRAM: Program = Program {
    name: "bb_runner",
    about: "Runs the commands of build actions as other Unix users",
    processors_per_thread: 8,
};

/// How long killed processes may take to be gone: each user's when the daemon starts, and all actions' when it leaves.
/// Calls may last that much longer than the drain timeout, so that callers hear what became of their actions.
const LEFTOVER_KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves Runs until the daemon is told to stop; then drains, kills what is left, and returns.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    host_requirements::check_capabilities()?;
    host_requirements::check_users(&config)?;
    if let Some(failure) = check_command::check_cleaned_directories(&config) {
        return Err(failure);
    }
    let (allowed, unknown) = host_requirements::resolve_users(&config.allowed_users);
    for name in unknown {
        tracing::warn!("{}", host_requirements::unknown_user(name));
    }
    let range = config.users.range();
    // Before anything is killed: what runs as these users may be another runner's.
    let _lock = lock_users(&config).await?;
    let listener = daemon::listen(
        "runner",
        "listen",
        &config.listen,
        Some(SocketPermissions {
            mode: config.socket_mode.0,
            group: host_requirements::socket_group(&config)?,
        }),
    )?;
    let (port, socket) = (&config.metrics, &config.control);
    let listeners = daemon::observation_listeners(
        (&port.listen, port.is_default()),
        (&socket.listen, socket.is_default(), &socket.socket_group),
    )?;
    let traces = TraceExporter::start("bb_runner", &config.traces, &lifecycle)?;
    prepare_process();
    let (layers, cgroups) = sandbox::enable_layers(&config)?;
    if config.root != Root::Host && !layers.contains(Layers::MOUNTS) {
        return Err(Failure::Configuration {
            key: "root",
            message: "another root than the host's takes containment.mounts, which does not work \
                      here"
                .to_owned(),
        });
    }
    kill_leftovers(&config)?;

    let sandbox_context = SandboxContext::new(&config, layers, cgroups)
        .map_err(failed("make the first process of actions"))?;
    let sandboxes = SandboxPool::open(sandbox_context).map_err(failed("start a thread"))?;
    let users = UserPool::new(&config.users);
    let added_variables = added_variables(&config, layers);
    let sources = RunnerSources {
        counts: Arc::default(),
        users: users.clone(),
        user_count: config.users.count,
        layers,
    };
    let kill_all_actions = CancellationToken::new();
    let drain = config.shutdown.drain_timeout.get();
    let context = Arc::new(run_context(config, sandboxes, sources.counts.clone())?);
    // Files for stdout and stderr are made for the action's user to write; everything else that is made has a mode
    // of its own.
    umask(Mode::empty());
    let service = RunnerService {
        users: users.clone(),
        allowed,
        added_variables,
        kill_all_actions: kill_all_actions.clone(),
        context: context.clone(),
    };
    let routes = Services::default()
        .add(EarlyHeadersService::new(service))
        .observable(&lifecycle.stopping())?;

    // Each command has a thread of the pool to itself.
    lifecycle.liveness_check("the pool of threads", {
        let runtime = tokio::runtime::Handle::current();
        move || {
            let (sender, answer) = std::sync::mpsc::channel();
            runtime.spawn_blocking(move || sender.send(()));
            let _ = answer.recv();
        }
    });
    let service_scope = format!(
        "for {} as users {} to {}",
        listener.address(),
        range.start,
        range.end - 1
    );
    lifecycle.ready(&format!("running commands {service_scope}"));
    let stopping = lifecycle.stopping();
    let observation = Observation {
        metrics: metrics::metrics(sources.clone()),
        readiness: Box::new({
            let stopping = stopping.clone();
            move || match stopping.is_cancelled() {
                true => Err("it stops".to_owned()),
                false => Ok(()),
            }
        }),
        status: Box::new(move || sources.status()),
    };
    let observed = daemon::serve_observation(listeners, observation, stopping.clone());
    let observed = tokio::spawn(observed);
    let line = || match (stopping.is_cancelled(), users.in_use()) {
        (true, users_in_use) => format!("draining: {users_in_use} commands still run"),
        (false, 0) => format!("idle, {service_scope}"),
        (false, users_in_use) => format!("{users_in_use} commands run, {service_scope}"),
    };
    let kill_after_drain = async {
        lifecycle.stopping().cancelled().await;
        tokio::time::sleep(drain).await;
        kill_all_actions.cancel();
        std::future::pending().await
    };
    let result = tokio::select! {
        // Callers are told what became of commands that had to be killed.
        result = daemon::serve(listener, routes, lifecycle.stopping(), drain + LEFTOVER_KILL_TIMEOUT) => result,
        () = lifecycle.keep_status(line) => Ok(()),
        () = kill_after_drain => Ok(()),
    };
    observed.abort();
    traces.flush().await;
    kill_all_actions.cancel();
    if !users.wait_all_returned(LEFTOVER_KILL_TIMEOUT).await {
        tracing::warn!("leaving although not everything that was killed is gone");
    }
    context.sandboxes.close();
    result
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::Environment {
        message: format!("could not {what}: {error}"),
    }
}

/// Keeps other runners from using the same users.
async fn lock_users(config: &Config) -> Result<UserRangeLock, Failure> {
    let taken = UserRangeLock::take(&config.users.range()).await;
    taken.map_err(|error| match error {
        UserRangeError::Taken(_) => Failure::Configuration {
            key: "users.first",
            message: format!("{error}; give each runner a range of its own"),
        },
        UserRangeError::Io(_) => Failure::Environment {
            message: error.to_string(),
        },
    })
}

/// Sets what this daemon's process needs, and keeps others from.
fn prepare_process() {
    // Each action takes some twenty descriptors; the usual soft limit is there for select(2) only, and
    // actions get limits of their own (`spawn`).
    let limit = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(limit).and_then(|(_, hard)| setrlimit(limit, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "could not raise the limit of descriptors");
    }
    // Neither a core file nor another user may hold what is in this process's memory: new
    // processes share it for a moment.
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Kills the processes that a runner which was killed left, and closes its actions' directories.
fn kill_leftovers(config: &Config) -> Result<(), Failure> {
    let range = config.users.range();
    for user in range.clone() {
        if !user_cleanup::kill_processes(user, LEFTOVER_KILL_TIMEOUT) {
            return Err(Failure::Environment {
                message: format!(
                    "could not kill the processes of user {user}, which is one of users.first and \
                     users.count"
                ),
            });
        }
    }
    action_directory_lock::close_leftovers(&config.build_directory, &range);
    Ok(())
}

/// What is added to the environments of actions.
fn added_variables(config: &Config, layers: Layers) -> AddedVariables {
    let build_directory = config.build_directory.to_string_lossy().into_owned();
    AddedVariables {
        view: match (&config.root, layers.contains(Layers::MOUNTS)) {
            (Root::Input, _) => BuildDirectoryView::InputRoot,
            (_, true) => BuildDirectoryView::OwnDirectory(build_directory),
            (_, false) => BuildDirectoryView::Whole(build_directory),
        },
        tmpdir: config.set_tmpdir_environment_variable,
        defaults: config.set_default_environment_variables,
    }
}

/// Makes what all actions share.
fn run_context(
    config: Config,
    sandboxes: SandboxPool,
    counts: Arc<RunCounts>,
) -> Result<RunContext, Failure> {
    let emulator = config.emulator.iter();
    let emulator = emulator.map(|text| CString::new(text.as_str()));
    let has_cleaning =
        !config.clean_temporary_directories.is_empty() || !config.run_command_cleaner.is_empty();
    let has_filter = sandboxes.context().layers.contains(Layers::SECCOMP);
    Ok(RunContext {
        counts,
        sandboxes,
        null: fs::File::open("/dev/null").map_err(failed("open /dev/null"))?,
        inherited: InheritedState {
            // SIGPIPE is ignored by Rust's runtime; the rest is as whoever started this daemon had it.
            ignored_signals: proc_self_status::bits("SigIgn:").unwrap_or(0),
            bounding_capabilities: proc_self_status::bits("CapBnd:").unwrap_or(u64::MAX),
        },
        pid_namespace: sandbox::daemon_pid_namespace().map_err(failed("open /proc/self/ns/pid"))?,
        seccomp_filter: has_filter
            .then(|| SeccompFilter::new(config.containment.allow_user_namespaces)),
        supplementary_groups: host_requirements::resolve_groups(&config.additional_groups)?
            .into_iter()
            .map(Gid::from_raw)
            .collect(),
        emulator: emulator
            .collect::<Result<_, _>>()
            .map_err(|_| Failure::Configuration {
                key: "emulator",
                message: "it has a NUL character".to_owned(),
            })?,
        idle_invoker: has_cleaning.then(|| {
            IdleInvoker::new(
                config.clean_temporary_directories.clone(),
                config.run_command_cleaner.clone(),
            )
        }),
        config,
    })
}
