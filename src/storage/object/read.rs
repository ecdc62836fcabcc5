//! Reading blobs: from the cache, or else from the service, and then into the cache.
//!
//! 1. Nothing is fetched twice at a time: small blobs by one for all, and of a large one whoever comes second
//!    waits for a while for the first one to have it in the cache.
//! 2. What is interrupted goes on where it was. What proves wrong is read once more from its start.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};

use super::{
    ObjectStorage,
    service::{FailedAttempt, Pieces},
};
use crate::{
    digest::{Digest, Hasher},
    storage::{
        BlobStream, Error, blocking,
        embedded::{BlobWriter, LimitId},
        retry::Attempts,
        single_flight::{self, Role},
        verify,
    },
};

/// Blobs of at most this size are read as a whole.
const SMALL: u64 = 1 << 20;

/// How long one who reads a large blob waits for another who does.
const FILL_TIMEOUT: Duration = Duration::from_secs(5);

type FillLeader = single_flight::Leader<Digest, ()>;

/// The pieces of a blob as the service has them. Nothing is verified.
struct ObjectReader {
    storage: Arc<ObjectStorage>,
    digest: Digest,
    at: u64,
    end: u64,
    attempts: Attempts,
    open: Option<Pieces>,
}

impl ObjectReader {
    fn new(storage: &Arc<ObjectStorage>, digest: &Digest, start: u64, end: u64) -> Self {
        ObjectReader {
            storage: storage.clone(),
            digest: *digest,
            at: start,
            end,
            attempts: storage.retry.attempts(),
            open: None,
        }
    }

    /// The next piece; `None` when all of them have come.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let storage = self.storage.clone();
        storage.health.call(self.read_piece()).await
    }

    async fn read_piece(&mut self) -> Result<Option<Bytes>, Error> {
        if self.at == self.end {
            // One more byte would make it another blob.
            let rest = match &mut self.open {
                Some(pieces) => pieces.next().await,
                None => None,
            };
            return match rest {
                Some(Ok(more)) if !more.is_empty() => Err(self.damaged()),
                _ => Ok(None),
            };
        }
        loop {
            let done = self.attempt().await;
            let error = done.as_ref().err().map(|failed| &failed.error);
            self.storage.health.note_attempt(error);
            let failed = match done {
                Ok(Some(piece)) => {
                    self.at += piece.len() as u64;
                    return match self.at > self.end {
                        true => Err(self.damaged()),
                        false => Ok(Some(piece)),
                    };
                }
                // It ended before its end.
                Ok(None) => return Err(self.damaged()),
                Err(failed) => failed,
            };
            self.open = None;
            if !self.attempts.wait(failed.transience).await {
                return Err(failed.error);
            }
        }
    }

    async fn attempt(&mut self) -> Result<Option<Bytes>, FailedAttempt> {
        if self.open.is_none() {
            let storage = &self.storage;
            let name = storage.blob_name(&self.digest);
            let _turn = storage.calls.acquire().await;
            let opened = storage
                .service
                .read(&name, self.at..self.end, self.digest.size());
            let Some(pieces) = opened.await? else {
                storage.note_missing();
                let missing = Error::Missing(vec![self.digest]);
                return Err(FailedAttempt::permanent(missing));
            };
            self.open = Some(pieces);
        }
        match &mut self.open {
            Some(pieces) => pieces.next().await.transpose(),
            None => Ok(None),
        }
    }

    fn damaged(&self) -> Error {
        self.storage.note_damaged(&self.digest);
        Error::Missing(vec![self.digest])
    }
}

impl ObjectStorage {
    /// Whole blobs of at most `limit` bytes each, verified, in the order asked for.
    pub async fn read_many(
        self: &Arc<Self>,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        let cached = self.read_cached(digests, limit).await;
        let wanted = digests.iter().copied().zip(cached);
        let reads = wanted.map(|(digest, cached)| async move {
            match cached {
                Some(content) => Ok(content),
                None => self.read(&digest, limit).await,
            }
        });
        let concurrency = self.service.concurrency();
        stream::iter(reads).buffered(concurrency).collect().await
    }

