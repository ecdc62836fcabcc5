//! bb_scheduler: queues the actions of clients, and hands them to workers.
//!
//! In the order to read it: `routing` and `action_routing` find out where an action goes; `queue` decides,
//! with `size_class`, and `shared_queue` lets calls meet in it. `execution` and `operations` serve clients,
//! whose names for operations are those of `operation_name`; `workers` serves workers, `state` and
//! `control` operators, with `drain_file`, and `web` people; `command` asks them; all of them with the refusals of `status`. `worker_log` and `completion_log` tell
//! what goes on, `live_output` and `output_stream` what actions print, and `statistics_store` keeps what executions came to.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use tonic::codec::CompressionEncoding;

mod action_routing;
mod action_trace;
mod command;
mod completion_log;
mod control;
mod drain_file;
mod execution;
mod live_output;
mod metrics;
mod operation_message;
pub mod operation_name;
mod operations;
mod output_stream;
pub mod queue;
pub mod routing;
mod shared_queue;
pub mod size_class;
mod state;
pub mod statistics_store;
mod status;
mod web;
mod worker_log;
mod workers;

use crate::{
    config::{
        self, Diagnostics, ListenAddress,
        scheduler::{Config, StorageLocation},
    },
    daemon::{
        self, CheckReport, Credentials, Failure, Installation, Lifecycle, PageLimits, Policy,
        Program, ServerLimits, Services, Tokens, traces::TraceExporter,
    },
    proto::{
        buildqueuestate::build_queue_state_server::BuildQueueStateServer,
        control::scheduler_control_server::SchedulerControlServer,
        live_output::live_output_server::LiveOutputServer,
        longrunning::operations_server::OperationsServer, reapi::execution_server::ExecutionServer,
        remoteworker::operation_queue_server::OperationQueueServer,
    },
    storage::{
        self, Backend, InitialSizeClassCache,
        serve::{Announcement, ByteStreamService},
    },
};
use action_routing::ActionRouting;
use control::ControlService;
use drain_file::DrainFile;
use execution::ExecutionService;
use live_output::{LiveOutput, LiveOutputService};
use operations::OperationsService;
use output_stream::OutputStreams;
use queue::Settings;
use shared_queue::SharedQueue;
use size_class::Analyzer;
use state::StateService;
use statistics_store::StatisticsStore;
use web::{History, Pages, Protection};

pub use command::ask;

pub const PROGRAM: Program = Program {
    name: "bb_scheduler",
    about: "Queues build actions of REAPI clients and hands them to workers; with an embedded store by default",
};

/// A worker's report carries a whole ExecuteResponse.
const LARGEST_REPORT: usize = 64 << 20;
/// An ExecuteRequest has a few names and a digest.
const LARGEST_REQUEST: usize = 1 << 20;

/// What is wrong, although `run` goes on with it.
pub fn warnings(config: &Config, installation: &Installation, diagnostics: &mut Diagnostics) {
    let none = config::Duration::seconds(0);
    installation.check_drain(config.shutdown.drain_timeout, none, diagnostics);
    for (name, unit, key, address) in sockets(config) {
        installation.check_socket(name, unit, key, address, diagnostics);
    }
    daemon::warn_grants(&config.grants, diagnostics);
    Tokens::warn(&config.tokens, diagnostics);
    daemon::warn_server("clients.tls", &config.clients.tls, diagnostics);
    daemon::warn_server("workers.tls", &config.workers.tls, diagnostics);
    daemon::warn_server("state.tls", &config.state.tls, diagnostics);
    daemon::warn_server("web.tls", &config.web.tls, diagnostics);
    daemon::warn_client("storage.tls", &config.storage.tls, diagnostics);
    if config.storage.places().has_embedded() {
        let embedded = &config.storage.embedded;
        let key = "storage.embedded.maximum_size";
        installation.check_size(key, embedded.maximum_size, &embedded.directory, diagnostics);
    }
}

