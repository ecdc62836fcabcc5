//! What is used, in the order of its last use, with weights and pins. PURE.
//!
//! 1. Every operation takes constant time; `evict` in proportion to what it evicts, however much is
//!    pinned: pinned entries are in no order.
//! 2. What is pinned is not evicted; it counts as used when its last pin goes.
//! 3. A handle is valid for as long as its entry is pinned.

use std::{collections::HashMap, hash::Hash, num::NonZeroU32};

const NONE: u32 = u32::MAX;

pub struct Lru<K, V> {
    index: HashMap<K, u32>,
    slots: Vec<LruSlot<K, V>>,
    vacant: Vec<u32>,
    oldest: u32,
    newest: u32,
    weight: u64,
}

struct LruSlot<K, V> {
    older: u32,
    newer: u32,
    pins: u32,
    entry: Option<LruEntry<K, V>>,
}

struct LruEntry<K, V> {
    key: K,
    value: V,
    weight: u64,
}

/// Where a pinned entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(NonZeroU32);

impl Handle {
    fn new(at: u32) -> Self {
        Handle(NonZeroU32::MIN.saturating_add(at))
    }

    fn at(self) -> usize {
        self.0.get() as usize - 1
    }
}

impl<K: Copy + Eq + Hash, V> Default for Lru<K, V> {
    fn default() -> Self {
        Lru {
            index: HashMap::new(),
            slots: Vec::new(),
            vacant: Vec::new(),
            oldest: NONE,
            newest: NONE,
            weight: 0,
        }
    }
}

impl<K: Copy + Eq + Hash, V> Lru<K, V> {
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Of all entries together.
    pub fn weight(&self) -> u64 {
        self.weight
    }

    pub fn contains(&self, key: &K) -> bool {
        self.index.contains_key(key)
    }

    pub fn keys(&self) -> Vec<K> {
        self.index.keys().copied().collect()
    }

    /// Looks at an entry without using it.
    pub fn peek(&self, key: &K) -> Option<&V> {
        let slot = &self.slots[*self.index.get(key)? as usize];
        slot.entry.as_ref().map(|entry| &entry.value)
    }

    pub fn peek_mut(&mut self, key: &K) -> Option<&mut V> {
        let slot = &mut self.slots[*self.index.get(key)? as usize];
        slot.entry.as_mut().map(|entry| &mut entry.value)
    }

