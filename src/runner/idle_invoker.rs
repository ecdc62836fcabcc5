//! Cleans what actions share while none of them runs: empties directories, and runs a command.
//!
//! That happens before the first of some actions that overlap, and after the last one of them; no action
//! starts meanwhile. Buildbarn has an IdleInvoker for it, with directory and command cleaners
//! (clean_temporary_directories, run_command_cleaner).
//!
//! 1. Nobody holds the lock while something is cleaned, so that who waits for it can be cancelled.
//! 2. The command ends within `COMMAND_TIMEOUT`, or is killed; then cleaning has failed.
//! 3. The command has the usual umask, not this daemon's, which is empty: what it makes is not for all to
//!    write to.

use std::{
    fs, io,
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};
use tokio::sync::Notify;

use super::{run_cancellation::RunCancellation, sys};
use crate::removal;

/// How long the command may take; no action can start meanwhile.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// The umask of the command.
const UMASK: Mode = Mode::WGRP.union(Mode::WOTH);

/// Invokes cleaners when no action runs.
#[derive(Debug)]
pub(super) struct IdleInvoker {
    directories: Vec<PathBuf>,
    command: Vec<String>,
    timeout: Duration,
    phase: Mutex<IdleInvokerPhase>,
    /// Notified when cleaning is over.
    cleaned: Notify,
}

/// Whether actions run or something is cleaned, but never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IdleInvokerPhase {
    /// Something is cleaned, and no action runs.
    Cleaning,
    /// So many actions run, and nothing is cleaned.
    Running(usize),
}

/// An action's, while it runs: as long as there is one, nothing is cleaned. Cleans when the last one is dropped.
#[derive(Debug)]
pub(super) struct IdleInvokerGuard<'a>(&'a IdleInvoker);

impl IdleInvoker {
    pub(super) fn new(directories: Vec<PathBuf>, command: Vec<String>) -> Self {
        IdleInvoker {
            directories,
            command,
            timeout: COMMAND_TIMEOUT,
            phase: Mutex::new(IdleInvokerPhase::Running(0)),
            cleaned: Notify::new(),
        }
    }

    /// Admits an action, after cleaning if none runs; fails when that does. Returns `None` when the Run is cancelled
    /// while others clean.
    pub(super) fn acquire(
        &self,
        cancellation: &RunCancellation,
    ) -> io::Result<Option<IdleInvokerGuard<'_>>> {
        loop {
            // Before the look, so that no notification is missed.
            let cleaned = self.cleaned.notified();
            let phase = {
                let mut phase = self.phase.lock();
                let found = *phase;
                *phase = match found {
                    IdleInvokerPhase::Cleaning | IdleInvokerPhase::Running(0) => {
                        IdleInvokerPhase::Cleaning
                    }
                    IdleInvokerPhase::Running(count) => IdleInvokerPhase::Running(count + 1),
                };
                found
            };
            match phase {
                IdleInvokerPhase::Cleaning => match cancellation.block_on(cleaned) {
                    Some(()) => continue,
                    None => return Ok(None),
                },
                IdleInvokerPhase::Running(0) => {
                    let result = self.clean();
                    self.finish_cleaning(IdleInvokerPhase::Running(usize::from(result.is_ok())));
                    result?;
                }
                IdleInvokerPhase::Running(_) => {}
            }
            return Ok(Some(IdleInvokerGuard(self)));
        }
    }

    /// Ends cleaning, and wakes those who wait for that.
    fn finish_cleaning(&self, phase: IdleInvokerPhase) {
        *self.phase.lock() = phase;
        self.cleaned.notify_waiters();
    }

    /// Empties the directories, then runs the command. The error names what failed.
    fn clean(&self) -> io::Result<()> {
        for directory in &self.directories {
            let emptied =
                fs::File::open(directory).and_then(|opened| removal::empty(opened.as_fd()));
            emptied.map_err(|error| about(&directory.to_string_lossy(), &error))?;
        }
        if let Some((program, arguments)) = self.command.split_first() {
            let mut command = Command::new(program);
            command
                .args(arguments)
                .stdin(Stdio::null())
                .process_group(0);
            sys::set_umask(&mut command, UMASK);
            let status = command
                .spawn()
                .and_then(|command| wait_or_kill(self.timeout, command))
                .map_err(|error| about(program, &error))?;
            if !status.success() {
                return Err(io::Error::other(format!("{program} failed: {status}")));
            }
        }
        Ok(())
    }
}