/// Names of sockets, their units, and what they are used in place of.
fn sockets(config: &Config) -> Vec<(&'static str, &'static str, &'static str, &ListenAddress)> {
    let control = (
        "control",
        "bb-scheduler-control.socket",
        "control.listen",
        &config.control.listen,
    );
    let mut sockets = vec![
        (
            "clients",
            "bb-scheduler.socket",
            "clients.listen",
            &config.clients.listen,
        ),
        (
            "workers",
            "bb-scheduler-workers.socket",
            "workers.listen",
            &config.workers.listen,
        ),
        (
            "state",
            "bb-scheduler-state.socket",
            "state.listen",
            &config.state.listen,
        ),
        (
            "web",
            "bb-scheduler-web.socket",
            "web.listen",
            &config.web.listen,
        ),
    ];
    // Only tried where nobody chose it.
    sockets.extend((!config.control.is_default()).then_some(control));
    sockets
}

/// What would keep `run` from working.
pub async fn probe(config: &Config, installation: &Installation, report: &mut CheckReport) {
    for (_, unit, key, address) in sockets(config) {
        report.try_address(installation, unit, key, address);
    }
    Tokens::check(&config.tokens, report);
    daemon::check_server("clients.tls", &config.clients.tls, report);
    daemon::check_server("workers.tls", &config.workers.tls, report);
    daemon::check_server("state.tls", &config.state.tls, report);
    daemon::check_server("web.tls", &config.web.tls, report);
    daemon::check_client("storage.tls", &config.storage.tls, report);
    daemon::check_headers(config.storage.call_headers(), report);
    daemon::check_secrets(&config.storage.places().secret_files(), report);
    daemon::check_client("traces.tls", &config.traces.tls, report);
    daemon::check_headers(config.traces.exported().call_headers(), report);
    let state = config.state.directory.display();
    match DrainFile::check(&config.state.directory) {
        Ok(drains) => report.good(format!("state.directory: {state}, drains: {drains}")),
        // A start goes on all the same.
        Err(error) => report.note(format!(
            "state.directory: drains would not outlive the scheduler: {error}"
        )),
    }
    let mut failures = Backend::probe(&config.storage).await;
    let storage = &config.storage;
    if storage.places().has_embedded() {
        let embedded = &storage.embedded;
        let lock = embedded.directory.join("lock");
        report.try_lock(installation, "storage.embedded.directory", &lock);
        failures.retain(|failure| match failure {
            Failure::Configuration { key, message } if key.ends_with("maximum_size") => {
                let given = installation.explicit_keys().contains(key);
                if !given {
                    report.note(format!("{key}: {message}"));
                }
                // More than the whole disk is a warning's.
                given
                    && daemon::disk::space(&embedded.directory)
                        .is_none_or(|disk| embedded.maximum_size.get() <= disk.total)
            }
            Failure::Configuration { .. } => true,
            // Told of the lock, with who has it.
            Failure::Environment { .. } => false,
        });
    }
    let mut kinds = Vec::new();
    for place in [&storage.cas, &storage.action_cache] {
        let kind = match place {
            StorageLocation::Embedded => {
                format!("{} can be used", storage.embedded.directory.display())
            }
            StorageLocation::Endpoint(endpoint) => format!("{endpoint} answers"),
            StorageLocation::Shards => format!("all of {} shards answer", storage.shards.len()),
            StorageLocation::Objects(service) => format!("{} answers", service.name()),
        };
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let what = format!("storage: {}", kinds.join(", "));
    report.record(what, failures);
}

/// Runs until told to stop.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    daemon::raise_file_limit();
    let traces = TraceExporter::start("bb_scheduler", &config.traces.exported(), &lifecycle)?;
    let credentials = Credentials::open("storage.tls", &config.storage.tls, &lifecycle)?
        .with_headers(config.storage.call_headers(), Some(&lifecycle))?
        .with_secrets(config.storage.places().secret_files(), Some(&lifecycle))?;
    let place = config.storage.clone();
    let storage = tokio::task::spawn_blocking({
        let credentials = credentials.clone();
        move || Backend::open(&place, credentials)
    })
    .await
    .map_err(|error| Failure::Environment {
        message: format!("could not open the store: {error}"),
    })??;
    let stopping = lifecycle.stopping();
    let drain = config.shutdown.drain_timeout.get();
    let cache = &config.storage.initial_size_class_cache;
    let statistics =
        StatisticsStore::new(InitialSizeClassCache::open(cache, &storage, &credentials));
    let drains = DrainFile::new(&config.state.directory);
    let settings = Settings {
        drains: drains.read(),
        ..Settings::from(&config)
    };
    let queue = SharedQueue::new(settings, &statistics);
    let routing = Arc::new(ActionRouting::new(&config, storage.clone()));
    let policy = Policy::open(&config.grants, &config.tokens, &lifecycle)?;
    // Who calls there is told by the kernel.
    let no_tokens = config::tokens::Tokens::default();
    let control_grants = daemon::control_grants(&config.grants);
    let control_policy = Policy::open(&control_grants, &no_tokens, &lifecycle)?;
    lifecycle.apply_on_reload(&["grants", "tokens"], {
        let (policy, control_policy) = (policy.clone(), control_policy.clone());
        move |config: Config, lifecycle| {
            policy.replace(&config.grants, &config.tokens, lifecycle)?;
            let grants = daemon::control_grants(&config.grants);
            control_policy.replace(&grants, &no_tokens, lifecycle)
        }
    });
    let clients = daemon::listen("clients", "clients.listen", &config.clients.listen, None)?
        .with_tls(daemon::server_tls(
            "clients.tls",
            &config.clients.tls,
            &lifecycle,
        )?)
        .with_policy(&policy);
    let workers = daemon::listen("workers", "workers.listen", &config.workers.listen, None)?
        .with_tls(daemon::server_tls(
            "workers.tls",
            &config.workers.tls,
            &lifecycle,
        )?)
        .with_policy(&policy);
    let state = daemon::listen("state", "state.listen", &config.state.listen, None)?
        .with_tls(daemon::server_tls(
            "state.tls",
            &config.state.tls,
            &lifecycle,
        )?)
        .with_policy(&policy);
    let web = daemon::listen("web", "web.listen", &config.web.listen, None)?
        .with_tls(daemon::server_tls("web.tls", &config.web.tls, &lifecycle)?)
        .with_policy(&policy);
    let control = daemon::listen_if_possible(
        "control",
        "control.listen",
        &config.control.listen,
        config.control.is_default(),
        Some(daemon::control_permissions(&config.control.socket_group)?),
    )?
    .map(|listener| listener.with_policy(&control_policy));
    let mut addresses = BTreeMap::from([
        ("clients".to_owned(), clients.address()),
        ("workers".to_owned(), workers.address()),
        ("state".to_owned(), state.address()),
        ("web".to_owned(), web.address()),
    ]);
    if let Some(control) = &control {
        addresses.insert("control".to_owned(), control.address());
    }
    let status = format!(
        "serving clients on {}, workers on {}, operators on {}, pages on {}",
        clients.address(),
        workers.address(),
        state.address(),
        web.address()
    );
    let history = Arc::new(History::default());
    let live = Arc::new(LiveOutput::default());
    let pages_url = match config.web.url.is_empty() {
        true => web.url(),
        false => Some(config.web.url.clone()),
    };
    let execution = ExecutionService {
        queue: queue.clone(),
        storage: storage.clone(),
        scheduling: config.scheduling.clone(),
        routing: routing.clone(),
        analyzer: Analyzer::from(&config.scheduling.size_classes),
        statistics: statistics.clone(),
        lookups: history.lookups.clone(),
        live: live.clone(),
        scheduler: fastrand::u64(..),
        trace_sample_ratio: config.traces.sample_ratio,
        started: Instant::now(),
        stopping: stopping.clone(),
    };
    let operations = OperationsServer::new(OperationsService(execution.clone()))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let execution = ExecutionServer::new(execution)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let queue_state = BuildQueueStateServer::new(StateService {
        queue: queue.clone(),
        drains: drains.clone(),
        stopping: stopping.clone(),
    })
    .accept_compressed(CompressionEncoding::Gzip)
    .max_decoding_message_size(LARGEST_REQUEST);
    let scheduler_control = SchedulerControlServer::new(ControlService {
        queue: queue.clone(),
        storage: storage.clone(),
        started: SystemTime::now(),
        addresses,
        stopping: stopping.clone(),
    })
    .accept_compressed(CompressionEncoding::Gzip)
    .max_decoding_message_size(LARGEST_REQUEST);
    let operation_queue = OperationQueueServer::new(workers::OperationQueueService {
        queue: queue.clone(),
        routing,
        idle_interval: config.scheduling.idle_worker_synchronization_interval.get(),
        pages: pages_url,
        stopping: stopping.clone(),
    })
    .accept_compressed(CompressionEncoding::Gzip)
    .max_decoding_message_size(LARGEST_REPORT);
    let mut client_services = Services::default().add(execution).add(operations);
    let blobs = storage.needs_services().then(|| ByteStreamService {
        backend: storage.clone(),
    });
    client_services = client_services.add(storage::serve::byte_stream(OutputStreams {
        queue: queue.clone(),
        live: live.clone(),
        storage: storage.clone(),
        blobs,
        stopping: stopping.clone(),
    }));
    if storage.needs_services() {
        client_services = storage::serve::add_beside_byte_stream(client_services, &storage);
    }
    let client_routes = client_services
        .add(storage::serve::capabilities(Announcement {
            exec_enabled: true,
            storage: storage.needs_services().then(|| storage.clone()),
            chunks: storage::serve::serves_chunks(&storage),
        }))
        .observable(&stopping)?;
    let worker_routes = Services::default()
        .add(operation_queue)
        .add(LiveOutputServer::new(LiveOutputService {
            live: live.clone(),
            stopping: stopping.clone(),
        }))
        .observable(&stopping)?;
    let state_routes = Services::default()
        .add(queue_state)
        .add(scheduler_control)
        .observable(&stopping)?;
    let pages = web::router(Arc::new(Pages::new(
        queue.clone(),
        drains.clone(),
        storage.clone(),
        live,
        InitialSizeClassCache::open(cache, &storage, &credentials),
        history.clone(),
        Protection::new(&config.web.url, &daemon::hostname()),
    )));
    let default = ServerLimits::default();
    let limits = ServerLimits {
        calls: match config.callers.maximum_calls {
            0 => default.calls,
            calls => calls,
        },
        requests_per_second: config.callers.requests_per_second,
        bytes_per_second: config.callers.bytes_per_second.get(),
        ..default
    };
    let worker_limits = ServerLimits {
        largest_message: LARGEST_REPORT as u64,
        ..limits.clone()
    };
    lifecycle.liveness_check("the queue", {
        let queue = queue.clone();
        move || queue.wait_for_lock()
    });
    lifecycle.ready(&status);
    let ended = tokio::select! {
        () = queue.run_timers() => Ok(()),
        () = statistics.run() => Ok(()),
        () = drains.run(&queue) => Ok(()),
        () = history.run(&queue) => Ok(()),
        () = worker_log::run(&queue, &lifecycle, &status) => Ok(()),
        served = async {
            tokio::try_join!(
                daemon::serve_within(clients, client_routes, limits.clone(), stopping.clone(), drain),
                daemon::serve_within(
                    workers,
                    worker_routes,
                    worker_limits,
                    stopping.clone(),
                    drain
                ),
                daemon::serve_pages(
                    web,
                    pages,
                    PageLimits::default(),
                    stopping.clone(),
                    drain
                ),
                daemon::serve_within(state, state_routes.clone(), limits, stopping.clone(), drain),
                async {
                    match control {
                        Some(control) => {
                            daemon::serve(control, state_routes, stopping.clone(), drain).await
                        }
                        None => {
                            stopping.cancelled().await;
                            Ok(())
                        }
                    }
                },
            )
        } => served.map(|_| ()),
    };
    queue.log_totals();
    statistics.write_all().await;
    traces.flush().await;
    ended
}
