//! Layers of containment: which there are, and which of them this host allows.
//!
//! Each is tried alone when the daemon starts. One that does not work is left out where the
//! configuration says `auto`, and stops the daemon where it says `require`; a line tells of each.

use super::room::Plan;
use crate::{
    config::runner::{Config, Containment, Demand},
    daemon::Failure,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Mounts,
    Processes,
    Ipc,
    Hostname,
    Network,
    Devices,
    Hidden,
    Seccomp,
}

/// A set of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers(u8);

struct Description {
    layer: Layer,
    key: &'static str,
    demand: fn(&Containment) -> Demand,
    /// What it is part of.
    needs_mounts: bool,
    on: &'static str,
    off: &'static str,
}

/// In the order of which each may need the one before.
const LAYERS: [Description; 8] = [
    Description {
        layer: Layer::Mounts,
        key: "containment.mounts",
        demand: |containment| containment.mounts,
        needs_mounts: false,
        on: "actions see the host's files read-only, and have their own directories at constant paths",
        off: "actions share /tmp, /var/tmp and /dev/shm, where what they leave is removed, and write \
              wherever the host lets every user write",
    },
    Description {
        layer: Layer::Processes,
        key: "containment.processes",
        demand: |containment| containment.processes,
        needs_mounts: true,
        on: "actions see their own processes only, and the kernel ends all of them together",
        off: "actions see the host's processes; their own are found by control group and user",
    },
    Description {
        layer: Layer::Ipc,
        key: "containment.ipc",
        demand: |containment| containment.ipc,
        needs_mounts: false,
        on: "actions have System V IPC and message queues of their own",
        off: "actions share System V IPC and message queues; what they leave is removed",
    },
    Description {
        layer: Layer::Hostname,
        key: "containment.hostname",
        demand: |containment| containment.hostname,
        needs_mounts: false,
        on: "actions see localhost as the host's name",
        off: "actions see the host's name",
    },
    Description {
        layer: Layer::Network,
        key: "containment.network",
        demand: |containment| containment.network.demand(),
        needs_mounts: false,
        on: "actions have a loopback interface of their own and no other network",
        off: "actions use the host's network, its loopback interface and abstract sockets included",
    },
    Description {
        layer: Layer::Devices,
        key: "containment.devices",
        demand: |containment| containment.devices,
        needs_mounts: true,
        on: "actions have a /dev of their own with null, zero, full, random, urandom, tty and terminals",
        off: "actions see the host's devices, as far as their permissions let them",
    },
    Description {
        layer: Layer::Hidden,
        key: "containment.hidden",
        demand: |containment| containment.hidden,
        needs_mounts: true,
        on: "containment.hidden_paths are empty for actions",
        off: "actions see the daemons' directories and sockets, as far as their permissions let them",
    },
    Description {
        layer: Layer::Seccomp,
        key: "containment.seccomp",
        demand: |containment| containment.seccomp,
        needs_mounts: false,
        on: "system calls that builds never need are refused",
        off: "actions may use all system calls",
    },
];

impl Layers {
    pub const NONE: Layers = Layers(0);

    pub fn has(self, layer: Layer) -> bool {
        self.0 & 1 << layer as u8 != 0
    }

    #[must_use]
    pub fn with(self, layer: Layer) -> Self {
        Layers(self.0 | 1 << layer as u8)
    }

    /// Those that are wanted and work here, and a failure for each that is required and does not.
    pub fn find(config: &Config, tell: bool) -> (Self, Vec<Failure>) {
        let mut found = Layers::NONE;
        let mut failures = Vec::new();
        for description in &LAYERS {
            let demand = (description.demand)(&config.containment);
            let missing = if demand == Demand::Off {
                Some("it is off in the configuration".to_owned())
            } else if description.needs_mounts && !found.has(Layer::Mounts) {
                Some("it needs containment.mounts, which is off".to_owned())
            } else {
                try_out(config, description).err()
            };
            let key = description.key;
            match missing {
                None => {
                    found = found.with(description.layer);
                    if tell {
                        tracing::info!("{key} is on: {}", description.on);
                    }
                }
                Some(reason) if demand == Demand::Require => failures.push(unmet(key, &reason)),
                Some(_) if tell && demand == Demand::Off => {
                    tracing::info!("{key} is off: {}", description.off);
                }
                Some(reason) if tell => {
                    tracing::warn!("{key} is off, since {reason}: {}", description.off);
                }
                Some(_) => {}
            }
        }
        (found, failures)
    }
}

/// What is required does not work here.
pub fn unmet(key: &'static str, reason: &str) -> Failure {
    Failure::Configuration {
        key,
        message: format!("it is required, but {reason}; let the host allow it, or write \"auto\""),
    }
}

fn try_out(config: &Config, description: &Description) -> Result<(), String> {
    if description.layer == Layer::Seccomp {
        // A kernel that was built without it has no such field.
        return super::status_bits("Seccomp:")
            .map(drop)
            .ok_or_else(|| "this kernel has no seccomp filters".to_owned());
    }
    let mut layers = Layers::NONE.with(description.layer);
    if description.needs_mounts {
        layers = layers.with(Layer::Mounts);
    }
    let mut config = config.clone();
    // It may come later, and says nothing about namespaces.
    if !config.build_directory.is_dir() {
        config.build_directory = "/tmp".into();
    }
    let plan = Plan::new(&config, layers, None).map_err(|error| error.to_string())?;
    plan.try_out().map_err(|error| error.to_string())
}
