//! Which system calls actions are refused (seccomp(2)): what builds and tests never need and what
//! keeps no promise about other users' business: keyrings, BPF, userfaultfd, mounts, user namespaces
//! (with which they would have mounts and network interfaces of their own, and so most of the
//! kernel's privileged code), modules, kexec, clocks, performance counters, rings.
//!
//! 1. They fail, as on a kernel that was built without them: programs look for something else.
//! 2. Everything else is allowed, so that new system calls and strange programs work.
//! 3. 32-bit programs are filtered by their own numbers.
//!
//! Tracing is allowed: sanitizers and debuggers trace their own processes, and others are in other
//! namespaces and have other users.

/// A program for the kernel, as it takes it.
#[derive(Debug)]
pub struct Filter(Vec<libc::sock_filter>);

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
#[cfg(target_arch = "x86_64")]
const I386: u32 = 0x4000_0003;

/// Refused with EPERM, by name.
const DENIED: &[libc::c_long] = &[
    // Keyrings.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Programs in the kernel, and its memory faults.
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    // Mounts.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Files by their number instead of their path.
    libc::SYS_open_by_handle_at,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    // Clocks, names of the host.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Others' files, and terminals.
    libc::SYS_fanotify_init,
    libc::SYS_vhangup,
    // Rings in which other system calls hide.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Address families (socket(2)) that network namespaces do not hold, or that are the kernel's least
/// used: a virtual machine's host, cryptography, clusters.
const FAMILIES: [u32; 5] = [
    libc::AF_VSOCK as u32,
    libc::AF_ALG as u32,
    libc::AF_TIPC as u32,
    libc::AF_RDS as u32,
    libc::AF_CAIF as u32,
];

/// The same for 32-bit programs (arch/x86/entry/syscalls/syscall_32.tbl).
#[cfg(target_arch = "x86_64")]
const DENIED_I386: &[libc::c_long] = &[
    286, 287, 288, 357, 374, 336, 21, 22, 52, 217, 61, 428, 429, 430, 431, 432, 433, 442, 346, 131,
    87, 115, 342, 128, 350, 129, 283, 88, 103, 51, 79, 264, 404, 343, 405, 124, 25, 74, 121, 338,
    111, 425, 426, 427,
];

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// Places in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

const fn load(place: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, place)
}

const fn answer(verdict: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, verdict)
}

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

const fn jump(comparison: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    }
}

const EQUAL: u32 = libc::BPF_JEQ;
const AT_LEAST: u32 = libc::BPF_JGE;
const HAS_BITS: u32 = libc::BPF_JSET;

impl Filter {
    pub fn new() -> Self {
        let mut program = vec![load(ARCHITECTURE)];
        let native = table(
            DENIED,
            [
                libc::SYS_clone,
                libc::SYS_unshare,
                libc::SYS_clone3,
                libc::SYS_socket,
            ],
        );
        let at = jump(EQUAL, NATIVE, 0, native.len() as u8);
        program.push(at);
        program.extend(native);
        #[cfg(target_arch = "x86_64")]
        {
            let other = table(DENIED_I386, [120, 310, 435, 359]);
            program.push(jump(EQUAL, I386, 0, other.len() as u8));
            program.extend(other);
        }
        program.push(answer(refuse(libc::ENOSYS)));
        Filter(program)
    }

    /// What prctl(2), PR_SET_SECCOMP, takes; valid as long as the filter is.
    pub fn program(&self) -> libc::sock_fprog {
        libc::sock_fprog {
            len: self.0.len() as u16,
            filter: self.0.as_ptr().cast_mut(),
        }
    }
}

/// The part for one architecture; it always returns. The numbers are those of clone, unshare, clone3
/// and socket.
fn table(
    denied: &[libc::c_long],
    [clone, unshare, clone3, socket]: [libc::c_long; 4],
) -> Vec<libc::sock_filter> {
    let mut cases: Vec<Case> = denied
        .iter()
        .map(|number| (*number as u32, vec![answer(refuse(libc::EPERM))]))
        .collect();
    for number in [clone, unshare] {
        // A user namespace.
        let part = vec![
            load(FIRST_ARGUMENT),
            jump(HAS_BITS, libc::CLONE_NEWUSER as u32, 1, 0),
            answer(ALLOW),
            answer(refuse(libc::EPERM)),
        ];
        cases.push((number as u32, part));
    }
    // Its flags are in memory, where a filter cannot look; all callers know how to do without it.
    cases.push((clone3 as u32, vec![answer(refuse(libc::ENOSYS))]));
    let mut part = vec![load(FIRST_ARGUMENT)];
    for (index, family) in FAMILIES.iter().enumerate() {
        let left = FAMILIES.len() - index - 1;
        part.push(jump(EQUAL, *family, left as u8 + 1, 0));
    }
    part.extend([answer(ALLOW), answer(refuse(libc::EPERM))]);
    cases.push((socket as u32, part));
    cases.sort_by_key(|(number, _)| *number);

    let mut part = vec![load(NUMBER)];
    // The x32 ABI: the same calls by other numbers.
    part.push(jump(AT_LEAST, 0x4000_0000, 0, 1));
    part.push(answer(refuse(libc::ENOSYS)));
    part.extend(search(&cases));
    part
}

