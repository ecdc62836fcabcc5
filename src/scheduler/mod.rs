//! bb_scheduler: queues the actions of clients, and hands them to workers.
//!
//! `queue` decides, `shared` lets calls meet in it, `service` speaks the protocols.

use std::{num::NonZeroUsize, sync::Arc};

use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes};
use tonic_health::ServingStatus;

pub mod queue;
mod service;
mod shared;

use crate::{
    config::scheduler::{Config, StoragePlace},
    daemon::{self, Failure, Life, Program},
    proto::{
        self,
        reapi::{capabilities_server::CapabilitiesServer, execution_server::ExecutionServer},
        remoteworker::operation_queue_server::OperationQueueServer,
    },
    storage::{Storage, remote},
};
use queue::Settings;
use shared::SharedQueue;

pub const PROGRAM: Program = Program {
    name: "bb_scheduler",
    about: "Queues build actions of REAPI clients and hands them to workers; with an embedded store by default",
};

/// A worker's report carries a whole ExecuteResponse.
const LARGEST_REPORT: usize = 64 << 20;
/// An ExecuteRequest has a few names and a digest.
const LARGEST_REQUEST: usize = 1 << 20;

/// What would keep `run` from working.
pub async fn probe(config: &Config) -> Vec<Failure> {
    let mut failures = Vec::new();
    for (name, key, address) in [
        ("clients", "clients.listen", &config.clients.listen),
        ("workers", "workers.listen", &config.workers.listen),
    ] {
        failures.extend(daemon::listen(name, key, address, None).err());
    }
    match storage(config) {
        Ok(Storage::Remote(client)) => {
            if let Err(error) = client.probe().await {
                failures.push(Failure::Environment {
                    message: format!("could not use the storage of storage.cas: {error}"),
                });
            }
        }
        Err(failure) => failures.push(failure),
    }
    failures
}

/// Runs until told to stop.
pub async fn run(config: Config, life: Life) -> Result<(), Failure> {
    let storage = storage(&config)?;
    let stopping = life.stopping();
    let drain = config.shutdown.drain_timeout.get();
    let queue = SharedQueue::new(Settings::from(&config.scheduling));
    let clients = daemon::listen("clients", "clients.listen", &config.clients.listen, None)?;
    let workers = daemon::listen("workers", "workers.listen", &config.workers.listen, None)?;
    let status = format!(
        "serving clients on {}, workers on {}",
        clients.address(),
        workers.address()
    );
    let for_clients = Arc::new(service::Clients {
        queue: queue.clone(),
        storage,
        scheduling: config.scheduling.clone(),
        stopping: stopping.clone(),
    });
    let for_workers = service::Workers {
        queue: queue.clone(),
        idle_interval: config.scheduling.idle_worker_synchronization_interval.get(),
        stopping: stopping.clone(),
    };
    let client_routes = observable(
        &[
            <ExecutionServer<service::Clients> as NamedService>::NAME,
            <CapabilitiesServer<service::Clients> as NamedService>::NAME,
        ],
        &stopping,
    )?
    .add_service(
        ExecutionServer::from_arc(for_clients.clone()).max_decoding_message_size(LARGEST_REQUEST),
    )
    .add_service(CapabilitiesServer::from_arc(for_clients));
    let worker_routes = observable(
        &[<OperationQueueServer<service::Workers> as NamedService>::NAME],
        &stopping,
    )?
    .add_service(OperationQueueServer::new(for_workers).max_decoding_message_size(LARGEST_REPORT));
    life.ready(&status);
    tokio::select! {
        () = queue.keep_time() => Ok(()),
        served = async {
            tokio::try_join!(
                daemon::serve(clients, client_routes, stopping.clone(), drain),
                daemon::serve(workers, worker_routes, stopping.clone(), drain),
            )
        } => served.map(|_| ()),
    }
}

fn storage(config: &Config) -> Result<Storage, Failure> {
    match (&config.storage.cas, &config.storage.action_cache) {
        (StoragePlace::Endpoint(cas), StoragePlace::Endpoint(action_cache)) => {
            let concurrency = NonZeroUsize::new(256).unwrap_or(NonZeroUsize::MIN);
            let options = remote::Options {
                download_concurrency: concurrency,
                upload_concurrency: concurrency,
            };
            Ok(Storage::Remote(remote::Client::connect(
                cas,
                action_cache,
                options,
            )))
        }
        _ => Err(Failure::Configuration {
            key: "storage.cas",
            message: "there is no embedded store yet; name an endpoint".to_owned(),
        }),
    }
}

/// Health and reflection, which every server has. From `stopping` on, nothing is healthy.
fn observable(services: &[&'static str], stopping: &CancellationToken) -> Result<Routes, Failure> {
    let reflect = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
    };
    let broken = |error: tonic_reflection::server::Error| Failure::Environment {
        message: format!("could not describe the services: {error}"),
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut names = vec![""];
    names.extend(services);
    let stopping = stopping.clone();
    tokio::spawn(async move {
        for name in &names {
            let serving = ServingStatus::Serving;
            reporter.set_service_status(name, serving).await;
        }
        stopping.cancelled().await;
        for name in &names {
            let leaving = ServingStatus::NotServing;
            reporter.set_service_status(name, leaving).await;
        }
    });
    Ok(Routes::new(health)
        .add_service(reflect().build_v1().map_err(broken)?)
        .add_service(reflect().build_v1alpha().map_err(broken)?))
}
