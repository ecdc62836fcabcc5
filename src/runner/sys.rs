//! System calls that neither nix nor rustix has, or not in a form that a new process may call, each as a function that does nothing else, and two
//! ways to make a process.
//!
//! What is said to be for a *new process* may be called where `clone_vfork` has begun: it allocates
//! nothing, takes no lock and cannot panic. Its error numbers are the kernel's, as `libc::syscall`
//! leaves them to the thread that waits meanwhile. Of rustix, such a process may call whatever takes
//! `&CStr` for its paths: the back end that rustix has on Linux makes each call by itself.

#![expect(unsafe_code, reason = "system calls without a safe wrapper are here")]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr,
};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::{fs::Mode, io::Errno, process::umask};

/// A system call for a new process, with the result as an error number.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // Each as wide as a register: what is narrower may bring garbage in its upper half.
        match libc::syscall(libc::$number $(, ($argument) as libc::c_long)*) {
            -1 => Err(Errno::from_raw_os_error(*libc::__errno_location())),
            result => Ok(result),
        }
    };
}

/// The function that a process begins with which shares its maker's memory; it never returns.
pub(super) type ProcessEntry = unsafe extern "C" fn(*const c_void) -> !;

/// Flags of clone3(2) that libc cuts down to an int.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const STACK_SIZE: usize = 64 << 10;

