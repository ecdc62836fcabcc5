//! What a worker is doing, in one line for `systemctl status`, and what changes in it, for the journal.
//!
//! Slots meet the same troubles at the same time: each trouble is logged when the first slot has it,
//! and when none has it any more.

use std::{fmt::Write, time::SystemTime};

use parking_lot::Mutex;

use crate::daemon::message_id;

/// Of all slots together.
#[derive(Debug)]
pub struct StatusLine {
    scheduler: String,
    slots: usize,
    state: Mutex<Conditions>,
}

#[derive(Debug, Default)]
struct Conditions {
    running: usize,
    /// Since when nothing was heard from the scheduler, and why.
    unreachable: Option<(SystemTime, String)>,
    /// Why slots take no actions, and since when.
    unready: Option<(SystemTime, String)>,
    unready_slots: std::collections::BTreeSet<usize>,
    /// What has answered since the start.
    scheduler_answered: bool,
    runner_answered: bool,
    storage_answered: bool,
}

/// An action that runs.
pub struct RunningCount<'a>(&'a StatusLine);

impl StatusLine {
    pub fn new(scheduler: &impl ToString, slots: usize) -> Self {
        StatusLine {
            scheduler: scheduler.to_string(),
            slots,
            state: Mutex::default(),
        }
    }

    /// All, and those that run an action.
    pub fn slots(&self) -> (usize, usize) {
        (self.slots, self.state.lock().running)
    }

    pub fn scheduler(&self) -> &str {
        &self.scheduler
    }

    /// Whether the worker serves: runner, scheduler and storage have answered, and go on to. Else why not.
    pub fn readiness(&self) -> Result<(), String> {
        let state = self.state.lock();
        if let Some((_, reason)) = &state.unreachable {
            return Err(format!("scheduler {}: {}", self.scheduler, short(reason)));
        }
        if let Some((_, reason)) = &state.unready
            && state.unready_slots.len() >= self.slots
        {
            return Err(short(reason));
        }
        for (has_answered, who) in [
            (state.runner_answered, "no runner has"),
            (state.scheduler_answered, "the scheduler has not"),
            (state.storage_answered, "the storage has not"),
        ] {
            if !has_answered {
                return Err(format!("{who} answered yet"));
            }
        }
        Ok(())
    }

    pub fn storage_answered(&self) {
        self.state.lock().storage_answered = true;
    }

    pub fn run(&self) -> RunningCount<'_> {
        self.state.lock().running += 1;
        RunningCount(self)
    }

    pub fn failed(&self, code: tonic::Code, error: &str, now: SystemTime) {
        let mut state = self.state.lock();
        let first = state.unreachable.is_none();
        let since = state.unreachable.take().map_or(now, |(since, _)| since);
        state.unreachable = Some((since, format!("{code:?}: {error}")));
        drop(state);
        if first {
            tracing::warn!(
                message_id = message_id::SCHEDULER_UNREACHABLE,
                scheduler = self.scheduler,
                ?code,
                error,
                "could not synchronize with the scheduler; trying again"
            );
        }
    }

    pub fn answered(&self) {
        let ended = {
            let mut state = self.state.lock();
            state.scheduler_answered = true;
            state.unreachable.take()
        };
        if let Some((since, _)) = ended {
            tracing::info!(
                scheduler = self.scheduler,
                since = %moment(since),
                "the scheduler answers again"
            );
        }
    }

    pub fn unready(&self, slot: usize, reason: &str, now: SystemTime) {
        let mut state = self.state.lock();
        state.unready_slots.insert(slot);
        let since = state.unready.as_ref().map_or(now, |(since, _)| *since);
        let news = state
            .unready
            .as_ref()
            .is_none_or(|(_, known)| known != reason);
        state.unready = Some((since, reason.to_owned()));
        drop(state);
        if news {
            tracing::warn!(
                slot,
                error = reason,
                "could not get ready for actions; trying again"
            );
        }
    }

    pub fn ready(&self, slot: usize) {
        let mut state = self.state.lock();
        state.unready_slots.remove(&slot);
        state.runner_answered = true;
        let ended = match state.unready_slots.is_empty() {
            true => state.unready.take(),
            false => None,
        };
        drop(state);
        if let Some((since, _)) = ended {
            tracing::info!(since = %moment(since), "ready for actions again");
        }
    }

    /// One line, for people.
    pub fn line(&self, stopping: bool) -> String {
        let state = self.state.lock();
        let (running, slots) = (state.running, self.slots);
        let mut line = match (stopping, running) {
            (true, _) => format!("draining: {running} of {slots} slots still run an action"),
            (false, 0) => format!("idle: {slots} slots"),
            (false, _) => format!("{running} of {slots} slots run an action"),
        };
        let unready = state.unready.as_ref().map(|(since, reason)| {
            let slots = state.unready_slots.len();
            format!(
                "{slots} slots not ready since {}: {}",
                moment(*since),
                short(reason)
            )
        });
        let reachability = match &state.unreachable {
            None => format!("scheduler {}", self.scheduler),
            Some((since, reason)) => format!(
                "scheduler {} unreachable since {}: {}",
                self.scheduler,
                moment(*since),
                short(reason)
            ),
        };
        for part in unready.into_iter().chain([reachability]) {
            let _ = write!(line, "; {part}");
        }
        line
    }
}

impl Drop for RunningCount<'_> {
    fn drop(&mut self) {
        self.0.state.lock().running -= 1;
    }
}

fn moment(time: SystemTime) -> humantime::Rfc3339Timestamp {
    humantime::format_rfc3339_seconds(time)
}

/// A status line has one line, of which `systemctl status` shows the beginning.
fn short(reason: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    reason.chars().map(plain).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_runs_and_since_when_what_does_not_work() {
        let status_line = StatusLine::new(&"grpc://s:1", 4);
        assert_eq!(
            status_line.line(false),
            "idle: 4 slots; scheduler grpc://s:1"
        );
        let running = status_line.run();
        let since = SystemTime::UNIX_EPOCH;
        status_line.failed(tonic::Code::Unavailable, "no\nroute", since);
        status_line.failed(tonic::Code::Unavailable, "no\nroute", SystemTime::now());
        assert_eq!(
            status_line.line(false),
            "1 of 4 slots run an action; scheduler grpc://s:1 unreachable since \
             1970-01-01T00:00:00Z: Unavailable: no route"
        );
        assert!(
            status_line
                .line(true)
                .starts_with("draining: 1 of 4 slots still")
        );
        drop(running);
        status_line.answered();
        status_line.unready(0, "no runner", since);
        status_line.unready(1, "no runner", since);
        status_line.ready(0);
        assert_eq!(
            status_line.line(false),
            "idle: 4 slots; 1 slots not ready since 1970-01-01T00:00:00Z: no runner; scheduler grpc://s:1"
        );
        status_line.ready(1);
        assert_eq!(
            status_line.line(false),
            "idle: 4 slots; scheduler grpc://s:1"
        );
        let late = Err("the storage has not answered yet".to_owned());
        assert_eq!(status_line.readiness(), late);
        status_line.storage_answered();
        assert_eq!(status_line.readiness(), Ok(()));
        status_line.failed(tonic::Code::Unavailable, "no route", since);
        assert!(status_line.readiness().is_err());
    }
}
