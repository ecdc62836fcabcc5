//! Which chunks blobs have, for as long as there is room.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

use crate::{digest::Digest, storage::chunking::ChunkingFunction};

/// Chunks of all blobs whose chunks are remembered, at most.
const REMEMBERED_CHUNKS: usize = 200_000;

type ListKey = (Digest, ChunkingFunction);

/// Which chunks blobs have.
#[derive(Default)]
pub(super) struct ChunkLists(Mutex<ListsState>);

#[derive(Default)]
struct ListsState {
    lists: HashMap<ListKey, Vec<Digest>>,
    /// The oldest first.
    order: VecDeque<ListKey>,
    chunks: usize,
}

impl ChunkLists {
    pub(super) fn get(&self, key: &ListKey) -> Option<Vec<Digest>> {
        self.0.lock().lists.get(key).cloned()
    }

    pub(super) fn remember(&self, key: ListKey, list: Vec<Digest>) {
        let mut state = self.0.lock();
        let state = &mut *state;
        state.chunks += list.len();
        match state.lists.insert(key, list) {
            Some(before) => state.chunks -= before.len(),
            None => state.order.push_back(key),
        }
        while state.chunks > REMEMBERED_CHUNKS
            && let Some(oldest) = state.order.pop_front()
        {
            let gone = state.lists.remove(&oldest);
            state.chunks -= gone.map_or(0, |list| list.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn lists_that_are_remembered_have_a_bound() {
        let lists = ChunkLists::default();
        let chunk = DigestFunction::Sha256.empty();
        let key = |number: u32| {
            let digest = DigestFunction::Sha256.digest_of(&number.to_le_bytes());
            (digest, ChunkingFunction::FAST_CDC_2020)
        };
        for number in 0..30 {
            lists.remember(key(number), vec![chunk; REMEMBERED_CHUNKS / 10]);
            lists.remember(key(number), vec![chunk; REMEMBERED_CHUNKS / 10]);
        }
        let known = |number| lists.get(&key(number)).is_some();
        assert!(!known(19) && known(20) && known(29));
        lists.remember(key(99), vec![chunk; REMEMBERED_CHUNKS + 1]);
        assert!(!known(29) && !known(99));
        assert_eq!(lists.0.lock().chunks, 0);
    }
}
