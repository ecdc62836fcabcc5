//! Why a sandbox could not be made, and who can help.

use std::{io, sync::Arc};

/// The step of making a control group.
pub(super) const CGROUP_STEP: &str = "control group";

/// Why a sandbox could not be made: the administrator must act, or there is a shortage on this host.
#[derive(Clone, Debug, thiserror::Error)]
#[error("could not prepare a sandbox for the action: {step}: {error}{}", remedy(.step, .error))]
pub(crate) struct SandboxError {
    step: String,
    error: Arc<io::Error>,
}

impl SandboxError {
    /// Makes the error of a step from what went wrong there.
    pub(crate) fn at<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        |error| SandboxError {
            step: step.into(),
            error: Arc::new(error.into()),
        }
    }

    /// The error of a step at which no system call failed.
    pub(crate) fn other(step: &str, reason: impl Into<String>) -> Self {
        SandboxError::at(step)(io::Error::other(reason.into()))
    }
}

/// What ran out, and who gives more of it.
fn remedy(step: &str, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            "; bb_runner has all the descriptors that it may have: raise LimitNOFILE= of its unit (systemd.exec(5))"
        }
        Some(libc::ENFILE) => {
            "; this host has all the open files that it may have: raise fs.file-max (sysctl)"
        }
        Some(libc::ENOSPC | libc::EUSERS) => {
            "; this host has all the namespaces or mounts that it may have: raise \
             user.max_mnt_namespaces, user.max_pid_namespaces, user.max_net_namespaces, \
             user.max_ipc_namespaces, user.max_uts_namespaces, user.max_cgroup_namespaces or \
             fs.mount-max (sysctl)"
        }
        Some(libc::EAGAIN) if step.starts_with(CGROUP_STEP) => {
            "; there are too many control groups: raise cgroup.max.descendants and cgroup.max.depth \
             of the groups above"
        }
        Some(libc::EAGAIN) => {
            "; this host or bb_runner's control group has all the processes that it may have: raise \
             kernel.pid_max, kernel.threads-max (sysctl) or TasksMax= of its unit"
        }
        Some(libc::ENOMEM) => "; this host is short of memory",
        _ => "",
    }
}
