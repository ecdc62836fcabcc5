//! What a new process does before it becomes the action's command.
//!
//! 1. It shares this daemon's memory and runs on a stack of its own while the thread that made it
//!    sleeps (`sys::clone_vfork`). So it does only what a new process may: it allocates nothing, takes
//!    no lock, cannot panic, and changes credentials by raw system calls, since glibc's wrappers would
//!    change those of all threads.
//! 2. The order is the argument: first what takes privileges (namespaces, mounts, the input root,
//!    which only a privileged process may reach where nobody else may pass its directory), then the
//!    loss of every privilege, then what the action's own rights must decide (its working directory,
//!    its executable).
//! 3. Nothing of the daemon's gets through: no descriptor, signal disposition or mask, session,
//!    terminal, group, capability, keyring; and no privilege can be had again (no_new_privs).

#![expect(
    unsafe_code,
    reason = "it is run by a new process, which shares memory until it executes the command"
)]

use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_int, c_void},
};

use rustix::{
    fs::{
        Access, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, accessat, openat, openat2, stat,
    },
    io::Errno,
    process::{
        Gid, Pid, Signal, Uid, chdir, fchdir, getppid, set_parent_process_death_signal, setsid,
        umask,
    },
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    thread::{
        CapabilitySet, CapabilitySets, NanosleepRelativeResult, Timespec, nanosleep,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{
    rlimits::{limit_open_files, limit_resources},
    spawn_spec::{PathBase, SpawnSpec},
    spawn_stage::SpawnStage,
};
use crate::runner::sys;

/// What the new process needs; it lives until the process has executed the command.
pub(super) struct CommandLaunch<'a> {
    pub spec: &'a SpawnSpec<'a>,
    /// Null-terminated, as execve(2) takes it, as is the environment. With an emulator, the executable
    /// is put in after its arguments.
    pub arguments: &'a [Cell<*const c_char>],
    pub environment: &'a [*const c_char],
    /// This daemon, as the process sees it.
    pub parent: Option<Pid>,
    pub progress: Cell<SpawnProgress>,
}

/// How far the new process came. `errno` is 0 as long as nothing failed.
#[derive(Clone, Copy, Default)]
pub(super) struct SpawnProgress {
    pub stage: SpawnStage,
    pub errno: c_int,
    /// The index of the executable that was found.
    pub executable: Option<usize>,
}

/// What the new process begins with.
///
/// # Safety
///
/// `argument` is a `CommandLaunch`. Runs in a process of its own.
pub(super) unsafe extern "C" fn main(argument: *const c_void) -> ! {
    // SAFETY: as the caller promises; the thread that made it sleeps.
    let launch = unsafe { &*argument.cast::<CommandLaunch<'_>>() };
    let errno = match prepare(launch) {
        Ok(()) => execute(launch),
        Err(errno) => errno,
    };
    launch.progress.set(SpawnProgress {
        errno: errno.raw_os_error(),
        ..launch.progress.get()
    });
    sys::exit(127)
}

impl CommandLaunch<'_> {
    /// Notes what is done next.
    fn begin(&self, stage: SpawnStage) {
        self.progress.set(SpawnProgress {
            stage,
            ..self.progress.get()
        });
    }
}

/// Does all that comes before the command is executed, in this order.
fn prepare(launch: &CommandLaunch<'_>) -> Result<(), Errno> {
    let spec = launch.spec;
    for step in spec.setup {
        launch.begin(step.stage());
        step.perform()?;
    }

    launch.begin(SpawnStage::Session);
    setsid()?;
    // Kernels without keyrings have none to inherit.
    let _ = sys::join_new_session_keyring();
    // CLONE_CLEAR_SIGHAND (`sys::clone_vfork`) resets signals that are handled, but not those that are ignored.
    for signal in 1..=sys::LAST_SIGNAL {
        if spec.inherited.ignored_signals & (1 << (signal - 1)) != 0 {
            sys::set_disposition(signal, sys::Disposition::Default)?;
        }
    }

    launch.begin(SpawnStage::Descriptors);
    let [stdin, stdout, stderr] = spec.stdio;
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    dup2_stderr(stderr)?;
    sys::close_on_exec_from(3)?;

    launch.begin(SpawnStage::Limits);
    umask(Mode::from_raw_mode(0o022));
    limit_resources(spec.process_limit)?;

    launch.begin(SpawnStage::InputRoot);
    enter_input_root(spec)?;
    // Not before: the daemon may have more descriptors than that, and so has this copy of them.
    limit_open_files()?;

    launch.begin(SpawnStage::Credentials);
    become_user(spec)?;
    // Dies with the thread that made it; after the change of user, which clears this.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != launch.parent {
        return Err(Errno::SRCH);
    }

    launch.begin(SpawnStage::Filter);
    if let Some(filter) = spec.seccomp_filter {
        sys::install_seccomp_filter(filter)?;
    }

    launch.begin(SpawnStage::WorkingDirectory);
    chdir(spec.working_directory)
}

