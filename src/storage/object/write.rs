//! Writing blobs: to the service, and then into the cache.
//!
//! 1. A blob is acknowledged when the service has it.
//! 2. Large blobs are written in parts, some at a time, each read when there is room for it in memory.

use std::{collections::HashSet, pin::pin, sync::Arc, time::Instant};

use bytes::Bytes;
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, FuturesOrdered},
};
use tokio::sync::SemaphorePermit;

use super::{
    ObjectStorage,
    read::note_unkept,
    service::{PartialWrite, WrittenPart},
};
use crate::{
    digest::{Digest, Hasher},
    storage::{
        Content, Error, blocking, content,
        embedded::{Blob, LimitId},
        verify,
    },
};

/// Blobs of at most this size are written as a whole.
const WHOLE: u64 = 8 << 20;

/// As many as S3 takes of one object, and how large each may be in memory.
const MOST_PARTS: u64 = 10_000;

/// Of one blob at a time.
const PARTS_UNDER_WAY: usize = 4;

/// Where the content of a blob is.
#[derive(Clone)]
enum Source {
    Content(Content),
    Cached(Arc<Blob>),
}

impl Source {
    /// Blocks.
    fn part(&self, digest: &Digest, start: u64, end: u64) -> Result<Bytes, Error> {
        match self {
            Source::Content(content) => content.part(digest, start, end),
            Source::Cached(blob) => blob.read(start, end),
        }
    }
}

impl ObjectStorage {
    /// Uploads what the CAS lacks of these.
    pub async fn upload(&self, blobs: Vec<(Digest, Content)>) -> Result<(), Error> {
        let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
        let mut missing: HashSet<Digest> = self.find_missing(&digests).await?.into_iter().collect();
        let lacking = blobs
            .into_iter()
            .filter(|(digest, _)| missing.remove(digest))
            .collect();
        self.write_all(lacking).await
    }

    /// Uploads whole blobs that somebody else sent, once they have proved right.
    pub async fn put_many(
        &self,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        content::put_verified(blobs, |mut right| {
            let (mut present, now) = (self.present.lock(), Instant::now());
            // Who sends a blob has been told that it is missing, as a rule.
            right.retain(|(digest, _)| !digest.is_empty_blob() && !present.contains(digest, now));
            drop(present);
            self.write_all(right)
        })
        .await
    }

    async fn write_all(&self, blobs: Vec<(Digest, Content)>) -> Result<(), Error> {
        let writes = blobs.into_iter().map(|(digest, content)| async move {
            let source = Source::Content(content.clone());
            self.write(&digest, source).await?;
            let Some(cache) = self.cache.clone() else {
                return Ok(());
            };
            let kept =
                blocking(move || cache.store_all(vec![(digest, content)], LimitId::NONE)).await?;
            note_unkept(kept);
            Ok(())
        });
        let writes = stream::iter(writes).buffer_unordered(self.service.concurrency());
        writes.try_collect().await
    }

    /// Uploads what a client has uploaded into the cache.
    pub(in crate::storage) async fn upload_cached(&self, digest: &Digest) -> Result<(), Error> {
        if digest.is_empty_blob() {
            return Ok(());
        }
        let Some(cache) = self.cache.clone() else {
            return Err(Error::Internal("there is no cache".to_owned()));
        };
        let of = *digest;
        let blob = blocking(move || cache.blob(&of)).await?.map_err(|error| match error {
            Error::Missing(_) => Error::Full(format!(
                "blob {of} was evicted before the storage had it; raise storage.embedded.maximum_size"
            )),
            error => error,
        })?;
        self.write(digest, Source::Cached(Arc::new(blob))).await
    }

    async fn write(&self, digest: &Digest, source: Source) -> Result<(), Error> {
        let (size, largest) = (digest.size(), self.service.largest_value());
        if size > largest {
            return Err(Error::Invalid(format!(
                "blob {digest} is larger than the {} MiB that a value of this storage may have; keep the CAS in an object store or in files",
                largest >> 20
            )));
        }
        match size <= WHOLE {
            true => self.write_whole(digest, source).await?,
            false => self.write_parts(digest, source).await?,
        }
        self.damaged.lock().remove(digest);
        self.present.lock().insert(*digest, Instant::now());
        Ok(())
    }