    /// What the cache has of these.
    async fn read_cached(&self, digests: &[Digest], limit: u64) -> Vec<Option<Bytes>> {
        let Some(cache) = self.cache.clone() else {
            return vec![None; digests.len()];
        };
        let (wanted, count) = (digests.to_vec(), digests.len());
        let read = move || {
            let read = cache.read_many(&wanted, limit).into_iter();
            read.map(Result::ok).collect()
        };
        let found = blocking(read).await;
        found.unwrap_or_else(|_| vec![None; count])
    }

    async fn read(self: &Arc<Self>, digest: &Digest, limit: u64) -> Result<Bytes, Error> {
        if digest.size() > limit {
            return Err(Error::TooLarge {
                digest: *digest,
                limit,
            });
        }
        if digest.is_empty_blob() {
            return Ok(Bytes::new());
        }
        loop {
            match self.reads.join(*digest) {
                Role::Follower(follower) => {
                    if let Some(result) = follower.result().await {
                        return result;
                    }
                }
                Role::Leader(leader) => {
                    let result = self.fetch(digest).await;
                    if let (Ok(content), Some(cache)) = (&result, self.cache.clone()) {
                        let blob = (*digest, content.clone());
                        let kept = blocking(move || cache.put(&[blob])).await;
                        note_unkept(kept.and_then(|kept| kept.into_iter().collect()));
                    }
                    leader.finish(result.clone());
                    return result;
                }
            }
        }
    }

    /// From the service, verified. Whoever asks has said that he can bear as much.
    async fn fetch(self: &Arc<Self>, digest: &Digest) -> Result<Bytes, Error> {
        let mut corrupt_before = false;
        loop {
            let mut content = BytesMut::with_capacity(digest.size() as usize);
            let mut reader = ObjectReader::new(self, digest, 0, digest.size());
            while let Some(piece) = reader.next().await? {
                content.extend_from_slice(&piece);
            }
            let (content, of) = (content.freeze(), *digest);
            let hashed = content.clone();
            let right = blocking(move || verify(&of, of.function().digest_of(&hashed))).await?;
            if right.is_ok() {
                return Ok(content);
            }
            if corrupt_before {
                self.note_damaged(digest);
                return Err(Error::Missing(vec![*digest]));
            }
            corrupt_before = true;
        }
    }

