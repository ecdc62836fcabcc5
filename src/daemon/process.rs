//! What a daemon is as a process: its name, its exit code, its limits, the boot that it runs in, and
//! what it tells systemd.

use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;

/// The configuration must be changed first (sysexits(3)).
pub(super) const EX_CONFIG: u8 = 78;

/// What `--help` and `--version` say, and where the configuration is.
pub struct Program {
    /// The program's name, which its configuration and its manual have, too.
    pub name: &'static str,
    /// What it is for, in one line.
    pub about: &'static str,
    /// Processors of the host for each thread that serves calls. Each thread that has nothing to do is woken
    /// up for every call that another one serves, so that where others do the work, few are faster. Blocking work
    /// has threads of its own.
    pub processors_per_thread: usize,
}

/// Tells systemd, if there is one that listens.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

/// Which boot of the host this is (random(4)). Units that hide /proc/sys pass it on as BB_BOOT_ID
/// (systemd.unit(5), `%b`), without hyphens.
pub fn boot_id() -> std::io::Result<String> {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(text) => Ok(text.trim().replace('-', "")),
        Err(error) => std::env::var("BB_BOOT_ID").map_err(|_| error),
    }
}

/// Deep trees need many open directories; systemd leaves it to daemons to raise their limit.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "could not raise the limit of open files");
    }
}

/// How many files the process may have open; `None` for any number.
pub(super) fn file_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Bytes of memory that the process may use: the host's, or less where control groups that it is in say so
/// (cgroups(7): memory.max).
pub(super) fn memory_limit() -> u64 {
    let info = rustix::system::sysinfo();
    #[expect(
        clippy::useless_conversion,
        reason = "of another type on other architectures"
    )]
    let host = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = Path::new("/sys/fs/cgroup").join(unified.unwrap_or_default());
    own.ancestors()
        .filter_map(|group| std::fs::read_to_string(group.join("memory.max")).ok())
        .filter_map(|limit| limit.trim().parse().ok())
        .fold(host, u64::min)
}

/// What this host calls itself (gethostname(2)).
pub fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