    async fn write_whole(&self, digest: &Digest, source: Source) -> Result<(), Error> {
        let _room = self.room(digest.size()).await;
        let of = *digest;
        let value = blocking(move || {
            let value = source.part(&of, 0, of.size())?;
            verify(&of, of.function().digest_of(&value))?;
            Ok::<_, Error>(value)
        })
        .await??;
        let name = self.blob_name(digest);
        self.call(|| self.service.write(&name, value.clone())).await
    }

    async fn write_parts(&self, digest: &Digest, source: Source) -> Result<(), Error> {
        let name = self.blob_name(digest);
        let write = self.call(|| self.service.begin(&name)).await?;
        let done = self.write_parts_of(digest, source, &write).await;
        if done.is_err() {
            // A service that is out of use is not asked for this, either.
            let _ = self.health.while_usable(write.abandon()).await;
        }
        done
    }

    async fn write_parts_of(
        &self,
        digest: &Digest,
        source: Source,
        write: &PartialWrite,
    ) -> Result<(), Error> {
        let part_size = part_size(digest.size());
        let starts = (0..digest.size()).step_by(part_size as usize);
        let mut hasher = digest.function().hasher(digest.size());
        let (mut under_way, mut parts) = (FuturesOrdered::new(), Vec::new());
        // Read and hashed one after another.
        for (number, start) in starts.enumerate() {
            let end = (start + part_size).min(digest.size());
            let mut room = pin!(self.room(end - start));
            let room = loop {
                tokio::select! {
                    biased;
                    Some(part) = under_way.next() => parts.push(part?),
                    room = &mut room => break room,
                }
            };
            let data;
            (data, hasher) = read_part(source.clone(), digest, (start, end), hasher).await?;
            under_way.push_back(self.write_part(write, (number, start), data, room));
            if under_way.len() >= PARTS_UNDER_WAY
                && let Some(part) = under_way.next().await
            {
                parts.push(part?);
            }
        }
        while let Some(part) = under_way.next().await {
            parts.push(part?);
        }
        verify(digest, hasher.finish())?;
        let finished = self.call(|| write.finish(&parts)).await;
        let Err(error) = finished else {
            return Ok(());
        };
        // The answer to an attempt that succeeded may have been lost.
        match self.look(digest).await {
            Ok(true) => Ok(()),
            _ => Err(error),
        }
    }

    async fn write_part(
        &self,
        write: &PartialWrite,
        (number, start): (usize, u64),
        data: Bytes,
        room: Option<SemaphorePermit<'_>>,
    ) -> Result<WrittenPart, Error> {
        let part = self.call(|| write.part(number, start, data.clone())).await;
        drop(room);
        part
    }

    /// For so much in memory.
    async fn room(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let kib = (bytes >> 10) as u32 + 1;
        // Never closed.
        self.memory.acquire_many(kib).await.ok()
    }
}

async fn read_part(
    source: Source,
    digest: &Digest,
    (start, end): (u64, u64),
    mut hasher: Hasher,
) -> Result<(Bytes, Hasher), Error> {
    let of = *digest;
    blocking(move || {
        let data = source.part(&of, start, end)?;
        hasher.update(&data);
        Ok((data, hasher))
    })
    .await?
}

/// Of whole MiB, and no more of them than there may be.
fn part_size(size: u64) -> u64 {
    size.div_ceil(MOST_PARTS)
        .next_multiple_of(1 << 20)
        .max(WHOLE)
}

#[cfg(test)]
mod tests {
    use super::{super::cloud::Cloud, *};

    #[test]
    fn parts_are_no_more_than_s3_takes_and_fit_into_memory() {
        for size in [
            WHOLE + 1,
            100 << 20,
            80 << 30,
            200 << 30,
            Cloud::LARGEST_VALUE,
        ] {
            let part = part_size(size);
            assert!(size.div_ceil(part) <= MOST_PARTS, "{size}");
            assert!((WHOLE..=64 << 20).contains(&part), "{size}: {part}");
        }
    }
}