/// Makes the input root the working directory.
fn enter_input_root(spec: &SpawnSpec<'_>) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |base| openat2(base, spec.input_root, flags, Mode::empty(), beneath);
    let input_root = match spec.base {
        PathBase::Directory(directory) => open(directory)?,
        // In the namespace's mounts: a directory that was opened outside would lead outside.
        PathBase::Path(path) => {
            use std::os::fd::AsFd;
            open(openat(CWD, path, flags, Mode::empty())?.as_fd())?
        }
    };
    fchdir(input_root)
}

/// Becomes the action's user, in its groups, without capabilities.
fn become_user(spec: &SpawnSpec<'_>) -> Result<(), Errno> {
    for capability in 0..u64::BITS {
        let bit = 1 << capability;
        // Refused without CAP_SETPCAP; then no_new_privs alone keeps files from giving any.
        if spec.inherited.bounding_capabilities & bit != 0
            && remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit)).is_err()
        {
            break;
        }
    }
    let (user, group) = (Uid::from_raw(spec.user), Gid::from_raw(spec.user));
    set_thread_groups(spec.supplementary_groups)?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    // The change of user has emptied the others of its sets, not the inheritable one.
    give_up_privileges()
}

/// Empties the sets of capabilities, for good. For a new process (`sys`).
pub(crate) fn give_up_privileges() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    set_capabilities(None, sets)?;
    set_no_new_privs(true)
}

/// Executes the command; returns only the reason why not.
fn execute(launch: &CommandLaunch<'_>) -> Errno {
    let spec = launch.spec;
    let mut candidates = spec
        .executables
        .iter()
        .map(|path| path.as_c_str())
        .enumerate();
    if spec.search {
        launch.begin(SpawnStage::Search);
    }
    let found = match spec.search {
        true => candidates.find(|(_, path)| is_executable(path)),
        false => candidates.next(),
    };
    let Some((index, mut executable)) = found else {
        return Errno::NOENT;
    };
    launch.progress.set(SpawnProgress {
        stage: SpawnStage::Execute,
        executable: Some(index),
        errno: 0,
    });
    if let Err(errno) = sys::unblock_signals() {
        return errno;
    }
    if let Some(emulator) = spec.emulator.first() {
        if let Some(emulated) = launch.arguments.get(spec.emulator.len()) {
            emulated.set(executable.as_ptr());
        }
        executable = emulator;
        launch.begin(SpawnStage::Emulate);
    }
    let mut attempts = 0;
    loop {
        // SAFETY: both arrays are null-terminated, and a `Cell` is as its value is in memory.
        let errno = unsafe {
            sys::execve(
                executable,
                launch.arguments.as_ptr().cast(),
                launch.environment.as_ptr(),
            )
        };
        // Somebody who wrote this file has forked a moment ago, and will close it.
        if errno != Errno::TXTBSY || attempts == 20 {
            return errno;
        }
        attempts += 1;
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        let _: NanosleepRelativeResult = nanosleep(&pause);
    }
}

/// Whether a path is of a regular file that this user may execute.
fn is_executable(path: &CStr) -> bool {
    stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
        // Real and effective user are the same by now.
        && accessat(CWD, path, Access::EXEC_OK, AtFlags::empty()).is_ok()
}
