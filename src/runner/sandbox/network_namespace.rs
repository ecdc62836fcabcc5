//! The layer `containment.network`: namespaces that have nothing but a loopback interface
//! (network_namespaces(7)).
//!
//! 1. Two running actions never have the same one.
//! 2. Making one takes as long as everything else around an action, so they are kept and lent again,
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
    namespace_fd::{Namespace, NamespaceKind},
};
use crate::runner::sys;

pub(super) const LAYER: Layer = Layer {
    flag: Layers::NETWORK,
    key: "containment.network",
    demand: |containment| containment.network.demand(),
    needs: Layers::empty(),
    probe: Probe::Sandbox,
    namespace: None,
    on: "actions have a loopback interface of their own and no other network",
    off: "actions use the host's network, its loopback interface and abstract sockets included",
};

const KIND: NamespaceKind = NamespaceKind {
    flag: CloneFlags::CLONE_NEWNET,
    name: "net",
    link: LinkNameSpaceType::Network,
};

/// Those that nobody has.
#[derive(Clone, Debug, Default)]
pub(crate) struct NetworkPool(Arc<Mutex<Vec<Namespace>>>);

/// One that is lent; given back on drop.
#[derive(Debug)]
pub(crate) struct LentNetwork {
    namespace: Option<Namespace>,
    pool: NetworkPool,
}

impl NetworkPool {
    /// One that nobody else has. This thread is in it then.
    pub(crate) fn enter_one(&self) -> io::Result<LentNetwork> {
        let kept = self.0.lock().pop();
        let namespace = match kept {
            Some(namespace) => {
                namespace.enter()?;
                namespace
            }
            None => make()?,
        };
        Ok(LentNetwork {
            namespace: Some(namespace),
            pool: self.clone(),
        })
    }
}

impl LentNetwork {
    /// Another descriptor of it.
    pub(crate) fn namespace(&self) -> io::Result<Namespace> {
        match &self.namespace {
            Some(namespace) => namespace.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Not to be lent again: something of the action may live.
    pub(crate) fn retire(&mut self) {
        self.namespace = None;
    }
}

impl Drop for LentNetwork {
    fn drop(&mut self) {
        self.pool.0.lock().extend(self.namespace.take());
    }
}

fn make() -> io::Result<Namespace> {
    unshare(KIND.flag)?;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    sys::raise_loopback(socket.as_fd()).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{error}; raising the loopback interface takes CAP_NET_ADMIN"),
        )
    })?;
    // Or a server in the next action might find its port taken; where it is refused, it may.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0");
    Namespace::current(KIND)
}
