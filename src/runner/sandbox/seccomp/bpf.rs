//! Programs of the classic Berkeley packet filter, as seccomp(2) runs them on struct seccomp_data.

/// Some instructions of a program; they always end in an action.
pub(super) type Fragment = Vec<libc::sock_filter>;

/// The offset of the system call's number in struct seccomp_data.
pub(super) const NUMBER: u32 = 0;
/// The offset of the architecture.
pub(super) const ARCHITECTURE: u32 = 4;
/// The offset of the first argument's lower half, which is all that the kernel reads of an int or of flags.
pub(super) const FIRST_ARGUMENT: u32 = 16;

/// Whether what was loaded last is equal to a number.
pub(super) const EQUAL: u32 = libc::BPF_JEQ;
/// Whether what was loaded last is at least a number.
const AT_LEAST: u32 = libc::BPF_JGE;
/// Whether what was loaded last has some of these bits.
pub(super) const HAS_BITS: u32 = libc::BPF_JSET;

/// Finds the action for the number that was loaded last: each action holds from its number on, up to the next
/// one's. The first one's is 0. `fragment` has the instructions for an action.
///
/// There is one comparison for each but the first, and each different action is there once: the kernel
/// compiles the program for every action, and tries all numbers up to about `end`, to know those that are
/// always allowed.
pub(super) fn binary_search<A: Copy + PartialEq>(
    actions: &[(u32, A)],
    end: u32,
    fragment: impl Fn(A) -> Fragment,
) -> Fragment {
    let mut comparisons = Vec::new();
    bisect(actions, end, &mut comparisons);
    let mut ends: Vec<(A, usize)> = Vec::new();
    let mut rest = Fragment::new();
    for (_, targets) in &comparisons {
        for target in targets {
            if let Target::Action(action) = target
                && !ends.iter().any(|(known, _)| known == action)
            {
                ends.push((*action, comparisons.len() + rest.len()));
                rest.extend(fragment(*action));
            }
        }
    }
    let target_index = |target: &Target<A>| match target {
        Target::Comparison(index) => Some(*index),
        Target::Action(action) => {
            let end = ends.iter().find(|(known, _)| known == action)?;
            Some(end.1)
        }
    };
    let mut program: Fragment = comparisons
        .iter()
        .enumerate()
        .map(|(at, (number, [yes, no]))| {
            let distance =
                |target| target_index(target).and_then(|index| u8::try_from(index - at - 1).ok());
            match (distance(yes), distance(no)) {
                (Some(yes), Some(no)) => jump(AT_LEAST, *number, yes, no),
                _ => unreachable!("the table has more rows than a jump is long"),
            }
        })
        .collect();
    program.extend(rest);
    program
}

/// Where a comparison leads to.
#[derive(Clone, Copy)]
enum Target<A> {
    Comparison(usize),
    Action(A),
}

/// Adds the comparison that halves the numbers up to `end`, and those for each half. Returns where that begins.
fn bisect<A: Copy>(
    actions: &[(u32, A)],
    end: u32,
    comparisons: &mut Vec<(u32, [Target<A>; 2])>,
) -> Target<A> {
    let (first, action) = actions[0];
    let middle = first.midpoint(end);
    let nearest = (1..actions.len()).min_by_key(|index| actions[*index].0.abs_diff(middle));
    let Some((low, high)) = nearest.map(|index| actions.split_at(index)) else {
        return Target::Action(action);
    };
    let at = comparisons.len();
    comparisons.push((high[0].0, [Target::Comparison(at); 2]));
    let yes = bisect(high, end, comparisons);
    let no = bisect(low, high[0].0, comparisons);
    comparisons[at].1 = [yes, no];
    Target::Comparison(at)
}

/// Runs one fragment if the comparison of what was loaded last holds, or else the other one.
pub(super) fn if_else(comparison: u32, k: u32, yes: Fragment, no: Fragment) -> Fragment {
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

/// Loads the 32 bits at an offset of struct seccomp_data.
pub(super) const fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

/// Ends the program with what the kernel is to do (SECCOMP_RET_…).
pub(super) const fn ret(action: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
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
