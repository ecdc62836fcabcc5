//! The layer `containment.hostname`: the same name for every host (uts_namespaces(7)).

use std::io;

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;

use super::{
    containment_layer::{Layer, Layers, Probe},
    namespace_fd::NamespaceKind,
};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::HOSTNAME,
    key: "containment.hostname",
    demand: |containment| containment.hostname,
    needs: Layers::empty(),
    probe: Probe::Sandbox,
    unshared_namespace: Some(NamespaceKind {
        flag: CloneFlags::CLONE_NEWUTS,
        name: "uts",
        link: LinkNameSpaceType::HostNameAndNISDomainName,
    }),
    on: "actions see localhost as the host's name",
    off: "actions see the host's name",
};

/// The name of every host, which /etc/hosts knows.
const HOSTNAME: &str = "localhost";

/// Sets the host's name, on a thread that is in the sandbox's namespace.
pub(super) fn prepare() -> io::Result<()> {
    Ok(nix::unistd::sethostname(HOSTNAME)?)
}
