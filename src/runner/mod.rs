//! bb_runner: runs commands as other Unix users, confined, and leaves nothing behind.
//!
//! A worker asks over a Unix socket (`service`, `deadline`). What to run is parsed (`command`,
//! `environment`); a user of its own is found (`user`, `account`), and a room that was prepared ahead
//! (`rooms`, `room`): namespaces (`furnish`, `mount`, `network`, with a first process, `init`; most is
//! copied from a `template`) and a control group (`cgroup`), as far as the host allows them (`layer`).
//! The action's directory is opened to that user (`gate`); a process is made (`process`, `child`,
//! `seccomp`, `syscalls`, `quota`), waited for, and everything that came of it is killed (`action`,
//! where the order is).
//!
//! What an action can and cannot do to whom: bb-remote-execution(7), SECURITY.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    config::runner::{Config, Demand, Root},
    daemon::{self, Failure, Lifecycle, Program, Services, SocketPermissions},
};

mod account;
mod action;
mod cgroup;
mod child;
mod claim;
mod cleaner;
mod command;
mod deadline;
mod environment;
mod furnish;
mod gate;
mod giving;
mod init;
mod layer;
mod log;
mod mount;
mod network;
mod probe;
mod process;
mod quota;
mod room;
mod rooms;
mod root;
mod seccomp;
mod service;
mod stop;
mod syscalls;
mod template;
mod user;

use environment::{Additions, View};
use layer::{Layer, Layers};
pub use probe::{probe, warnings};

pub const PROGRAM: Program = Program {
    name: "bb_runner",
    about: "Runs the commands of build actions as other Unix users",
};

/// execve(2) takes a few MiB of arguments and environment.
const LARGEST_REQUEST: usize = 16 << 20;
/// How long killed actions may take when the daemon leaves.
const DYING: Duration = Duration::from_secs(20);

/// capabilities(7): what running as root is needed for.
const CAPABILITIES: [(u32, &str); 8] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (3, "CAP_FOWNER"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    // Both for namespaces; `layer` says what is missing without them.
    (18, "CAP_SYS_CHROOT"),
    (21, "CAP_SYS_ADMIN"),
];
const NAMESPACES: usize = 2;

