//! What would keep a worker from working, for `--check`.

use std::{path::Path, time::Duration};

use super::{connect_storage, existing, group_of, one_file_system, refuse_equal_slots};
use crate::{
    config::worker::Config,
    daemon::{self, Failure},
    proto::{
        remoteworker::{SynchronizeRequest, operation_queue_client::OperationQueueClient},
        runner::{CheckReadinessRequest, runner_client::RunnerClient},
    },
};

const TIMEOUT: Duration = Duration::from_secs(10);

/// What would keep `run` from working. Leaves nothing changed.
pub async fn probe(config: &Config) -> Vec<Failure> {
    let mut failures = Vec::new();
    failures.extend(refuse_equal_slots(config).err());
    let (cache, build) = (&config.cache.directory, &config.build_directory);
    let mut usable = true;
    for (key, path) in [("cache.directory", cache), ("build_directory", build)] {
        if let Err(message) = check_writable(path) {
            failures.push(Failure::Configuration { key, message });
            usable = false;
        }
    }
    if usable {
        let (cache, build) = (existing(cache), existing(build));
        let linkable = one_file_system(&cache, &build).and_then(|()| check_links(&cache, &build));
        failures.extend(linkable.err());
    }
    for runner in &config.runners {
        failures.extend(group_of(runner).err());
        let mut client = RunnerClient::new(daemon::connect(&runner.endpoint));
        // The build directory itself.
        let check = client.check_readiness(CheckReadinessRequest::default());
        if let Some(message) = answer(&runner.endpoint, check).await {
            failures.push(Failure::Configuration {
                key: "runners.endpoint",
                message: format!(
                    "{message}; is bb_runner running, and may this user connect to its socket?"
                ),
            });
        }
    }
    let mut scheduler = OperationQueueClient::new(daemon::connect(&config.scheduler.endpoint));
    // A worker that says nothing of itself is refused, which shows that a scheduler is there.
    let call = scheduler.synchronize(SynchronizeRequest::default());
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(Err(status)) if status.code() == tonic::Code::InvalidArgument => {}
        Ok(Ok(_)) => {}
        Ok(Err(status)) => failures.push(Failure::Configuration {
            key: "scheduler.endpoint",
            message: format!(
                "{} does not serve workers: {}; set it to the workers' port of bb_scheduler",
                config.scheduler.endpoint,
                status.message()
            ),
        }),
        Err(_) => failures.push(Failure::Configuration {
            key: "scheduler.endpoint",
            message: format!("{} does not answer", config.scheduler.endpoint),
        }),
    }
    let storage = connect_storage(config);
    match tokio::time::timeout(TIMEOUT, storage.probe()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => failures.push(Failure::Configuration {
            key: "storage.cas",
            message: format!("{}: {error}", config.storage.cas),
        }),
        Err(_) => failures.push(Failure::Configuration {
            key: "storage.cas",
            message: format!("{} does not answer", config.storage.cas),
        }),
    }
    failures
}

async fn answer<T>(
    endpoint: &crate::config::Endpoint,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Option<String> {
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some(format!("{endpoint}: {}", status.message())),
        Err(_) => Some(format!("{endpoint} does not answer")),
    }
}

fn check_writable(path: &Path) -> Result<(), String> {
    let existing = existing(path);
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(&existing, access).map_err(|error| {
        let (existing, path) = (existing.display(), path.display());
        format!("{path} cannot be made or written to ({existing}: {error}); let the worker's user own it")
    })
}

/// Makes a hard link the way that input files are, and removes it.
fn check_links(cache: &Path, build: &Path) -> Result<(), Failure> {
    let name = format!(".bb_worker-check-{}", std::process::id());
    let (from, to) = (cache.join(&name), build.join(format!("{name}-link")));
    let linked = std::fs::File::create_new(&from).and_then(|_| std::fs::hard_link(&from, &to));
    let _ = std::fs::remove_file(&to);
    let _ = std::fs::remove_file(&from);
    linked.map_err(|error| Failure::Configuration {
        key: "build_directory",
        message: format!(
            "no hard link could be made from {} to {}: {error}; both must be on one file system that has hard links",
            from.display(),
            to.display()
        ),
    })
}
