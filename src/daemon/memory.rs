//! Gives memory back to the host that the allocator keeps without need.
//!
//! mimalloc gives back what is free when somebody asks it for more. After a burst of calls nobody does: 230 MiB
//! stayed resident for a minute and more, with 200 KiB in use.

#![expect(unsafe_code, reason = "it asks the allocator")]

use std::time::Duration;

/// How often.
const INTERVAL: Duration = Duration::from_secs(30);

/// Gives back from now on, on a thread of its own, since that takes milliseconds.
pub(super) fn start() {
    let thread = std::thread::Builder::new().name("memory".to_owned());
    let started = thread.spawn(|| {
        loop {
            std::thread::sleep(INTERVAL);
            give_back();
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "could not start the thread that gives memory back");
    }
}

fn give_back() {
    // SAFETY: mi_collect has no preconditions; it gives back what no thread uses.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that are resident and of no file (proc_pid_status(5)).
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() << 10
    }

    #[test]
    fn what_a_burst_has_used_is_given_back_though_something_small_of_it_lives_on() {
        // As a thread of a daemon that has nothing to do now, and lives on.
        let (burst, bursting) = std::sync::mpsc::channel();
        let (end, ending) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let boxes: Vec<Box<[u8; 400]>> = (0..500_000).map(|_| Box::new([1; 400])).collect();
            let before = resident();
            // Each thousandth lives on.
            let kept: Vec<_> = boxes.into_iter().step_by(1000).collect();
            burst.send(before).unwrap();
            let _ = ending.recv();
            assert!(kept.iter().all(|bytes| bytes[0] == 1));
        });
        let before = bursting.recv().unwrap();
        assert!(before > 200 << 20, "{before}");
        give_back();
        // Of 200 MB; other tests of this process need some, too.
        let after = resident();
        assert!(after + (100 << 20) < before, "{before}, then {after}");
        drop(end);
        thread.join().unwrap();
    }
}
