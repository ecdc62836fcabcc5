//! Furnishing a room, as the list of steps that it is.
//!
//! 1. What all rooms have in common is copied from a `template`; what an action may write is made
//!    anew: shared memory, terminals, temporary directories, /proc.
//! 2. Its user has a name in it (`account`), as soon as there is a user.
//! 3. An action's gate (see `gate`) is mounted on the build directory when it starts, so that its
//!    paths are the same in every slot and it sees nobody else's.
//!
//! It runs on a thread of its own, which goes from one room's namespaces to the next one's.

use std::{ffi::CString, io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount},
};

use super::{
    account::Account,
    cgroup::Cgroup,
    gate,
    init::Init,
    layer::Layer,
    mount::{attach, copy_of_tree, private_tmpfs},
    network::Network,
    room::{
        GROUP_STEP, Mounts, Plan, Room, RoomError, SHARED_MEMORY, enter, open_namespace, unshare,
    },
    template::{Fresh, Moment, Template, at, make_place},
};

/// Kinds of namespaces: the layer, the flag, the name in /proc.
const KINDS: [(Layer, libc::c_int, &str); 3] = [
    (Layer::Mounts, libc::CLONE_NEWNS, "mnt"),
    (Layer::Ipc, libc::CLONE_NEWIPC, "ipc"),
    (Layer::Hostname, libc::CLONE_NEWUTS, "uts"),
];

/// What every host calls itself, and /etc/hosts knows.
const HOSTNAME: &str = "localhost";

/// A thread's.
pub struct Workshop {
    /// The mount namespace of the daemon.
    host: OwnedFd,
    template: Option<Template>,
}

impl Workshop {
    /// For this thread, which can do nothing else from now on.
    pub fn open() -> Result<Self, RoomError> {
        // Working and root directory are those of all threads, until then.
        unshare(libc::CLONE_FS).map_err(RoomError::at("unshare"))?;
        Ok(Workshop {
            host: open_namespace("mnt").map_err(RoomError::at("mnt"))?,
            template: None,
        })
    }

    pub fn furnish(&mut self, plan: &Plan) -> Result<Room, RoomError> {
        let has = |layer| plan.layers.has(layer);
        if has(Layer::Mounts) {
            enter(&self.host, libc::CLONE_NEWNS).map_err(RoomError::at("the host's mounts"))?;
        }
        let cgroup = match &plan.cgroups {
            Some(cgroups) => Some(cgroups.create().map_err(|(path, error)| {
                RoomError::at(format!("{GROUP_STEP} {}", path.display()))(error)
            })?),
            None => None,
        };
        let mut room = Room {
            init: None,
            namespaces: Vec::new(),
            mounts: None,
            network: None,
            cgroup,
        };
        if has(Layer::Network) {
            room.network = Some(join_network(plan).map_err(RoomError::at("network namespace"))?);
        }
        let template = match has(Layer::Mounts) {
            true => Some(self.enter_template(plan)?),
            false => None,
        };
        let kinds = KINDS.iter().filter(|(layer, ..)| has(*layer));
        unshare(kinds.clone().fold(0, |flags, (_, flag, _)| flags | flag))
            .map_err(RoomError::at("unshare"))?;
        // While /proc is still the host's.
        for (_, flag, name) in kinds {
            let namespace = open_namespace(name).map_err(RoomError::at(*name))?;
            room.namespaces.push((namespace, *flag));
        }
        if let Some(network) = &room.network {
            let namespace = network
                .namespace()
                .map_err(RoomError::at("network namespace"))?;
            room.namespaces.push((namespace, libc::CLONE_NEWNET));
        }
        if has(Layer::Hostname) {
            nix::unistd::sethostname(HOSTNAME)
                .map_err(|error| RoomError::at("host name")(error.into()))?;
        }
        if let Some(template) = template {
            room.mounts = Some(mounts(plan, template)?);
        }
        if let Some(program) = &plan.init {
            let group = room.cgroup.as_ref().map(Cgroup::as_fd);
            let started = Init::start(program, group);
            let mut init = started.map_err(RoomError::at("process namespace"))?;
            let cgroup = init.take_cgroup();
            room.namespaces
                .extend(cgroup.map(|namespace| (namespace, libc::CLONE_NEWCGROUP)));
            room.init = Some(init);
        }
        Ok(room)
    }

    fn enter_template(&mut self, plan: &Plan) -> Result<&Template, RoomError> {
        let now = Moment::now(plan);
        let template = match self.template.take() {
            Some(template) if template.moment == now => template,
            _ => Template::make(plan, now)?,
        };
        enter(&template.namespace, libc::CLONE_NEWNS).map_err(RoomError::at("template"))?;
        Ok(self.template.insert(template))
    }
}

fn join_network(plan: &Plan) -> io::Result<Network> {
    let network = plan.networks.take()?;
    enter(network.namespace()?, libc::CLONE_NEWNET)?;
    Ok(network)
}

/// In a copy of the template.
fn mounts(plan: &Plan, template: &Template) -> Result<Mounts, RoomError> {
    for Fresh { place, keeps } in &template.fresh {
        let named = || RoomError::at(place.to_string_lossy());
        let trees: Vec<OwnedFd> = keeps
            .iter()
            .map(|path| copy_of_tree(path))
            .collect::<io::Result<_>>()
            .map_err(named())?;
        private_tmpfs(place, c"mode=1777").map_err(named())?;
        for (path, tree) in keeps.iter().zip(&trees) {
            make_place(path)
                .and_then(|()| attach(tree, path))
                .map_err(named())?;
        }
    }
    if plan.layers.has(Layer::Devices) {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        let options = format!(
            "newinstance,ptmxmode=0666,mode=0620,gid=5,max={}",
            plan.terminals
        );
        let options = CString::new(options).unwrap_or_default();
        mount("devpts", "/dev/pts", "devpts", flags, Some(&*options)).map_err(at("/dev/pts"))?;
    }
    let build_directory = rustix::fs::open(
        &*template.place,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(at("build directory"))?;
    let scratch = Path::new(SHARED_MEMORY);
    let has_scratch = template.fresh.iter().any(|fresh| fresh.place == scratch);
    let account = match plan.names_users && has_scratch {
        true => {
            let root = plan.image.as_deref().unwrap_or(Path::new("/"));
            Account::prepare(root, scratch).map_err(RoomError::at("/etc/passwd and /etc/group"))?
        }
        false => Account::default(),
    };
    Ok(Mounts {
        account,
        identity: gate::identity(&build_directory).map_err(RoomError::at("build directory"))?,
        moment: template.moment.clone(),
        build_directory,
        place: template.place.clone(),
        temporary: template.temporary.clone(),
    })
}
