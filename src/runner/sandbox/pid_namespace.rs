//! The layer `containment.processes`: a PID namespace for each action (pid_namespaces(7)), and its init process.
//!
//! 1. The init process exists before the action and after it. The action's command process is not its child but this
//!    daemon's, which alone learns how it ended; what becomes an orphan is reaped here.
//! 2. When it ends, the kernel kills everything in the namespace, and this daemon is told of its end
//!    only when nothing is left there.
//! 3. It ends when this daemon does, in whatever way: it waits for the end of a pipe.
//! 4. The descriptor of its namespace is opened by the process itself, which every process may do for
//!    itself (proc_pid_ns(5)). To ask for the namespace of another process, by its pidfd or its
//!    directory in /proc, takes PTRACE_MODE_READ (ptrace(2)): CAP_SYS_PTRACE, or that the other one
//!    can be dumped, which it cannot from clone3(2) until some time after its execve(2) has let this
//!    daemon go on.
//! 5. It is a program of a few instructions in memory (`init_program`), so that it costs a page or
//!    two, has nothing of the daemon's, and can do nothing.
//! 6. Where there is a control group, the process also makes the cgroup namespace, and mounts /sys/fs/cgroup.

#![expect(
    unsafe_code,
    reason = "it makes the init process of a namespace, which shares memory until it executes a program"
)]

use std::{
    cell::Cell,
    ffi::{CStr, c_int, c_void},
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, unshare},
    unistd::pipe2,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, Mode, OFlags, openat},
    io::{Errno, fcntl_dupfd_cloexec},
    mount::{MountFlags, mount},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, setsid, waitid},
    thread::{CapabilitiesSecureBits, LinkNameSpaceType, set_capabilities_secure_bits},
};

use super::{
    containment_layer::{Layer, Layers, Probe},
    init_program::{InitProgram, PARENT_PIPE},
    namespace_fd::{NamespaceFd, NamespaceKind},
};
use crate::runner::{spawn::give_up_privileges, sys};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::PROCESSES,
    key: "containment.processes",
    demand: |containment| containment.processes,
    // For a /proc of its own.
    needs: Layers::MOUNTS,
    probe: Probe::Sandbox,
    unshared_namespace: None,
    on: "actions see their own processes only, and the kernel ends all of them together",
    off: "actions see the host's processes; their own are found by control group and user",
};

const CGROUP: NamespaceKind = NamespaceKind {
    flag: CloneFlags::CLONE_NEWCGROUP,
    name: "cgroup",
    link: LinkNameSpaceType::ControlGroup,
};

/// How long the init process may take to exit on request, among an action's processes; they live on meanwhile.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// The init process of a namespace, which is killed on drop.
#[derive(Debug)]
pub(crate) struct InitProcess {
    pidfd: OwnedFd,
    namespace: OwnedFd,
    /// The init process exits when something is written here, or when this is closed.
    parent_pipe: OwnedFd,
    end: Option<NamespaceEnd>,
}

/// How a namespace ended; nothing is left in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NamespaceEnd {
    /// The init process was asked to exit, or had to be killed by this daemon.
    EndedByRunner,
    /// Somebody else killed the init process, and so all others.
    KilledByOthers,
}

/// What the new process needs, and what it opens in the table of descriptors that it shares with this
/// daemon until then.
struct InitLaunch<'a> {
    program: BorrowedFd<'a>,
    parent_pipe: BorrowedFd<'a>,
    /// Whether its control group becomes all that it, and what joins it, sees of control groups
    /// (cgroup_namespaces(7)).
    has_cgroup: bool,
    pid_namespace: Cell<Option<OwnedFd>>,
    cgroup_namespace: Cell<Option<OwnedFd>>,
    errno: Cell<c_int>,
}

impl InitProcess {
    /// Starts one in a PID namespace of its own, whose /proc it mounts, and in the other namespaces of this thread.
    /// With a control group, it also makes a cgroup namespace, which is returned for processes to enter.
    pub(crate) fn start(
        program: &InitProgram,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> io::Result<(Self, Option<NamespaceFd>)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        let launch = InitLaunch {
            program: program.as_fd(),
            parent_pipe: read.as_fd(),
            has_cgroup: cgroup.is_some(),
            pid_namespace: Cell::new(None),
            cgroup_namespace: Cell::new(None),
            errno: Cell::new(0),
        };
        // SAFETY: `main` gets the launch that it wants, which is here until the process needs it no
        // more, and does what a new process may.
        let (_, pidfd) = unsafe {
            sys::clone_vfork(
                main,
                ptr::from_ref(&launch).cast(),
                libc::CLONE_NEWPID | libc::CLONE_FILES,
                cgroup,
            )?
        };
        match (launch.errno.get(), launch.pid_namespace.take()) {
            (0, Some(namespace)) => {
                let init = InitProcess {
                    pidfd,
                    namespace,
                    parent_pipe: write,
                    end: None,
                };
                let cgroup_namespace = launch.cgroup_namespace.take();
                Ok((
                    init,
                    cgroup_namespace.map(|fd| NamespaceFd::new(fd, CGROUP)),
                ))
            }
            (errno, _) => {
                // It is gone, or will be when its pipe is.
                drop(write);
                let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
                Err(match errno {
                    // Killed by somebody else.
                    0 => Errno::SRCH.into(),
                    errno => io::Error::from_raw_os_error(errno),
                })
            }
        }
    }

