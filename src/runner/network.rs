//! Network namespaces that have nothing but a loopback interface (network_namespaces(7)).
//!
//! 1. Two running actions never have the same one.
//! 2. Making one takes as long as everything else around an action, so they are kept and lent again,
//!    when no process of the action before is left; nothing in them outlives processes but closed
//!    connections that wait, and those are switched off.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use parking_lot::Mutex;

use super::room::{open_namespace, unshare};

#[derive(Clone, Debug, Default)]
pub struct Networks(Arc<Mutex<Vec<OwnedFd>>>);

/// One that is lent; given back on drop.
#[derive(Debug)]
pub struct Network {
    namespace: Option<OwnedFd>,
    networks: Networks,
}

impl Networks {
    /// One that nobody else has; this thread may have entered it.
    pub fn take(&self) -> io::Result<Network> {
        let kept = self.0.lock().pop();
        let namespace = match kept {
            Some(namespace) => namespace,
            None => make()?,
        };
        Ok(Network {
            namespace: Some(namespace),
            networks: self.clone(),
        })
    }
}

impl Network {
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        match &self.namespace {
            Some(namespace) => namespace.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Not to be lent again: something of the action may live.
    pub fn retire(&mut self) {
        self.namespace = None;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.networks.0.lock().extend(self.namespace.take());
    }
}

fn make() -> io::Result<OwnedFd> {
    unshare(libc::CLONE_NEWNET)?;
    let socket = nix::sys::socket::socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives during the call (netdevice(7)).
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } != 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("{error}; raising the loopback interface takes CAP_NET_ADMIN"),
        ));
    }
    // Or a server in the next action might find its port taken; where it is refused, it may.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0");
    open_namespace("net")
}
