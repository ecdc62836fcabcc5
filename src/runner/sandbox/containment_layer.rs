//! What a layer of containment is. Each has a file of its own, with its probe and what it prepares; `detect`
//! has the table of all.

use bitflags::bitflags;

use super::namespace_fd::NamespaceKind;
use crate::config::runner::{Config, Containment, Demand};

bitflags! {
    /// A set of layers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Layers: u32 {
        const CGROUPS = 1 << 0;
        const MOUNTS = 1 << 1;
        const PROCESSES = 1 << 2;
        const IPC = 1 << 3;
        const HOSTNAME = 1 << 4;
        const NETWORK = 1 << 5;
        const DEVICES = 1 << 6;
        const HIDDEN = 1 << 7;
        const SECCOMP = 1 << 8;
    }
}

/// One layer, as the log and `--check` tell of it.
#[derive(Debug)]
pub(super) struct Layer {
    pub flag: Layers,
    /// Its key in bb_runner.toml.
    pub key: &'static str,
    /// What the configuration says of it.
    pub demand: fn(&Containment) -> Demand,
    /// Layers without which this one cannot work.
    pub needs: Layers,
    pub probe: Probe,
    /// The namespace that `builder` unshares for each sandbox (namespaces(7)); `None` where the layer has none, or makes
    /// it itself.
    pub unshared_namespace: Option<NamespaceKind>,
    /// What is so when it is on, for the log.
    pub on: &'static str,
    /// What is so when it is off, for the log.
    pub off: &'static str,
}

/// How it is found out whether this host allows a layer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Probe {
    /// A sandbox is made that has this layer, and those that it needs, and no others.
    Sandbox,
    /// A function is asked. Its error says why the layer does not work.
    Function(fn(&Config) -> Result<(), String>),
}
