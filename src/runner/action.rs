//! One action, from its command to its last process, as one straight function.
//!
//! Where it returns, whatever it returns, no process of the action lives, its gate is closed and
//! unlocked, and nothing that it made outside of its own directories exists.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::fs::OFlags;
use tokio::sync::oneshot;

use super::{
    cgroup::{Cgroup, Memory, Usage},
    child::{Inherited, Step},
    cleaner::{Cleaner, RunningAction},
    command::{Command, Executable},
    gate::{BuildDirectory, Gate, GateError},
    init::End,
    layer::Layer,
    log::{INTERVAL, Log},
    mount::copy_of_directory,
    process::{Base, Blueprint, Exit, Process, SpawnError, Woken},
    room::{Mounts, Room, RoomError},
    rooms::Rooms,
    root::RootDirectory,
    seccomp::Filter,
    stop::StopSignal,
    user::{self, User},
};
use crate::{
    config::{
        Size,
        runner::{Config, Root},
    },
    path::RelativePath,
};

/// How long processes that were killed may take to be gone; those that hang in a system call, such
/// as on a dead network file system, may take forever.
const DYING: Duration = Duration::from_secs(30);

/// What all actions share.
#[derive(Debug)]
pub struct House {
    pub config: Config,
    pub rooms: Rooms,
    pub null: File,
    pub inherited: Inherited,
    /// The process namespace of this daemon.
    pub processes: OwnedFd,
    pub filter: Option<Filter>,
    pub groups: Vec<libc::gid_t>,
    pub emulator: Vec<CString>,
    /// `None` when there is nothing to clean.
    pub cleaner: Option<Cleaner>,
}

/// Why there is no exit code.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Gate(#[from] GateError),
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The action must be changed.
    #[error("Cannot find executable {name:?} in search paths {path:?}")]
    NotFound { name: String, path: String },
    #[error("Failed to start process: {} {subject:?}: {error}", verb(.step))]
    Start {
        step: Step,
        subject: String,
        error: io::Error,
    },
    #[error("Failed to start process: could not {what}: {error}")]
    Resources {
        what: &'static str,
        error: io::Error,
    },
    #[error("Failed to wait for process: {0}")]
    Wait(io::Error),
    /// What it had done until then says nothing about it.
    #[error("The action was killed from outside: {0}")]
    Killed(&'static str),
    #[error(
        "Processes of the action were still there {DYING:?} after they were killed; user {user} is \
         not used again until bb_runner is restarted"
    )]
    Immortal { user: u32 },
    #[error("The call was cancelled; everything that it had started was killed")]
    Stopped,
}

impl RunError {
    /// Whether the action itself is at fault, so that it would fail again elsewhere.
    pub fn is_the_actions(&self) -> bool {
        match self {
            RunError::NotFound { .. } => true,
            RunError::Gate(error) => error.escapes(),
            RunError::Start { step, error, .. } => {
                matches!(step, Step::Execute | Step::Search | Step::WorkingDirectory)
                    && matches!(
                        error.raw_os_error(),
                        Some(
                            libc::ENOENT
                                | libc::ENOTDIR
                                | libc::EACCES
                                | libc::EPERM
                                | libc::EISDIR
                                | libc::ENOEXEC
                                | libc::ELOOP
                                | libc::ENAMETOOLONG
                                | libc::E2BIG
                                | libc::ELIBBAD
                        )
                    )
            }
            _ => false,
        }
    }
}

fn verb(step: &Step) -> &'static str {
    match step {
        Step::Namespaces => "enter namespaces for",
        Step::Mounts => "mount directories for",
        Step::Root => "change the root of",
        Step::Session => "begin a session for",
        Step::Descriptors => "hand descriptors to",
        Step::Limits => "set limits of",
        Step::InputRoot => "enter input root directory",
        Step::Credentials => "become the user of",
        Step::Filter => "filter system calls of",
        Step::WorkingDirectory => "chdir",
        Step::Search | Step::Execute => "exec",
    }
}

/// Runs a command, on this thread, and answers when nothing of it is left. What can wait is done
/// after the answer.
pub fn run(
    house: &House,
    command: &Command,
    user: User,
    stop: &StopSignal,
    answer: oneshot::Sender<Result<Exit, RunError>>,
) {
    let begun = begin(house, stop);
    let (result, begun) = match begun {
        Ok((running, build, mut room)) => {
            let result = run_in(house, command, user.id(), stop, &build, &mut room);
            (result, Some((running, room)))
        }
        Err(error) => (Err(error), None),
    };
    let immortal = matches!(result, Err(RunError::Immortal { .. }));
    // Before anybody learns that the action is over.
    let room = begun.map(|(running, room)| {
        drop(running);
        room
    });
    // The call may be gone.
    let _ = answer.send(result);
    drop(room);
    // Last: whoever has all users back knows that all rooms are torn down.
    if immortal {
        user.retire();
    }
}

