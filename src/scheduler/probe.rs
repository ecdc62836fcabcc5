//! What `--check` tries of a scheduler's configuration, and what a start warns of.

use super::drain_file::DrainFile;
use crate::{
    config::{
        self, Diagnostics, ListenAddress,
        scheduler::{Config, StorageLocation},
    },
    daemon::{self, CheckReport, Failure, Installation, Tokens},
    storage::Backend,
};

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
