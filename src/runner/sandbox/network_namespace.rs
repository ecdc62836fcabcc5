//! The layer `containment.network`: namespaces that have nothing but a loopback interface
//! (network_namespaces(7)).
//!
//! 1. Two running actions never have the same namespace.
//! 2. Making one takes as long as everything else around an action, so they are pooled, and used again
//!    when no process of the action before is left; nothing in them outlives processes but closed
//!    connections that wait, and those are switched off.

use std::{fs, io, os::fd::AsFd, sync::Arc};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use parking_lot::Mutex;
use rustix::thread::LinkNameSpaceType;

use super::{
    containment_layer::{Layer, Layers, Probe},
    namespace_fd::{NamespaceFd, NamespaceKind},
};
use crate::runner::sys;

pub(super) const LAYER: Layer = Layer {
    flag: Layers::NETWORK,
    key: "containment.network",
    demand: |containment| containment.network.demand(),
    needs: Layers::empty(),
    probe: Probe::Sandbox,
    unshared_namespace: None,
    on: "actions have a loopback interface of their own and no other network",
    off: "actions use the host's network, its loopback interface and abstract sockets included",
};

const KIND: NamespaceKind = NamespaceKind {
    flag: CloneFlags::CLONE_NEWNET,
    name: "net",
    link: LinkNameSpaceType::Network,
};

/// Network namespaces that no sandbox has.
#[derive(Clone, Debug, Default)]
pub(crate) struct NetworkNamespacePool(Arc<Mutex<Vec<NamespaceFd>>>);

/// A network namespace that one sandbox has; goes back to the pool on drop.
#[derive(Debug)]
pub(crate) struct PooledNetworkNamespace {
    namespace: Option<NamespaceFd>,
    pool: NetworkNamespacePool,
}

impl NetworkNamespacePool {
    /// Takes one that nobody else has, or makes one, and moves this thread into it.
    pub(crate) fn enter_one(&self) -> io::Result<PooledNetworkNamespace> {
        let kept = self.0.lock().pop();
        let namespace = match kept {
            Some(namespace) => {
                namespace.enter()?;
                namespace
            }
            None => make()?,
        };
        Ok(PooledNetworkNamespace {
            namespace: Some(namespace),
            pool: self.clone(),
        })
    }
}

impl PooledNetworkNamespace {
    /// The namespace, by another descriptor.
    pub(crate) fn namespace(&self) -> io::Result<NamespaceFd> {
        match &self.namespace {
            Some(namespace) => namespace.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Keeps it from being used again: something of the action may live.
    pub(crate) fn retire(&mut self) {
        self.namespace = None;
    }
}

impl Drop for PooledNetworkNamespace {
    fn drop(&mut self) {
        self.pool.0.lock().extend(self.namespace.take());
    }
}

/// Makes a network namespace, which this thread is in then.
fn make() -> io::Result<NamespaceFd> {
    unshare(KIND.flag)?;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    sys::bring_up_loopback(socket.as_fd()).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{error}; raising the loopback interface takes CAP_NET_ADMIN"),
        )
    })?;
    // Or a server in the next action might find its port taken; where it is refused, it may.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0");
    NamespaceFd::current(KIND)
}