    /// Uses an entry.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        let at = *self.index.get(key)?;
        self.touch(at);
        let entry = self.slots[at as usize].entry.as_ref();
        entry.map(|entry| &entry.value)
    }

    /// Pins an entry once more.
    pub fn pin(&mut self, key: &K) -> Option<Handle> {
        let at = *self.index.get(key)?;
        if self.slots[at as usize].pins == 0 {
            self.unlink(at);
        }
        self.slots[at as usize].pins += 1;
        Some(Handle::new(at))
    }

    pub fn unpin(&mut self, handle: Handle) {
        let pins = &mut self.slots[handle.at()].pins;
        debug_assert!(*pins > 0, "unpinned more often than pinned");
        if *pins == 1 {
            *pins = 0;
            self.append(handle.at() as u32);
        } else {
            *pins = pins.saturating_sub(1);
        }
    }

    /// The value behind a handle.
    pub fn value_of(&self, handle: Handle) -> Option<&V> {
        let entry = self.slots[handle.at()].entry.as_ref();
        entry.map(|entry| &entry.value)
    }

    /// The key behind a handle.
    pub fn key_of(&self, handle: Handle) -> Option<&K> {
        let entry = self.slots[handle.at()].entry.as_ref();
        entry.map(|entry| &entry.key)
    }

    /// Of the entry behind a handle.
    pub fn weight_of(&self, handle: Handle) -> u64 {
        let entry = self.slots[handle.at()].entry.as_ref();
        entry.map_or(0, |entry| entry.weight)
    }

    /// The first entry at or after a place, in an order of no meaning in which an entry keeps its
    /// place, and the place after it. `None` when there is no more.
    pub fn next(&self, place: usize) -> Option<(&K, &V, usize)> {
        let rest = self.slots.get(place..)?.iter().enumerate();
        let mut found = rest.filter_map(|(i, slot)| Some((i, slot.entry.as_ref()?)));
        let (i, entry) = found.next()?;
        Some((&entry.key, &entry.value, place + i + 1))
    }

    /// Adds an entry as the one last used. An entry that is there already is used, and stays.
    pub fn insert(&mut self, key: K, value: V, weight: u64) {
        if let Some(at) = self.index.get(&key) {
            return self.touch(*at);
        }
        let slot = LruSlot {
            older: NONE,
            newer: NONE,
            pins: 0,
            entry: Some(LruEntry { key, value, weight }),
        };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.slots[at as usize] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 entries")
            }
        };
        self.index.insert(key, at);
        self.weight += weight;
        self.append(at);
    }

    pub fn add_weight(&mut self, key: &K, weight: u64) {
        if let Some(at) = self.index.get(key)
            && let Some(entry) = &mut self.slots[*at as usize].entry
        {
            entry.weight += weight;
            self.weight += weight;
        }
    }

    pub fn take_weight(&mut self, key: &K, weight: u64) {
        if let Some(at) = self.index.get(key)
            && let Some(entry) = &mut self.slots[*at as usize].entry
        {
            let weight = weight.min(entry.weight);
            entry.weight -= weight;
            self.weight -= weight;
        }
    }

    /// Removes unpinned entries, the oldest first, for as long as `more` of (weight, count) says so.
    pub fn evict(&mut self, more: impl Fn(u64, usize) -> bool) -> Vec<(K, V)> {
        let mut evicted = Vec::new();
        while more(self.weight, self.len()) {
            let Some(entry) = self.evict_oldest() else {
                break;
            };
            evicted.push(entry);
        }
        evicted
    }

    /// Removes the unpinned entry that is the oldest.
    pub fn evict_oldest(&mut self) -> Option<(K, V)> {
        (self.oldest != NONE).then(|| self.remove_at(self.oldest))?
    }

    /// Removes an entry; a pinned one stays.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let at = *self.index.get(key)?;
        if self.slots[at as usize].pins > 0 {
            return None;
        }
        self.remove_at(at).map(|(_, value)| value)
    }

    /// One that is not pinned.
    fn remove_at(&mut self, at: u32) -> Option<(K, V)> {
        self.unlink(at);
        let entry = self.slots[at as usize].entry.take()?;
        self.index.remove(&entry.key);
        self.weight -= entry.weight;
        self.vacant.push(at);
        Some((entry.key, entry.value))
    }

    fn touch(&mut self, at: u32) {
        if self.newest != at && self.slots[at as usize].pins == 0 {
            self.unlink(at);
            self.append(at);
        }
    }

    fn append(&mut self, at: u32) {
        self.slots[at as usize].older = self.newest;
        self.slots[at as usize].newer = NONE;
        match self.newest {
            NONE => self.oldest = at,
            newest => self.slots[newest as usize].newer = at,
        }
        self.newest = at;
    }

    fn unlink(&mut self, at: u32) {
        let LruSlot { older, newer, .. } = self.slots[at as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum LruStep {
        Insert(u8, u64),
        Get(u8),
        Pin(u8),
        Unpin(usize),
        Remove(u8),
        Evict(u64),
    }

    fn step() -> impl Strategy<Value = LruStep> {
        prop_oneof![
            (0..20u8, 0..9u64).prop_map(|(k, w)| LruStep::Insert(k, w)),
            (0..20u8).prop_map(LruStep::Get),
            (0..20u8).prop_map(LruStep::Pin),
            (0..8usize).prop_map(LruStep::Unpin),
            (0..20u8).prop_map(LruStep::Remove),
            (0..60u64).prop_map(LruStep::Evict),
        ]
    }

    fn touch(list: &mut Vec<(u8, u64, u32)>, key: u8) -> Option<&mut u32> {
        let at = list.iter().position(|entry| entry.0 == key)?;
        let entry = list.remove(at);
        list.push(entry);
        list.last_mut().map(|entry| &mut entry.2)
    }

    proptest! {
        #[test]
        fn it_forgets_what_a_plain_list_would_forget(steps in prop::collection::vec(step(), 0..200)) {
            let mut lru = Lru::default();
            // Oldest first: key, weight, pins.
            let mut list: Vec<(u8, u64, u32)> = Vec::new();
            let mut handles: Vec<(u8, Handle)> = Vec::new();
            for step in steps {
                match step {
                    LruStep::Insert(key, weight) => {
                        lru.insert(key, key, weight);
                        if touch(&mut list, key).is_none() {
                            list.push((key, weight, 0));
                        }
                    }
                    LruStep::Get(key) => {
                        prop_assert_eq!(lru.get(&key).is_some(), touch(&mut list, key).is_some());
                    }
                    LruStep::Pin(key) => {
                        let handle = lru.pin(&key);
                        let pins = touch(&mut list, key);
                        prop_assert_eq!(handle.is_some(), pins.is_some());
                        if let (Some(handle), Some(pins)) = (handle, pins) {
                            *pins += 1;
                            handles.push((key, handle));
                        }
                    }
                    LruStep::Unpin(n) => {
                        if n < handles.len() {
                            let (key, handle) = handles.remove(n);
                            lru.unpin(handle);
                            list.iter_mut().find(|e| e.0 == key).unwrap().2 -= 1;
                            if list.iter().any(|e| e.0 == key && e.2 == 0) {
                                touch(&mut list, key);
                            }
                        }
                    }
                    LruStep::Remove(key) => {
                        let before = list.len();
                        list.retain(|e| e.0 != key || e.2 > 0);
                        prop_assert_eq!(lru.remove(&key).is_some(), list.len() < before);
                    }
                    LruStep::Evict(limit) => {
                        let evicted: Vec<u8> =
                            lru.evict(|weight, _| weight > limit).into_iter().map(|e| e.0).collect();
                        let mut expected = Vec::new();
                        let mut weight: u64 = list.iter().map(|e| e.1).sum();
                        list.retain(|e| {
                            let go = weight > limit && e.2 == 0;
                            if go {
                                weight -= e.1;
                                expected.push(e.0);
                            }
                            !go
                        });
                        prop_assert_eq!(evicted, expected);
                    }
                }
                prop_assert_eq!(lru.len(), list.len());
                prop_assert_eq!(lru.weight(), list.iter().map(|e| e.1).sum::<u64>());
                prop_assert!(list.iter().all(|e| lru.contains(&e.0)));
                prop_assert!(handles.iter().all(|(key, handle)| lru.key_of(*handle) == Some(key)));
                let mut walked = Vec::new();
                let mut place = 0;
                while let Some((key, _, next)) = lru.next(place) {
                    walked.push(*key);
                    place = next;
                }
                walked.sort_unstable();
                let mut keys = lru.keys();
                keys.sort_unstable();
                prop_assert_eq!(walked, keys);
            }
        }
    }
}
