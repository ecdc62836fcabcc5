//! Making an action's first process, waiting for it, and what it used.
//!
//! The process is made like vfork(2) does it: it shares the memory of this daemon until it executes
//! the action's command, and the thread that made it is stopped until then. Copying the daemon's
//! page tables instead takes 0.5 ms for each 5 MiB that it uses. `child` is what runs meanwhile.
//!
//! 1. Everything that can be prepared is prepared before the process exists.
//! 2. The process is in its control group from the start (clone3(2), CLONE_INTO_CGROUP).
//! 3. The thread that makes a process stays until it is gone, since its end would kill the process
//!    (PR_SET_PDEATHSIG).

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    cgroup::Usage,
    child::{self, Inherited, Launch, Report, Step},
    room::enter,
    seccomp::Filter,
    stop::StopSignal,
};

/// A process that was made and not yet waited for; killed and reaped on drop.
pub struct Process {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    reaped: bool,
    /// What this daemon used at most when the process was made; KiB.
    ours: libc::c_long,
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    Ended,
    Stopped,
    Late,
}

/// How a process ended.
#[derive(Clone, Copy)]
pub struct Exit {
    pub cause: Cause,
    pub usage: libc::rusage,
    /// Whether `usage` has the memory that this daemon used: a process keeps the highest figure of
    /// what it shared before it executed a program. Then the command's was this at most.
    pub memory_is_ours: bool,
    /// Of the whole action, where it had a control group.
    pub group: Option<Usage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Code(i32),
    Signal(i32),
}

/// Why there is no process.
#[derive(Debug)]
pub enum SpawnError {
    /// There is none at all.
    Clone(io::Error),
    /// It failed on its way to the command.
    Start {
        step: Step,
        error: io::Error,
        /// Of the candidates.
        executable: Option<usize>,
    },
}

/// What a process is made from. All descriptors are numbered 3 or above.
pub struct Blueprint<'a> {
    pub arguments: &'a [CString],
    pub environment: &'a [CString],
    pub executables: &'a [CString],
    /// Whether the first of these that can be executed is meant, rather than the only one.
    pub search: bool,
    pub working_directory: &'a CStr,
    pub input_root: &'a CStr,
    pub base: Base<'a>,
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    pub user: u32,
    pub groups: &'a [libc::gid_t],
    pub cgroup: Option<BorrowedFd<'a>>,
    /// With their kinds (setns(2)).
    pub namespaces: &'a [(OwnedFd, c_int)],
    /// The process namespace to be in, and the one that this daemon is in.
    pub processes: Option<(BorrowedFd<'a>, BorrowedFd<'a>)>,
    pub inherited: Inherited,
    /// What to mount where.
    pub mounts: &'a [(OwnedFd, CString)],
    /// What becomes the process's `/`, and what of the room is copied where before.
    pub root: Option<(&'a CStr, &'a [(CString, CString)])>,
    pub filter: Option<&'a Filter>,
    /// A program and arguments, before the command's; empty for none.
    pub emulator: &'a [CString],
    pub process_limit: u64,
}

