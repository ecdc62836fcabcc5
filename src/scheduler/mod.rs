//! bb_scheduler: queues the actions of clients, and hands them to workers.
//!
//! In the order to read it: `routing` and `action_routing` find out where an action goes; `queue` decides,
//! with `size_class`, and `shared_queue` lets calls meet in it. `execution` and `operations` serve clients,
//! whose names for operations are those of `operation_name`; `workers` serves workers, `state` and
//! `control` operators, with `drain_file`, and `web` people; `command` asks them; all of them with the
//! refusals of `status`. `listeners` are where all that is served, and `probe` looks for what would keep it
//! from being. `worker_log` and `completion_log` tell what goes on, `live_output` and `output_stream` what
//! actions print, and `statistics_store` keeps what executions came to.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use tonic::{codec::CompressionEncoding, service::Routes};

mod action_routing;
mod action_trace;
mod command;
mod completion_log;
mod control;
mod drain_file;
mod execution;
mod listeners;
mod live_output;
mod metrics;
mod operation_message;
pub mod operation_name;
mod operation_stream;
mod operations;
mod output_stream;
mod probe;
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
    config::scheduler::Config,
    daemon::{self, Credentials, Failure, Lifecycle, Program, Services, traces::TraceExporter},
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
use listeners::{LARGEST_REPORT, ListenerRoutes, Listeners};
use live_output::{LiveOutput, LiveOutputService};
use operations::OperationsService;
use output_stream::OutputStreams;
use queue::Settings;
use shared_queue::SharedQueue;
use size_class::Analyzer;
use state::StateService;
use statistics_store::StatisticsStore;
use web::{History, Pages, Protection};
use workers::OperationQueueService;

pub use command::ask;
pub use probe::{probe, warnings};

pub const PROGRAM: Program = Program {
    name: "bb_scheduler",
    about: "Queues build actions of REAPI clients and hands them to workers; with an embedded store by default",
    processors_per_thread: 1,
};

/// An ExecuteRequest has a few names and a digest.
const LARGEST_REQUEST: usize = 1 << 20;

/// Runs until told to stop.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    daemon::raise_file_limit();
    let traces = TraceExporter::start("bb_scheduler", &config.traces.exported(), &lifecycle)?;
    let credentials = Credentials::open("storage.tls", &config.storage.tls, &lifecycle)?
        .with_headers(config.storage.call_headers(), Some(&lifecycle))?
        .with_secrets(config.storage.places().secret_files(), Some(&lifecycle))?;
    let storage = open_storage(&config, &credentials).await?;
    let stopping = lifecycle.stopping();
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
    let listeners = Listeners::open(&config, &lifecycle)?;
    let status = listeners.status();
    let history = Arc::new(History::default());
    let live = Arc::new(LiveOutput::default());
    let pages_url = match config.web.url.is_empty() {
        true => listeners.web.url(),
        false => Some(config.web.url.clone()),
    };
    let execution = ExecutionService {
        queue: queue.clone(),
        storage: storage.clone(),
        scheduling: Arc::new(config.scheduling.clone()),
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
    let routes = ListenerRoutes {
        clients: client_routes(execution, &storage)?,
        workers: worker_routes(
            OperationQueueService {
                queue: queue.clone(),
                routing,
                idle_interval: config.scheduling.idle_worker_synchronization_interval.get(),
                pages: pages_url,
                stopping: stopping.clone(),
            },
            live.clone(),
        )?,
        state: state_routes(
            StateService {
                queue: queue.clone(),
                drains: drains.clone(),
                stopping: stopping.clone(),
            },
            ControlService {
                queue: queue.clone(),
                storage: storage.clone(),
                started: SystemTime::now(),
                addresses: listeners.addresses(),
                stopping: stopping.clone(),
            },
        )?,
    };
    let pages = web::router(Arc::new(Pages::new(
        queue.clone(),
        drains.clone(),
        storage.clone(),
        live,
        InitialSizeClassCache::open(cache, &storage, &credentials),
        history.clone(),
        Protection::new(&config.web.url, &daemon::hostname()),
    )));
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
        served = listeners.serve(&config, routes, pages, &stopping) => served,
    };
    queue.log_totals();
    statistics.write_all().await;
    traces.flush().await;
    ended
}

async fn open_storage(config: &Config, credentials: &Credentials) -> Result<Backend, Failure> {
    let (place, credentials) = (config.storage.clone(), credentials.clone());
    tokio::task::spawn_blocking(move || Backend::open(&place, credentials))
        .await
        .map_err(|error| Failure::Environment {
            message: format!("could not open the store: {error}"),
        })?
}

fn client_routes(execution: ExecutionService, storage: &Backend) -> Result<Routes, Failure> {
    let stopping = execution.stopping.clone();
    let streams = OutputStreams {
        queue: execution.queue.clone(),
        live: execution.live.clone(),
        storage: storage.clone(),
        blobs: storage.needs_services().then(|| ByteStreamService {
            backend: storage.clone(),
        }),
        stopping: stopping.clone(),
    };
    let operations = OperationsServer::new(OperationsService(execution.clone()))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let execution = ExecutionServer::new(execution)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let mut services = Services::default()
        .add(execution)
        .add(operations)
        .add(storage::serve::byte_stream(streams));
    if storage.needs_services() {
        services = storage::serve::add_beside_byte_stream(services, storage);
    }
    services
        .add(storage::serve::capabilities(Announcement {
            exec_enabled: true,
            storage: storage.needs_services().then(|| storage.clone()),
            chunks: storage::serve::serves_chunks(storage),
        }))
        .observable(&stopping)
}

fn worker_routes(service: OperationQueueService, live: Arc<LiveOutput>) -> Result<Routes, Failure> {
    let stopping = service.stopping.clone();
    let operation_queue = OperationQueueServer::new(service)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REPORT);
    let live_output = LiveOutputServer::new(LiveOutputService {
        live,
        stopping: stopping.clone(),
    });
    Services::default()
        .add(operation_queue)
        .add(live_output)
        .observable(&stopping)
}

fn state_routes(state: StateService, control: ControlService) -> Result<Routes, Failure> {
    let stopping = control.stopping.clone();
    let queue_state = BuildQueueStateServer::new(state)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let scheduler_control = SchedulerControlServer::new(control)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    Services::default()
        .add(queue_state)
        .add(scheduler_control)
        .observable(&stopping)
}