/// Waits for a command, which leads a process group; kills that group when it takes too long, or cannot
/// be waited for.
fn wait_or_kill(timeout: Duration, mut command: Child) -> io::Result<ExitStatus> {
    let pid = Pid::from_child(&command);
    let ended = ends_within(timeout, pid);
    if !matches!(ended, Ok(true)) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    // Whatever became of it, it is reaped.
    let status = command.wait()?;
    match ended? {
        true => Ok(status),
        false => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("it did not end within {timeout:?}, and was killed"),
        )),
    }
}

/// Whether a child ends within this time; it is not reaped.
fn ends_within(timeout: Duration, pid: Pid) -> io::Result<bool> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(timeout).ok();
    loop {
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], limit.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            result => return Ok(result? > 0),
        }
    }
}

/// An error that says what it is about.
fn about(subject: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{subject}: {error}"))
}

impl Drop for IdleInvokerGuard<'_> {
    fn drop(&mut self) {
        let idle_invoker = self.0;
        {
            let mut phase = idle_invoker.phase.lock();
            *phase = match *phase {
                IdleInvokerPhase::Running(count @ 2..) => IdleInvokerPhase::Running(count - 1),
                _ => IdleInvokerPhase::Cleaning,
            };
            if *phase != IdleInvokerPhase::Cleaning {
                return;
            }
        }
        if let Err(error) = idle_invoker.clean() {
            // The next action is refused if it still fails then.
            tracing::warn!(%error, "could not clean up after actions");
        }
        idle_invoker.finish_cleaning(IdleInvokerPhase::Running(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle_invoker(command: &[&str]) -> IdleInvoker {
        let command = command.iter().map(|word| word.to_string()).collect();
        IdleInvoker::new(Vec::new(), command)
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_with_its_children() {
        let mut idle_invoker = idle_invoker(&["/bin/sh", "-c", "sleep infinity & wait"]);
        idle_invoker.timeout = Duration::from_millis(100);
        let error = idle_invoker
            .acquire(&RunCancellation::new().unwrap())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("/bin/sh"), "{error}");
        // And the next one tries again.
        idle_invoker
            .acquire(&RunCancellation::new().unwrap())
            .unwrap_err();
    }

    #[test]
    fn what_the_command_makes_is_not_for_all_to_write_to() {
        let directory = tempfile::tempdir().unwrap();
        let made = directory.path().join("made");
        let idle_invoker =
            idle_invoker(&["/bin/sh", "-c", "umask > \"$0\"", made.to_str().unwrap()]);
        drop(
            idle_invoker
                .acquire(&RunCancellation::new().unwrap())
                .unwrap(),
        );
        assert_eq!(fs::read_to_string(&made).unwrap().trim(), "0022");
    }

    #[test]
    fn directories_of_any_depth_are_emptied() {
        let directory = tempfile::tempdir().unwrap();
        let mut deepest = fs::File::open(directory.path()).unwrap();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&deepest, "d", Mode::RWXU).unwrap();
            let flags = rustix::fs::OFlags::DIRECTORY;
            deepest = rustix::fs::openat(&deepest, "d", flags, Mode::empty())
                .unwrap()
                .into();
        }
        let idle_invoker = IdleInvoker::new(vec![directory.path().to_owned()], Vec::new());
        // No more than a thread of the runtime's has.
        let clean = move || {
            drop(
                idle_invoker
                    .acquire(&RunCancellation::new().unwrap())
                    .unwrap(),
            )
        };
        let thread = std::thread::Builder::new().stack_size(256 << 10);
        thread.spawn(clean).unwrap().join().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn who_waits_while_others_clean_can_be_cancelled() {
        let idle_invoker = idle_invoker(&[]);
        *idle_invoker.phase.lock() = IdleInvokerPhase::Cleaning;
        let cancellation = RunCancellation::new().unwrap();
        cancellation.cancel();
        tokio::task::spawn_blocking(move || {
            assert!(idle_invoker.acquire(&cancellation).unwrap().is_none());
            idle_invoker.finish_cleaning(IdleInvokerPhase::Running(0));
            assert!(idle_invoker.acquire(&cancellation).unwrap().is_some());
        })
        .await
        .unwrap();
    }
}
