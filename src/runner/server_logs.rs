//! A log for people whose action something else than its command has ended, or a limit has held back: what that was, how much it was
//! allowed, and what was running (RunRequest.server_logs_directory; REAPI: ExecuteResponse.server_logs).
//!
//! 1. It is only made where there is something to tell: an action that ends by itself, however, costs nothing.
//! 2. A status, or a line in the standard error, says what happened; here are the details.
//! 3. It is a text of bounded size, whatever the action called its processes.
//! 4. Whatever the action put in its place stays there, and is neither followed nor written to.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write as _},
    time::Duration,
};

use super::{
    build_directory::BuildDirectory,
    sandbox::{CgroupUsage, MemoryUsage},
    user_cleanup::RunningProcess,
};
use crate::{
    config::{Size, runner::Limits},
    path::RelativePath,
};

/// The name of the log, in the directory for server logs.
const NAME: &str = "bb_runner.log";

/// How many processes are listed; others are counted.
const MOST_PROCESSES: usize = 50;

/// What is known of an action that has ended.
pub(super) struct ServerLog<'r> {
    /// Why it was killed, where a status says so.
    pub kill_reason: Option<String>,
    pub limits: &'r Limits,
    /// How much time the caller granted, if it said so.
    pub timeout: Option<Duration>,
    pub elapsed: Duration,
    /// What its processes used, where it had a control group.
    pub usage: Option<&'r CgroupUsage>,
    /// The processes that ran when it was cancelled, and were killed.
    pub killed_processes: &'r [RunningProcess],
}

impl ServerLog<'_> {
    /// Writes the log beneath the build directory, if there is something to tell. A log that cannot be written is
    /// none: the action has ended as it has.
    pub(super) fn write(&self, build: &BuildDirectory, directory: &RelativePath) {
        let Some(text) = self.text() else {
            return;
        };
        let written = build
            .create_server_log(directory, NAME)
            .and_then(|file| File::from(file).write_all(text.as_bytes()));
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                tracing::debug!("an action has made a file in place of its server log");
            }
            Err(error) => {
                tracing::warn!(directory = %directory, %error, "could not write an action's server log");
            }
        }
    }

    /// The log, if there is something to tell.
    fn text(&self) -> Option<String> {
        let causes = self.causes();
        if causes.is_empty() {
            return None;
        }
        let mut text =
            "bb_runner ran this action, which something else than its command has ended, or kept \
                        from what it asked for:\n"
                .to_owned();
        for cause in causes {
            text.push_str(&format!("- {cause}\n"));
        }
        // A String takes all that is written to it.
        let _ = self.describe(&mut text);
        Some(text)
    }

    /// What the command itself did not cause, each for one line.
    fn causes(&self) -> Vec<String> {
        let mut causes: Vec<String> = self.kill_reason.iter().cloned().collect();
        let memory = self.usage.and_then(|usage| usage.memory);
        if let Some(memory) = memory.filter(MemoryUsage::is_exhausted) {
            causes.push(format!(
                "the kernel killed {} of its processes, since all of them together had reached the limit of memory {} \
                 times; have the command use less, such as by fewer threads, or have limits.memory of bb_runner.toml \
                 raised",
                memory.oom_kills, memory.oom_events
            ));
        }
        let refused = self.usage.map_or(0, |usage| usage.pids_max_events);
        if refused > 0 {
            causes.push(format!(
                "{refused} times it could not make another process or thread; have the command use fewer, or have \
                 limits.processes of bb_runner.toml raised"
            ));
        }
        causes
    }

    /// Writes the limits, what was used, and what ran.
    fn describe(&self, text: &mut String) -> fmt::Result {
        writeln!(
            text,
            "\nIt ran for {:.3} s. Its limits:",
            self.elapsed.as_secs_f64()
        )?;
        if let Some(timeout) = self.timeout {
            writeln!(text, "- time: {} s", timeout.as_secs_f64())?;
        }
        let memory = self.usage.and_then(|usage| usage.memory);
        if let Some((memory, limit)) = memory.and_then(|memory| Some((memory, memory.limit?))) {
            write!(text, "- memory: {}", Size(limit))?;
            match memory.peak {
                Some(peak) => writeln!(text, ", of which it used up to {}", Size(peak))?,
                None => writeln!(text)?,
            }
        }
        writeln!(text, "- processes and threads: {}", self.limits.processes)?;
        if self.limits.processors > 0.0 {
            writeln!(text, "- processors: {}", self.limits.processors)?;
        }
        if self.limits.log_size.get() > 0 {
            writeln!(
                text,
                "- standard output, and standard error: {}",
                self.limits.log_size
            )?;
        }
        if let Some(cpu) = self.usage.and_then(|usage| usage.cpu) {
            writeln!(
                text,
                "\nIts processes used {:.3} s of processors as a user and {:.3} s in the kernel, and waited {:.3} s since \
                 their share was used up.",
                cpu.user.as_secs_f64(),
                cpu.system.as_secs_f64(),
                cpu.throttled.as_secs_f64()
            )?;
        }
        if !self.killed_processes.is_empty() {
            writeln!(text, "\nThese were running, and were killed:")?;
            for process in self.killed_processes.iter().take(MOST_PROCESSES) {
                let RunningProcess { name, state } = process;
                writeln!(text, "- {}: {}", printable(name), printable(state))?;
            }
            let others = self.killed_processes.len().saturating_sub(MOST_PROCESSES);
            if others > 0 {
                writeln!(text, "- and {others} others")?;
            }
        }
        Ok(())
    }
}

