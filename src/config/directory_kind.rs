//! Which directories a configuration may name to be emptied or filled, without harm to the host.

use std::path::{Component, Path};

/// Directories all of whose contents belong to the operating system.
const SYSTEM: [&str; 12] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin",
    "/sys", "/usr",
];
/// Directories that the operating system needs, though what is below them may be anybody's.
const PARENTS: [&str; 21] = [
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
/// Directories for everybody's temporary files.
const SHARED: [&str; 4] = ["/dev/shm", "/run/shm", "/tmp", "/var/tmp"];

/// Whose files lie at an absolute path without `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectoryKind {
    /// The operating system's, or a user's home; the host cannot be without them.
    System,
    /// Other programs and users have files there.
    Shared,
    /// Neither.
    Ordinary,
}

/// Whose files lie at `path`, which is absolute and has no `..`.
pub fn directory_kind(path: &Path) -> DirectoryKind {
    let is = |known: &[&str]| known.iter().any(|known| Path::new(known) == path);
    if is(&SHARED) {
        return DirectoryKind::Shared;
    }
    let below_shared = SHARED.iter().any(|shared| path.starts_with(shared));
    let below_system = SYSTEM.iter().any(|system| path.starts_with(system))
        && !path.starts_with("/usr/local")
        && !below_shared;
    let is_home = path.parent() == Some(Path::new("/home"));
    match is(&PARENTS) || is_home || below_system {
        true => DirectoryKind::System,
        false => DirectoryKind::Ordinary,
    }
}

/// Why a path cannot name a directory of the farm.
pub fn path_error(path: &Path) -> Option<&'static str> {
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
            assert_eq!(
                directory_kind(Path::new(path)),
                DirectoryKind::System,
                "{path}"
            );
        }
        for path in ["/tmp", "/var/tmp/", "/dev/shm"] {
            assert_eq!(
                directory_kind(Path::new(path)),
                DirectoryKind::Shared,
                "{path}"
            );
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
            assert_eq!(
                directory_kind(Path::new(path)),
                DirectoryKind::Ordinary,
                "{path}"
            );
        }
    }
}