/// What an action needs before anything is made for it alone.
fn begin<'a>(
    house: &'a House,
    stop: &StopSignal,
) -> Result<(Option<RunningAction<'a>>, BuildDirectory, Room), RunError> {
    let resources = |what| move |error| RunError::Resources { what, error };
    let running = match &house.cleaner {
        Some(cleaner) => {
            let running = cleaner
                .begin(stop)
                .map_err(resources("clean up before the action"))?;
            Some(running.ok_or(RunError::Stopped)?)
        }
        None => None,
    };
    let build = BuildDirectory::open(&house.config.build_directory)?;
    let identity = build
        .identity()
        .map_err(resources("look at the build directory"))?;
    let room = match house.rooms.try_take(identity) {
        Some(room) => room,
        None => stop
            .block_on(house.rooms.take(identity))
            .ok_or(RunError::Stopped)??,
    };
    Ok((running, build, room))
}

fn run_in(
    house: &House,
    command: &Command,
    user: u32,
    stop: &StopSignal,
    build: &BuildDirectory,
    room: &mut Room,
) -> Result<Exit, RunError> {
    // Before anything of the action exists, and closed after everything of it is gone.
    let gate = Gate::open(build, command, user, stop)?;
    let limit = house.config.limits.log_size;
    let mut stdout = Log::new(build.create_log(&command.stdout)?, limit);
    let mut stderr = Log::new(build.create_log(&command.stderr)?, limit);

    if let Some(mounts) = &room.mounts {
        mounts
            .account
            .name(user, &command.home)
            .map_err(|error| RunError::Resources {
                what: "name the action's user",
                error,
            })?;
    }
    let Scene {
        base,
        input_root,
        mounts,
        root,
    } = Scene::set(house, command, build, room.mounts.as_ref())?;
    let (executables, search) = match &command.executable {
        Executable::Path(path) => (std::slice::from_ref(path), false),
        Executable::Search { candidates, .. } => (candidates.as_slice(), true),
    };
    let working_directory = c_string(command.working_directory.to_string());
    let blueprint = Blueprint {
        arguments: &command.arguments,
        environment: &command.environment,
        executables,
        search,
        working_directory: &working_directory,
        input_root: &input_root,
        base: match (&base, &room.mounts) {
            (Some(path), _) => Base::Path(path),
            (None, Some(mounts)) => Base::Directory(mounts.build_directory.as_fd()),
            (None, None) => Base::Directory(build.as_fd()),
        },
        stdin: house.null.as_fd(),
        stdout: stdout.file.as_fd(),
        stderr: stderr.file.as_fd(),
        user,
        groups: &house.groups,
        cgroup: room.cgroup.as_ref().map(|cgroup| cgroup.as_fd()),
        namespaces: &room.namespaces,
        processes: room
            .init
            .as_ref()
            .map(|init| (init.processes(), house.processes.as_fd())),
        inherited: house.inherited,
        mounts: &mounts,
        root: match (&root, &room.mounts) {
            (Some(root), Some(mounts)) => Some((&mounts.place, root.copies())),
            _ => None,
        },
        filter: house.filter.as_ref(),
        emulator: &house.emulator,
        process_limit: house.config.limits.processes,
    };
    let mut ended = match Process::spawn(&blueprint) {
        Ok(mut process) => loop {
            match process.wait(stop, Some(INTERVAL)) {
                Woken::Ended => break process.reap().map_err(RunError::Wait),
                Woken::Stopped => {
                    let grace = house.config.termination_grace.get();
                    if !grace.is_zero() {
                        process.terminate(grace);
                    }
                    break Err(RunError::Stopped);
                }
                Woken::Late => {
                    stdout.cut();
                    stderr.cut();
                }
            }
        },
        Err(error) => Err(start_error(command, error)),
    };

    // Also when it never started: by now nothing may be left.
    let namespace = room.init.as_mut().map(|init| init.end(DYING));
    let quiet = namespace != Some(None)
        && room
            .cgroup
            .as_ref()
            .is_none_or(|cgroup| cgroup.empty(DYING))
        && user::sweep(user, DYING);
    if !quiet {
        // Whoever waits for the lock must not find that nothing stirs.
        std::mem::forget(gate);
        if let Some(network) = &mut room.network {
            network.retire();
        }
        tracing::error!(
            user,
            "processes of an action could not be killed; its user is not used again"
        );
        return Err(RunError::Immortal { user });
    }
    stdout.finish();
    stderr.finish();
    let group = room.cgroup.as_ref().map(Cgroup::usage);
    if let Ok(exit) = &mut ended {
        exit.group = group;
        if let Some(group) = &group {
            explain(&mut stderr, group, house.config.limits.processes);
        }
    }
    let memory = group.and_then(|group| group.memory);
    if memory.is_some_and(|memory| memory.is_victim()) {
        ended = ended.and(Err(RunError::Killed("this host ran out of memory")));
    } else if namespace == Some(Some(End::Killed))
        && !memory.is_some_and(|memory| memory.is_exhausted())
        && !matches!(ended, Err(RunError::Stopped))
    {
        ended = Err(RunError::Killed(
            "somebody sent SIGKILL to the first process of its namespace, or to its control group",
        ));
    }
    let plan = house.rooms.plan();
    if !plan.layers.has(Layer::Mounts) {
        user::sweep_files(user, &plan.shared());
    }
    if !plan.layers.has(Layer::Ipc) {
        user::sweep_ipc(user);
    }
    drop(root);
    drop(gate);
    ended
}