/// A text that an action chose, made fit for one line.
fn printable(name: &str) -> String {
    let shown = |c: char| match c {
        ' '..='~' => c,
        _ => '?',
    };
    name.chars().take(64).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        memory: Size(96 << 20),
        processors: 2.0,
        processes: 64,
        log_size: Size(8 << 20),
    };

    /// The usage of a control group with these files.
    fn usage(files: &[(&str, &str)]) -> CgroupUsage {
        CgroupUsage::read(|name| {
            let found = files.iter().find(|(file, _)| *file == name);
            found
                .map(|(_, text)| (*text).to_owned())
                .ok_or(std::io::ErrorKind::NotFound.into())
        })
    }

    fn record<'r>(usage: &'r CgroupUsage, killed_processes: &'r [RunningProcess]) -> ServerLog<'r> {
        ServerLog {
            kill_reason: None,
            limits: &LIMITS,
            timeout: None,
            elapsed: Duration::from_millis(1234),
            usage: Some(usage),
            killed_processes,
        }
    }

    #[test]
    fn an_action_that_its_own_command_ended_has_no_log() {
        // One that was close to its limit, and went on.
        let usage = usage(&[("memory.events", "oom 3\noom_kill 0\n")]);
        assert_eq!(record(&usage, &[]).text(), None);
        let without = ServerLog {
            usage: None,
            ..record(&usage, &[])
        };
        assert_eq!(without.text(), None);
    }

    #[test]
    fn each_limit_that_was_reached_is_told_with_what_it_was_and_what_raises_it() {
        let usage = usage(&[
            (
                "cpu.stat",
                "user_usec 1500000\nsystem_usec 0\nthrottled_usec 2000000\n",
            ),
            ("memory.events", "oom 41\noom_kill 2\n"),
            ("memory.peak", "100663296\n"),
            ("memory.max", "100663296\n"),
            ("pids.events", "max 12\n"),
        ]);
        let text = record(&usage, &[]).text().unwrap();
        for words in [
            "killed 2 of its processes",
            "41 times",
            "limits.memory of bb_runner.toml",
            "memory: 96MiB, of which it used up to 96MiB",
            "12 times it could not make",
            "limits.processes",
            "processes and threads: 64",
            "ran for 1.234 s",
            "1.500 s of processors",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn what_ran_at_its_end_is_a_text_within_bounds_whatever_it_is_called() {
        let usage = CgroupUsage::default();
        let process = |name: &str| RunningProcess {
            name: name.to_owned(),
            state: "S (sleeping)".to_owned(),
        };
        let mut all = vec![process("a\nb\u{1b}[2J\u{202e}")];
        all.extend((0..10_000).map(|_| process(&"x".repeat(1000))));
        let killed = ServerLog {
            kill_reason: Some("it was late".to_owned()),
            timeout: Some(Duration::from_millis(700)),
            ..record(&usage, &all)
        };
        let text = killed.text().unwrap();
        assert!(
            text.contains("- it was late\n") && text.contains("- time: 0.7 s\n"),
            "{text}"
        );
        assert!(text.contains("- a?b?[2J?: S (sleeping)\n"), "{text}");
        assert!(text.contains("- and 9951 others\n"), "{text}");
        assert!(text.len() < 10_000, "{}", text.len());
        assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)));
    }
}
