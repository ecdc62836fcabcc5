//! The system calls that actions are refused, by name, with their numbers on each architecture.
//!
//! 1. One row is one call: what is refused to native programs is refused to 32-bit ones, and a call
//!    that only these have is a row too.
//! 2. From 424 on, a number means the same call on every ABI (Linux 5.1), so that one number, `NEWEST_SYSCALL`,
//!    ends the table for all of them. What is beyond it was never looked at, and is not there.
//! 3. A call that carries others is refused as far as what it carries would be: rings as a whole,
//!    socketcall(2), whose arguments lie in memory, where it makes sockets.
//!
//! The numbers are those of the kernel's headers, which a test compares: asm/unistd_64.h and
//! unistd_32.h on x86, and asm-generic/unistd.h, which arm64 has.

/// The last call of this table's kernel, Linux 6.18: file_setattr.
pub(super) const NEWEST_SYSCALL: u32 = 469;

/// One call, with its number on each ABI; `None` where the ABI has no such call.
#[derive(Clone, Copy, Debug)]
pub(super) struct FilteredSyscall {
    /// For the reader, and compared by the tests.
    #[cfg_attr(not(test), expect(dead_code))]
    pub name: &'static str,
    #[cfg_attr(not(any(test, target_arch = "x86_64")), expect(dead_code))]
    pub amd64: Option<u32>,
    #[cfg_attr(not(any(test, target_arch = "x86_64")), expect(dead_code))]
    pub i386: Option<u32>,
    #[cfg_attr(not(any(test, target_arch = "aarch64")), expect(dead_code))]
    pub arm64: Option<u32>,
    pub rule: SyscallRule,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyscallRule {
    /// It fails with this error number.
    Refused(i32),
    /// It fails with this error number, unless actions may make user namespaces: in one of the action's own it
    /// concerns nobody else, and does what the namespace is for (user_namespaces(7)).
    RefusedWithoutUserNamespaces(i32),
    /// Its first argument is a set of CLONE_ flags; a new user namespace is refused.
    CloneFlags,
    /// Its first argument is an address family, one of `FAMILIES` or refused.
    AddressFamily,
    /// Its first argument is the number of a call, and calls that make sockets are refused.
    SocketCall,
}

/// What may be a socket's address family: what network namespaces hold, and programs use. Others
/// reach a virtual machine's host (vsock), devices of the host, or the kernel's least used code.
pub(super) const FAMILIES: [u32; 6] = [
    libc::AF_UNSPEC as u32,
    libc::AF_UNIX as u32,
    libc::AF_INET as u32,
    libc::AF_INET6 as u32,
    libc::AF_NETLINK as u32,
    libc::AF_PACKET as u32,
];

/// SYS_SOCKET and SYS_SOCKETPAIR of linux/net.h, which make sockets by socketcall(2).
pub(super) const SOCKETCALL_SOCKET_NUMBERS: [u32; 2] = [1, 8];

use SyscallRule::{Refused, RefusedWithoutUserNamespaces};

/// The call fails as if it were forbidden.
const DENIED: SyscallRule = Refused(libc::EPERM);
/// The call fails as on a kernel without it: for those that are new, optional or obsolete, which programs have
/// a way around.
const ABSENT: SyscallRule = Refused(libc::ENOSYS);
const DENIED_WITHOUT_USER_NAMESPACES: SyscallRule = RefusedWithoutUserNamespaces(libc::EPERM);
const ABSENT_WITHOUT_USER_NAMESPACES: SyscallRule = RefusedWithoutUserNamespaces(libc::ENOSYS);

/// A call that every architecture has.
const fn call(
    name: &'static str,
    amd64: u32,
    i386: u32,
    arm64: u32,
    rule: SyscallRule,
) -> FilteredSyscall {
    FilteredSyscall {
        name,
        amd64: Some(amd64),
        i386: Some(i386),
        arm64: Some(arm64),
        rule,
    }
}

/// A call that has the same number on every ABI, as those since Linux 5.1 do.
const fn unified(name: &'static str, number: u32, rule: SyscallRule) -> FilteredSyscall {
    call(name, number, number, number, rule)
}

/// A call of Intel's architectures alone.
const fn x86(
    name: &'static str,
    amd64: Option<u32>,
    i386: Option<u32>,
    rule: SyscallRule,
) -> FilteredSyscall {
    FilteredSyscall {
        name,
        amd64,
        i386,
        arm64: None,
        rule,
    }
}

pub(super) const FILTERED_SYSCALLS: &[FilteredSyscall] = &[
    // Keyrings.
    call("add_key", 248, 286, 217, DENIED),
    call("request_key", 249, 287, 218, DENIED),
    call("keyctl", 250, 288, 219, DENIED),
    // Programs in the kernel, its memory faults, counters.
    call("bpf", 321, 357, 280, DENIED),
    call("userfaultfd", 323, 374, 282, DENIED),
    call("perf_event_open", 298, 336, 241, DENIED),
    // Mounts, roots and namespaces. clone3's flags are in memory, where a filter cannot look.
    call("mount", 165, 21, 40, DENIED_WITHOUT_USER_NAMESPACES),
    call("umount2", 166, 52, 39, DENIED_WITHOUT_USER_NAMESPACES),
    x86("umount", None, Some(22), DENIED_WITHOUT_USER_NAMESPACES),
    call("pivot_root", 155, 217, 41, DENIED_WITHOUT_USER_NAMESPACES),
    call("chroot", 161, 61, 51, DENIED_WITHOUT_USER_NAMESPACES),
    unified("open_tree", 428, DENIED_WITHOUT_USER_NAMESPACES),
    unified("move_mount", 429, DENIED_WITHOUT_USER_NAMESPACES),
    unified("fsopen", 430, DENIED_WITHOUT_USER_NAMESPACES),
    unified("fsconfig", 431, DENIED_WITHOUT_USER_NAMESPACES),
    unified("fsmount", 432, DENIED_WITHOUT_USER_NAMESPACES),
    unified("fspick", 433, DENIED_WITHOUT_USER_NAMESPACES),
    unified("mount_setattr", 442, DENIED_WITHOUT_USER_NAMESPACES),
    unified("open_tree_attr", 467, ABSENT_WITHOUT_USER_NAMESPACES),
    unified("statmount", 457, ABSENT_WITHOUT_USER_NAMESPACES),
    unified("listmount", 458, ABSENT_WITHOUT_USER_NAMESPACES),
    call("setns", 308, 346, 268, DENIED_WITHOUT_USER_NAMESPACES),
    call("clone", 56, 120, 220, SyscallRule::CloneFlags),
    call("unshare", 272, 310, 97, SyscallRule::CloneFlags),
    unified("clone3", 435, ABSENT),
    // Names of the host.
    call("sethostname", 170, 74, 161, DENIED_WITHOUT_USER_NAMESPACES),
    call(
        "setdomainname",
        171,
        121,
        162,
        DENIED_WITHOUT_USER_NAMESPACES,
    ),
    // Disks.
    call("quotactl", 179, 131, 60, DENIED),
    unified("quotactl_fd", 443, ABSENT),
    call("swapon", 167, 87, 224, DENIED),
    call("swapoff", 168, 115, 225, DENIED),
    // Files by their number instead of their path; what happens to others' files; terminals.
    call("open_by_handle_at", 304, 342, 265, DENIED),
    call("fanotify_init", 300, 338, 262, DENIED),
    call("vhangup", 153, 111, 58, DENIED),
    // The kernel itself, and the machine.
    call("init_module", 175, 128, 105, DENIED),
    call("finit_module", 313, 350, 273, DENIED),
    call("delete_module", 176, 129, 106, DENIED),
    call("kexec_load", 246, 283, 104, DENIED),
    FilteredSyscall {
        i386: None,
        ..call("kexec_file_load", 320, 0, 294, DENIED)
    },
    call("reboot", 169, 88, 142, DENIED),
    call("syslog", 103, 103, 116, DENIED),
    call("acct", 163, 51, 89, DENIED),
    unified("lsm_get_self_attr", 459, ABSENT),
    unified("lsm_set_self_attr", 460, ABSENT),
    unified("lsm_list_modules", 461, ABSENT),
    x86("iopl", Some(172), Some(110), DENIED),
    x86("ioperm", Some(173), Some(101), DENIED),
    x86("vm86", None, Some(166), ABSENT),
    x86("vm86old", None, Some(113), ABSENT),
    x86("uselib", Some(134), Some(86), ABSENT),
    x86("_sysctl", Some(156), Some(149), ABSENT),
    call("nfsservctl", 180, 169, 42, ABSENT),
    call("lookup_dcookie", 212, 253, 18, ABSENT),
    // Clocks.
    call("settimeofday", 164, 79, 170, DENIED),
    call("clock_settime", 227, 264, 112, DENIED),
    call("clock_adjtime", 305, 343, 266, DENIED),
    call("adjtimex", 159, 124, 171, DENIED),
    x86("stime", None, Some(25), DENIED),
    x86("clock_settime64", None, Some(404), DENIED),
    x86("clock_adjtime64", None, Some(405), DENIED),
    // Rings in which other calls hide.
    unified("io_uring_setup", 425, DENIED),
    unified("io_uring_enter", 426, DENIED),
    unified("io_uring_register", 427, DENIED),
    // Its contexts are counted against one number of the whole host's, fs.aio-max-nr.
    call("io_setup", 206, 245, 0, ABSENT),
    // Sockets.
    call("socket", 41, 359, 198, SyscallRule::AddressFamily),
    call("socketpair", 53, 360, 199, SyscallRule::AddressFamily),
    x86("socketcall", None, Some(102), SyscallRule::SocketCall),
];
