//! Deadlines, soonest first. Each object has at most one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use uuid::Uuid;

use super::{ForeignAction, QueueNumber, WorkerNumber};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Its call has been held long enough, or it has been silent for too long.
    Worker(WorkerNumber),
    /// Nobody waits for it.
    Operation(Uuid),
    /// It has no workers.
    Queue(QueueNumber),
    /// Nobody asks for the result that a worker of before a restart brought.
    Unclaimed(ForeignAction),
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    order: BTreeSet<(Instant, Timer)>,
    deadlines: BTreeMap<Timer, Instant>,
}

impl Timers {
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        self.clear(&timer);
        self.deadlines.insert(timer.clone(), at);
        self.order.insert((at, timer));
    }

    pub(super) fn clear(&mut self, timer: &Timer) {
        if let Some((timer, old)) = self.deadlines.remove_entry(timer) {
            self.order.remove(&(old, timer));
        }
    }

    pub(super) fn get(&self, timer: &Timer) -> Option<Instant> {
        self.deadlines.get(timer).copied()
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes one that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Timer> {
        if self.order.first()?.0 > now {
            return None;
        }
        let (_, timer) = self.order.pop_first()?;
        self.deadlines.remove(&timer);
        Some(timer)
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}
