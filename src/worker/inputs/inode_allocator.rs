//! Says which of the inodes of each cached file an input root links: each at most once, so that no two files of the
//! root are one inode (I8 Distinct).
//!
//! The cache keeps several inodes of a file where roots have its content several times. A root links the one with the
//! lowest index that it does not link yet, so that as few are made as there are occurrences. Every function takes
//! constant time, but for what many occurrences of one content cost: a bit each.

use std::collections::{HashMap, HashSet};

use crate::worker::lru::Handle;

const BITS: u32 = u64::BITS;

/// Which inodes one root links, of each cached file.
#[derive(Default)]
pub(super) struct InodeAllocator {
    /// The cached files whose first inode is linked: nearly all are in this set alone, which is small.
    first_inodes: HashSet<Handle>,
    /// The indices of extra inodes that are linked, less one; a file of which none is linked is not in the map.
    extra_inodes: HashMap<Handle, IndexSet>,
}

/// A set of indices that are small.
#[derive(Default)]
struct IndexSet {
    words: Vec<u64>,
    /// All words in front of this one are full.
    first_not_full: usize,
}

impl InodeAllocator {
    /// Allocates the inode of a file that has the lowest index of those that are free, from `least` on.
    pub(super) fn allocate(&mut self, file: Handle, least: u32) -> u32 {
        if least == 0 && self.first_inodes.insert(file) {
            return 0;
        }
        let indices = self.extra_inodes.entry(file).or_default();
        let index = indices.first_free(least.saturating_sub(1));
        indices.insert(index);
        index + 1
    }

    /// Allocates the inode of a file that has this index; `false` when the root links it already.
    pub(super) fn try_allocate(&mut self, file: Handle, inode_index: u32) -> bool {
        match inode_index {
            0 => self.first_inodes.insert(file),
            extra => self.extra_inodes.entry(file).or_default().insert(extra - 1),
        }
    }

    /// Allocates the next free inode of a file instead of one that has all the links that it can have.
    pub(super) fn replace_at_link_limit(&mut self, file: Handle, full: u32) -> u32 {
        let inode_index = self.allocate(file, full + 1);
        self.free(file, full);
        inode_index
    }

    /// Frees an inode of a file, which the root does not link any more.
    pub(super) fn free(&mut self, file: Handle, inode_index: u32) {
        if inode_index == 0 {
            self.first_inodes.remove(&file);
        } else if let Some(indices) = self.extra_inodes.get_mut(&file)
            && indices.remove(inode_index - 1)
        {
            self.extra_inodes.remove(&file);
        }
    }
}

impl IndexSet {
    /// The lowest index from `least` on that is not in the set.
    fn first_free(&self, least: u32) -> u32 {
        let (word, bit) = ((least / BITS) as usize, least % BITS);
        for (i, taken) in self
            .words
            .iter()
            .enumerate()
            .skip(word.max(self.first_not_full))
        {
            // As if all below `least` were taken.
            let below: u64 = if i == word { (1 << bit) - 1 } else { 0 };
            let ones = (taken | below).trailing_ones();
            if ones < BITS {
                return i as u32 * BITS + ones;
            }
        }
        least.max(self.words.len() as u32 * BITS)
    }

    /// Adds an index; `false` when the set has it already.
    fn insert(&mut self, index: u32) -> bool {
        let (word, bit) = ((index / BITS) as usize, 1 << (index % BITS));
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        while self.words.get(self.first_not_full) == Some(&u64::MAX) {
            self.first_not_full += 1;
        }
        new
    }

    /// Removes an index; tells whether the set is empty then.
    fn remove(&mut self, index: u32) -> bool {
        let (word, bit) = ((index / BITS) as usize, 1 << (index % BITS));
        if let Some(taken) = self.words.get_mut(word) {
            *taken &= !bit;
            self.first_not_full = word.min(self.first_not_full);
        }
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
        self.words.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::worker::lru::Lru;

    fn handle() -> Handle {
        let mut lru = Lru::default();
        lru.insert(1, (), 1);
        lru.pin(&1).unwrap()
    }

    proptest! {
        #[test]
        fn it_gives_what_a_plain_set_would_give(
            steps in prop::collection::vec((0..4u8, 0..300u32), 0..400),
        ) {
            let (file, mut inodes, mut plain) = (handle(), InodeAllocator::default(), BTreeSet::new());
            for (step, index) in steps {
                match step {
                    0 => prop_assert_eq!(inodes.try_allocate(file, index), plain.insert(index)),
                    1 => {
                        inodes.free(file, index);
                        plain.remove(&index);
                    }
                    2 => {
                        let lowest = (index..).find(|n| !plain.contains(n)).unwrap();
                        prop_assert_eq!(inodes.allocate(file, index), lowest);
                        plain.insert(lowest);
                    }
                    _ => {
                        let lowest = (0..).find(|n| !plain.contains(n)).unwrap();
                        prop_assert_eq!(inodes.allocate(file, 0), lowest);
                        plain.insert(lowest);
                    }
                }
                let none = inodes.first_inodes.is_empty() && inodes.extra_inodes.is_empty();
                prop_assert_eq!(none, plain.is_empty());
            }
        }
    }

    #[test]
    fn a_million_occurrences_take_a_million_steps() {
        let (file, mut inodes) = (handle(), InodeAllocator::default());
        for index in 0..1_000_000 {
            assert_eq!(inodes.allocate(file, 0), index);
        }
        inodes.free(file, 500_000);
        assert_eq!(inodes.allocate(file, 0), 500_000);
        assert_eq!(inodes.allocate(file, 0), 1_000_000);
    }
}
