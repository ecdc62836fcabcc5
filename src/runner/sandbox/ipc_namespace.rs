//! The layer `containment.ipc`: System V IPC and POSIX message queues of an action's own
//! (ipc_namespaces(7)). There is nothing to prepare in a new namespace.

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;

use super::{
    containment_layer::{Layer, Layers, Probe},
    namespace_fd::NamespaceKind,
};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::IPC,
    key: "containment.ipc",
    demand: |containment| containment.ipc,
    needs: Layers::empty(),
    probe: Probe::Sandbox,
    unshared_namespace: Some(NamespaceKind {
        flag: CloneFlags::CLONE_NEWIPC,
        name: "ipc",
        link: LinkNameSpaceType::InterProcessCommunication,
    }),
    on: "actions have System V IPC and message queues of their own",
    off: "actions share System V IPC and message queues; what they leave is removed",
};