/// A number, and what is done for it; this always returns.
type Case = (u32, Vec<libc::sock_filter>);

/// Finds a case by halves, and allows what is none: when a filter is installed, the kernel tries all
/// numbers, to know those that are always allowed.
fn search(cases: &[Case]) -> Vec<libc::sock_filter> {
    let mut part = Vec::new();
    if let [_, _, _, ..] = cases {
        let (low, high) = cases.split_at(cases.len() / 2);
        let (first, low, high) = (high[0].0, search(low), search(high));
        part.push(jump(AT_LEAST, first, low.len() as u8, 0));
        part.extend(low);
        part.extend(high);
    } else {
        for (number, found) in cases {
            part.push(jump(EQUAL, *number, 0, found.len() as u8));
            part.extend(found);
        }
        part.push(answer(ALLOW));
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's interpreter would say.
    fn verdict(filter: &Filter, architecture: u32, number: u32, argument: u32) -> u32 {
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let step = filter.0[at];
            at += 1;
            let code = u32::from(step.code);
            let taken = match code & 0x07 {
                libc::BPF_LD => {
                    accumulator = match step.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        _ => argument,
                    };
                    continue;
                }
                libc::BPF_RET => return step.k,
                _ => match code & 0xf0 {
                    EQUAL => accumulator == step.k,
                    AT_LEAST => accumulator >= step.k,
                    _ => accumulator & step.k != 0,
                },
            };
            at += usize::from(if taken { step.jt } else { step.jf });
        }
    }

    #[test]
    fn what_is_listed_is_refused_and_everything_else_is_not() {
        let filter = Filter::new();
        let refused = refuse(libc::EPERM);
        for number in 0..600 {
            let expected = if DENIED.contains(&number) {
                refused
            } else if number == libc::SYS_clone3 {
                refuse(libc::ENOSYS)
            } else {
                ALLOW
            };
            assert_eq!(
                verdict(&filter, NATIVE, number as u32, 0),
                expected,
                "{number}"
            );
        }
        for number in [libc::SYS_clone, libc::SYS_unshare] {
            let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32;
            assert_eq!(verdict(&filter, NATIVE, number as u32, flags), refused);
            let harmless = (libc::CLONE_VM | libc::SIGCHLD) as u32;
            assert_eq!(verdict(&filter, NATIVE, number as u32, harmless), ALLOW);
        }
    }

    #[test]
    fn sockets_are_of_families_that_a_namespace_holds() {
        let filter = Filter::new();
        let socket = libc::SYS_socket as u32;
        for family in 0..50 {
            let expected = match FAMILIES.contains(&family) {
                true => refuse(libc::EPERM),
                false => ALLOW,
            };
            assert_eq!(verdict(&filter, NATIVE, socket, family), expected);
        }
    }

    #[test]
    fn no_other_architecture_or_numbering_is_a_way_around() {
        let filter = Filter::new();
        let unknown = refuse(libc::ENOSYS);
        assert_eq!(verdict(&filter, 0x1234, 0, 0), unknown);
        let mount = libc::SYS_mount as u32 | 0x4000_0000;
        assert_eq!(verdict(&filter, NATIVE, mount, 0), unknown);
        #[cfg(target_arch = "x86_64")]
        {
            for number in (0..500).filter(|number| *number != 435) {
                let expected = match DENIED_I386.contains(&number) {
                    true => refuse(libc::EPERM),
                    false => ALLOW,
                };
                assert_eq!(verdict(&filter, I386, number as u32, 0), expected);
            }
            // unshare with CLONE_NEWUSER.
            let user = libc::CLONE_NEWUSER as u32;
            assert_eq!(verdict(&filter, I386, 310, user), refuse(libc::EPERM));
        }
    }
}
