//! What would keep a worker from working, for `--check`.

use std::{path::Path, time::Duration};

use super::setup::{check_own, group_of, one_file_system, storage_options};
use crate::{
    config::{
        self, Diagnostics, DirectoryKind, directory_kind,
        worker::{Config, Runner},
    },
    daemon::{
        self, CheckReport, Credentials, Failure, Installation,
        disk::{self, blocking_path, nearest_directory},
    },
    proto::{
        remoteworker::{SynchronizeRequest, operation_queue_client::OperationQueueClient},
        runner::{CheckReadinessRequest, runner_client::RunnerClient},
    },
    storage::probe_servers,
};

const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Descriptors that one slot needs.
const DESCRIPTORS: u64 = 100;

/// What is wrong, although `run` goes on with it.
pub fn warnings(config: &Config, installation: &Installation, diagnostics: &mut Diagnostics) {
    installation.check_drain(
        config.shutdown.drain_timeout,
        config::Duration::seconds(0),
        diagnostics,
    );
    daemon::warn_client("scheduler.tls", &config.scheduler.tls, diagnostics);
    daemon::warn_client("storage.tls", &config.storage.tls, diagnostics);
    let cache = &config.cache;
    for (key, size) in [
        ("cache.maximum_size", cache.maximum_size),
        ("cache.minimum_free", cache.minimum_free),
    ] {
        installation.check_size(key, size, &cache.directory, diagnostics);
    }
    let slots: usize = config.runners.iter().map(Runner::slots).sum();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    if let Some(limit) = limit
        && slots as u64 * DESCRIPTORS > limit
    {
        diagnostics.add(
            "runners.concurrency",
            format!(
                "{slots} actions at a time need {} open files, and the limit is {limit}; lower it, or \
                 raise LimitNOFILE= of bb-worker.service",
                slots as u64 * DESCRIPTORS
            ),
        );
    }
    if let Some(runner) = installation.sibling::<config::runner::Config>("bb_runner") {
        check_runner(config, &runner, diagnostics);
    }
}

/// Of the runner that is configured in the same directory: what each of them says is right, but not
/// both.
fn check_runner(config: &Config, runner: &config::runner::Config, diagnostics: &mut Diagnostics) {
    let ours = config
        .runners
        .iter()
        .enumerate()
        .filter(|(_, ours)| ours.endpoint.is_at(&runner.listen));
    let mut slots_there = 0;
    let mut last = None;
    for (number, ours) in ours {
        slots_there += ours.slots();
        last = Some(number);
    }
    let Some(number) = last else { return };
    diagnostics.require(
        config.build_directory == runner.build_directory,
        "build_directory",
        format!(
            "the runner of {} looks for actions in {}; give both the same build_directory",
            runner.listen,
            runner.build_directory.display()
        ),
    );
    diagnostics.require(
        slots_there <= runner.users.count as usize,
        &format!("runners.{number}.concurrency"),
        format!(
            "{slots_there} actions at a time need as many users, and bb_runner.toml has {}; lower it, or raise users.count there",
            runner.users.count
        ),
    );
}

