//! The first process of a room's process namespace (pid_namespaces(7)).
//!
//! 1. It exists before the action and after it. The action's first process is not its child but this
//!    daemon's, which alone learns how it ended; what becomes an orphan is reaped here.
//! 2. When it ends, the kernel kills everything in the namespace, and this daemon is told of its end
//!    only when nothing is left there.
//! 3. It ends when this daemon does, in whatever way: it waits for the end of a pipe.
//! 4. The descriptor of its namespace is opened by the process itself, which every process may do for
//!    itself (proc_pid_ns(5)). To ask for the namespace of another process, by its pidfd or its
//!    directory in /proc, takes PTRACE_MODE_READ (ptrace(2)): CAP_SYS_PTRACE, or that the other one
//!    can be dumped, which it cannot from clone3(2) until some time after its execve(2) has let this
//!    daemon go on.
//! 5. It is a program of a few instructions in memory, so that it costs a page or two, has nothing of
//!    the daemon's, and can do nothing.

use std::{
    ffi::{c_int, c_void},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use super::{child, process};

/// The program, ready to be executed.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// A running one; its namespace is killed on drop.
#[derive(Debug)]
pub struct Init {
    pidfd: OwnedFd,
    namespaces: Namespaces,
    /// It ends when it is told to here, or when this is closed.
    life: OwnedFd,
    end: Option<End>,
}

/// What other processes join.
#[derive(Debug)]
pub struct Namespaces {
    processes: OwnedFd,
    cgroup: Option<OwnedFd>,
}

/// How the namespace ended; nothing is left in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Told,
    /// Somebody else killed the first process, and so all others.
    Killed,
}

/// read(3, …, 1), exit(0).
#[cfg(target_arch = "x86_64")]
const CODE: &[u8] = &[
    0x31, 0xc0, // xor eax, eax
    0xbf, 0x03, 0x00, 0x00, 0x00, // mov edi, 3
    0x48, 0x8d, 0x74, 0x24, 0xf0, // lea rsi, [rsp-16]
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1
    0x0f, 0x05, // syscall
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, 60
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];
#[cfg(target_arch = "aarch64")]
const CODE: &[u8] = &[
    0x60, 0x00, 0x80, 0xd2, // mov x0, #3
    0xe1, 0x43, 0x00, 0xd1, // sub x1, sp, #16
    0x22, 0x00, 0x80, 0xd2, // mov x2, #1
    0xe8, 0x07, 0x80, 0xd2, // mov x8, #63
    0x01, 0x00, 0x00, 0xd4, // svc #0
    0xa8, 0x0b, 0x80, 0xd2, // mov x8, #93
    0x00, 0x00, 0x80, 0xd2, // mov x0, #0
    0x01, 0x00, 0x00, 0xd4, // svc #0
];

/// elf(5): e_machine.
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

const LOAD_ADDRESS: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// An executable of one segment (elf(5)).
fn image() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut half = |value: u16| image.extend(value.to_le_bytes());
    half(2); // ET_EXEC
    half(MACHINE);
    image.extend(1u32.to_le_bytes());
    for value in [LOAD_ADDRESS + HEADERS, 64, 0] {
        image.extend(value.to_le_bytes()); // entry, program headers, section headers
    }
    image.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 1, 64, 0, 0] {
        image.extend(value.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes()); // PT_LOAD
    image.extend(5u32.to_le_bytes()); // readable, executable
    for value in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1_0000] {
        image.extend(value.to_le_bytes());
    }
    image.extend(CODE);
    image
}

impl Program {
    pub fn new() -> io::Result<Self> {
        // Kernels before 6.3 do not know the flag that says it may be executed, nor forbid it.
        let make = |flags: libc::c_uint| {
            // SAFETY: the name is a string.
            let fd = unsafe { libc::memfd_create(c"bb-init".as_ptr(), flags) };
            match fd {
                -1 => Err(io::Error::last_os_error()),
                // SAFETY: it is new, and ours.
                fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            }
        };
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let memory = make(flags | MFD_EXEC).or_else(|_| make(flags))?;
        rustix::io::write(&memory, &image())?;
        let seals =
            libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: takes numbers.
        if unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Executed through a descriptor that cannot write.
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        Ok(Program(std::fs::File::open(path)?.into()))
    }
}

