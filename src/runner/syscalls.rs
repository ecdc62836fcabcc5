//! The system calls that actions are refused, by their numbers on every ABI.
//!
//! 1. One row is one call: what is refused to native programs is refused to 32-bit ones, and a call
//!    that only these have is a row too.
//! 2. From 424 on, a number means the same call on every ABI (Linux 5.1), so that one number, `NEWEST`,
//!    ends the table for all of them. What is beyond it was never looked at, and is not there.
//! 3. A call that carries others is refused as far as what it carries would be: rings as a whole,
//!    socketcall(2), whose arguments lie in memory, where it makes sockets.
//!
//! The numbers: arch/x86/entry/syscalls/syscall_32.tbl and syscall_64.tbl, and scripts/syscall.tbl.

/// The last call of this table's kernel, Linux 6.18: file_setattr.
pub const NEWEST: u32 = 469;

/// One call. `None`: this ABI has no such call.
#[derive(Clone, Copy, Debug)]
pub struct SystemCall {
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "for the reader, and compared by the tests")
    )]
    pub name: &'static str,
    pub native: Option<u32>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub i386: Option<u32>,
    pub rule: Rule,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// It fails with this error number.
    Refused(i32),
    /// The same; but in a user namespace of the action's own it concerns nobody else, and makes what
    /// the namespace is for (user_namespaces(7)).
    ForUserNamespaces(i32),
    /// Its first argument is a set of CLONE_ flags; a new user namespace is refused.
    CloneFlags,
    /// Its first argument is an address family, one of `FAMILIES` or refused.
    AddressFamily,
    /// Its first argument is the number of a call, and calls that make sockets are refused.
    SocketCall,
}

/// What may be a socket's address family: what network namespaces hold, and programs use. Others
/// reach a virtual machine's host (vsock), devices of the host, or the kernel's least used code.
pub const FAMILIES: [u32; 6] = [
    libc::AF_UNSPEC as u32,
    libc::AF_UNIX as u32,
    libc::AF_INET as u32,
    libc::AF_INET6 as u32,
    libc::AF_NETLINK as u32,
    libc::AF_PACKET as u32,
];

/// linux/net.h: SYS_SOCKET and SYS_SOCKETPAIR.
pub const SOCKET_MAKERS: [u32; 2] = [1, 8];

use Rule::{ForUserNamespaces, Refused};

const DENIED: Rule = Refused(libc::EPERM);
/// As on a kernel without it: for calls that are new, optional or obsolete, which programs have a
/// way around.
const ABSENT: Rule = Refused(libc::ENOSYS);
const NAMESPACED: Rule = ForUserNamespaces(libc::EPERM);
const NAMESPACED_NEW: Rule = ForUserNamespaces(libc::ENOSYS);

/// A call that every architecture has.
const fn call(name: &'static str, native: libc::c_long, i386: u32, rule: Rule) -> SystemCall {
    SystemCall {
        name,
        native: Some(native as u32),
        i386: Some(i386),
        rule,
    }
}

/// One of those that have the same number everywhere.
const fn new(name: &'static str, number: u32, rule: Rule) -> SystemCall {
    call(name, number as libc::c_long, number, rule)
}

/// A call of Intel's architectures alone.
const fn intel(
    name: &'static str,
    amd64: Option<u32>,
    i386: Option<u32>,
    rule: Rule,
) -> SystemCall {
    SystemCall {
        name,
        native: if cfg!(target_arch = "x86_64") {
            amd64
        } else {
            None
        },
        i386,
        rule,
    }
}

#[cfg(target_arch = "x86_64")]
const KEXEC_FILE_LOAD: u32 = 320;
#[cfg(target_arch = "aarch64")]
const KEXEC_FILE_LOAD: u32 = 294;