/// What would keep `run` from working. Leaves nothing changed.
pub async fn probe(config: &Config, installation: &Installation, report: &mut CheckReport) {
    let (cache, build) = (&config.cache.directory, &config.build_directory);
    let mut usable = true;
    for (key, path) in [("cache.directory", cache), ("build_directory", build)] {
        let wrong = check_writable(path)
            .err()
            .map(|message| Failure::Configuration { key, message });
        usable &= wrong.is_none();
        report.record(
            format!("{key}: {} can be written to", path.display()),
            wrong,
        );
        report.try_lock(installation, key, path);
    }
    if usable {
        let linkable = one_file_system(cache, build)
            .and_then(|()| check_links(&nearest_directory(cache), &nearest_directory(build)));
        report.record(
            "build_directory: files can be linked there from the cache",
            linkable.err(),
        );
    }
    report.record(
        "build_directory: the users of actions can pass to it",
        check_passable(build).err(),
    );
    if directory_kind(build) == DirectoryKind::Ordinary
        && let Err(failure) = check_own(build)
    {
        report.fail(failure);
    }
    if let Some(disk) = disk::space(cache)
        && disk.total
            < config
                .cache
                .maximum_size
                .get()
                .saturating_add(config.cache.minimum_free.get())
    {
        report.note(format!(
            "cache.maximum_size is not reached: {} of {} stay free",
            config.cache.minimum_free,
            daemon::disk::rounded_to_mib(disk.total)
        ));
    }
    for runner in &config.runners {
        if let Err(failure) = group_of(runner) {
            report.fail(failure);
        }
        let wrong = check_runner_answers(config, runner, usable).await.err();
        report.record(
            format!("runners.endpoint: {} answers", runner.endpoint),
            wrong,
        );
    }
    daemon::check_client("scheduler.tls", &config.scheduler.tls, report);
    daemon::check_client("storage.tls", &config.storage.tls, report);
    daemon::check_headers(config.scheduler.call_headers(), report);
    daemon::check_headers(config.storage.call_headers(), report);
    let places = config.storage.places();
    daemon::check_secrets(&places.secret_files(), report);
    daemon::check_client("traces.tls", &config.traces.tls, report);
    daemon::check_headers(config.traces.call_headers(), report);
    let credentials = Credentials::of("scheduler.tls", &config.scheduler.tls);
    let credentials = credentials
        .clone()
        .with_headers(config.scheduler.call_headers(), None)
        .unwrap_or(credentials);
    let channel = daemon::connect_with(&config.scheduler.endpoint, &credentials);
    let mut scheduler = OperationQueueClient::new(channel);
    // A worker that says nothing of itself is refused, which shows that a scheduler is there.
    let call = scheduler.synchronize(SynchronizeRequest::default());
    let wrong = match tokio::time::timeout(PROBE_TIMEOUT, call).await {
        Ok(Err(status)) if status.code() == tonic::Code::InvalidArgument => None,
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some(Failure::Configuration {
            key: "scheduler.endpoint",
            message: format!(
                "{} does not serve workers: {}; set it to the workers' port of bb_scheduler",
                config.scheduler.endpoint,
                match status.code() {
                    tonic::Code::Unimplemented => "what answers there is something else",
                    _ => status.message(),
                }
            ),
        }),
        Err(_) => Some(Failure::Configuration {
            key: "scheduler.endpoint",
            message: format!("{} does not answer", config.scheduler.endpoint),
        }),
    };
    report.record(
        format!(
            "scheduler.endpoint: {} serves workers",
            config.scheduler.endpoint
        ),
        wrong,
    );
    let credentials = Credentials::of("storage.tls", &config.storage.tls);
    let credentials = credentials
        .clone()
        .with_headers(config.storage.call_headers(), None)
        .unwrap_or(credentials);
    let credentials = credentials
        .clone()
        .with_secrets(places.secret_files(), None)
        .unwrap_or(credentials);
    let options = storage_options(config, credentials);
    let wrong = tokio::time::timeout(PROBE_TIMEOUT, probe_servers(&places, &options)).await;
    let wrong = wrong.unwrap_or_else(|_| {
        vec![Failure::Configuration {
            key: "storage.cas",
            message: format!("{} does not answer", config.storage.cas),
        }]
    });
    let what = match places.has_shards() {
        true => format!("storage: all of {} shards answer", places.shards.len()),
        false => format!("storage.cas: {} answers", config.storage.cas),
    };
    report.record(what, wrong);
}

/// Whether it is ready, and looks for actions where this worker lays them out.
async fn check_runner_answers(
    config: &Config,
    runner: &Runner,
    usable: bool,
) -> Result<(), Failure> {
    let key = "runners.endpoint";
    let mut client = RunnerClient::new(daemon::connect(&runner.endpoint));
    // The build directory itself.
    let check = client.check_readiness(CheckReadinessRequest::default());
    if let Some(message) = answer(&runner.endpoint, check).await {
        return Err(Failure::Configuration {
            key,
            message: format!(
                "{message}; is bb_runner running, and may this user connect to its socket?"
            ),
        });
    }
    if !usable || !config.build_directory.is_dir() {
        return Ok(());
    }
    let name = format!("bb_worker-check-{}", std::process::id());
    let path = config.build_directory.join(&name);
    if std::fs::create_dir(&path).is_err() {
        return Ok(());
    }
    let check = client.check_readiness(CheckReadinessRequest { path: name });
    let seen = answer(&runner.endpoint, check).await;
    let _ = std::fs::remove_dir(&path);
    match seen {
        None => Ok(()),
        Some(message) => Err(Failure::Configuration {
            key: "build_directory",
            message: format!(
                "the runner does not see what is made in {} ({message}); give bb_runner.toml the same build_directory",
                config.build_directory.display()
            ),
        }),
    }
}

/// A directory on the way that the users of actions are kept out of.
fn check_passable(build: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt;
    // The last one is the worker's own to open.
    let closed = build.ancestors().skip(1).find(|directory| {
        std::fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 == 0)
    });
    match closed {
        None => Ok(()),
        Some(directory) => Err(Failure::Configuration {
            key: "build_directory",
            message: format!(
                "the users of actions cannot pass {}; chmod o+x {0}, or choose another place",
                directory.display()
            ),
        }),
    }
}

async fn answer<T>(
    endpoint: &crate::config::Endpoint,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Option<String> {
    match tokio::time::timeout(PROBE_TIMEOUT, call).await {
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some(format!("{endpoint}: {}", status.message())),
        Err(_) => Some(format!("{endpoint} does not answer")),
    }
}

fn check_writable(path: &Path) -> Result<(), String> {
    if let Some(file) = blocking_path(path) {
        return Err(format!(
            "{} is no directory; choose another path",
            file.display()
        ));
    }
    let existing = nearest_directory(path);
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
