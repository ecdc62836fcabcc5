//! A node of an invocation tree, and where it belongs among its siblings.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use crate::scheduler::queue::{
    InvocationKey, InvocationKeys,
    arena::{InvocationNumber, OperationNumber, QueueNumber, WorkerNumber},
    report::CallNumber,
};

/// An operation's place within its invocation: most urgent first, then what is expected to take longer,
/// then what came first. It keeps its arrival when it is queued again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::scheduler::queue) struct Position {
    pub priority: i32,
    pub expected_milliseconds: Reverse<u32>,
    pub arrival: u64,
    pub operation: OperationNumber,
}

/// Among siblings that have something queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ReadyPlace {
    pub score: Score,
    pub served: u64,
}

/// The binary logarithm of (executing workers + 1) · 2^(priority / 100), so that no priority is out of
/// range. It orders as the number does that it is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score(i64);

impl Score {
    fn new(executing: usize, priority: i32) -> Self {
        let logarithm = ((executing + 1) as f64).log2() + f64::from(priority) / 100.0;
        // As f64::total_cmp does.
        let bits = logarithm.to_bits() as i64;
        Score(bits ^ (((bits >> 63) as u64) >> 1) as i64)
    }
}

/// A node of an invocation tree.
pub(in crate::scheduler::queue) struct Invocation {
    pub queue: QueueNumber,
    pub(super) parent: Option<InvocationNumber>,
    pub keys: InvocationKeys,
    pub(super) children: BTreeMap<InvocationKey, InvocationNumber>,
    /// How many operations and workers name it.
    pub(super) held: usize,
    /// At the node itself.
    pub queued: BTreeSet<Position>,
    /// How many are queued in it and below it, by priority.
    pub(super) priorities: BTreeMap<i32, u32>,
    pub queued_in_all: usize,
    /// Workers that execute for it or below it, each with for how many operations.
    pub executing: BTreeMap<WorkerNumber, u32>,
    /// Workers that wait for work, and last worked for exactly this node.
    pub idle_synchronizing: BTreeMap<CallNumber, WorkerNumber>,
    /// Of it and of those below it.
    pub idle_in_all: usize,
    /// Workers that are not busy, in a call or not, that last worked for it or below it.
    pub idle_workers: usize,
    /// When a task of it was last given out.
    pub(super) served: u64,
    pub(super) ready: BTreeSet<(ReadyPlace, InvocationNumber)>,
    pub(super) idle: BTreeSet<((usize, u64), InvocationNumber)>,
    /// Where it is in its parent's `ready` and `idle`.
    pub(super) ready_at: Option<ReadyPlace>,
    pub(super) idle_at: Option<(usize, u64)>,
}

impl Invocation {
    pub(super) fn new(
        queue: QueueNumber,
        parent: Option<InvocationNumber>,
        keys: InvocationKeys,
    ) -> Self {
        Invocation {
            queue,
            parent,
            keys,
            children: BTreeMap::new(),
            held: 0,
            queued: BTreeSet::new(),
            priorities: BTreeMap::new(),
            queued_in_all: 0,
            executing: BTreeMap::new(),
            idle_synchronizing: BTreeMap::new(),
            idle_in_all: 0,
            idle_workers: 0,
            served: 0,
            ready: BTreeSet::new(),
            idle: BTreeSet::new(),
            ready_at: None,
            idle_at: None,
        }
    }

    /// The root's is 0.
    pub(super) fn depth(&self) -> usize {
        self.keys.as_slice().len()
    }

    /// Whether something of it, or below it, is queued or executed.
    pub(super) fn is_active(&self) -> bool {
        self.queued_in_all > 0 || !self.executing.is_empty()
    }

    pub(super) fn ready_place(&self) -> Option<ReadyPlace> {
        let (most_urgent, _) = self.priorities.first_key_value()?;
        Some(ReadyPlace {
            score: Score::new(self.executing.len(), *most_urgent),
            served: self.served,
        })
    }

    pub(super) fn idle_place(&self) -> Option<(usize, u64)> {
        (self.idle_in_all > 0).then_some((self.executing.len(), self.served))
    }

    /// Children that have something queued, in the order in which they are served.
    pub(in crate::scheduler::queue) fn ready_children(
        &self,
    ) -> impl Iterator<Item = InvocationNumber> {
        self.ready.iter().map(|(_, child)| *child)
    }

    /// What is wrong with it, if anything.
    pub(in crate::scheduler::queue) fn check(&self) -> Result<(), &'static str> {
        let queued: usize = self.priorities.values().map(|count| *count as usize).sum();
        match () {
            () if queued != self.queued_in_all => Err("an invocation's priorities are miscounted"),
            () if self.ready_at.is_some() != (self.queued_in_all > 0) && self.parent.is_some() => {
                Err("an invocation is ready if and only if something is queued in it")
            }
            () if self.parent.is_some() && self.ready_at != self.ready_place() => {
                Err("an invocation is ready in another place")
            }
            () if self.parent.is_some() && self.idle_at != self.idle_place() => {
                Err("an invocation's idle workers are in another place")
            }
            () if self.parent.is_some() && self.held == 0 && self.children.is_empty() => {
                Err("an invocation is of no use")
            }
            () => Ok(()),
        }
    }
}
