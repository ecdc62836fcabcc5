//! How a sandbox is made.
//!
//! Making one takes about as long as an action's whole start (mount namespaces are copied and torn down
//! under locks of the whole kernel), hence ahead, on a thread of its own (`pool`), which goes from one
//! sandbox's namespaces to the next one's.

use nix::sched::{CloneFlags, unshare};

use super::{
    action_sandbox::Sandbox,
    cgroups::ActionCgroup,
    containment_layer::{Layer, Layers},
    error::SandboxError,
    ipc_namespace,
    mount_namespace::{self, MountNamespaceSwitcher, SandboxMounts},
    namespace_fd::NamespaceFd,
    pid_namespace::InitProcess,
    sandbox_context::SandboxContext,
    uts_namespace,
};

/// Layers for which each sandbox has a new namespace, all of them made by one unshare(2).
const UNSHARED: [Layer; 3] = [
    mount_namespace::LAYER,
    ipc_namespace::LAYER,
    uts_namespace::LAYER,
];

/// Makes sandboxes, on one thread.
pub(super) struct SandboxBuilder {
    mounts: MountNamespaceSwitcher,
}

impl SandboxBuilder {
    /// A builder for this thread, which can do nothing else from now on.
    pub(super) fn new() -> Result<Self, SandboxError> {
        // Working and root directory are those of all threads, until then.
        unshare(CloneFlags::CLONE_FS).map_err(SandboxError::at("unshare"))?;
        Ok(SandboxBuilder {
            mounts: MountNamespaceSwitcher::new().map_err(SandboxError::at("mnt"))?,
        })
    }

    /// Makes one, and leaves this thread in its namespaces.
    pub(super) fn build(&mut self, context: &SandboxContext) -> Result<Sandbox, SandboxError> {
        let has = |layer| context.layers.contains(layer);
        if has(Layers::MOUNTS) {
            self.mounts.enter_host()?;
        }
        let cgroup = match &context.cgroups {
            Some(cgroups) => Some(cgroups.create()?),
            None => None,
        };
        let network = match has(Layers::NETWORK) {
            true => {
                let network = context.networks.enter_one();
                Some(network.map_err(SandboxError::at("network namespace"))?)
            }
            false => None,
        };
        let template = match has(Layers::MOUNTS) {
            true => Some(self.mounts.enter_template(context)?),
            false => None,
        };
        let kinds = UNSHARED.iter().filter(|layer| has(layer.flag));
        let kinds: Vec<_> = kinds.filter_map(|layer| layer.unshared_namespace).collect();
        // One call, since each copies what all processes have in common.
        let flags = kinds.iter().map(|kind| kind.flag).collect();
        unshare(flags).map_err(SandboxError::at("unshare"))?;
        // While /proc is still the host's.
        let mut namespaces = Vec::with_capacity(5);
        for kind in kinds {
            namespaces.push(NamespaceFd::current(kind).map_err(SandboxError::at(kind.name))?);
        }
        if let Some(network) = &network {
            let namespace = network.namespace();
            namespaces.push(namespace.map_err(SandboxError::at("network namespace"))?);
        }
        if has(Layers::HOSTNAME) {
            uts_namespace::prepare().map_err(SandboxError::at("host name"))?;
        }
        let mounts = match template {
            Some(template) => Some(SandboxMounts::prepare(context, template)?),
            None => None,
        };
        let init = match &context.init {
            Some(program) => {
                let cgroup = cgroup.as_ref().map(ActionCgroup::as_fd);
                let started = InitProcess::start(program, cgroup);
                let (init, cgroup_namespace) =
                    started.map_err(SandboxError::at("PID namespace"))?;
                namespaces.extend(cgroup_namespace);
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

/// Makes a sandbox on a thread of its own, and drops it; fails when none can be made.
pub(super) fn try_build(context: &SandboxContext) -> Result<(), SandboxError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("sandbox".to_owned())
            .spawn_scoped(scope, || SandboxBuilder::new()?.build(context).map(drop))
            .map_err(SandboxError::at("thread"))?;
        let panicked = |_| Err(SandboxError::other("thread", "it panicked"));
        thread.join().unwrap_or_else(panicked)
    })
}