    /// The PID namespace, which the parent of a process must join (pid_namespaces(7)).
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Whether it has not ended by now.
    pub(crate) fn is_alive(&self) -> bool {
        self.end.is_none() && !self.ends_within(Duration::ZERO)
    }

    /// Kills everything in the namespace. `None` when something was left after this long.
    ///
    /// The init process is asked to exit rather than killed, so that its status says whether somebody else did that.
    pub(crate) fn end(&mut self, timeout: Duration) -> Option<NamespaceEnd> {
        if self.end.is_some() {
            return self.end;
        }
        // Fails when it is gone already.
        let _ = rustix::io::write(&self.parent_pipe, &[0]);
        let exited_on_request = self.ends_within(EXIT_TIMEOUT.min(timeout));
        if !exited_on_request {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            if !self.ends_within(timeout) {
                return None;
            }
        }
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        self.end = Some(match (exited_on_request, status) {
            (true, Ok(Some(status))) if status.killed() => NamespaceEnd::KilledByOthers,
            _ => NamespaceEnd::EndedByRunner,
        });
        self.end
    }

    /// Whether it ends within this time.
    fn ends_within(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                result => return matches!(result, Ok(1..)),
            }
        }
    }
}

impl Drop for InitProcess {
    fn drop(&mut self) {
        self.end(EXIT_TIMEOUT);
    }
}

/// The PID namespace of this daemon.
pub(crate) fn daemon_pid_namespace() -> io::Result<OwnedFd> {
    Ok(fs::File::open("/proc/self/ns/pid")?.into())
}

/// What the init process begins with.
///
/// # Safety
///
/// `argument` is an `InitLaunch`. Runs in a process of its own.
unsafe extern "C" fn main(argument: *const c_void) -> ! {
    // SAFETY: as the caller promises; the thread that made it sleeps.
    let launch = unsafe { &*argument.cast::<InitLaunch<'_>>() };
    let errno = become_init(launch);
    launch.errno.set(errno.raw_os_error());
    sys::exit(127)
}

/// Mounts /proc and its control group, gives up what it can, becomes its program. Returns only the
/// reason why not.
fn become_init(launch: &InitLaunch<'_>) -> Errno {
    match prepare(launch) {
        Ok(program) => sys::execute_file(program.as_fd(), c"bb-init"),
        Err(errno) => errno,
    }
}

/// Does all that comes before the program; returns that.
fn prepare(launch: &InitLaunch<'_>) -> Result<OwnedFd, Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"proc", c"/proc", c"proc", flags, None::<&CStr>)?;
    launch.pid_namespace.set(Some(open(c"/proc/self/ns/pid")?));
    if launch.has_cgroup {
        // It is in its group already, which becomes the root.
        leave(CloneFlags::CLONE_NEWCGROUP)?;
        launch
            .cgroup_namespace
            .set(Some(open(c"/proc/self/ns/cgroup")?));
        // Where this is not to be had, what is there stays empty.
        let flags = flags | MountFlags::RDONLY;
        let _ = mount(
            c"cgroup2",
            c"/sys/fs/cgroup",
            c"cgroup2",
            flags,
            None::<&CStr>,
        );
    }
    // From here on the descriptors are its own.
    leave(CloneFlags::CLONE_FILES)?;
    setsid()?;
    // So that the kernel reaps orphans by itself; survives the execution of the program.
    sys::set_disposition(libc::SIGCHLD, sys::Disposition::Ignore)?;
    let program = fcntl_dupfd_cloexec(launch.program, ABOVE_PARENT_PIPE)?;
    // SAFETY: this table is this process's alone, and what it has there is not used any more.
    unsafe { sys::pass_only(launch.parent_pipe, PARENT_PIPE)? };
    // Root would have its capabilities again with its next program; where this is refused,
    // no_new_privs keeps them away alone.
    let _ = set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT | CapabilitiesSecureBits::NO_ROOT_LOCKED,
    );
    give_up_privileges()?;
    Ok(program)
}

/// A number of descriptors that is not the pipe's.
const ABOVE_PARENT_PIPE: RawFd = 10;

fn open(path: &CStr) -> Result<OwnedFd, Errno> {
    openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Leaves what is shared with other processes (unshare(2)).
fn leave(what: CloneFlags) -> Result<(), Errno> {
    unshare(what).map_err(|error| Errno::from_raw_os_error(error as c_int))
}
