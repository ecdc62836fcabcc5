//! Which chunks of blobs are in files of this host.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    os::unix::fs::FileExt,
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::digest::Digest;

/// Opens the file that has a digest, if this host has one. Blocks.
pub type LocalFiles = Arc<dyn Fn(&Digest) -> Option<File> + Send + Sync>;

/// Chunks that are known to be in files, at most: some 20 MB.
const REMEMBERED_CHUNKS: usize = 100_000;

/// Which chunks files have that were here lately, and perhaps still are.
#[derive(Default)]
pub(super) struct LocalChunks(Mutex<ChunksState>);

#[derive(Default)]
struct ChunksState {
    /// The file, and where the chunk begins in it.
    places: HashMap<Digest, (Digest, u64)>,
    /// The files, the oldest first, with their chunks.
    files: VecDeque<(Digest, Vec<Digest>)>,
    chunks: usize,
}

impl LocalChunks {
    pub(super) fn remember(&self, file: Digest, chunks: Vec<Digest>) {
        let mut state = self.0.lock();
        let state = &mut *state;
        let mut at = 0;
        for chunk in &chunks {
            state.places.insert(*chunk, (file, at));
            at += chunk.size();
        }
        state.chunks += chunks.len();
        state.files.push_back((file, chunks));
        while state.chunks > REMEMBERED_CHUNKS
            && let Some((file, chunks)) = state.files.pop_front()
        {
            state.chunks -= chunks.len();
            for chunk in chunks {
                if state.places.get(&chunk).is_some_and(|(of, _)| *of == file) {
                    state.places.remove(&chunk);
                }
            }
        }
    }

    pub(super) fn find(&self, chunks: &[Digest]) -> HashMap<Digest, (Digest, u64)> {
        let state = self.0.lock();
        let found = chunks.iter();
        found
            .filter_map(|chunk| Some((*chunk, *state.places.get(chunk)?)))
            .collect()
    }
}

/// Those chunks of `wanted` that are in files here, read and verified. Blocks.
pub(super) fn read_locally(
    files: &LocalFiles,
    open: &mut HashMap<Digest, Option<File>>,
    wanted: &HashMap<Digest, (Digest, u64)>,
    chunks: &[Digest],
) -> HashMap<Digest, Bytes> {
    let mut found = HashMap::new();
    for chunk in chunks {
        let Some((digest, at)) = wanted.get(chunk) else {
            continue;
        };
        if found.contains_key(chunk) {
            continue;
        }
        let file = open.entry(*digest).or_insert_with(|| files(digest));
        let Some(file) = file else {
            continue;
        };
        let mut content = vec![0; chunk.size() as usize];
        if file.read_exact_at(&mut content, *at).is_ok()
            && chunk.function().digest_of(&content) == *chunk
        {
            found.insert(*chunk, Bytes::from(content));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn chunks_that_are_remembered_have_a_bound_and_the_newest_place() {
        let chunks = LocalChunks::default();
        let digest = |number: usize| DigestFunction::Sha256.digest_of(&number.to_le_bytes());
        let shared = digest(usize::MAX);
        for file in 0..200 {
            let mut list: Vec<_> = (0..1000).map(|chunk| digest(1000 * file + chunk)).collect();
            list.push(shared);
            chunks.remember(digest(1_000_000 + file), list);
        }
        let state = chunks.0.lock();
        assert!(state.chunks <= REMEMBERED_CHUNKS && state.places.len() <= state.chunks);
        assert_eq!(state.places[&shared], (digest(1_000_199), 8000));
        assert_eq!(state.places[&digest(199_001)], (digest(1_000_199), 8));
        drop(state);
        let found = chunks.find(&[digest(0), shared]);
        assert_eq!(found.len(), 1);
    }
}