/// A stack, 16-byte aligned, as both ABIs want it to be.
#[repr(align(16))]
struct Stack(#[expect(dead_code, reason = "it is only memory")] [MaybeUninit<u8>; STACK_SIZE]);

/// Makes a process that shares this one's memory and calls `entry`, while this thread sleeps, like
/// vfork(2). Returns its number and a pidfd when it has executed a program, or is gone.
///
/// Copying the daemon's page tables instead takes 0.5 ms for each 5 MiB that it uses.
///
/// # Safety
///
/// `entry` does only what a new process may (see this file), and what `argument` points to lives and
/// is left alone by other threads until then.
pub(super) unsafe fn clone_vfork(
    entry: ProcessEntry,
    argument: *const c_void,
    flags: c_int,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<(libc::pid_t, OwnedFd)> {
    let mut stack = Box::<Stack>::new_uninit();
    let mut pidfd: RawFd = -1;
    let flags = flags | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD;
    let into_cgroup = match cgroup {
        Some(_) => CLONE_INTO_CGROUP,
        None => 0,
    };
    let arguments = libc::clone_args {
        flags: flags as u64 | into_cgroup | CLONE_CLEAR_SIGHAND,
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
    // No handler of this daemon's may run in the new process: not before the kernel has set them to the default,
    // nor after `unblock_signals`.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: `arguments` names a stack that nobody else uses, and `entry` never returns; this thread
    // sleeps until the new process is done with what they point to (CLONE_VFORK).
    let result = unsafe { clone3(&arguments, entry, argument) };
    let _ = before.thread_set_mask();
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
///
/// The stack in `arguments` must be 16-byte aligned at its end, and nobody else's; `argument` must
/// be what `entry` wants.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(
    arguments: &libc::clone_args,
    entry: ProcessEntry,
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

/// clone3(2) on a stack of the child's own, which then calls `entry`. glibc has no wrapper.
///
/// # Safety
///
/// The stack in `arguments` must be 16-byte aligned at its end, and nobody else's; `argument` must
/// be what `entry` wants.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3(
    arguments: &libc::clone_args,
    entry: ProcessEntry,
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

/// Calls `act` in a copy of this process that has no descriptors, and waits for its end.
///
/// # Safety
///
/// `act` makes system calls that are async-signal-safe, and nothing else (fork(2)): the copy has only
/// one of this process's threads.
pub(super) unsafe fn fork_and_wait(act: impl FnOnce()) {
    // SAFETY: as the caller promises; and the copy leaves by _exit.
    unsafe {
        match libc::fork() {
            0 => {
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
                act();
                libc::_exit(0);
            }
            child if child > 0 => {
                libc::waitpid(child, ptr::null_mut(), 0);
            }
            _ => {}
        }
    }
}

/// Waits for the end of a child that nobody else waits for; returns its wait status and what it used.
pub(super) fn wait4(pid: libc::pid_t) -> io::Result<(c_int, libc::rusage)> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    loop {
        // SAFETY: both places live during the call.
        if unsafe { libc::wait4(pid, &mut status, 0, usage.as_mut_ptr()) } == pid {
            // SAFETY: the kernel has written it, and all zeros are a valid value as well.
            return Ok((status, unsafe { usage.assume_init() }));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Has a command begin with another umask than this process's (umask(2)).
pub(super) fn set_umask(command: &mut Command, mask: Mode) {
    let set = move || {
        umask(mask);
        Ok(())
    };
    // SAFETY: it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// struct mount_attr of mount_setattr(2), which libc lacks on glibc.
#[repr(C)]
pub(super) struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub user_namespace: u64,
}

/// Changes attributes of a mount, or of all below it (mount_setattr(2)).
pub(super) fn mount_setattr(
    directory: BorrowedFd<'_>,
    path: &CStr,
    flags: u32,
    attributes: &MountAttributes,
) -> io::Result<()> {
    // SAFETY: path and attributes live during the call, and the size is that of the latter.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Switches on the loopback interface of this socket's network namespace (netdevice(7)).
pub(super) fn bring_up_loopback(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as c_char;
    request.ifr_name[1] = b'o' as c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives during the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes System V IPC objects: shared memory, semaphores, message queues (svipc(7)). May be called
/// in the copy that `fork_and_wait` makes.
pub(super) fn remove_ipc(segments: &[c_int], semaphores: &[c_int], queues: &[c_int]) {
    // SAFETY: take numbers; IPC_RMID uses no buffer.
    unsafe {
        for &object in segments {
            libc::shmctl(object, libc::IPC_RMID, ptr::null_mut());
        }
        for &object in semaphores {
            libc::semctl(object, 0, libc::IPC_RMID);
        }
        for &object in queues {
            libc::msgctl(object, libc::IPC_RMID, ptr::null_mut());
        }
    }
}

// From here on, for a new process.

/// Executes a program (execve(2)); returns only the reason why not.
///
/// # Safety
///
/// Both arrays are null-terminated, and what they point to are strings.
pub(super) unsafe fn execve(
    path: &CStr,
    arguments: *const *const c_char,
    environment: *const *const c_char,
) -> Errno {
    // SAFETY: as the caller promises.
    match unsafe { call!(SYS_execve, path.as_ptr(), arguments, environment) } {
        Ok(_) => Errno::INVAL,
        Err(errno) => errno,
    }
}

/// Executes an open program without arguments and environment, under the given name; returns only the
/// reason why not.
pub(super) fn execute_file(program: BorrowedFd<'_>, name: &CStr) -> Errno {
    let arguments = [name.as_ptr(), ptr::null()];
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: both arrays are null-terminated and live during the call.
    let failed = unsafe {
        call!(
            SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH
        )
    };
    failed.err().unwrap_or(Errno::INVAL)
}

/// Ends this process.
pub(super) fn exit(status: c_int) -> ! {
    // SAFETY: takes a number; runs none of this daemon's exit handlers.
    unsafe { libc::_exit(status) }
}

/// Closes all descriptors from this number on when a program is executed.
pub(super) fn close_on_exec_from(first: RawFd) -> Result<(), Errno> {
    // SAFETY: takes numbers, and closes nothing yet.
    unsafe {
        call!(
            SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC as c_int
        )?;
    }
    Ok(())
}

/// Gives the next program one descriptor, under this number, and no other.
///
/// # Safety
///
/// The table of descriptors is this process's own, and nothing uses what it has under that number.
pub(super) unsafe fn pass_only(descriptor: BorrowedFd<'_>, number: RawFd) -> Result<(), Errno> {
    // SAFETY: as the caller promises.
    unsafe {
        if descriptor.as_raw_fd() != number {
            call!(SYS_dup3, descriptor.as_raw_fd(), number, 0)?;
        }
        close_on_exec_from(0)?;
        call!(SYS_fcntl, number, libc::F_SETFD, 0)?;
    }
    Ok(())
}

/// The greatest number of a signal, as the kernel counts (signal(7)).
pub(super) const LAST_SIGNAL: c_int = 64;
/// Bytes of a set of signals, as the kernel has them.
const SIGNAL_SET_SIZE: usize = 8;

/// What a signal can do here; no new process has a handler.
#[derive(Clone, Copy)]
pub(super) enum Disposition {
    Default,
    Ignore,
}

/// Sets what a signal does to this process (rt_sigaction(2)).
pub(super) fn set_disposition(signal: c_int, disposition: Disposition) -> Result<(), Errno> {
    // struct sigaction as the kernel takes it: the handler first, on every architecture.
    let handler = match disposition {
        Disposition::Default => libc::SIG_DFL,
        Disposition::Ignore => libc::SIG_IGN,
    };
    let action = [handler as u64, 0, 0, 0];
    // SAFETY: the action lives during the call, is no handler, and nobody asks for the old one.
    unsafe {
        call!(
            SYS_rt_sigaction,
            signal,
            action.as_ptr(),
            0,
            SIGNAL_SET_SIZE
        )?;
    }
    Ok(())
}

/// Lets all signals through (rt_sigprocmask(2)).
pub(super) fn unblock_signals() -> Result<(), Errno> {
    let none = 0u64;
    // SAFETY: the set lives during the call, and nobody asks for the old one.
    unsafe {
        call!(
            SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            0,
            SIGNAL_SET_SIZE
        )?;
    }
    Ok(())
}

/// The operation of keyctl(2), which libc lacks.
const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;

/// Gives this process a new session keyring that belongs to nobody else (session-keyring(7)).
pub(super) fn join_new_session_keyring() -> Result<(), Errno> {
    // SAFETY: takes numbers.
    unsafe { call!(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0)? };
    Ok(())
}

/// Filters this process's system calls from now on (seccomp(2)).
pub(super) fn install_seccomp_filter(filter: &[libc::sock_filter]) -> Result<(), Errno> {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program during the call.
    unsafe {
        call!(
            SYS_prctl,
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program
        )?;
    }
    Ok(())
}
