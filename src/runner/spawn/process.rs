//! A process as this daemon has it: how it is made, waited for and killed, and what it used.
//!
//! 1. Everything that can be prepared is prepared before the process exists.
//! 2. The process is in its control group from the start (clone3(2), CLONE_INTO_CGROUP).
//! 3. The thread that makes a process stays until it is gone, since its end would kill the process
//!    (PR_SET_PDEATHSIG).

#![expect(
    unsafe_code,
    reason = "it makes a process, which shares memory until it executes the command"
)]

use std::{
    cell::Cell,
    ffi::{CString, c_char},
    io,
    os::fd::OwnedFd,
    ptr,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::resource::{UsageWho, getrusage},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Signal, getpid, pidfd_send_signal},
};

use super::{
    child::{self, CommandLaunch, SpawnProgress},
    spawn_spec::SpawnSpec,
    spawn_stage::SpawnStage,
};
use crate::runner::{run_cancellation::RunCancellation, sys};

/// How long a process that was killed is waited for when it is dropped.
const REAP_TIMEOUT: Duration = Duration::from_secs(1);

/// A process that was made and not yet waited for; killed and reaped on drop.
pub(crate) struct Process {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    is_reaped: bool,
    /// The most memory that this daemon had used when the process was made, in KiB.
    daemon_peak: libc::c_long,
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitOutcome {
    Exited,
    /// The Run was cancelled.
    Cancelled,
    /// Neither could be waited for.
    PollFailed,
    TimedOut,
}

/// How a process ended, and what it used.
#[derive(Clone, Copy)]
pub(crate) struct Exit {
    pub status: ExitStatus,
    pub usage: libc::rusage,
    /// Whether `usage` may have the memory that this daemon used: a process keeps the highest figure
    /// of what it shared before it executed a program. Then the command's was this at most. The
    /// kernel adds each thread's pages to a figure in lots of 64, so that it can read a little more
    /// to the new process than to this daemon a moment later; hence up to twice the daemon's.
    pub maxrss_may_be_daemons: bool,
}

/// The exit code of a process, or the signal that killed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    Code(i32),
    Signal(i32),
}

/// Why a process could not be made, or did not become the command.
#[derive(Debug)]
pub(crate) enum SpawnError {
    /// No process was made.
    Clone(io::Error),
    /// It failed on its way to the command.
    Start {
        stage: SpawnStage,
        error: io::Error,
        /// The index of the executable among those that were given, if one was chosen.
        executable: Option<usize>,
    },
}

impl Process {
    /// Makes a process, and returns when it has become the command.
    pub(crate) fn spawn(spec: &SpawnSpec<'_>) -> Result<Self, SpawnError> {
        let arguments: Vec<Cell<*const c_char>> = spec
            .emulator
            .iter()
            .chain(spec.arguments)
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .map(Cell::new)
            .collect();
        let environment: Vec<*const c_char> = pointers(spec.environment);
        let launch = CommandLaunch {
            spec,
            arguments: &arguments,
            environment: &environment,
            // pid_namespaces(7): a parent outside of one's own is none.
            parent: spec.pid_namespaces.is_none().then(getpid),
            progress: Cell::new(SpawnProgress::default()),
        };
        // Concerns the children of this thread, and not itself.
        let kind = CloneFlags::CLONE_NEWPID;
        if let Some(namespaces) = spec.pid_namespaces {
            setns(namespaces.inside, kind).map_err(|error| SpawnError::Clone(error.into()))?;
        }
        // SAFETY: `main` gets the launch that it wants, which is here until the process needs it no
        // more, and does what a new process may.
        let made =
            unsafe { sys::clone_vfork(child::main, ptr::from_ref(&launch).cast(), 0, spec.cgroup) };
        if let Some(namespaces) = spec.pid_namespaces
            && let Err(error) = setns(namespaces.daemon, kind)
        {
            tracing::error!(%error, "a thread could not return to its PID namespace");
        }
        let (pid, pidfd) = made.map_err(SpawnError::Clone)?;
        let mut process = Process {
            pid,
            pidfd,
            is_reaped: false,
            daemon_peak: getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.max_rss()),
        };
        let progress = launch.progress.get();
        if progress.errno == 0 {
            return Ok(process);
        }
        let _ = process.reap();
        Err(SpawnError::Start {
            stage: progress.stage,
            error: io::Error::from_raw_os_error(progress.errno),
            executable: progress.executable,
        })
    }

    /// Waits until the process has ended, or the Run is cancelled, or this long.
    pub(crate) fn wait(&self, cancellation: &RunCancellation, timeout: Duration) -> WaitOutcome {
        let timeout = Timespec::try_from(timeout).ok();
        loop {
            let mut fds = [
                PollFd::new(&self.pidfd, PollFlags::IN),
                PollFd::new(cancellation, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "could not wait for a process");
                    return WaitOutcome::PollFailed;
                }
                Ok(0) => return WaitOutcome::TimedOut,
                Ok(_) if fds[0].revents().is_empty() => return WaitOutcome::Cancelled,
                Ok(_) => return WaitOutcome::Exited,
            }
        }
    }

    /// Asks the process to end.
    pub(crate) fn terminate(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
    }

    /// Waits until the process has ended, or this long; also less, when a signal comes.
    pub(crate) fn ends_within(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, timeout.as_ref()) == Ok(1)
    }

    /// Waits for its end, and reaps it; to be called once.
    pub(crate) fn reap(&mut self) -> io::Result<Exit> {
        // Its number is still that of our child, since only this method reaps it, once.
        self.is_reaped = true;
        let (wait_status, usage) = sys::wait4(self.pid)?;
        Ok(Exit {
            status: match libc::WIFSIGNALED(wait_status) {
                true => ExitStatus::Signal(libc::WTERMSIG(wait_status)),
                false => ExitStatus::Code(libc::WEXITSTATUS(wait_status)),
            },
            usage,
            maxrss_may_be_daemons: usage.ru_maxrss <= self.daemon_peak.saturating_mul(2),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_reaped {
            return;
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if self.ends_within(REAP_TIMEOUT) {
            let _ = self.reap();
            return;
        }
        // It waits for a device, say, where no signal ends it: whoever looks whether all is gone says so.
        let pid = self.pid;
        let reaper = std::thread::Builder::new().name("reap".to_owned());
        let _ = reaper.spawn(move || sys::wait4(pid));
    }
}

/// A null-terminated array, as execve(2) takes it; valid as long as the strings are.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([ptr::null()]).collect()
}
