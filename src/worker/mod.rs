//! The worker: lays out input roots, has a runner run commands in them, uploads their outputs.
//!
//! To be read in this order:
//!
//! - `slot_loop` serves one slot as `slot`, which is pure, says; `task` is what a scheduler asks for.
//! - `execute` is one action, in order: `inputs` makes its root, `runner_client` knows of its runner,
//!   `outputs` collects what it left, `response_size` and `completion_log` tell of it; `command` is what
//!   it runs, and `fault` why it has no result.
//! - `live_output` has what actions print read meanwhile, and `browser_link` says where results are looked
//!   at; `metrics` and `execution_metrics` are its numbers, and `commands` ask it.
//! - `availability` says whether slots take work, as `health`, which is pure, decides.
//! - `setup` is a worker's start, `probe` what `--check` tries, `status_line` what systemctl shows.
//! - `beneath` and `attributes` handle what actions may have made; `blocking` has threads for
//!   it; `lru` is for caches.

use std::sync::Arc;

use self::{
    availability::Availability,
    browser_link::BrowserUrl,
    execute::Executor,
    execution_metrics::ExecutionMetrics,
    inputs::{
        InputRoots,
        directory_cache::DirectoryCache,
        file_cache::{CreateMode, Verifier},
    },
    live_output::RunningOutputs,
    metrics::WorkerSources,
    status_line::StatusLine,
};
use crate::{
    config::worker::{Config, Inputs, Runner},
    daemon::{self, Credentials, Failure, Lifecycle, Observation, Program, traces::TraceExporter},
    proto::runner::runner_client::RunnerClient,
    storage::Backend,
};

mod attributes;
pub mod availability;
pub mod beneath;
mod blocking;
pub mod browser_link;
pub mod command;
mod commands;
mod completion_log;
pub mod execute;
mod execution_metrics;
mod execution_spans;
pub mod fault;
mod fencing;
pub mod health;
pub mod inputs;
pub mod live_output;
pub mod lru;
mod metrics;
pub mod outputs;
mod probe;
pub mod response_size;
mod runner_client;
mod setup;
pub mod slot;
pub mod slot_loop;
mod status_line;
pub mod task;

pub use commands::ask;
pub use probe::{probe, warnings};

pub const PROGRAM: Program = Program {
    name: "bb_worker",
    about: "Lays out input roots, has a runner run build actions in them, and uploads their outputs",
    processors_per_thread: 4,
};

