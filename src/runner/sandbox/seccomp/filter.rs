//! The program that decides on each system call of an action, made from the list in `syscalls` for every ABI
//! of this architecture's kernels.

use super::{
    bpf::{
        ARCHITECTURE, EQUAL, FIRST_ARGUMENT, Fragment, HAS_BITS, NUMBER, binary_search, if_else,
        load, ret,
    },
    syscalls::{
        FAMILIES, FILTERED_SYSCALLS, FilteredSyscall, NEWEST_SYSCALL, SOCKETCALL_SOCKET_NUMBERS,
        SyscallRule,
    },
};

/// A program that decides on each system call, for seccomp(2).
#[derive(Debug)]
pub(crate) struct SeccompFilter(Vec<libc::sock_filter>);

/// A way to make system calls: its architecture (linux/audit.h), and how it numbers them.
type Abi = (u32, fn(&FilteredSyscall) -> Option<u32>);

/// The ABIs of this architecture's kernels.
#[cfg(target_arch = "x86_64")]
const ABIS: [Abi; 2] = [
    (0xc000_003e, |call| call.amd64),
    (0x4000_0003, |call| call.i386),
];
#[cfg(target_arch = "aarch64")]
const ABIS: [Abi; 1] = [(0xc000_00b7, |call| call.arm64)];

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
/// The action that fails a call with an error number.
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

impl SeccompFilter {
    /// Makes the program. With `user_namespaces`, actions may make some, and use what these are for.
    pub(crate) fn new(user_namespaces: bool) -> Self {
        let other = vec![ret(refuse(libc::ENOSYS))];
        let abis = ABIS.iter().rev();
        let programs = abis.fold(other, |rest, (architecture, number)| {
            if_else(
                EQUAL,
                *architecture,
                abi_program(user_namespaces, number),
                rest,
            )
        });
        let mut program = vec![load(ARCHITECTURE)];
        program.extend(programs);
        SeccompFilter(program)
    }

    /// The program, for the kernel.
    pub(crate) fn program(&self) -> &[libc::sock_filter] {
        &self.0
    }
}

/// What is done at calls of some numbers.
#[derive(Clone, Copy, PartialEq)]
enum SyscallAction {
    /// The same at each call (SECCOMP_RET_…).
    Fixed(u32),
    /// What the rule says of the call's first argument.
    ByArgument(SyscallRule),
}

/// The part of the program for one ABI, in which a call has the number that `number` says.
fn abi_program(
    user_namespaces: bool,
    number: impl Fn(&FilteredSyscall) -> Option<u32>,
) -> Fragment {
    let mut actions: Vec<(u32, SyscallAction)> = Vec::new();
    for it in 0..=NEWEST_SYSCALL + 1 {
        let call = FILTERED_SYSCALLS
            .iter()
            .find(|call| number(call) == Some(it));
        let found = match call.map(|call| call.rule) {
            // Here end those of the x32 ABI as well, which start at 2^30.
            _ if it > NEWEST_SYSCALL => SyscallAction::Fixed(refuse(libc::ENOSYS)),
            None => SyscallAction::Fixed(ALLOW),
            Some(SyscallRule::Refused(errno)) => SyscallAction::Fixed(refuse(errno)),
            Some(SyscallRule::RefusedWithoutUserNamespaces(_) | SyscallRule::CloneFlags)
                if user_namespaces =>
            {
                SyscallAction::Fixed(ALLOW)
            }
            Some(SyscallRule::RefusedWithoutUserNamespaces(errno)) => {
                SyscallAction::Fixed(refuse(errno))
            }
            Some(rule) => SyscallAction::ByArgument(rule),
        };
        if actions.last().is_none_or(|(_, last)| *last != found) {
            actions.push((it, found));
        }
    }
    [
        vec![load(NUMBER)],
        binary_search(&actions, NEWEST_SYSCALL + 2, fragment),
    ]
    .concat()
}