/// Where the path of an input root starts.
#[derive(Clone, Copy)]
pub enum Base<'a> {
    Directory(BorrowedFd<'a>),
    /// A path as the process sees it.
    Path(&'a CStr),
}

impl Process {
    pub fn spawn(blueprint: &Blueprint<'_>) -> Result<Self, SpawnError> {
        let mut arguments = pointers(blueprint.emulator);
        arguments.pop();
        arguments.extend(pointers(blueprint.arguments));
        let environment = pointers(blueprint.environment);
        let executables = pointers(blueprint.executables);
        let mounts: Vec<(RawFd, *const c_char)> = blueprint
            .mounts
            .iter()
            .map(|(tree, place)| (tree.as_raw_fd(), place.as_ptr()))
            .collect();
        let namespaces: Vec<(RawFd, c_int)> = blueprint
            .namespaces
            .iter()
            .map(|(namespace, kind)| (namespace.as_raw_fd(), *kind))
            .collect();
        let copies: Vec<(*const c_char, *const c_char)> = blueprint
            .root
            .iter()
            .flat_map(|(_, copies)| copies.iter())
            .map(|(from, to)| (from.as_ptr(), to.as_ptr()))
            .collect();
        let filter = blueprint.filter.map(Filter::program);
        let mut report = Report::default();
        let launch = Launch {
            arguments: arguments.as_mut_ptr(),
            environment: environment.as_ptr(),
            executables: executables.as_ptr(),
            search: blueprint.search,
            working_directory: blueprint.working_directory.as_ptr(),
            input_root: blueprint.input_root.as_ptr(),
            base: match blueprint.base {
                Base::Directory(directory) => child::Base::Directory(directory.as_raw_fd()),
                Base::Path(path) => child::Base::Path(path.as_ptr()),
            },
            standard: [blueprint.stdin, blueprint.stdout, blueprint.stderr]
                .map(|fd| fd.as_raw_fd()),
            user: blueprint.user,
            groups: blueprint.groups.as_ptr(),
            group_count: blueprint.groups.len(),
            namespaces: namespaces.as_ptr(),
            namespace_count: namespaces.len(),
            mounts: mounts.as_ptr(),
            mount_count: mounts.len(),
            root: match blueprint.root {
                Some((place, _)) => child::Root::Tree {
                    place: place.as_ptr(),
                    copies: copies.as_ptr(),
                    copy_count: copies.len(),
                },
                None => child::Root::Room,
            },
            emulator: blueprint
                .emulator
                .first()
                .map_or(ptr::null(), |program| program.as_ptr()),
            emulated: blueprint.emulator.len(),
            processes: blueprint.process_limit,
            filter: filter.as_ref().map_or(ptr::null(), ptr::from_ref),
            inherited: blueprint.inherited,
            parent: match blueprint.processes {
                // pid_namespaces(7): a parent outside of one's own is 0.
                Some(_) => 0,
                None => rustix::process::getpid().as_raw_nonzero().get(),
            },
            report: &raw mut report,
        };
        // Concerns the children of this thread, and not itself.
        if let Some((inside, _)) = blueprint.processes {
            enter(inside, libc::CLONE_NEWPID).map_err(SpawnError::Clone)?;
        }
        let made = make(
            child::main,
            ptr::from_ref(&launch).cast(),
            0,
            blueprint.cgroup,
        );
        if let Some((_, own)) = blueprint.processes
            && let Err(error) = enter(own, libc::CLONE_NEWPID)
        {
            tracing::error!(%error, "a thread could not return to its process namespace");
        }
        let (pid, pidfd) = made.map_err(SpawnError::Clone)?;
        let mut process = Process {
            pid,
            pidfd,
            reaped: false,
            ours: own_peak(),
        };
        // SAFETY: the child, which alone writes it, has executed its command or is gone.
        let report = unsafe { ptr::read_volatile(&raw const report) };
        if report.errno == 0 {
            return Ok(process);
        }
        let _ = process.reap();
        Err(SpawnError::Start {
            step: report.step,
            error: io::Error::from_raw_os_error(report.errno),
            executable: report.executable,
        })
    }

    /// Waits until the process has ended, or should end, or this long.
    pub fn wait(&self, stop: &StopSignal, patience: Option<Duration>) -> Woken {
        let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
        loop {
            let mut fds = [
                PollFd::new(&self.pidfd, PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "could not wait for a process");
                    return Woken::Stopped;
                }
                Ok(0) => return Woken::Late,
                Ok(_) if fds[0].revents().is_empty() => return Woken::Stopped,
                Ok(_) => return Woken::Ended,
            }
        }
    }

    /// Asks the process to end, and gives it this long.
    pub fn terminate(&self, grace: Duration) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::TERM);
        let timeout = Timespec::try_from(grace).ok();
        let _ = poll(
            &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
            timeout.as_ref(),
        );
    }

    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }

    /// Waits for its end.
    pub fn reap(&mut self) -> io::Result<Exit> {
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        loop {
            // SAFETY: both places live during the call. The number is still that of our child, since
            // only this method reaps it, once.
            let pid = unsafe { libc::wait4(self.pid, &mut status, 0, usage.as_mut_ptr()) };
            if pid == self.pid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                self.reaped = true;
                return Err(error);
            }
        }
        self.reaped = true;
        let cause = if libc::WIFSIGNALED(status) {
            Cause::Signal(libc::WTERMSIG(status))
        } else {
            Cause::Code(libc::WEXITSTATUS(status))
        };
        // SAFETY: all zeros are a valid value, whether or not the kernel wrote another.
        let usage = unsafe { usage.assume_init() };
        Ok(Exit {
            cause,
            usage,
            memory_is_ours: usage.ru_maxrss <= self.ours,
            group: None,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            let _ = self.reap();
        }
    }
}