/// Runs until told to stop.
pub async fn run(config: Config, lifecycle: Lifecycle) -> Result<(), Failure> {
    check_capabilities()?;
    check_users(&config)?;
    if let Some(failure) = probe::vital_directory(&config) {
        return Err(failure);
    }
    let (allowed, unknown) = resolve_users(&config.allowed_users);
    for name in unknown {
        tracing::warn!("{}", unknown_user(name));
    }
    let range = config.users.range();
    // Before anything is killed.
    let _claim = claim::Claim::take(&range)
        .await
        .map_err(|error| match error {
            claim::ClaimError::Taken(_) => Failure::Configuration {
                key: "users.first",
                message: format!("{error}; give each runner a range of its own"),
            },
            claim::ClaimError::Io(_) => Failure::Environment {
                message: error.to_string(),
            },
        })?;
    let listener = daemon::listen(
        "runner",
        "listen",
        &config.listen,
        Some(SocketPermissions {
            mode: config.socket_mode.0,
            group: socket_group(&config)?,
        }),
    )?;

    raise_descriptors();
    // Neither a core file nor another user may hold what is in this process's memory: actions' first
    // processes share it for a moment.
    let _ = nix::sys::prctl::set_dumpable(false);
    let cgroups = find_cgroups(&config)?;
    // What a runner that was killed left.
    for user in range.clone() {
        if !user::sweep(user, DYING) {
            return Err(Failure::Environment {
                message: format!(
                    "could not kill the processes of user {user}, which is one of users.first and \
                     users.count"
                ),
            });
        }
    }
    gate::close_all(&config.build_directory, &range);

    let (layers, failures) = Layers::find(&config, true);
    if let Some(failure) = failures.into_iter().next() {
        return Err(failure);
    }
    if config.root != Root::Host && !layers.has(Layer::Mounts) {
        return Err(Failure::Configuration {
            key: "root",
            message: "another root than the host's takes containment.mounts, which does not work \
                      here"
                .to_owned(),
        });
    }
    let failed = |what: &str, error: std::io::Error| Failure::Environment {
        message: format!("could not {what}: {error}"),
    };
    let plan = room::Plan::new(&config, layers, cgroups)
        .map_err(|error| failed("make the first process of actions", error))?;
    let rooms = rooms::Rooms::open(plan).map_err(|error| failed("start a thread", error))?;
    let null = fs::File::open("/dev/null").map_err(|error| failed("open /dev/null", error))?;

    let groups = resolve_groups(&config.additional_groups)?;
    let emulator = config
        .emulator
        .iter()
        .map(|text| std::ffi::CString::new(text.as_str()))
        .collect::<Result<_, _>>()
        .map_err(|_| Failure::Configuration {
            key: "emulator",
            message: "it has a NUL character".to_owned(),
        })?;
    let has_cleaner =
        !config.clean_temporary_directories.is_empty() || !config.run_command_cleaner.is_empty();
    let cleaner = has_cleaner.then(|| {
        cleaner::Cleaner::new(
            config.clean_temporary_directories.clone(),
            config.run_command_cleaner.clone(),
        )
    });
    let users = user::Users::new(&config.users);
    let build_directory = config.build_directory.to_string_lossy().into_owned();
    let additions = Additions {
        view: match (&config.root, layers.has(Layer::Mounts)) {
            (Root::Input, _) => View::InputRoot,
            (_, true) => View::OwnDirectory(build_directory),
            (_, false) => View::Whole(build_directory),
        },
        tmpdir: config.set_tmpdir_environment_variable,
        defaults: config.set_default_environment_variables,
    };
    let processes =
        room::open_namespace("pid").map_err(|error| failed("open /proc/self/ns/pid", error))?;
    let user_namespaces = config.containment.allow_user_namespaces;
    let filter = layers
        .has(Layer::Seccomp)
        .then(|| seccomp::Filter::new(user_namespaces));
    let killing = CancellationToken::new();
    let drain = config.shutdown.drain_timeout.get();
    let house = Arc::new(action::House {
        config,
        rooms,
        null,
        processes,
        filter,
        groups,
        emulator,
        cleaner,
        inherited: child::Inherited {
            // SIGPIPE is ignored by Rust's runtime; the rest is as whoever started this daemon had it.
            ignored_signals: status_bits("SigIgn:").unwrap_or(0),
            bounding_capabilities: status_bits("CapBnd:").unwrap_or(u64::MAX),
        },
    });
    // Logs are made for the action's user to write; everything else that is made has a mode of its own.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let runner = service::Runner {
        users: users.clone(),
        allowed,
        additions,
        killing: killing.clone(),
        house: house.clone(),
    };
    let routes = Services::default()
        .add(deadline::Server::new(runner))
        .observable(&lifecycle.stopping())?;

    // Each command has a thread of the pool to itself.
    lifecycle.liveness_check("the pool of threads", {
        let runtime = tokio::runtime::Handle::current();
        move || {
            let (sender, answer) = std::sync::mpsc::channel();
            runtime.spawn_blocking(move || sender.send(()));
            let _ = answer.recv();
        }
    });
    let place = format!(
        "for {} as users {} to {}",
        listener.address(),
        range.start,
        range.end - 1
    );
    lifecycle.ready(&format!("running commands {place}"));
    let stopping = lifecycle.stopping();
    let line = || match (stopping.is_cancelled(), users.in_use()) {
        (true, running) => format!("draining: {running} commands still run"),
        (false, 0) => format!("idle, {place}"),
        (false, running) => format!("{running} commands run, {place}"),
    };
    let kill_what_is_late = async {
        lifecycle.stopping().cancelled().await;
        tokio::time::sleep(drain).await;
        killing.cancel();
        std::future::pending().await
    };
    let result = tokio::select! {
        // Callers are told what became of commands that had to be killed.
        result = daemon::serve(listener, routes, lifecycle.stopping(), drain + DYING) => result,
        () = lifecycle.keep_status(line) => Ok(()),
        () = kill_what_is_late => Ok(()),
    };
    killing.cancel();
    if !users.all_back(DYING).await {
        tracing::warn!("leaving although not everything that was killed is gone");
    }
    house.rooms.close();
    result
}

/// Each action takes some twenty descriptors; the usual soft limit is there for select(2) only, and
/// actions get limits of their own (`child`).
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let limit = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(limit).and_then(|(_, hard)| setrlimit(limit, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "could not raise the limit of descriptors");
    }
}

const CGROUPS: &str = "containment.cgroups";

/// Each limit is.
fn kept(unkept: &[cgroup::Unkept]) -> Result<(), String> {
    match unkept {
        [] => Ok(()),
        _ => {
            let reason = |it: &cgroup::Unkept| format!("{} cannot be kept: {}", it.key, it.reason);
            Err(unkept.iter().map(reason).collect::<Vec<_>>().join("; "))
        }
    }
}

