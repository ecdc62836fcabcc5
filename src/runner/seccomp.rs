//! A filter of system calls (seccomp(2)) for actions: it refuses what builds and tests never need and
//! what keeps no promise about other users' business: keyrings, BPF, userfaultfd, mounts, user
//! namespaces (with which they would have mounts and network interfaces of their own, and so most of
//! the kernel's privileged code), modules, kexec, clocks, performance counters, rings. `syscalls` is
//! the list.
//!
//! 1. They fail, as on a kernel that was built without them: programs look for something else.
//! 2. So do calls that are newer than the list, on every ABI: a program that knows them knows older
//!    kernels too.
//! 3. 32-bit programs are filtered by their own numbers, out of the same list. Numbers of the x32 ABI
//!    and programs of other architectures are refused as a whole.
//!
//! Tracing is allowed: sanitizers and debuggers trace their own processes, and others are in other
//! namespaces and have other users.

use super::syscalls::{FAMILIES, NEWEST, Rule, SOCKET_MAKERS, SYSTEM_CALLS, SystemCall};

/// A program for the kernel, as it takes it.
#[derive(Debug)]
pub struct Filter(Vec<libc::sock_filter>);

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
#[cfg(target_arch = "x86_64")]
const I386: u32 = 0x4000_0003;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// Places in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Its lower half, which is all that the kernel reads of an int or of flags.
const FIRST_ARGUMENT: u32 = 16;

const EQUAL: u32 = libc::BPF_JEQ;
const AT_LEAST: u32 = libc::BPF_JGE;
const HAS_BITS: u32 = libc::BPF_JSET;

