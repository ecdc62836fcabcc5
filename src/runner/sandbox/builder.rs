//! A sandbox, which is what surrounds one action, and how it is made.
//!
//! 1. It is one action's own: namespaces with all that is in them, and a control group. Only network
//!    namespaces are used again, as `network` says.
//! 2. It is bound to the host's mounts and the build directory as they were; when something was mounted
//!    since, or the worker has made that directory anew, it is not used.
//!
//! Making one takes about as long as an action's whole start (mount namespaces are copied and torn down
//! under locks of the whole kernel), hence ahead, on a thread of its own (`pool`), which goes from one
//! sandbox's namespaces to the next one's.

use nix::sched::{CloneFlags, unshare};

use super::{
    cgroups::ActionCgroup,
    containment_layer::{Layer, Layers},
    error::SandboxError,
    hostname, ipc,
    mount_watch::DirectoryId,
    mounts::{self, MountNamespaceSwitcher, SandboxMounts},
    namespace::Namespace,
    network::LentNetwork,
    pid_namespace::InitProcess,
    spec::SandboxContext,
};
use crate::runner::spawn::SetupStep;

/// Layers that are a new namespace, and what is done in it.
const UNSHARED: [Layer; 3] = [mounts::LAYER, ipc::LAYER, hostname::LAYER];

/// One action's surroundings. Dropped in this order: processes first.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub init: Option<InitProcess>,
    /// All but the PID namespace, which is `init`'s.
    namespaces: Vec<Namespace>,
    pub mounts: Option<SandboxMounts>,
    pub network: Option<LentNetwork>,
    pub cgroup: Option<ActionCgroup>,
}

/// Makes sandboxes, on one thread.
pub(super) struct SandboxBuilder {
    mounts: MountNamespaceSwitcher,
}

impl SandboxBuilder {
    /// For this thread, which can do nothing else from now on.
    pub(super) fn new() -> Result<Self, SandboxError> {
        // Working and root directory are those of all threads, until then.
        unshare(CloneFlags::CLONE_FS).map_err(SandboxError::at("unshare"))?;
        Ok(SandboxBuilder {
            mounts: MountNamespaceSwitcher::new().map_err(SandboxError::at("mnt"))?,
        })
    }

    pub(super) fn build(&mut self, spec: &SandboxContext) -> Result<Sandbox, SandboxError> {
        let has = |layer| spec.layers.contains(layer);
        if has(Layers::MOUNTS) {
            self.mounts.enter_host()?;
        }
        let cgroup = match &spec.cgroups {
            Some(cgroups) => Some(cgroups.create()?),
            None => None,
        };
        let network = match has(Layers::NETWORK) {
            true => {
                let network = spec.networks.enter_one();
                Some(network.map_err(SandboxError::at("network namespace"))?)
            }
            false => None,
        };
        let template = match has(Layers::MOUNTS) {
            true => Some(self.mounts.enter_template(spec)?),
            false => None,
        };
        let kinds = UNSHARED.iter().filter(|layer| has(layer.flag));
        let kinds: Vec<_> = kinds.filter_map(|layer| layer.namespace).collect();
        // One call, since each copies what all processes have in common.
        let flags = kinds.iter().map(|kind| kind.flag).collect();
        unshare(flags).map_err(SandboxError::at("unshare"))?;
        // While /proc is still the host's.
        let mut namespaces = Vec::with_capacity(5);
        for kind in kinds {
            namespaces.push(Namespace::current(kind).map_err(SandboxError::at(kind.name))?);
        }
        if let Some(network) = &network {
            let namespace = network.namespace();
            namespaces.push(namespace.map_err(SandboxError::at("network namespace"))?);
        }
        if has(Layers::HOSTNAME) {
            hostname::prepare().map_err(SandboxError::at("host name"))?;
        }
        let mounts = match template {
            Some(template) => Some(SandboxMounts::prepare(spec, template)?),
            None => None,
        };
        let init = match &spec.init {
            Some(program) => {
                let group = cgroup.as_ref().map(ActionCgroup::as_fd);
                let started = InitProcess::start(program, group);
                let (init, cgroups) = started.map_err(SandboxError::at("PID namespace"))?;
                namespaces.extend(cgroups);
                Some(init)
            }
            None => None,
        };
        Ok(Sandbox {
            init,
            namespaces,
            mounts,
            network,
            cgroup,
        })
    }
}

impl Sandbox {
    /// Whether it is around the host as it is, and nobody has killed its first process or removed its
    /// control group.
    pub(crate) fn is_usable(&self, build_directory: DirectoryId, changes: u64) -> bool {
        let mounts = self.mounts.as_ref();
        mounts.is_none_or(|mounts| mounts.is_current(build_directory, changes))
            && self.init.as_ref().is_none_or(InitProcess::is_alive)
            && !self.cgroup.as_ref().is_some_and(ActionCgroup::is_removed)
    }

    /// What brings an action's process into it, but for its PID namespace and control group.
    pub(crate) fn setup_steps(&self) -> impl Iterator<Item = SetupStep<'_>> {
        let mounts = self.mounts.iter().map(|_| SetupStep::MakeMountsPrivate);
        self.namespaces
            .iter()
            .map(Namespace::setup_step)
            .chain(mounts)
    }
}

/// Whether a sandbox can be made.
pub(super) fn try_out(spec: &SandboxContext) -> Result<(), SandboxError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("sandbox".to_owned())
            .spawn_scoped(scope, || SandboxBuilder::new()?.build(spec).map(drop))
            .map_err(SandboxError::at("thread"))?;
        let panicked = |_| Err(SandboxError::other("thread", "it panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}
