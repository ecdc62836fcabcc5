//! What was so a moment ago, within bounds of number and time.

use std::{
    collections::HashSet,
    hash::Hash,
    time::{Duration, Instant},
};

/// Keys that are forgotten when they are older than a lifetime; sooner when there are many.
#[derive(Debug)]
pub(super) struct Recently<K> {
    lifetime: Duration,
    /// Of each generation.
    most: usize,
    begun: Option<Instant>,
    young: HashSet<K>,
    old: HashSet<K>,
}

impl<K: Eq + Hash> Recently<K> {
    pub(super) fn new(lifetime: Duration, most: usize) -> Self {
        Recently {
            lifetime,
            most: most / 2,
            begun: None,
            young: HashSet::new(),
            old: HashSet::new(),
        }
    }

    pub(super) fn contains(&mut self, key: &K, now: Instant) -> bool {
        self.age(now);
        self.young.contains(key) || self.old.contains(key)
    }

    pub(super) fn insert(&mut self, key: K, now: Instant) {
        self.age(now);
        if self.young.len() >= self.most {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key);
    }

    pub(super) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }

    /// Two generations, of half a lifetime each.
    fn age(&mut self, now: Instant) {
        let begun = *self.begun.get_or_insert(now);
        let age = now.saturating_duration_since(begun);
        if age < self.lifetime / 2 {
            return;
        }
        self.old = std::mem::take(&mut self.young);
        if age >= self.lifetime {
            self.old.clear();
        }
        self.begun = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_live_for_a_lifetime_at_most_and_there_are_only_so_many() {
        const SECOND: Duration = Duration::from_secs(1);
        let mut recently = Recently::new(2 * SECOND, 10);
        let start = Instant::now();
        recently.insert(0, start);
        assert!(recently.contains(&0, start + SECOND));
        assert!(!recently.contains(&0, start + 2 * SECOND));
        recently.insert(1, start + 2 * SECOND);
        assert!(!recently.contains(&1, start + 9 * SECOND));
        for key in 0..1000 {
            recently.insert(key, start + 10 * SECOND);
            assert!(recently.young.len() + recently.old.len() <= 10);
        }
        assert!(recently.contains(&999, start + 10 * SECOND));
        recently.clear();
        assert!(!recently.contains(&999, start + 10 * SECOND));
    }
}