impl Filter {
    /// With `user_namespaces`, actions may make some, and use what these are for.
    pub fn new(user_namespaces: bool) -> Self {
        let native = table(user_namespaces, |call| call.native);
        let other = vec![answer(refuse(libc::ENOSYS))];
        #[cfg(target_arch = "x86_64")]
        let other = choose(EQUAL, I386, table(user_namespaces, |call| call.i386), other);
        let mut program = vec![load(ARCHITECTURE)];
        program.extend(choose(EQUAL, NATIVE, native, other));
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

/// Some steps of a program; they always end in an answer.
type Part = Vec<libc::sock_filter>;

/// The part for one ABI, whose numbers `number` tells.
fn table(user_namespaces: bool, number: impl Fn(&SystemCall) -> Option<u32>) -> Part {
    let mut cases: Vec<(u32, Part)> = SYSTEM_CALLS
        .iter()
        .filter_map(|call| Some((number(call)?, part(call.rule, user_namespaces)?)))
        .collect();
    cases.sort_by_key(|(number, _)| *number);
    let mut part = vec![load(NUMBER)];
    // Here end those of the x32 ABI as well, which start at 2^30.
    part.extend(choose(
        AT_LEAST,
        NEWEST + 1,
        vec![answer(refuse(libc::ENOSYS))],
        search(cases),
    ));
    part
}

/// `None` for what is allowed.
fn part(rule: Rule, user_namespaces: bool) -> Option<Part> {
    let one_of = |values: &[u32], is: u32, other: u32| {
        let last = vec![answer(other)];
        let found = values.iter().fold(last, |rest, value| {
            choose(EQUAL, *value, vec![answer(is)], rest)
        });
        [vec![load(FIRST_ARGUMENT)], found].concat()
    };
    match rule {
        Rule::Refused(errno) => Some(vec![answer(refuse(errno))]),
        Rule::ForUserNamespaces(_) | Rule::CloneFlags if user_namespaces => None,
        Rule::ForUserNamespaces(errno) => Some(vec![answer(refuse(errno))]),
        Rule::CloneFlags => {
            let user = libc::CLONE_NEWUSER as u32;
            let refused = vec![answer(refuse(libc::EPERM))];
            let tested = choose(HAS_BITS, user, refused, vec![answer(ALLOW)]);
            Some([vec![load(FIRST_ARGUMENT)], tested].concat())
        }
        Rule::AddressFamily => Some(one_of(&FAMILIES, ALLOW, refuse(libc::EPERM))),
        Rule::SocketCall => Some(one_of(&SOCKET_MAKERS, refuse(libc::ENOSYS), ALLOW)),
    }
}

/// Finds a case by halves, and allows what is none: when a filter is installed, the kernel tries all
/// numbers, to know those that are always allowed.
fn search(mut cases: Vec<(u32, Part)>) -> Part {
    if cases.len() > 2 {
        let high = cases.split_off(cases.len() / 2);
        return choose(AT_LEAST, high[0].0, search(high), search(cases));
    }
    let none = vec![answer(ALLOW)];
    cases.into_iter().fold(none, |rest, (number, found)| {
        choose(EQUAL, number, found, rest)
    })
}

/// One part if the comparison of what was loaded last holds, or else the other one.
fn choose(comparison: u32, k: u32, yes: Part, no: Part) -> Part {
    let mut part = match u8::try_from(yes.len()) {
        Ok(length) => vec![jump(comparison, k, 0, length)],
        // Only unconditional jumps go farther.
        Err(_) => vec![
            jump(comparison, k, 1, 0),
            statement(libc::BPF_JMP | libc::BPF_JA, yes.len() as u32),
        ],
    };
    part.extend(yes);
    part.extend(no);
    part
}

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
                    libc::BPF_JA => {
                        at += step.k as usize;
                        continue;
                    }
                    EQUAL => accumulator == step.k,
                    AT_LEAST => accumulator >= step.k,
                    _ => accumulator & step.k != 0,
                },
            };
            at += usize::from(if taken { step.jt } else { step.jf });
        }
    }

    /// A way to make system calls: its architecture, and how it numbers them.
    type Abi = (u32, fn(&SystemCall) -> Option<u32>);

    #[cfg(target_arch = "x86_64")]
    const ABIS: [Abi; 2] = [(NATIVE, |call| call.native), (I386, |call| call.i386)];
    #[cfg(not(target_arch = "x86_64"))]
    const ABIS: [Abi; 1] = [(NATIVE, |call| call.native)];

    #[test]
    fn what_is_listed_is_refused_and_everything_older_is_not() {
        for user_namespaces in [false, true] {
            let filter = Filter::new(user_namespaces);
            for (architecture, numbered) in ABIS {
                for number in 0..=NEWEST {
                    let row = SYSTEM_CALLS
                        .iter()
                        .find(|call| numbered(call) == Some(number));
                    let expected = match row.map(|call| call.rule) {
                        Some(Rule::Refused(errno)) => refuse(errno),
                        Some(Rule::ForUserNamespaces(errno)) if !user_namespaces => refuse(errno),
                        _ => ALLOW,
                    };
                    let got = verdict(&filter, architecture, number, 0);
                    assert_eq!(got, expected, "{architecture:x} {number} {row:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_newer_than_the_list_is_absent_on_every_abi() {
        let filter = Filter::new(true);
        let absent = refuse(libc::ENOSYS);
        for (architecture, _) in ABIS {
            for number in [NEWEST + 1, 512, 547, 0x4000_0000, 0x4000_00a5, u32::MAX] {
                assert_eq!(verdict(&filter, architecture, number, 0), absent);
            }
        }
        for architecture in [0, 0x1234, 0x4000_0028] {
            assert_eq!(verdict(&filter, architecture, 0, 0), absent);
        }
    }

    #[test]
    fn user_namespaces_are_made_only_where_they_are_allowed() {
        for (allowed, expected) in [(false, refuse(libc::EPERM)), (true, ALLOW)] {
            let filter = Filter::new(allowed);
            for (architecture, numbered) in ABIS {
                for name in ["clone", "unshare"] {
                    let row = SYSTEM_CALLS.iter().find(|call| call.name == name);
                    let number = row.and_then(numbered).unwrap();
                    let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32;
                    assert_eq!(verdict(&filter, architecture, number, flags), expected);
                    let harmless = (libc::CLONE_VM | libc::SIGCHLD) as u32;
                    assert_eq!(verdict(&filter, architecture, number, harmless), ALLOW);
                }
            }
        }
    }

    #[test]
    fn sockets_are_of_families_that_a_namespace_holds() {
        let filter = Filter::new(true);
        for (architecture, numbered) in ABIS {
            for name in ["socket", "socketpair"] {
                let row = SYSTEM_CALLS.iter().find(|call| call.name == name);
                let number = row.and_then(numbered).unwrap();
                for family in 0..60 {
                    let expected = match FAMILIES.contains(&family) {
                        true => ALLOW,
                        false => refuse(libc::EPERM),
                    };
                    assert_eq!(verdict(&filter, architecture, number, family), expected);
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
        let filter = Filter::new(true);
        for call in 0..=20 {
            let expected = match call {
                1 | 8 => refuse(libc::ENOSYS),
                _ => ALLOW,
            };
            assert_eq!(verdict(&filter, I386, 102, call), expected, "{call}");
        }
    }

    /// The kernel's own headers, as Debian's linux-libc-dev installs them, which every linker needs.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn numbers_are_those_of_the_kernels_headers() {
        for (file, numbered) in [("unistd_64.h", ABIS[0].1), ("unistd_32.h", ABIS[1].1)] {
            let path = format!("/usr/include/x86_64-linux-gnu/asm/{file}");
            let header = std::fs::read_to_string(path).unwrap();
            let numbers: std::collections::BTreeMap<&str, u32> = header
                .lines()
                .filter_map(|line| {
                    let mut words = line.strip_prefix("#define __NR_")?.split_whitespace();
                    Some((words.next()?, words.next()?.parse().ok()?))
                })
                .collect();
            let newest = numbers.values().max().unwrap();
            assert!(numbers.len() > 300 && *newest <= NEWEST, "{file}: {newest}");
            for call in SYSTEM_CALLS {
                let number = numbered(call);
                // Headers may be older than the list.
                if number.is_none_or(|number| number <= *newest) {
                    assert_eq!(numbers.get(call.name).copied(), number, "{file} {call:?}");
                }
            }
        }
    }
}
