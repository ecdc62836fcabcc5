//! One action, from its command to its last process, as one straight function.
//!
//! Where it returns, whatever it returns, no process of the action lives, its gate is closed and
//! unlocked, and nothing that it made outside of its own directories exists.

use std::{ffi::CString, fs::File, io, os::fd::AsFd, time::Duration};

use rustix::fs::OFlags;
use tokio::sync::oneshot;

use super::{
    child::{Inherited, Step},
    command::{Command, Executable},
    gate::{BuildDirectory, Gate, GateError},
    process::{Blueprint, Exit, Process, SpawnError, Stop},
    room::{Room, RoomError, Rooms, copy_of_directory},
    user::{self, User},
};
use crate::config::runner::Config;

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
        Step::Session => "begin a session for",
        Step::Descriptors => "hand descriptors to",
        Step::Limits => "set limits of",
        Step::InputRoot => "enter input root directory",
        Step::Credentials => "become the user of",
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
    stop: &Stop,
    answer: oneshot::Sender<Result<Exit, RunError>>,
) {
    let result = BuildDirectory::open(&house.config.build_directory)
        .map_err(RunError::from)
        .and_then(|build| {
            let identity = build.identity().map_err(|error| RunError::Resources {
                what: "look at the build directory",
                error,
            })?;
            let room = house.rooms.take(identity)?;
            let result = run_in(house, command, user.id(), stop, &build, &room);
            Ok((result, room))
        });
    let (result, room) = match result {
        Ok((result, room)) => (result, Some(room)),
        Err(error) => (Err(error), None),
    };
    let immortal = matches!(result, Err(RunError::Immortal { .. }));
    // The call may be gone.
    let _ = answer.send(result);
    drop(room);
    // Last: whoever has all users back knows that all rooms are torn down.
    if immortal {
        user.retire();
    }
}

fn run_in(
    house: &House,
    command: &Command,
    user: u32,
    stop: &Stop,
    build: &BuildDirectory,
    room: &Room,
) -> Result<Exit, RunError> {
    // Before anything of the action exists, and closed after everything of it is gone.
    let gate = Gate::open(build, command, user, stop)?;
    let stdout = build.create_log(&command.stdout)?;
    let stderr = build.create_log(&command.stderr)?;

    let mut mounts = Vec::new();
    if let (Some(namespaces), Some(path)) = (&room.namespaces, &command.temporary_directory) {
        let temporary = build.directory(path, OFlags::PATH)?;
        for place in &namespaces.temporary {
            let tree =
                copy_of_directory(temporary.as_fd()).map_err(|error| RunError::Resources {
                    what: "mount the temporary directory",
                    error,
                })?;
            mounts.push((tree, place.as_c_str()));
        }
    }
    let (executables, search) = match &command.executable {
        Executable::Path(path) => (std::slice::from_ref(path), false),
        Executable::Search { candidates, .. } => (candidates.as_slice(), true),
    };
    let input_root = c_string(command.input_root.to_string());
    let working_directory = c_string(command.working_directory.to_string());
    let blueprint = Blueprint {
        arguments: &command.arguments,
        environment: &command.environment,
        executables,
        search,
        working_directory: &working_directory,
        input_root: &input_root,
        build_directory: match &room.namespaces {
            Some(namespaces) => namespaces.build_directory.as_fd(),
            None => build.as_fd(),
        },
        stdin: house.null.as_fd(),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        user,
        cgroup: room.cgroup.as_ref().map(|cgroup| cgroup.as_fd()),
        namespaces: room
            .namespaces
            .as_ref()
            .map(|namespaces| (namespaces.mount.as_fd(), namespaces.ipc.as_fd())),
        inherited: house.inherited,
        mounts: &mounts,
    };
    let ended = match Process::spawn(&blueprint) {
        Ok(mut process) => match process.wait(stop) {
            true => process.reap().map_err(RunError::Wait),
            false => Err(RunError::Stopped),
        },
        Err(error) => Err(start_error(command, error)),
    };

    // Also when it never started: by now nothing may be left.
    let quiet = room
        .cgroup
        .as_ref()
        .is_none_or(|cgroup| cgroup.empty(DYING))
        && user::sweep(user, DYING);
    if !quiet {
        tracing::error!(
            user,
            "processes of an action could not be killed; its user is not used again"
        );
        return Err(RunError::Immortal { user });
    }
    if room.namespaces.is_none() {
        user::sweep_files(user, &house.rooms.plan().shared());
        user::sweep_ipc(user);
    }
    drop(gate);
    ended
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
