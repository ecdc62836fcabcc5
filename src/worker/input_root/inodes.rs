//! Which inodes of cached files an input root has: each at most once, so that every file of the root
//! is one of its own.
//!
//! The cache keeps several inodes of a file where roots have its content several times. A root takes
//! the one with the lowest number that it does not have yet, so that as few are made as there are
//! occurrences. Every verb takes constant time, but for what many occurrences of one content cost: a
//! bit each.

use std::collections::HashMap;

use crate::worker::lru::Handle;

const BITS: u32 = u64::BITS;

/// Numbers of inodes, by the cached file; an entry that is empty is not there.
#[derive(Default)]
pub struct Inodes {
    of: HashMap<Handle, Numbers>,
}

/// A set of small numbers.
enum Numbers {
    /// Below 64.
    Few(u64),
    /// Any; none of the words in front of the first that is told is full.
    Many { words: Vec<u64>, free: usize },
}

impl Inodes {
    /// The lowest number that is not taken, from `least` on; takes it.
    pub fn take(&mut self, file: Handle, least: u32) -> u32 {
        let numbers = self.of.entry(file).or_insert(Numbers::Few(0));
        let number = numbers.first_free(least);
        numbers.insert(number);
        number
    }

    /// Takes this one; `false` when it is taken already.
    pub fn take_this(&mut self, file: Handle, number: u32) -> bool {
        let numbers = self.of.entry(file).or_insert(Numbers::Few(0));
        numbers.insert(number)
    }

    /// Another one instead of one that is full: the next that is not taken.
    pub fn instead(&mut self, file: Handle, full: u32) -> u32 {
        let number = self.take(file, full + 1);
        self.free(file, full);
        number
    }

    pub fn free(&mut self, file: Handle, number: u32) {
        if let Some(numbers) = self.of.get_mut(&file)
            && numbers.remove(number)
        {
            self.of.remove(&file);
        }
    }
}

impl Numbers {
    fn first_free(&self, least: u32) -> u32 {
        let (word, bit) = ((least / BITS) as usize, least % BITS);
        // As if all below `least` were taken.
        let from = |taken: u64| (taken | ((1 << bit) - 1)).trailing_ones();
        let (words, free) = match self {
            Numbers::Few(taken) => (std::slice::from_ref(taken), 0),
            Numbers::Many { words, free } => (&words[..], *free),
        };
        let first = word.max(free);
        for (i, taken) in words.iter().enumerate().skip(first) {
            let ones = if i == word {
                from(*taken)
            } else {
                taken.trailing_ones()
            };
            if ones < BITS {
                return i as u32 * BITS + ones;
            }
        }
        least.max(words.len() as u32 * BITS)
    }

    /// `false` when it is in it already.
    fn insert(&mut self, number: u32) -> bool {
        let (word, bit) = ((number / BITS) as usize, 1 << (number % BITS));
        if let Numbers::Few(taken) = self {
            if word == 0 {
                let new = *taken & bit == 0;
                *taken |= bit;
                return new;
            }
            *self = Numbers::Many {
                words: vec![*taken],
                free: 0,
            };
        }
        let Numbers::Many { words, free } = self else {
            return false;
        };
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        let new = words[word] & bit == 0;
        words[word] |= bit;
        while words.get(*free) == Some(&u64::MAX) {
            *free += 1;
        }
        new
    }

    /// Whether it is empty then.
    fn remove(&mut self, number: u32) -> bool {
        let (word, bit) = ((number / BITS) as usize, 1 << (number % BITS));
        match self {
            Numbers::Few(taken) => {
                if word == 0 {
                    *taken &= !bit;
                }
                *taken == 0
            }
            Numbers::Many { words, free } => {
                if let Some(taken) = words.get_mut(word) {
                    *taken &= !bit;
                    *free = word.min(*free);
                }
                while words.last() == Some(&0) {
                    words.pop();
                }
                words.is_empty()
            }
        }
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
            let (file, mut inodes, mut plain) = (handle(), Inodes::default(), BTreeSet::new());
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
                prop_assert_eq!(inodes.of.is_empty(), plain.is_empty());
            }
        }
    }

    #[test]
    fn a_million_occurrences_take_a_million_steps() {
        let (file, mut inodes) = (handle(), Inodes::default());
        for number in 0..1_000_000 {
            assert_eq!(inodes.take(file, 0), number);
        }
        inodes.free(file, 500_000);
        assert_eq!(inodes.take(file, 0), 500_000);
        assert_eq!(inodes.take(file, 0), 1_000_000);
    }
}
