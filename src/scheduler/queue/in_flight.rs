//! Cacheable tasks that are not completed, by the hash of instance name and digest.
//!
//! Hashes are random, so that a million of them are in many small sets, by their first bits, of which
//! each is a node or two.

use std::collections::BTreeSet;

use super::arena::{Number, TaskNumber};

const BITS: u32 = 17;

pub(super) struct InFlight {
    parts: Vec<BTreeSet<(u64, TaskNumber)>>,
    len: usize,
}

fn part_of(hash: u64) -> usize {
    (hash >> (u64::BITS - BITS)) as usize
}

impl InFlight {
    pub(super) fn new() -> Self {
        InFlight {
            parts: (0..1 << BITS).map(|_| BTreeSet::new()).collect(),
            len: 0,
        }
    }

    pub(super) fn insert(&mut self, hash: u64, task: TaskNumber) {
        self.len += usize::from(self.parts[part_of(hash)].insert((hash, task)));
    }

    pub(super) fn remove(&mut self, hash: u64, task: TaskNumber) {
        self.len -= usize::from(self.parts[part_of(hash)].remove(&(hash, task)));
    }

    pub(super) fn contains(&self, hash: u64, task: TaskNumber) -> bool {
        self.parts[part_of(hash)].contains(&(hash, task))
    }

    /// Tasks of this hash, nearly always one at most.
    pub(super) fn of_hash(&self, hash: u64) -> impl Iterator<Item = TaskNumber> {
        let from = (hash, TaskNumber::new(0, 0));
        let candidates = self.parts[part_of(hash)].range(from..);
        candidates
            .take_while(move |(other, _)| *other == hash)
            .map(|(_, task)| *task)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}