/// What the new process needs.
pub struct Launch {
    pub program: RawFd,
    pub life: RawFd,
    /// Whether its control group becomes all that it, and what joins it, sees of control groups
    /// (cgroup_namespaces(7)).
    pub has_cgroup: bool,
    /// What the process has opened, in the table of descriptors that it shares with this daemon until
    /// then; -1 before.
    pub processes: RawFd,
    pub cgroup: RawFd,
    pub errno: c_int,
}

impl Init {
    /// In a process namespace of its own and in the other namespaces of this thread, whose /proc it
    /// mounts.
    pub fn start(program: &Program, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let mut launch = Launch {
            program: program.0.as_raw_fd(),
            life: read.as_raw_fd(),
            has_cgroup: cgroup.is_some(),
            processes: -1,
            cgroup: -1,
            errno: 0,
        };
        let pointer: *mut Launch = &raw mut launch;
        let (_, pidfd) = process::make(
            child::first,
            pointer.cast::<c_void>(),
            (libc::CLONE_NEWPID | libc::CLONE_FILES) as u64,
            cgroup,
        )?;
        // SAFETY: the child, which alone writes it, has executed its program or is gone.
        let Launch {
            processes,
            cgroup,
            errno,
            ..
        } = unsafe { std::ptr::read_volatile(pointer) };
        // SAFETY: those that there are, are in this daemon's table, and nobody else's.
        let [processes, cgroup] =
            [processes, cgroup].map(|fd| (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }));
        let failed = |errno| {
            // It is gone, or will be when its pipe is.
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            Err(io::Error::from_raw_os_error(errno))
        };
        match (errno, processes) {
            (0, Some(processes)) => Ok(Init {
                pidfd,
                namespaces: Namespaces { processes, cgroup },
                life: write,
                end: None,
            }),
            // Killed by somebody else.
            (0, None) => failed(libc::ESRCH),
            (errno, _) => failed(errno),
        }
    }

    /// To be joined by the parent of a process (pid_namespaces(7)).
    pub fn processes(&self) -> BorrowedFd<'_> {
        self.namespaces.processes.as_fd()
    }

    /// To be joined by a process itself.
    pub fn take_cgroup(&mut self) -> Option<OwnedFd> {
        self.namespaces.cgroup.take()
    }

    pub fn is_alive(&self) -> bool {
        self.end.is_none() && !self.ends_within(Duration::ZERO)
    }

    /// Kills everything in the namespace. `None` when something was left after `patience`.
    ///
    /// It is told to end rather than killed, so that its status says whether somebody else did that.
    pub fn end(&mut self, patience: Duration) -> Option<End> {
        if self.end.is_some() {
            return self.end;
        }
        // Fails when it is gone already.
        let _ = rustix::io::write(&self.life, &[0]);
        let obeyed = self.ends_within(FORBEARANCE.min(patience));
        if !obeyed {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            if !self.ends_within(patience) {
                return None;
            }
        }
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        let killed = obeyed && matches!(status, Ok(Some(status)) if status.killed());
        self.end = Some(if killed { End::Killed } else { End::Told });
        self.end
    }

    fn ends_within(&self, patience: Duration) -> bool {
        let timeout = Timespec::try_from(patience).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                result => return matches!(result, Ok(1..)),
            }
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.end(FORBEARANCE);
    }
}

/// How long it may take to do what it is told, among an action's processes; they live on meanwhile.
const FORBEARANCE: Duration = Duration::from_secs(1);

/// memfd_create(2), since Linux 6.3.
const MFD_EXEC: libc::c_uint = 0x10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_one_page_at_most() {
        let image = image();
        assert_eq!(image.len() as u64, HEADERS + CODE.len() as u64);
        assert!(image.len() < 4096);
    }
}
