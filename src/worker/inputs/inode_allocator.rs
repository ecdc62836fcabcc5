//! Which inodes of cached files an input root has: each at most once, so that every file of the root
//! is one of its own.
//!
//! The cache keeps several inodes of a file where roots have its content several times. A root takes
//! the one with the lowest number that it does not have yet, so that as few are made as there are
//! occurrences. Every verb takes constant time, but for what many occurrences of one content cost: a
//! bit each.

use std::collections::{HashMap, HashSet};

use crate::worker::lru::Handle;

const BITS: u32 = u64::BITS;

/// Numbers of inodes, by the cached file.
#[derive(Default)]
pub(super) struct InodeAllocator {
    /// Files of which the first inode is taken: nearly all are in this set alone, which is small.
    first: HashSet<Handle>,
    /// Those from 1 on; a file of which none is taken is not there.
    extra: HashMap<Handle, Numbers>,
}

/// A set of small numbers.
#[derive(Default)]
struct Numbers {
    words: Vec<u64>,
    /// All words in front of this one are full.
    free: usize,
}

impl InodeAllocator {
    /// The lowest number that is not taken, from `least` on; takes it.
    pub(super) fn take(&mut self, file: Handle, least: u32) -> u32 {
        if least == 0 && self.first.insert(file) {
            return 0;
        }
        let numbers = self.extra.entry(file).or_default();
        let number = numbers.first_free(least.saturating_sub(1));
        numbers.insert(number);
        number + 1
    }

    /// Takes this one; `false` when it is taken already.
    pub(super) fn take_this(&mut self, file: Handle, number: u32) -> bool {
        match number {
            0 => self.first.insert(file),
            number => self.extra.entry(file).or_default().insert(number - 1),
        }
    }

    /// Another one instead of one that is full: the next that is not taken.
    pub(super) fn replace_at_link_limit(&mut self, file: Handle, full: u32) -> u32 {
        let number = self.take(file, full + 1);
        self.free(file, full);
        number
    }

    pub(super) fn free(&mut self, file: Handle, number: u32) {
        if number == 0 {
            self.first.remove(&file);
        } else if let Some(numbers) = self.extra.get_mut(&file)
            && numbers.remove(number - 1)
        {
            self.extra.remove(&file);
        }
    }
}

impl Numbers {
    fn first_free(&self, least: u32) -> u32 {
        let (word, bit) = ((least / BITS) as usize, least % BITS);
        for (i, taken) in self.words.iter().enumerate().skip(word.max(self.free)) {
            // As if all below `least` were taken.
            let below: u64 = if i == word { (1 << bit) - 1 } else { 0 };
            let ones = (taken | below).trailing_ones();
            if ones < BITS {
                return i as u32 * BITS + ones;
            }
        }
        least.max(self.words.len() as u32 * BITS)
    }

    /// `false` when it is in it already.
    fn insert(&mut self, number: u32) -> bool {
        let (word, bit) = ((number / BITS) as usize, 1 << (number % BITS));
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        while self.words.get(self.free) == Some(&u64::MAX) {
            self.free += 1;
        }
        new
    }

    /// Whether it is empty then.
    fn remove(&mut self, number: u32) -> bool {
        let (word, bit) = ((number / BITS) as usize, 1 << (number % BITS));
        if let Some(taken) = self.words.get_mut(word) {
            *taken &= !bit;
            self.free = word.min(self.free);
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
            for (step, number) in steps {
                match step {
                    0 => prop_assert_eq!(inodes.take_this(file, number), plain.insert(number)),
                    1 => {
                        inodes.free(file, number);
                        plain.remove(&number);
                    }
                    2 => {
                        let lowest = (number..).find(|n| !plain.contains(n)).unwrap();
                        prop_assert_eq!(inodes.take(file, number), lowest);
                        plain.insert(lowest);
                    }
                    _ => {
                        let lowest = (0..).find(|n| !plain.contains(n)).unwrap();
                        prop_assert_eq!(inodes.take(file, 0), lowest);
                        plain.insert(lowest);
                    }
                }
                let none = inodes.first.is_empty() && inodes.extra.is_empty();
                prop_assert_eq!(none, plain.is_empty());
            }
        }
    }

    #[test]
    fn a_million_occurrences_take_a_million_steps() {
        let (file, mut inodes) = (handle(), InodeAllocator::default());
        for number in 0..1_000_000 {
            assert_eq!(inodes.take(file, 0), number);
        }
        inodes.free(file, 500_000);
        assert_eq!(inodes.take(file, 0), 500_000);
        assert_eq!(inodes.take(file, 0), 1_000_000);
    }
}
