//! An action's share of what the kernel counts once for the whole host, and its limits for what the
//! kernel counts by user, whatever this daemon was started with: each action has a user of its own.
//!
//! What has neither is in bb-remote-execution(7), "What is not stopped"; asynchronous I/O contexts,
//! which have only a number for all, are refused (`syscalls`).

use std::{ffi::c_int, fs};

/// Resources (getrlimit(2)) and the most of them.
pub const LIMITS: [(c_int, u64); 5] = [
    // Bytes of memory that cannot be swapped, and of POSIX message queues: the kernel's defaults.
    (libc::RLIMIT_MEMLOCK as c_int, 8 << 20),
    (libc::RLIMIT_MSGQUEUE as c_int, 819_200),
    // Signals that wait to be delivered, and timers.
    (libc::RLIMIT_SIGPENDING as c_int, 65_536),
    // Nobody runs before others.
    (libc::RLIMIT_RTPRIO as c_int, 0),
    (libc::RLIMIT_NICE as c_int, 0),
];

/// Enough for any test of terminals, and at least so many that each can have some.
const TERMINALS: (u32, u32) = (8, 64);

/// How many pseudo-terminals one action may have (pts(4): kernel.pty).
pub fn terminals(users: u32) -> u32 {
    let number = |name| {
        let text = fs::read_to_string(format!("/proc/sys/kernel/pty/{name}")).ok()?;
        text.trim().parse::<u32>().ok()
    };
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let all = number("max").unwrap_or(4096);
    share(all, number("reserve").unwrap_or(1024), processors, users)
}

/// As workers run one action for each processor, unless told otherwise, twice as many have a share.
/// The kernel keeps the reserve for mounts of the host's own.
fn share(all: u32, reserve: u32, processors: u32, users: u32) -> u32 {
    let actions = users.min(processors.saturating_mul(2)).max(1);
    (all.saturating_sub(reserve) / actions).clamp(TERMINALS.0, TERMINALS.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_as_many_actions_as_processors_leave_terminals_for_each_other() {
        for (processors, users, expected) in [
            (2, 256, 64),
            (32, 256, 48),
            (128, 256, 12),
            (500, 500, 8),
            (128, 1, 64),
        ] {
            let share = share(4096, 1024, processors, users);
            assert_eq!(share, expected);
        }
        assert_eq!(share(16, 1024, 4, 4), 8);
    }
}
