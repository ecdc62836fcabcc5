//! A sandbox, which is what surrounds one action.
//!
//! 1. It is one action's own: namespaces with all that is in them, and a control group. Only network
//!    namespaces are used again, as `network_namespace` says.
//! 2. It is bound to the host's mounts and the build directory as they were; when something was mounted
//!    since, or the worker has made that directory anew, it is not used.

use super::{
    cgroups::ActionCgroup, mount_generation::DirectoryId, mount_namespace::SandboxMounts,
    namespace_fd::NamespaceFd, network_namespace::PooledNetworkNamespace,
    pid_namespace::InitProcess,
};
use crate::runner::spawn::SetupStep;

/// What surrounds one action. Its parts are dropped in this order: processes first.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub init: Option<InitProcess>,
    /// All namespaces that processes enter by themselves: all but the PID namespace, which is `init`'s.
    pub(super) namespaces: Vec<NamespaceFd>,
    pub mounts: Option<SandboxMounts>,
    pub network: Option<PooledNetworkNamespace>,
    pub cgroup: Option<ActionCgroup>,
}

impl Sandbox {
    /// Whether its mounts are of the host as it is, and nobody has killed its init process or removed its control
    /// group.
    pub(crate) fn is_usable(&self, build_directory: DirectoryId, mount_generation: u64) -> bool {
        let mounts = self.mounts.as_ref();
        mounts.is_none_or(|mounts| mounts.is_current(build_directory, mount_generation))
            && self.init.as_ref().is_none_or(InitProcess::is_alive)
            && !self.cgroup.as_ref().is_some_and(ActionCgroup::is_removed)
    }

    /// The steps that bring an action's process into it, but for its PID namespace and control group.
    pub(crate) fn setup_steps(&self) -> impl Iterator<Item = SetupStep<'_>> {
        let mounts = self.mounts.iter().map(|_| SetupStep::MakeMountsPrivate);
        self.namespaces
            .iter()
            .map(NamespaceFd::setup_step)
            .chain(mounts)
    }
}
