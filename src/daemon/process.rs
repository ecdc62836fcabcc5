//! What a daemon is as a process: its name, its exit code, its limits, the boot that it runs in, and
//! what it tells systemd.

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

/// What this host calls itself (gethostname(2)).
pub fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