fn find_cgroups(config: &Config) -> Result<Option<cgroup::Cgroups>, Failure> {
    let key = CGROUPS;
    if config.containment.cgroups == Demand::Off {
        tracing::info!("{key} is off: actions' processes are found by their users");
        return Ok(None);
    }
    match cgroup::Cgroups::find(config.users.first, &config.limits) {
        Ok(cgroups) => {
            if config.containment.cgroups == Demand::Require {
                kept(cgroups.unkept()).map_err(|reason| layer::unmet(key, &reason))?;
            }
            for cgroup::Unkept { key, reason } in cgroups.unkept() {
                tracing::warn!("{key} is not kept: {reason}");
            }
            tracing::info!(directory = %cgroups.directory().display(), "{key} is on: actions have control groups");
            Ok(Some(cgroups))
        }
        Err(reason) if config.containment.cgroups == Demand::Require => {
            Err(layer::unmet(key, &reason))
        }
        Err(reason) => {
            tracing::warn!(
                "{key} is off, since {reason}: actions' processes are found by their users"
            );
            Ok(None)
        }
    }
}

fn check_capabilities() -> Result<(), Failure> {
    let missing = missing_capabilities(0);
    // Without those for namespaces, actions can be run, with less around them.
    let vital =
        &missing[..missing.len() - missing_capabilities(CAPABILITIES.len() - NAMESPACES).len()];
    if vital.is_empty() {
        return Ok(());
    }
    Err(Failure::Configuration {
        key: "users",
        message: format!(
            "actions run as users of their own, which takes privileges; run bb_runner as root (it \
             lacks {})",
            vital.join(", ")
        ),
    })
}

/// Those of `CAPABILITIES` that this process lacks, from the given one on.
fn missing_capabilities(from: usize) -> Vec<&'static str> {
    let effective = status_bits("CapEff:").unwrap_or(0);
    CAPABILITIES
        .iter()
        .skip(from)
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect()
}

/// A bit set of this process (proc_pid_status(5)).
fn status_bits(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let digits = status.lines().find_map(|line| line.strip_prefix(field))?;
    u64::from_str_radix(digits.trim(), 16).ok()
}

fn check_users(config: &Config) -> Result<(), Failure> {
    let range = config.users.range();
    let own = nix::unistd::getuid().as_raw();
    let (allowed, _) = resolve_users(&config.allowed_users);
    let reason = if range.contains(&own) {
        Some(format!("bb_runner itself runs as user {own}"))
    } else if let Some(worker) = allowed.iter().find(|user| range.contains(user)) {
        Some(format!("allowed_users has user {worker}"))
    } else {
        user::collisions(&range).into_iter().next()
    };
    match reason {
        None => Ok(()),
        Some(reason) => Err(Failure::Configuration {
            key: "users.first",
            message: format!(
                "users {} to {} must be nobody else's, but {reason}; choose another range, or name \
                 those that are meant for actions bb-action…",
                range.start,
                range.end - 1
            ),
        }),
    }
}

/// Numbers of those that exist, and the names of the others.
fn resolve_users(names: &[String]) -> (BTreeSet<u32>, Vec<String>) {
    let mut known = BTreeSet::new();
    let mut unknown = Vec::new();
    for name in names {
        match (name.parse::<u32>(), nix::unistd::User::from_name(name)) {
            (Ok(number), _) => {
                known.insert(number);
            }
            (_, Ok(Some(user))) => {
                known.insert(user.uid.as_raw());
            }
            _ => unknown.push(name.clone()),
        }
    }
    (known, unknown)
}

fn unknown_user(name: String) -> Failure {
    Failure::Configuration {
        key: "allowed_users",
        message: format!(
            "there is no user {name:?} on this host; create it, or name the user that bb_worker \
             runs as"
        ),
    }
}

fn group(key: &'static str, name: &str) -> Result<u32, Failure> {
    let found = match name.parse::<u32>() {
        Ok(number) => Some(number),
        Err(_) => nix::unistd::Group::from_name(name)
            .ok()
            .flatten()
            .map(|group| group.gid.as_raw()),
    };
    found.ok_or_else(|| Failure::Configuration {
        key,
        message: format!("there is no group {name:?} on this host; create it, or name another"),
    })
}

fn resolve_groups(names: &[String]) -> Result<Vec<u32>, Failure> {
    names
        .iter()
        .map(|name| group("additional_groups", name))
        .collect()
}

fn socket_group(config: &Config) -> Result<Option<u32>, Failure> {
    match config.socket_group.as_str() {
        "" => Ok(None),
        name => group("socket_group", name).map(Some),
    }
}
