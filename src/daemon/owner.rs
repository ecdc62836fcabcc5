//! Who holds an address or a lock that this program would like to have.
//!
//! The kernel shows the descriptors of other users' processes to nobody but root. What everybody may
//! read is which user listens on a port (/proc/net/tcp), who is at the other end of a Unix socket
//! (unix(7), SO_PEERCRED), who has a lock (/proc/locks), and each process's name and arguments.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::config::ListenAddress;

/// A process that has what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OwnerProcess {
    pub pid: u32,
    /// As proc_pid_comm(5) says.
    pub program: String,
    /// What `--config` of its command line says.
    pub config: Option<PathBuf>,
}

/// Whether another process is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// systemd, for a unit.
    Systemd,
    Process(OwnerProcess),
    /// A process that this user may not look at, of this user if that is known.
    Unknown(Option<u32>),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Systemd => f.write_str("systemd"),
            Owner::Process(owner) => {
                write!(f, "{} (process {}", owner.program, owner.pid)?;
                match &owner.config {
                    Some(config) => write!(f, ", --config {})", config.display()),
                    None => f.write_str(")"),
                }
            }
            Owner::Unknown(Some(user)) => write!(f, "a process of user {user}"),
            Owner::Unknown(None) => f.write_str("another process"),
        }
    }
}

impl Owner {
    /// Whether that is the daemon which runs with this configuration.
    pub(super) fn is_daemon(&self, program: &str, config: &Path, is_default: bool) -> bool {
        match self {
            Owner::Process(owner) if owner.program == program => match &owner.config {
                Some(other) => is_same_file(other, config),
                None => is_default,
            },
            _ => false,
        }
    }
}

pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Who listens at an address that is in use. Of the processes that this user may not look into, it is
/// most likely one that `is_expected`.
pub(super) fn of_listener(address: &ListenAddress, is_expected: impl Fn(&Owner) -> bool) -> Owner {
    match address {
        ListenAddress::Unix(path) => {
            use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
            let peer = std::os::unix::net::UnixStream::connect(path)
                .ok()
                .and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
            match peer {
                Some(peer) => by_pid(peer.pid() as u32, Some(peer.uid())),
                None => Owner::Unknown(None),
            }
        }
        ListenAddress::Tcp(address) => {
            let tables = ["tcp", "tcp6"]
                .iter()
                .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
                .collect::<String>();
            let Some((user, inode)) = tables
                .lines()
                .filter_map(listening)
                .find(|(at, ..)| meets(at, address))
                .map(|(_, user, inode)| (user, inode))
            else {
                return Owner::Unknown(None);
            };
            let pids = processes();
            let socket = format!("socket:[{inode}]");
            let holds = |pid: &u32| {
                fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|entries| {
                    entries.flatten().any(|entry| {
                        fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == &*socket)
                    })
                })
            };
            if let Some(pid) = pids.iter().find(|pid| holds(pid)) {
                return by_pid(*pid, Some(user));
            }
            // Of another user. Sockets that systemd passes on are root's.
            let expected = pids
                .iter()
                .filter(|pid| user == 0 || user_of(**pid) == Some(user))
                .map(|pid| by_pid(*pid, Some(user)))
                .find(is_expected);
            match expected {
                Some(owner) => owner,
                None if user == 0 && name(1).is_some_and(|name| name == "systemd") => {
                    Owner::Systemd
                }
                None => Owner::Unknown(Some(user)),
            }
        }
    }
}

/// Who has a lock on a file or directory (flock(2)).
pub(super) fn of_lock(path: &Path) -> Owner {
    let found = || {
        let inode = fs::metadata(path).ok()?.ino().to_string();
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let pid = locks.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = words.iter().position(|word| *word == "FLOCK")?;
            let is_it = words.get(at + 4)?.rsplit(':').next()? == inode;
            is_it.then(|| words.get(at + 3)?.parse::<u32>().ok())?
        })?;
        Some(by_pid(pid, None))
    };
    found().unwrap_or(Owner::Unknown(None))
}

fn by_pid(pid: u32, user: Option<u32>) -> Owner {
    match name(pid) {
        Some(program) if pid == 1 && program == "systemd" => Owner::Systemd,
        Some(program) => Owner::Process(OwnerProcess {
            pid,
            program,
            config: config_of(pid),
        }),
        None => Owner::Unknown(user),
    }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

fn name(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

fn user_of(pid: u32) -> Option<u32> {
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

fn config_of(pid: u32) -> Option<PathBuf> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let mut words = line.split('\0');
    let path = loop {
        match words.next()? {
            "--config" => break words.next()?,
            word => {
                if let Some(path) = word.strip_prefix("--config=") {
                    break path;
                }
            }
        }
    };
    let path = Path::new(path);
    match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(directory) => Some(directory.join(path)),
        Err(_) => Some(path.to_owned()),
    }
}

fn meets(at: &SocketAddr, address: &SocketAddr) -> bool {
    let ip = at.ip().to_canonical();
    at.port() == address.port()
        && (ip == address.ip() || at.ip().is_unspecified() || address.ip().is_unspecified())
}

/// The address, the user and the inode of a line about a socket that listens (proc_pid_net(5)).
fn listening(line: &str) -> Option<(SocketAddr, u32, u64)> {
    const LISTEN: &str = "0A";
    let words: Vec<&str> = line.split_whitespace().collect();
    if *words.get(3)? != LISTEN {
        return None;
    }
    let (ip, port) = words.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits in the host's byte order.
    let mut octets = Vec::new();
    for word in ip.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        octets.extend(word.to_ne_bytes());
    }
    let ip = match <[u8; 16]>::try_from(octets.as_slice()) {
        Ok(octets) => IpAddr::V6(Ipv6Addr::from(octets)),
        Err(_) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)),
    };
    let (user, inode) = (words.get(7)?.parse().ok()?, words.get(9)?.parse().ok()?);
    Some((SocketAddr::new(ip, port), user, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_listens_or_locks_is_found() {
        let ours = std::process::id();
        let is_us = |owner: Owner| matches!(owner, Owner::Process(owner) if owner.pid == ours);
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
            let Ok(socket) = std::net::TcpListener::bind(address) else {
                continue;
            };
            let port = socket.local_addr().unwrap().port();
            let address = format!("{}{port}", address.strip_suffix('0').unwrap());
            assert!(
                is_us(of_listener(&address.parse().unwrap(), |_| false)),
                "{address}"
            );
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_us(of_listener(&ListenAddress::Unix(path), |_| false)));
        let file = fs::File::create(directory.path().join("lock")).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(is_us(of_lock(&directory.path().join("lock"))));
    }

    #[test]
    fn a_daemon_is_known_by_its_name_and_its_configuration() {
        let owner = |config: Option<&str>| {
            Owner::Process(OwnerProcess {
                pid: 7,
                program: "bb_worker".to_owned(),
                config: config.map(PathBuf::from),
            })
        };
        let path = Path::new("/nonexistent/w.toml");
        assert!(owner(Some("/nonexistent/w.toml")).is_daemon("bb_worker", path, false));
        assert!(!owner(Some("/nonexistent/v.toml")).is_daemon("bb_worker", path, false));
        assert!(!owner(Some("/nonexistent/w.toml")).is_daemon("bb_runner", path, false));
        assert!(owner(None).is_daemon("bb_worker", path, true));
        assert!(!owner(None).is_daemon("bb_worker", path, false));
        assert!(!Owner::Systemd.is_daemon("bb_worker", path, true));
    }
}