/// The most memory that this daemon had so far; KiB.
fn own_peak() -> libc::c_long {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the place lives during the call; all zeros are a valid value.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init().ru_maxrss
    }
}

/// A null-terminated array, as execve(2) takes it; valid as long as the strings are.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// clone(2); libc cuts the last one down to an int.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const STACK_SIZE: usize = 64 << 10;

/// 16-byte aligned, as both ABIs want a stack to be.
#[repr(align(16))]
struct Stack(#[allow(dead_code)] [MaybeUninit<u8>; STACK_SIZE]);

/// Makes a process that calls `entry`. Returns when it has executed a program, or is gone.
///
/// `entry` makes system calls only, and what `argument` points to lives and is left alone by others
/// until then.
pub fn make(
    entry: unsafe extern "C" fn(*const c_void) -> !,
    argument: *const c_void,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<(libc::pid_t, OwnedFd)> {
    let mut stack = Box::<Stack>::new_uninit();
    let mut pidfd: RawFd = -1;
    let mut flags = flags | (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64;
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let arguments = libc::clone_args {
        flags,
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK_SIZE as u64,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    // No handler of this daemon's may run in the child.
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the sets live during the calls, and are initialised before they are read. `arguments`
    // names a stack that nobody else uses, and `entry` never returns; the child makes system calls
    // only, on that stack, and this thread sleeps until it is done (CLONE_VFORK), so that what
    // `argument` points to stays alive and is not changed by anybody else.
    let result = unsafe {
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let result = clone3(&arguments, entry, argument);
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        result
    };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    // SAFETY: the kernel has put a new descriptor there, which is ours.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((result as libc::pid_t, pidfd))
}

/// clone3(2) on a stack of the child's own, which then calls `entry`. glibc has no wrapper.
///
/// # Safety
/// The stack in `arguments` must be 16-byte aligned at its end, and nobody else's; `argument` must
/// be what `entry` wants.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(
    arguments: &libc::clone_args,
    entry: unsafe extern "C" fn(*const c_void) -> !,
    argument: *const c_void,
) -> isize {
    let result: isize;
    // SAFETY: the parent changes nothing but rax, rcx and r11; the child never leaves.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") ptr::from_ref(arguments),
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") entry,
            in("r13") argument,
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3(
    arguments: &libc::clone_args,
    entry: unsafe extern "C" fn(*const c_void) -> !,
    argument: *const c_void,
) -> isize {
    let result: isize;
    // SAFETY: the parent changes nothing but x0; the child never leaves.
    unsafe {
        std::arch::asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x10",
            "blr x9",
            "brk #1",
            "2:",
            in("x8") libc::SYS_clone3,
            inlateout("x0") ptr::from_ref(arguments) as isize => result,
            in("x1") size_of::<libc::clone_args>(),
            in("x9") entry,
            in("x10") argument,
        );
    }
    result
}
