//! Which layers of containment this host allows.
//!
//! Each is tried alone when the daemon starts. One that does not work is left out where the
//! configuration says `auto`, and stops the daemon where it says `require`; a line tells of each.

use super::{
    builder::try_build,
    cgroups::{self, ActionCgroupParent},
    containment_layer::{Layer, Layers, Probe},
    devices, hidden_paths, ipc_namespace, mount_namespace, network_namespace, pid_namespace,
    sandbox_context::SandboxContext,
    seccomp, uts_namespace,
};
use crate::{
    config::runner::{Config, Demand},
    daemon::Failure,
};

/// All layers, each after those that it needs.
const LAYERS: [Layer; 9] = [
    cgroups::LAYER,
    mount_namespace::LAYER,
    pid_namespace::LAYER,
    ipc_namespace::LAYER,
    uts_namespace::LAYER,
    network_namespace::LAYER,
    devices::LAYER,
    hidden_paths::LAYER,
    seccomp::LAYER,
];

/// Enables the layers that are wanted and work here; the log tells of each. Returns them, and the parent of control
/// groups if those are among them. Fails when one that is required does not work.
pub(crate) fn enable_layers(
    config: &Config,
) -> Result<(Layers, Option<ActionCgroupParent>), Failure> {
    let mut found = Layers::empty();
    let mut cgroups = None;
    for layer in &LAYERS {
        let key = layer.key;
        let missing = match layer.flag {
            Layers::CGROUPS if is_wanted(config, layer) => cgroups::prepare(config)
                .map(|prepared| cgroups = Some(prepared))
                .err(),
            _ => missing(config, layer, found),
        };
        match missing {
            None => {
                found |= layer.flag;
                let directory = match layer.flag {
                    Layers::CGROUPS => cgroups.as_ref().map(ActionCgroupParent::directory),
                    _ => None,
                };
                let directory = directory.map(|path| tracing::field::display(path.display()));
                tracing::info!(directory, "{key} is on: {}", layer.on);
            }
            Some(_) if !is_wanted(config, layer) => {
                tracing::info!("{key} is off: {}", layer.off);
            }
            Some(reason) if is_required(config, layer) => {
                return Err(required_layer_missing(key, &reason));
            }
            Some(reason) => tracing::warn!("{key} is off, since {reason}: {}", layer.off),
        }
    }
    Ok((found, cgroups))
}

/// A failure for each layer that is required and does not work here.
pub(crate) fn check(config: &Config) -> Vec<Failure> {
    let mut found = Layers::empty();
    let mut failures = Vec::new();
    for layer in &LAYERS {
        match missing(config, layer, found) {
            None => found |= layer.flag,
            Some(reason) if is_required(config, layer) => {
                failures.push(required_layer_missing(layer.key, &reason));
            }
            Some(_) => {}
        }
    }
    failures
}

fn is_wanted(config: &Config, layer: &Layer) -> bool {
    (layer.demand)(&config.containment) != Demand::Off
}

fn is_required(config: &Config, layer: &Layer) -> bool {
    (layer.demand)(&config.containment) == Demand::Require
}

/// Why a layer is missing where those in `found` are on; `None` when it works.
fn missing(config: &Config, layer: &Layer, found: Layers) -> Option<String> {
    if !is_wanted(config, layer) {
        return Some("it is off in the configuration".to_owned());
    }
    if !found.contains(layer.needs) {
        return Some("it needs containment.mounts, which is off".to_owned());
    }
    let probed = match layer.probe {
        Probe::Function(ask) => ask(config),
        Probe::Sandbox => try_build_with(config, layer.flag | layer.needs),
    };
    probed.err()
}

/// Makes a sandbox with these layers only, and drops it.
fn try_build_with(config: &Config, layers: Layers) -> Result<(), String> {
    let mut config = config.clone();
    // That directory may come later, and says nothing about namespaces.
    if !config.build_directory.is_dir() {
        config.build_directory = "/tmp".into();
    }
    let context = SandboxContext::new(&config, layers, None).map_err(|error| error.to_string())?;
    try_build(&context).map_err(|error| error.to_string())
}

/// The failure of a layer that is required and does not work here.
fn required_layer_missing(key: &'static str, reason: &str) -> Failure {
    Failure::Configuration {
        key,
        message: format!("it is required, but {reason}; let the host allow it, or write \"auto\""),
    }
}
