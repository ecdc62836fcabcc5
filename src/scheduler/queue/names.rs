//! Operations by their names, in order, with the place of each in the list.
//!
//! Names are random, so that many small ordered maps, by the first bits, tell a place in the list of a
//! million without counting all, and each is a node or two.

use std::{collections::BTreeMap, ops::Bound};

use uuid::Uuid;

use super::arena::OperationNumber;

const BITS: u32 = 17;

pub(super) struct Names {
    parts: Vec<BTreeMap<Uuid, OperationNumber>>,
    len: usize,
}

fn part_of(name: Uuid) -> usize {
    (name.as_u128() >> (128 - BITS)) as usize
}

impl Names {
    pub(super) fn new() -> Self {
        Names {
            parts: (0..1 << BITS).map(|_| BTreeMap::new()).collect(),
            len: 0,
        }
    }

    pub(super) fn insert(&mut self, name: Uuid, operation: OperationNumber) {
        if self.parts[part_of(name)].insert(name, operation).is_none() {
            self.len += 1;
        }
    }

    pub(super) fn remove(&mut self, name: Uuid) {
        if self.parts[part_of(name)].remove(&name).is_some() {
            self.len -= 1;
        }
    }

    pub(super) fn get(&self, name: Uuid) -> Option<OperationNumber> {
        self.parts[part_of(name)].get(&name).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// In order, from the first one after `after`.
    pub(super) fn after(
        &self,
        after: Option<Uuid>,
    ) -> impl Iterator<Item = (Uuid, OperationNumber)> {
        let first = after.map_or(0, part_of);
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let begun = self.parts[first].range((from, Bound::Unbounded));
        let rest = self.parts[first + 1..].iter().flatten();
        begun
            .chain(rest)
            .map(|(name, operation)| (*name, *operation))
    }

    /// How many there are up to this one.
    pub(super) fn place_after(&self, name: Uuid) -> usize {
        let part = part_of(name);
        let before: usize = self.parts[..part].iter().map(BTreeMap::len).sum();
        before + self.parts[part].range(..=name).count()
    }
}
