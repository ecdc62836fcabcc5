//! Listeners that a daemon works without, for those who watch and steer it: at their default addresses they
//! are only tried, so that a second daemon on a host, or one that is started by hand, needs no
//! configuration.

use crate::config::{
    ListenAddress,
    grants::{CallerPattern, Grant, Permission},
};

use super::{Failure, Listener, SocketPermissions, listen};

/// Those who may open the socket may ask: root, and one group.
const CONTROL_MODE: u32 = 0o660;

/// The sockets that systemd passed under a name, else one of our own. `None` when nobody chose the address,
/// and it cannot be listened on.
pub fn listen_if_possible(
    name: &str,
    key: &'static str,
    address: &ListenAddress,
    is_default: bool,
    permissions: Option<SocketPermissions>,
) -> Result<Option<Listener>, Failure> {
    match listen(name, key, address, permissions) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if is_default => {
            tracing::info!(%error, "goes on without it");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A control socket's permissions. `group` is a name, a number, or empty for the daemon's own.
pub fn control_permissions(group: &str) -> Result<SocketPermissions, Failure> {
    let number = match (group, group.parse()) {
        ("", _) => None,
        (_, Ok(number)) => Some(number),
        (name, Err(_)) => {
            let found = nix::unistd::Group::from_name(name).ok().flatten();
            let found = found.ok_or_else(|| Failure::Configuration {
                key: "control.socket_group",
                message: format!(
                    "this host has no group {name:?}; write one that \"getent group\" lists"
                ),
            })?;
            Some(found.gid.as_raw())
        }
    };
    Ok(SocketPermissions {
        mode: CONTROL_MODE,
        group: number,
    })
}

/// Where a worker or a runner is watched: its port for metrics, and its control socket.
pub fn observation_listeners(
    metrics: (&ListenAddress, bool),
    control: (&ListenAddress, bool, &str),
) -> Result<Vec<Listener>, Failure> {
    let (address, is_default) = metrics;
    let port = listen_if_possible("metrics", "metrics.listen", address, is_default, None)?;
    let (address, is_default, group) = control;
    let permissions = Some(control_permissions(group)?);
    let socket = listen_if_possible(
        "control",
        "control.listen",
        address,
        is_default,
        permissions,
    )?;
    Ok(port.into_iter().chain(socket).collect())
}

/// What callers of a control socket may do: what the grants say of them, and, where these say nothing, all
/// that operators do, since the socket's mode lets no one else in.
pub fn control_grants(grants: &[Grant]) -> Vec<Grant> {
    let mut grants = grants.to_vec();
    if !grants.is_empty() {
        grants.push(Grant {
            who: vec![CallerPattern::Anyone],
            may: vec![Permission::See, Permission::Steer],
            ..Grant::default()
        });
    }
    grants
}