/// How long a start waits for runner, scheduler and storage before it says that it is ready without them.
const SERVING_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// How often it looks whether they have answered.
const READINESS_INTERVAL: std::time::Duration = std::time::Duration::from_millis(50);
/// How long a slot may take until its loop runs.
const START_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Runs until told to stop, then until the actions that are running have ended.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    daemon::raise_file_limit();
    let (port, socket) = (&config.metrics, &config.control);
    let listeners = daemon::observation_listeners(
        (&port.listen, port.is_default()),
        (&socket.listen, socket.is_default(), &socket.socket_group),
    )?;
    let slots: usize = config.runners.iter().map(Runner::slots).sum();
    let traces = TraceExporter::start("bb_worker", &config.traces, &lifecycle)?;
    let credentials = Credentials::open("storage.tls", &config.storage.tls, &lifecycle)?
        .with_headers(config.storage.call_headers(), Some(&lifecycle))?
        .with_secrets(config.storage.places().secret_files(), Some(&lifecycle))?;
    let storage = setup::connect_storage(&config, credentials)?;
    let setup::OpenedDirectories {
        cache,
        build_directory,
        token,
    } = setup::open_directories(&config, slots, &storage).await?;
    let (files, bytes) = cache.usage();
    tracing::info!(files, bytes, directory = %cache.path().display(), "opened the cache");
    let rate = config.cache.verification_rate.get();
    if rate > 0 {
        let started = Verifier::new(&cache).start(rate);
        started.map_err(|error| Failure::Environment {
            message: format!("could not start a thread that verifies the cache: {error}"),
        })?;
    }
    lifecycle.liveness_check("the cache", {
        let cache = cache.clone();
        move || {
            cache.usage();
        }
    });
    let directories = Arc::new(DirectoryCache::new(
        storage.clone(),
        config.storage.maximum_message_size.get(),
        config.cache.maximum_directories_size.get(),
    ));
    let credentials = Credentials::open("scheduler.tls", &config.scheduler.tls, &lifecycle)?
        .with_headers(config.scheduler.call_headers(), Some(&lifecycle))?;
    let scheduler = daemon::connect_with(&config.scheduler.endpoint, &credentials);
    let mut executors = Vec::new();
    let executions = Arc::new(ExecutionMetrics::default());
    let running = Arc::new(RunningOutputs::default());
    let mut live_outputs = tokio::task::JoinSet::new();
    let status_line = Arc::new(StatusLine::new(&config.scheduler.endpoint, slots));
    let mut clients = tokio::task::JoinSet::new();
    for runner in &config.runners {
        let identities = setup::identities(runner)?;
        tracing::info!(
            runner = %runner.endpoint,
            inputs = ?runner.inputs,
            shares_blocks = cache.supports_reflinks(),
            "{}",
            describe_inputs(runner.inputs, cache.create_mode(runner.inputs))
        );
        let executor = Arc::new(Executor {
            storage: storage.clone(),
            inputs: InputRoots {
                storage: storage.clone(),
                cache: cache.clone(),
                directories: directories.clone(),
                build_directory: build_directory.clone(),
                inputs: runner.inputs,
                group: setup::group_of(runner)?,
            },
            runner: RunnerClient::new(daemon::connect(&runner.endpoint)),
            availability: Availability::new(&runner.endpoint),
            workers: identities
                .iter()
                .map(|identity| serde_json::to_string(&identity.worker_id).unwrap_or_default())
                .collect(),
            environment_variables: runner.environment_variables.clone(),
            force_upload_trees_and_directories: config.storage.force_upload_trees_and_directories,
            outputs: config.outputs.clone(),
            metrics: executions.clone(),
            browser_url: BrowserUrl::new(&config.storage.browser_url),
            running: running.clone(),
        });
        executors.push(executor.clone());
        live_outputs.spawn(live_output::run(
            scheduler.clone(),
            executor.workers.clone(),
            runner.instance_name_prefix.clone(),
            running.clone(),
            config.build_directory.clone(),
            status_line.clone(),
            lifecycle.stopping(),
        ));
        for (slot, identity) in identities.into_iter().enumerate() {
            clients.spawn(slot_loop::run(
                scheduler.clone(),
                identity,
                token,
                executor.clone(),
                slot,
                lifecycle.stopping(),
                config.shutdown.drain_timeout.get(),
                lifecycle.heartbeat(format!("slot {slot}"), START_TIMEOUT),
                status_line.clone(),
            ));
        }
    }
    let stopping = lifecycle.stopping();
    let sources = WorkerSources {
        executions,
        cache: cache.clone(),
        build_directory: build_directory.clone(),
        executors: executors.clone(),
        status_line: status_line.clone(),
    };
    let observation = Observation {
        metrics: metrics::metrics(sources.clone()),
        readiness: Box::new({
            let sources = sources.clone();
            move || sources.readiness()
        }),
        status: Box::new({
            let stopping = stopping.clone();
            move || sources.status(stopping.is_cancelled())
        }),
    };
    let observed = tokio::spawn(daemon::serve_observation(
        listeners,
        observation,
        stopping.clone(),
    ));
    tokio::select! {
        () = serving(&status_line, &storage) => {}
        () = tokio::time::sleep(SERVING_TIMEOUT) => {}
        () = stopping.cancelled() => {}
    }
    lifecycle.ready(&match status_line.readiness() {
        Ok(()) => format!(
            "Serving {slots} slots of scheduler {}",
            config.scheduler.endpoint
        ),
        // A host whose scheduler is not there yet is no reason to fail its installation or its boot.
        Err(reason) => format!("not serving yet: {reason}"),
    });
    // What did not answer so far may do so later.
    let late = tokio::spawn({
        let status_line = status_line.clone();
        async move { serving(&status_line, &storage).await }
    });
    let line = || {
        let line = status_line.line(stopping.is_cancelled());
        let troubles = executors
            .iter()
            .filter_map(|executor| executor.availability.trouble())
            .chain(build_directory.describe_reuse_suspension(std::time::Instant::now()));
        troubles.fold(line, |line, trouble| format!("{line}; {trouble}"))
    };
    tokio::select! {
        () = async { while clients.join_next().await.is_some() {} } => {}
        () = lifecycle.keep_status(line) => {}
    }
    late.abort();
    observed.abort();
    live_outputs.abort_all();
    tracing::info!("laid out {}", build_directory.lay_out_counts());
    tracing::info!("verified {}", cache.verified());
    traces.flush().await;
    Ok(())
}

/// Returns when runner, scheduler and storage have answered.
async fn serving(status_line: &StatusLine, storage: &Backend) {
    while storage.answers().await.is_err() {
        tokio::time::sleep(READINESS_INTERVAL).await;
    }
    status_line.storage_answered();
    while status_line.readiness().is_err() {
        tokio::time::sleep(READINESS_INTERVAL).await;
    }
}

fn describe_inputs(inputs: Inputs, create_mode: CreateMode) -> &'static str {
    match (inputs, create_mode) {
        (_, CreateMode::Reflink) => "input files are reflinks of cached ones",
        (Inputs::Shared, _) => {
            "input files are hard links to cached ones, since the file system has no reflinks; flock(2) on one waits for other actions that have the same file"
        }
        (Inputs::HardLinks, _) => {
            "input files are hard links to cached ones; flock(2) on one waits for other actions that have the same file"
        }
        (Inputs::Private, _) => {
            "input files are the actions' own, and each input root is made anew"
        }
    }
}