    /// A blob's bytes from `start` to `end`, piece by piece. Of a blob as a whole, the last piece comes when
    /// all of it has proved right.
    pub async fn stream(
        self: &Arc<Self>,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> Result<BlobStream, Error> {
        if start == end {
            return Ok(stream::empty().boxed());
        }
        let is_whole = start == 0 && end == digest.size();
        let mut leader = None;
        if let Some(cache) = &self.cache {
            if let Ok(pieces) = cache.stream(digest, start, end).await {
                return Ok(pieces);
            }
            if digest.size() > SMALL && is_whole {
                match self.fills.join(*digest) {
                    Role::Leader(first) => leader = Some(first),
                    Role::Follower(follower) => {
                        let _ = tokio::time::timeout(FILL_TIMEOUT, follower.result()).await;
                        if let Ok(pieces) = cache.stream(digest, start, end).await {
                            return Ok(pieces);
                        }
                    }
                }
            }
        }
        if digest.size() <= SMALL {
            let content = self.read(digest, SMALL).await?;
            let content = content.slice(start as usize..end as usize);
            return Ok(stream::once(async { Ok(content) }).boxed());
        }
        let fill = leader.and_then(|leader| CacheFill::begin(self, leader));
        let reader = ObjectReader::new(self, digest, start, end);
        let hasher = is_whole.then(|| digest.function().hasher(digest.size()));
        let state = StreamState {
            reader,
            hasher,
            fill,
        };
        let pieces = stream::try_unfold(state, |mut state| async move {
            let piece = state.next().await?;
            Ok(piece.map(|piece| (piece, state)))
        });
        Ok(pieces.boxed())
    }

    /// Writes a blob into an open, empty file, verified; on error the file's content is undefined.
    pub async fn read_to_file(
        self: &Arc<Self>,
        digest: &Digest,
        file: Arc<File>,
    ) -> Result<(), Error> {
        if digest.size() <= SMALL {
            let mut one = self.read_many(&[*digest], SMALL).await;
            let content = one.pop().unwrap_or_else(|| Ok(Bytes::new()))?;
            let written = blocking(move || file.write_all_at(&content, 0)).await?;
            return written.map_err(Error::of_file);
        }
        if let Some(cache) = self.cache.clone() {
            let (of, into) = (*digest, file.clone());
            if blocking(move || cache.read_to_file(&of, &into))
                .await?
                .is_ok()
            {
                return Ok(());
            }
        }
        let mut corrupt_before = false;
        loop {
            file.set_len(0).map_err(Error::of_file)?;
            let mut reader = ObjectReader::new(self, digest, 0, digest.size());
            let mut hasher = digest.function().hasher(digest.size());
            while let Some(piece) = reader.next().await? {
                let into = file.clone();
                hasher = blocking(move || {
                    let written = into.write_all_at(&piece, hasher.size());
                    hasher.update(&piece);
                    written.map(|()| hasher)
                })
                .await?
                .map_err(Error::of_file)?;
            }
            if verify(digest, hasher.finish()).is_ok() {
                return Ok(());
            }
            if corrupt_before {
                self.note_damaged(digest);
                return Err(Error::Missing(vec![*digest]));
            }
            corrupt_before = true;
        }
    }
}

/// A large blob on its way to a caller.
struct StreamState {
    reader: ObjectReader,
    /// Of a blob as a whole.
    hasher: Option<Hasher>,
    fill: Option<CacheFill>,
}

impl StreamState {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(piece) = self.reader.next().await? else {
            return Ok(None);
        };
        let Some(mut hasher) = self.hasher.take() else {
            return Ok(Some(piece));
        };
        let (data, mut fill) = (piece.clone(), self.fill.take());
        let work = move || {
            hasher.update(&data);
            fill = fill.and_then(|fill| fill.write(&data));
            (hasher, fill)
        };
        let (hasher, fill) = blocking(work).await?;
        if hasher.size() < self.reader.digest.size() {
            (self.hasher, self.fill) = (Some(hasher), fill);
            return Ok(Some(piece));
        }
        // Nothing is behind the last piece.
        self.reader.next().await?;
        let digest = &self.reader.digest;
        if let Err(error) = verify(digest, hasher.finish()) {
            self.reader.storage.note_damaged(digest);
            return Err(error);
        }
        if let Some(fill) = fill {
            blocking(move || fill.finish()).await?;
        }
        Ok(Some(piece))
    }
}

/// A large blob on its way into the cache, which others wait for.
struct CacheFill {
    writer: BlobWriter,
    leader: FillLeader,
}

impl CacheFill {
    /// `None` when the cache doesn't take it.
    fn begin(storage: &ObjectStorage, leader: FillLeader) -> Option<Self> {
        let writer = storage.cache.as_ref()?.writer(*leader.key(), LimitId::NONE);
        match writer {
            Ok(writer) => Some(CacheFill { writer, leader }),
            Err(error) => {
                note_unkept(Err(error));
                None
            }
        }
    }

    /// Blocks.
    fn write(mut self, data: &[u8]) -> Option<Self> {
        match self.writer.write(data) {
            Ok(()) => Some(self),
            Err(error) => {
                note_unkept(Err(error));
                None
            }
        }
    }

    /// Blocks.
    fn finish(self) {
        note_unkept(self.writer.finish());
        self.leader.finish(());
    }
}

/// What the cache has not is read from the service again.
pub(super) fn note_unkept(kept: Result<(), Error>) {
    if let Err(error) = kept {
        tracing::debug!(%error, "the embedded store could not keep a blob of the storage behind it");
    }
}
