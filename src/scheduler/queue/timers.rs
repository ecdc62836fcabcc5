//! Deadlines, soonest first. Each object has at most one, and knows it.

use std::{collections::BTreeSet, time::Instant};

use super::arena::{OperationNumber, QueueNumber, WorkerNumber};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Its call has been held long enough, or it has been silent for too long.
    Worker(WorkerNumber),
    /// Nobody waits for it.
    Operation(OperationNumber),
    /// It has no workers, or what is queued in it is being killed.
    Queue(QueueNumber),
    /// No worker has said that it executes what the scheduler before this one gave it.
    AwaitedReports,
    /// Nobody asks for the result that a worker brought.
    KeptResult(u64),
}

/// An object's own.
pub(super) type Deadline = Option<Instant>;

#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Instant, Timer)>);

impl Timers {
    pub(super) fn set(&mut self, deadline: &mut Deadline, timer: Timer, at: Instant) {
        if *deadline != Some(at) {
            self.clear(deadline, timer);
            *deadline = Some(at);
            self.0.insert((at, timer));
        }
    }

    pub(super) fn clear(&mut self, deadline: &mut Deadline, timer: Timer) {
        if let Some(at) = deadline.take() {
            self.0.remove(&(at, timer));
        }
    }

    pub(super) fn has(&self, deadline: Deadline, timer: Timer) -> bool {
        deadline.is_none_or(|at| self.0.contains(&(at, timer)))
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes one that is due; its object is to forget the deadline.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Timer> {
        if self.0.first()?.0 > now {
            return None;
        }
        self.0.pop_first().map(|(_, timer)| timer)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