/// Tells whoever reads the action's output of limits that it has reached.
fn explain(stderr: &mut Log, group: &Usage, processes: u64) {
    if let Some(memory) = group.memory.filter(Memory::is_exhausted) {
        let peak = memory.peak.map_or_else(String::new, |peak| {
            format!(" and it used up to {}", Size(peak))
        });
        stderr.say(&format!(
            "the action ran out of memory: its limit is {}{peak}",
            Size(memory.limit.unwrap_or_default())
        ));
    }
    if group.processes_refused > 0 {
        stderr.say(&format!(
            "the action could not make more processes: its limit is {processes}"
        ));
    }
}

/// What is mounted for one action, and where its input root is then.
struct Scene {
    /// `None`: the build directory.
    base: Option<CString>,
    /// Below `base`.
    input_root: CString,
    mounts: Vec<(OwnedFd, CString)>,
    root: Option<RootDirectory>,
}

impl Scene {
    fn set(
        house: &House,
        command: &Command,
        build: &BuildDirectory,
        room: Option<&Mounts>,
    ) -> Result<Self, RunError> {
        let mut scene = Scene {
            base: None,
            input_root: c_string(command.input_root.to_string()),
            mounts: Vec::new(),
            root: None,
        };
        let Some(room) = room else {
            return Ok(scene);
        };
        let mounted = |path: &RelativePath, what| {
            let directory = build.directory(path, OFlags::PATH)?;
            copy_of_directory(directory.as_fd())
                .map_err(|error| RunError::Resources { what, error })
        };
        let mut temporary_places = room.temporary.clone();
        if house.config.root == Root::Input {
            let directory = build.directory(&command.input_root, OFlags::PATH)?;
            let root = RootDirectory::prepare(directory, &room.place).map_err(|error| {
                RunError::Resources {
                    what: "make the input root a root directory",
                    error,
                }
            })?;
            let tree = mounted(&command.input_root, "mount the input root")?;
            scene.mounts.push((tree, room.place.clone()));
            temporary_places = root.temporary();
            scene.base = Some(c"/".to_owned());
            scene.input_root = c".".to_owned();
            scene.root = Some(root);
        }
        if let Some(path) = &command.temporary_directory {
            for place in temporary_places {
                let tree = mounted(path, "mount the temporary directory")?;
                scene.mounts.push((tree, place));
            }
        }
        if scene.root.is_none()
            && let Some((gate, name)) = command.input_root.split_last()
            && !gate.is_root()
        {
            let tree = mounted(&gate, "mount the action's directory")?;
            scene.mounts.push((tree, room.place.clone()));
            scene.base = Some(room.place.clone());
            scene.input_root = c_string(name.to_string());
        }
        Ok(scene)
    }
}

fn start_error(command: &Command, error: SpawnError) -> RunError {
    match error {
        SpawnError::Clone(error) => RunError::Resources {
            what: "create a process",
            error,
        },
        SpawnError::Start {
            step,
            error,
            executable,
        } => match (&command.executable, step) {
            (Executable::Search { name, path, .. }, Step::Search) => RunError::NotFound {
                name: name.clone(),
                path: path.clone(),
            },
            (_, Step::WorkingDirectory) => RunError::Start {
                step,
                subject: command.working_directory.to_string(),
                error,
            },
            (_, Step::InputRoot) => RunError::Start {
                step,
                subject: command.input_root.to_string(),
                error,
            },
            (sought, _) => {
                let path = match sought {
                    Executable::Path(path) => Some(path),
                    Executable::Search { candidates, .. } => {
                        executable.and_then(|index| candidates.get(index))
                    }
                };
                let path = path.or(command.arguments.first());
                RunError::Start {
                    step,
                    subject: path
                        .map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
                    error,
                }
            }
        },
    }
}

/// Of a path that was parsed, and so has no NUL.
fn c_string(text: String) -> CString {
    CString::new(text).unwrap_or_default()
}
