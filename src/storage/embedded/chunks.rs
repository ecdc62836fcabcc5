//! Blobs as chunks, which are blobs like any other (REAPI: SplitBlob, SpliceBlob).
//!
//! 1. A blob that is made of chunks is verified like one that is uploaded.
//! 2. Which chunks a blob has is remembered for as long as there is room; what is remembered is what this
//!    store has cut itself.

use super::{
    super::{
        Error,
        chunking::{ChunkingFunction, Chunks},
    },
    STREAMED, Store,
    instance_limits::LimitId,
};
use crate::digest::Digest;

impl Store {
    /// The chunks of a blob, which are all there then; those that were not count towards `limit`. `None` when
    /// there are more than `most`.
    pub fn split(
        &self,
        digest: &Digest,
        function: ChunkingFunction,
        most: usize,
        limit: LimitId,
    ) -> Result<Option<Vec<Digest>>, Error> {
        let blob = self.blob(digest)?;
        if digest.size() < function.smallest_blob() {
            return Ok(Some(vec![*digest]));
        }
        // So that chunks do not push one another out before the last one is there.
        if digest.size() > self.maximum_blob_size() / 2 {
            return Err(Error::Full(format!(
                "blob {digest} has no room in this store beside its chunks"
            )));
        }
        let key = (*digest, function);
        if let Some(list) = self.chunk_lists.get(&key)
            && list.len() <= most
            && self.find_missing(&list).is_empty()
        {
            return Ok(Some(list));
        }
        let mut list = Vec::new();
        let read = |start, end| {
            let piece = blob.read(start, end);
            piece.map_err(|_| {
                self.forget_damaged(digest);
                Error::Missing(vec![*digest])
            })
        };
        let mut chunks = Chunks::new(function, digest.size(), read);
        while let Some(content) = chunks.next_chunk()? {
            if list.len() == most {
                return Ok(None);
            }
            let chunk = digest.function().digest_of(content);
            if !self.contains(&chunk) {
                let mut writer = self.writer(chunk, limit)?;
                writer.write(content)?;
                writer.finish()?;
            }
            list.push(chunk);
        }
        if !self.find_missing(&list).is_empty() {
            return Err(Error::Full(format!(
                "the store is too small for the chunks of blob {digest}"
            )));
        }
        self.chunk_lists.remember(key, list.clone());
        Ok(Some(list))
    }

    /// Makes a blob of chunks that are there, which counts towards `limit`.
    pub fn splice(&self, digest: Digest, chunks: &[Digest], limit: LimitId) -> Result<(), Error> {
        let sizes = chunks.iter().map(Digest::size);
        let total = sizes.fold(0, u64::saturating_add);
        if total != digest.size() {
            return Err(Error::Invalid(format!(
                "the chunks have {total} bytes together, but blob {digest} is to have {}",
                digest.size()
            )));
        }
        let missing = self.find_missing(chunks);
        if self.contains(&digest) {
            return Ok(());
        }
        if !missing.is_empty() {
            return Err(Error::Missing(missing));
        }
        let mut writer = self.writer(digest, limit)?;
        for chunk in chunks {
            let blob = self.blob(chunk)?;
            let mut at = 0;
            while at < chunk.size() {
                let end = (at + STREAMED).min(chunk.size());
                let piece = blob.read(at, end).map_err(|_| {
                    self.forget_damaged(chunk);
                    Error::Missing(vec![*chunk])
                })?;
                writer.write(&piece)?;
                at = end;
            }
        }
        writer.finish()
    }
}
