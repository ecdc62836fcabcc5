//! Where control groups of version 2 are mounted, and this daemon's own group (/proc/self/cgroup).

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where control groups are mounted: the same file system for all runners that can touch each other's groups.
pub(crate) fn mount_point() -> Option<PathBuf> {
    own_cgroup().ok().map(|group| group.mount)
}

/// This daemon's own group.
pub(super) struct OwnCgroup {
    /// Where control groups are mounted.
    pub mount: PathBuf,
    /// The group's directory below that.
    pub directory: PathBuf,
}

/// Finds this daemon's own group; the error says why there is none.
pub(super) fn own_cgroup() -> Result<OwnCgroup, String> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|error| format!("could not read {path}: {error}"))
    };
    let (root, mount) = read("/proc/self/mountinfo")?
        .lines()
        .find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            file_system
                .starts_with("cgroup2 ")
                .then(|| (unescape(root), unescape(point)))
        })
        .ok_or("control groups version 2 are not mounted")?;
    let path = read("/proc/self/cgroup")?
        .lines()
        .find_map(|line| line.strip_prefix("0::").map(str::to_owned))
        .ok_or("/proc/self/cgroup names no group of version 2")?;
    Path::new(&path)
        .strip_prefix(&root)
        .map(|below| OwnCgroup {
            directory: Path::new(&mount).join(below),
            mount: PathBuf::from(&mount),
        })
        .map_err(|_| format!("{path} is not below what is mounted at {mount}"))
}

/// A path as /proc/self/mountinfo has it, where space, tab, newline and backslash are written in octal (proc(5)).
fn unescape(text: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}
