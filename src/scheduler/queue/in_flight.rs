//! Cacheable tasks that are not completed, by the hash of instance name and digest.
//!
//! Hashes are random, so that a million of them are in many lists of a few, by their first bits.

use super::arena::TaskNumber;

const BITS: u32 = 17;

pub(super) struct InFlight {
    parts: Vec<Vec<(u64, TaskNumber)>>,
    len: usize,
}

fn part_of(hash: u64) -> usize {
    (hash >> (u64::BITS - BITS)) as usize
}

impl InFlight {
    pub(super) fn new() -> Self {
        InFlight {
            parts: vec![Vec::new(); 1 << BITS],
            len: 0,
        }
    }

    pub(super) fn insert(&mut self, hash: u64, task: TaskNumber) {
        if !self.contains(hash, task) {
            self.parts[part_of(hash)].push((hash, task));
            self.len += 1;
        }
    }

    pub(super) fn remove(&mut self, hash: u64, task: TaskNumber) {
        let part = &mut self.parts[part_of(hash)];
        if let Some(place) = part.iter().position(|entry| *entry == (hash, task)) {
            part.swap_remove(place);
            self.len -= 1;
        }
        // What is empty takes no memory.
        if part.is_empty() {
            *part = Vec::new();
        }
    }

    pub(super) fn contains(&self, hash: u64, task: TaskNumber) -> bool {
        self.parts[part_of(hash)].contains(&(hash, task))
    }

    /// Tasks of this hash, nearly always one at most.
    pub(super) fn of_hash(&self, hash: u64) -> impl Iterator<Item = TaskNumber> {
        let of_part = self.parts[part_of(hash)].iter();
        of_part
            .filter(move |(other, _)| *other == hash)
            .map(|(_, task)| *task)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}