/// The instructions for an action.
fn fragment(action: SyscallAction) -> Fragment {
    let one_of = |values: &[u32], is: u32, other: u32| {
        let last = vec![ret(other)];
        let found = values.iter().fold(last, |rest, value| {
            if_else(EQUAL, *value, vec![ret(is)], rest)
        });
        [vec![load(FIRST_ARGUMENT)], found].concat()
    };
    match action {
        SyscallAction::Fixed(action) => vec![ret(action)],
        SyscallAction::ByArgument(SyscallRule::AddressFamily) => {
            one_of(&FAMILIES, ALLOW, refuse(libc::EPERM))
        }
        SyscallAction::ByArgument(SyscallRule::SocketCall) => {
            one_of(&SOCKETCALL_SOCKET_NUMBERS, refuse(libc::ENOSYS), ALLOW)
        }
        SyscallAction::ByArgument(SyscallRule::CloneFlags) => {
            let user = libc::CLONE_NEWUSER as u32;
            let refused = vec![ret(refuse(libc::EPERM))];
            let tested = if_else(HAS_BITS, user, refused, vec![ret(ALLOW)]);
            [vec![load(FIRST_ARGUMENT)], tested].concat()
        }
        // These ask for nothing.
        SyscallAction::ByArgument(
            SyscallRule::Refused(errno) | SyscallRule::RefusedWithoutUserNamespaces(errno),
        ) => {
            vec![ret(refuse(errno))]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's interpreter would return.
    fn evaluate(filter: &SeccompFilter, architecture: u32, number: u32, argument: u32) -> u32 {
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
                    libc::BPF_JA => {
                        at += step.k as usize;
                        continue;
                    }
                    EQUAL => accumulator == step.k,
                    libc::BPF_JGE => accumulator >= step.k,
                    _ => accumulator & step.k != 0,
                },
            };
            at += usize::from(if taken { step.jt } else { step.jf });
        }
    }

    #[test]
    fn what_is_listed_is_refused_and_everything_older_is_not() {
        for user_namespaces in [false, true] {
            let filter = SeccompFilter::new(user_namespaces);
            for (architecture, numbered) in ABIS {
                for number in 0..=NEWEST_SYSCALL {
                    let row = FILTERED_SYSCALLS
                        .iter()
                        .find(|call| numbered(call) == Some(number));
                    let expected = match row.map(|call| call.rule) {
                        Some(SyscallRule::Refused(errno)) => refuse(errno),
                        Some(SyscallRule::RefusedWithoutUserNamespaces(errno))
                            if !user_namespaces =>
                        {
                            refuse(errno)
                        }
                        _ => ALLOW,
                    };
                    let got = evaluate(&filter, architecture, number, 0);
                    assert_eq!(got, expected, "{architecture:x} {number} {row:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_newer_than_the_list_is_absent_on_every_abi() {
        let filter = SeccompFilter::new(true);
        let absent = refuse(libc::ENOSYS);
        for (architecture, _) in ABIS {
            for number in [
                NEWEST_SYSCALL + 1,
                512,
                547,
                0x4000_0000,
                0x4000_00a5,
                u32::MAX,
            ] {
                assert_eq!(evaluate(&filter, architecture, number, 0), absent);
            }
        }
        for architecture in [0, 0x1234, 0x4000_0028] {
            assert_eq!(evaluate(&filter, architecture, 0, 0), absent);
        }
    }

    #[test]
    fn the_program_has_about_one_step_for_each_row_and_abi() {
        let rows = FILTERED_SYSCALLS.len() * ABIS.len();
        assert!(SeccompFilter::new(false).0.len() < rows * 2);
    }

    #[test]
    fn user_namespaces_are_made_only_where_they_are_allowed() {
        for (allowed, expected) in [(false, refuse(libc::EPERM)), (true, ALLOW)] {
            let filter = SeccompFilter::new(allowed);
            for (architecture, numbered) in ABIS {
                for name in ["clone", "unshare"] {
                    let row = FILTERED_SYSCALLS.iter().find(|call| call.name == name);
                    let number = row.and_then(numbered).unwrap();
                    let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32;
                    assert_eq!(evaluate(&filter, architecture, number, flags), expected);
                    let harmless = (libc::CLONE_VM | libc::SIGCHLD) as u32;
                    assert_eq!(evaluate(&filter, architecture, number, harmless), ALLOW);
                }
            }
        }
    }

    #[test]
    fn sockets_are_of_families_that_a_namespace_holds() {
        let filter = SeccompFilter::new(true);
        for (architecture, numbered) in ABIS {
            for name in ["socket", "socketpair"] {
                let row = FILTERED_SYSCALLS.iter().find(|call| call.name == name);
                let number = row.and_then(numbered).unwrap();
                for family in 0..60 {
                    let expected = match FAMILIES.contains(&family) {
                        true => ALLOW,
                        false => refuse(libc::EPERM),
                    };
                    assert_eq!(evaluate(&filter, architecture, number, family), expected);
                }
            }
        }
        for family in [libc::AF_VSOCK, libc::AF_ALG, libc::AF_TIPC, libc::AF_RDS] {
            assert!(!FAMILIES.contains(&(family as u32)));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_call_that_carries_others_carries_none_that_is_refused() {
        let filter = SeccompFilter::new(true);
        for call in 0..=20 {
            let expected = match call {
                1 | 8 => refuse(libc::ENOSYS),
                _ => ALLOW,
            };
            assert_eq!(evaluate(&filter, ABIS[1].0, 102, call), expected, "{call}");
        }
    }

    /// The kernel's own headers, as Debian's linux-libc-dev installs them, which every linker needs;
    /// those of arm64 are on every host.
    #[test]
    fn numbers_are_those_of_the_kernels_headers() {
        type NumberInHeaders = fn(&FilteredSyscall) -> Option<u32>;
        let mut headers: Vec<(&str, NumberInHeaders)> =
            vec![("/usr/include/asm-generic/unistd.h", |call| call.arm64)];
        if cfg!(target_arch = "x86_64") {
            let x86: [(&str, NumberInHeaders); 2] = [
                ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", |call| {
                    call.amd64
                }),
                ("/usr/include/x86_64-linux-gnu/asm/unistd_32.h", |call| {
                    call.i386
                }),
            ];
            headers.extend(x86);
        }
        for (file, numbered) in headers {
            let header = std::fs::read_to_string(file).unwrap();
            let numbers: std::collections::BTreeMap<&str, u32> = header
                .lines()
                .filter_map(|line| {
                    let mut words = line.strip_prefix("#define __NR_")?.split_whitespace();
                    Some((words.next()?, words.next()?.parse().ok()?))
                })
                // How many there are; and those of 32-bit ABIs, in the header that is for all.
                .filter(|(name, _)| *name != "syscalls")
                .filter(|(_, number)| !file.contains("generic") || !(403..424).contains(number))
                .collect();
            let newest = numbers.values().max().unwrap();
            assert!(
                numbers.len() > 250 && *newest <= NEWEST_SYSCALL,
                "{file}: {newest}"
            );
            for call in FILTERED_SYSCALLS {
                let number = numbered(call);
                // Headers may be older than the list.
                if number.is_none_or(|number| number <= *newest) {
                    assert_eq!(numbers.get(call.name).copied(), number, "{file} {call:?}");
                }
            }
        }
    }
}
