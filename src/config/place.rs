//! Which directories may be emptied, or filled, without harm to the host.

use std::path::{Component, Path};

/// Holding nothing but what belongs to all of the host.
const SYSTEM: [&str; 12] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin",
    "/sys", "/usr",
];
/// What is below them may be somebody's own.
const CONTAINERS: [&str; 21] = [
    "/",
    "/home",
    "/media",
    "/mnt",
    "/opt",
    "/root",
    "/run",
    "/run/lock",
    "/run/user",
    "/srv",
    "/usr/local",
    "/var",
    "/var/backups",
    "/var/cache",
    "/var/lib",
    "/var/local",
    "/var/lock",
    "/var/log",
    "/var/mail",
    "/var/opt",
    "/var/spool",
];
/// Anybody's, for a while.
const SHARED: [&str; 4] = ["/dev/shm", "/run/shm", "/tmp", "/var/tmp"];

/// What an absolute path without `..` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The host cannot be without what is there.
    Vital,
    /// Other programs and users have files there.
    Shared,
    Free,
}

pub fn place(path: &Path) -> Place {
    let is = |known: &[&str]| known.iter().any(|known| Path::new(known) == path);
    if is(&SHARED) {
        return Place::Shared;
    }
    let below_shared = SHARED.iter().any(|shared| path.starts_with(shared));
    let below_system = SYSTEM.iter().any(|system| path.starts_with(system))
        && !path.starts_with("/usr/local")
        && !below_shared;
    let is_home = path.parent() == Some(Path::new("/home"));
    match is(&CONTAINERS) || is_home || below_system {
        true => Place::Vital,
        false => Place::Free,
    }
}

/// Why a path cannot be that of a directory of the farm's.
pub fn unfit(path: &Path) -> Option<&'static str> {
    let text = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() {
        Some("write an absolute path, which begins with /")
    } else if text.contains(&0) {
        Some("it has a NUL character")
    } else if path.components().any(|step| step == Component::ParentDir) {
        Some("write a path without ..")
    } else if text.len() > 4000 {
        Some("it is longer than paths can be")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_or_others_need_is_told_from_what_may_be_emptied() {
        for path in [
            "/",
            "/home",
            "/home/alice",
            "/etc",
            "/etc/bb-remote-execution",
            "/usr/bin",
            "/var",
            "/var/lib",
            "/root",
            "/dev",
            "/proc/1",
            "/srv",
            "/boot/efi",
            "/home/",
        ] {
            assert_eq!(place(Path::new(path)), Place::Vital, "{path}");
        }
        for path in ["/tmp", "/var/tmp/", "/dev/shm"] {
            assert_eq!(place(Path::new(path)), Place::Shared, "{path}");
        }
        for path in [
            "/tmp/x",
            "/var/lib/bb-worker/build",
            "/home/alice/farm",
            "/srv/bb",
            "/dev/shm/bb",
            "/usr/local/cache",
            "/var/cache/ccache",
        ] {
            assert_eq!(place(Path::new(path)), Place::Free, "{path}");
        }
    }
}
