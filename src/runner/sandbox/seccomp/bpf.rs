//! Programs of the classic Berkeley packet filter, as seccomp(2) runs them on struct seccomp_data.

/// Some steps of a program; they always end in a verdict.
pub type Fragment = Vec<libc::sock_filter>;

/// Places in struct seccomp_data.
pub const NUMBER: u32 = 0;
pub const ARCHITECTURE: u32 = 4;
/// Its lower half, which is all that the kernel reads of an int or of flags.
pub const FIRST_ARGUMENT: u32 = 16;

/// Comparisons of what was loaded last.
pub const EQUAL: u32 = libc::BPF_JEQ;
pub const AT_LEAST: u32 = libc::BPF_JGE;
pub const HAS_BITS: u32 = libc::BPF_JSET;

/// Finds a case by halves, and allows what is none: when a filter is installed, the kernel tries all
/// numbers, to know those that are always allowed.
pub fn search(mut cases: Vec<(u32, Fragment)>) -> Fragment {
    if cases.len() > 2 {
        let high = cases.split_off(cases.len() / 2);
        return choose(AT_LEAST, high[0].0, search(high), search(cases));
    }
    let none = vec![answer(libc::SECCOMP_RET_ALLOW)];
    cases.into_iter().fold(none, |rest, (number, found)| {
        choose(EQUAL, number, found, rest)
    })
}

/// One fragment if the comparison of what was loaded last holds, or else the other one.
pub fn choose(comparison: u32, k: u32, yes: Fragment, no: Fragment) -> Fragment {
    let mut fragment = match u8::try_from(yes.len()) {
        Ok(length) => vec![jump(comparison, k, 0, length)],
        // Only unconditional jumps go farther.
        Err(_) => vec![
            jump(comparison, k, 1, 0),
            statement(libc::BPF_JMP | libc::BPF_JA, yes.len() as u32),
        ],
    };
    fragment.extend(yes);
    fragment.extend(no);
    fragment
}

pub const fn load(place: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, place)
}

pub const fn answer(verdict: u32) -> libc::sock_filter {
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