pub const SYSTEM_CALLS: &[SystemCall] = &[
    // Keyrings.
    call("add_key", libc::SYS_add_key, 286, DENIED),
    call("request_key", libc::SYS_request_key, 287, DENIED),
    call("keyctl", libc::SYS_keyctl, 288, DENIED),
    // Programs in the kernel, its memory faults, counters.
    call("bpf", libc::SYS_bpf, 357, DENIED),
    call("userfaultfd", libc::SYS_userfaultfd, 374, DENIED),
    call("perf_event_open", libc::SYS_perf_event_open, 336, DENIED),
    // Mounts, roots and namespaces. clone3's flags are in memory, where a filter cannot look.
    call("mount", libc::SYS_mount, 21, NAMESPACED),
    call("umount2", libc::SYS_umount2, 52, NAMESPACED),
    intel("umount", None, Some(22), NAMESPACED),
    call("pivot_root", libc::SYS_pivot_root, 217, NAMESPACED),
    call("chroot", libc::SYS_chroot, 61, NAMESPACED),
    new("open_tree", 428, NAMESPACED),
    new("move_mount", 429, NAMESPACED),
    new("fsopen", 430, NAMESPACED),
    new("fsconfig", 431, NAMESPACED),
    new("fsmount", 432, NAMESPACED),
    new("fspick", 433, NAMESPACED),
    new("mount_setattr", 442, NAMESPACED),
    new("open_tree_attr", 467, NAMESPACED_NEW),
    new("statmount", 457, NAMESPACED_NEW),
    new("listmount", 458, NAMESPACED_NEW),
    call("setns", libc::SYS_setns, 346, NAMESPACED),
    call("clone", libc::SYS_clone, 120, Rule::CloneFlags),
    call("unshare", libc::SYS_unshare, 310, Rule::CloneFlags),
    new("clone3", 435, ABSENT),
    // Names of the host.
    call("sethostname", libc::SYS_sethostname, 74, NAMESPACED),
    call("setdomainname", libc::SYS_setdomainname, 121, NAMESPACED),
    // Disks.
    call("quotactl", libc::SYS_quotactl, 131, DENIED),
    new("quotactl_fd", 443, ABSENT),
    call("swapon", libc::SYS_swapon, 87, DENIED),
    call("swapoff", libc::SYS_swapoff, 115, DENIED),
    // Files by their number instead of their path; what happens to others' files; terminals.
    call(
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        342,
        DENIED,
    ),
    call("fanotify_init", libc::SYS_fanotify_init, 338, DENIED),
    call("vhangup", libc::SYS_vhangup, 111, DENIED),
    // The kernel itself, and the machine.
    call("init_module", libc::SYS_init_module, 128, DENIED),
    call("finit_module", libc::SYS_finit_module, 350, DENIED),
    call("delete_module", libc::SYS_delete_module, 129, DENIED),
    call("kexec_load", libc::SYS_kexec_load, 283, DENIED),
    SystemCall {
        name: "kexec_file_load",
        native: Some(KEXEC_FILE_LOAD),
        i386: None,
        rule: DENIED,
    },
    call("reboot", libc::SYS_reboot, 88, DENIED),
    call("syslog", libc::SYS_syslog, 103, DENIED),
    call("acct", libc::SYS_acct, 51, DENIED),
    new("lsm_get_self_attr", 459, ABSENT),
    new("lsm_set_self_attr", 460, ABSENT),
    new("lsm_list_modules", 461, ABSENT),
    intel("iopl", Some(172), Some(110), DENIED),
    intel("ioperm", Some(173), Some(101), DENIED),
    intel("vm86", None, Some(166), ABSENT),
    intel("vm86old", None, Some(113), ABSENT),
    intel("uselib", Some(134), Some(86), ABSENT),
    intel("_sysctl", Some(156), Some(149), ABSENT),
    call("nfsservctl", libc::SYS_nfsservctl, 169, ABSENT),
    call("lookup_dcookie", libc::SYS_lookup_dcookie, 253, ABSENT),
    // Clocks.
    call("settimeofday", libc::SYS_settimeofday, 79, DENIED),
    call("clock_settime", libc::SYS_clock_settime, 264, DENIED),
    call("clock_adjtime", libc::SYS_clock_adjtime, 343, DENIED),
    call("adjtimex", libc::SYS_adjtimex, 124, DENIED),
    intel("stime", None, Some(25), DENIED),
    intel("clock_settime64", None, Some(404), DENIED),
    intel("clock_adjtime64", None, Some(405), DENIED),
    // Rings in which other calls hide.
    new("io_uring_setup", 425, DENIED),
    new("io_uring_enter", 426, DENIED),
    new("io_uring_register", 427, DENIED),
    // Its contexts are counted against one number of the whole host's, fs.aio-max-nr.
    call("io_setup", libc::SYS_io_setup, 245, ABSENT),
    // Sockets.
    call("socket", libc::SYS_socket, 359, Rule::AddressFamily),
    call("socketpair", libc::SYS_socketpair, 360, Rule::AddressFamily),
    intel("socketcall", None, Some(102), Rule::SocketCall),
];
