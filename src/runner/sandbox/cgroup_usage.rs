//! What a control group says of its action.

use std::{
    io::{self, Read},
    time::Duration,
};

/// How many bytes of one file are read at most. `io.stat` is the longest: some hundred bytes for each device.
const MAXIMUM_TEXT: u64 = 1 << 20;
/// How many bytes a file usually has at most: the kernel hands out whole lines, of a page at most at a time.
const USUAL_TEXT: usize = 4096;

/// What a group says of its action at the end: all processes, those that nobody waited for included.
/// Where a controller is missing, so is what it would tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CgroupUsage {
    pub cpu: Option<CpuUsage>,
    pub memory: Option<MemoryUsage>,
    pub io: Option<IoUsage>,
    /// How often a process could not be made, as there were too many.
    pub pids_max_events: u64,
}

/// Times that all processors together spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuUsage {
    pub user: Duration,
    pub system: Duration,
    /// Time in which something wanted to run and had used up its share.
    pub throttled: Duration,
}

/// Memory, its limit, and what became of processes at that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryUsage {
    /// The most that was used at a time, in bytes; the kernel tells it since Linux 5.19.
    pub peak: Option<u64>,
    /// Bytes; `None` for no limit.
    pub limit: Option<u64>,
    /// Processes of this group that were killed because its memory, or the host's, ran out (`oom_kill` of
    /// memory.events).
    pub oom_kills: u64,
    /// How often this group's own limit left nothing but to kill a process, or to fail (`oom` of
    /// memory.events).
    pub oom_events: u64,
}

/// Bytes that were read from, and written to, all devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IoUsage {
    pub read: u64,
    pub written: u64,
}

impl MemoryUsage {
    /// Whether processes were killed since the action used more than its limit.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.oom_kills > 0 && self.oom_events > 0
    }

    /// Whether processes were killed since others had used too much.
    pub(crate) fn is_external_oom(&self) -> bool {
        self.oom_kills > 0 && self.oom_events == 0
    }
}

impl CgroupUsage {
    /// The usage of a group whose files `read` reads; what cannot be read is not there.
    pub(crate) fn read(read: impl Fn(&str) -> io::Result<String>) -> Self {
        let number = |file| read(file).ok()?.trim().parse().ok();
        CgroupUsage {
            cpu: read("cpu.stat").ok().map(|text| CpuUsage {
                user: Duration::from_micros(field(&text, "user_usec")),
                system: Duration::from_micros(field(&text, "system_usec")),
                throttled: Duration::from_micros(field(&text, "throttled_usec")),
            }),
            memory: read("memory.events").ok().map(|events| MemoryUsage {
                peak: number("memory.peak"),
                limit: number("memory.max"),
                oom_kills: field(&events, "oom_kill"),
                oom_events: field(&events, "oom"),
            }),
            io: read("io.stat").ok().map(|text| IoUsage::sum(&text)),
            pids_max_events: read("pids.events").map_or(0, |text| field(&text, "max")),
        }
    }
}

impl IoUsage {
    /// Adds up the lines of `io.stat`, one for each device.
    fn sum(text: &str) -> Self {
        let mut sum = IoUsage::default();
        for word in text.split_whitespace() {
            let of = |name| word.strip_prefix(name)?.parse::<u64>().ok();
            sum.read = sum.read.saturating_add(of("rbytes=").unwrap_or(0));
            sum.written = sum.written.saturating_add(of("wbytes=").unwrap_or(0));
        }
        sum
    }
}

/// Reads a group's file, as far as `MAXIMUM_TEXT`.
pub(super) fn read_text(file: impl Read) -> io::Result<String> {
    let mut text = Vec::with_capacity(USUAL_TEXT);
    file.take(MAXIMUM_TEXT).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The number under a key of a flat keyed file (cgroups(7)); 0 when it is not there.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as the kernel's files do: no more than a line at a time.
    struct Lines<'a>(&'a [u8]);

    impl Read for Lines<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let line = self.0.split_inclusive(|byte| *byte == b'\n').next();
            let length = line.map_or(0, <[u8]>::len).min(buffer.len());
            let (read, rest) = self.0.split_at(length);
            buffer[..length].copy_from_slice(read);
            self.0 = rest;
            Ok(length)
        }
    }

    #[test]
    fn a_host_of_many_devices_is_read_to_the_last_one() {
        let line =
            |device| format!("254:{device} rbytes=1 wbytes=2 rios=1 wios=1 dbytes=0 dios=0\n");
        let stat: String = (0..1000).map(line).collect();
        assert!(stat.len() > 10 * USUAL_TEXT);
        let text = read_text(Lines(stat.as_bytes())).unwrap();
        let (read, written) = (1000, 2000);
        assert_eq!(IoUsage::sum(&text), IoUsage { read, written });
        let endless = read_text(io::repeat(b'x')).unwrap();
        assert_eq!(endless.len() as u64, MAXIMUM_TEXT);
    }

    #[test]
    fn figures_are_found_by_their_whole_names_and_summed_over_devices() {
        let events = "low 0\nhigh 0\nmax 41\noom 2\noom_kill 3\noom_group_kill 1\n";
        assert_eq!((field(events, "oom"), field(events, "oom_kill")), (2, 3));
        assert_eq!(field(events, "missing"), 0);
        let stat = "254:0 rbytes=4096 wbytes=100 rios=1 wios=1 dbytes=7 dios=0\n\
                    254:16 rbytes=1 wbytes=1 rios=1 wios=1 dbytes=0 dios=0\n";
        assert_eq!(
            IoUsage::sum(stat),
            IoUsage {
                read: 4097,
                written: 101
            }
        );
    }
}
