//! The embedded store: CAS and AC in one directory.
//!
//! ```text
//! DIRECTORY/lock                    flock(2)ed by the process that uses the directory
//! DIRECTORY/format                  the layout's version
//! DIRECTORY/segments/N.{data,table} blobs of up to 64 KiB, and action results (segment.rs)
//! DIRECTORY/files/AB/KEY-SIZE…      larger blobs (file.rs)
//! DIRECTORY/uploads/                blobs on their way; emptied at start
//! DIRECTORY/recency                 when what was last used, now and then (recency.rs)
//! ```
//!
//! 1. What is acknowledged has been written to files, so that it survives the process; nothing is
//!    flushed to the disk, so that a loss of power may lose or tear the last seconds' blobs.
//! 2. Everything is checksummed and checked each time it is read. What is damaged is removed and
//!    reported missing, so that a client uploads it again.
//! 3. The files' sizes together stay below the maximum size, and something of the file system stays
//!    free; least recently used blobs make room. So do those of instance names with limits of their own,
//!    for one another (instance_limits.rs).
//! 4. While its directory is removed or unmounted, nothing is taken and nothing is given (directory.rs).
//! 5. A lookup, of FindMissing, a read or an action's result, makes recently used.
//!
//! # Why no database
//!
//! The index is read into memory at start, since 300,000 lookups a second leave no time for more.
//! What remains for an embedded engine is to keep small blobs. Measured with 1,000,000 blobs of
//! 1 KiB on the ext4 file system of a 2-core machine (segments: `cargo bench --bench farm -- cas
//! /var/tmp 1 store`):
//!
//! | | fjall 3.1 | fjall 3.1, key-value separation | segments |
//! |---|---|---|---|
//! | insert, batches of 1,000 | 141,000/s | 127,000/s | 310,000/s |
//! | read one of 1,000,000 | 68,000/s | 110,000/s | 600,000 to 840,000/s |
//! | open and read all keys | 2.7 s | 1.4 s | 0.7 s |
//! | on disk after half was deleted | 1.1 GB | 1.2 GB | bounded |
//! | after a full disk | poisoned: no write until the process restarts | the same | goes on |
//!
//! The last two lines decide: the store's size is a promise, and so is that it outlives a full disk.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream};

use self::{
    file::BlobFile,
    index::{IndexEntry, Location},
    key::IndexKey,
    segment::NewContent,
    space::Space,
};
use super::{BlobStream, Content, Error, blocking, verify};
use crate::{
    config::{Size, scheduler::Embedded},
    daemon::Failure,
    digest::Digest,
    instance::InstanceName,
};

mod action_results;
mod active_segment;
mod append;
mod blob_writer;
mod cached;
mod ceiling;
mod check;
mod chunk_lists;
mod chunks;
mod counts;
mod directory;
mod file;
mod index;
mod initial_size_class_cache;
mod instance_limits;
mod key;
mod lookup;
mod maintenance;
mod maintenance_signal;
mod open;
mod read_many;
mod recency;
mod reclaim;
mod scrub;
mod segment;
mod space;
mod uploads;

pub use blob_writer::BlobWriter;
pub use check::{CheckProgress, StoreUsage};
pub use counts::StoreCounts;
pub use instance_limits::{InstanceUsage, LimitId};
pub use open::probe;
pub use segment::SMALL;
pub use uploads::{Uploads, WriteLease};

/// An open store. All calls block, for memory, and for the disk when the page cache has not what
/// they need.
pub struct Store {
    space: Arc<Space>,
    uploads: Arc<Uploads>,
    chunk_lists: chunk_lists::ChunkLists,
    maintenance: Option<maintenance::MaintenanceThread>,
}

/// A blob that is being read; eviction does not take it away.
pub enum Blob {
    /// All of it.
    Small(Bytes),
    /// A file that is read piece by piece.
    Large {
        /// Which blob it is.
        digest: Digest,
        /// Where it is read.
        blob: BlobFile,
    },
}

impl Blob {
    /// The number of bytes.
    pub fn size(&self) -> u64 {
        match self {
            Blob::Small(content) => content.len() as u64,
            Blob::Large { blob, .. } => blob.size(),
        }
    }

    /// Bytes from `start` to `end`, or to the blob's end if that is earlier; checked.
    pub fn read(&self, start: u64, end: u64) -> Result<Bytes, Error> {
        match self {
            Blob::Small(content) => {
                let length = content.len() as u64;
                let (start, end) = (start.min(length), end.min(length));
                Ok(content.slice(start as usize..end.max(start) as usize))
            }
            Blob::Large { digest, blob } => blob.read(start, end).ok_or_else(|| {
                Error::Internal(format!("blob {digest} is damaged on the storage's disk"))
            }),
        }
    }
}

/// What one piece of a stream has. Reads that cross no multiple of `file::PIECE` check each byte once.
const STREAMED: u64 = 4 * file::PIECE;

impl Store {
    /// Opens or creates a store. Takes about half a second for a million blobs.
    pub fn open(directory: &Path, maximum_size: u64) -> Result<Self, Failure> {
        Store::open_leaving(directory, maximum_size, 0)
    }

    /// The same; so many bytes of the file system stay free, whoever else writes to it.
    pub fn open_leaving(
        directory: &Path,
        maximum_size: u64,
        minimum_free: u64,
    ) -> Result<Self, Failure> {
        Store::open_configured(&Embedded {
            directory: directory.to_owned(),
            maximum_size: Size(maximum_size),
            minimum_free: Size(minimum_free),
            instance_limits: Vec::new(),
        })
    }

    /// The same, as configured.
    pub fn open_configured(config: &Embedded) -> Result<Self, Failure> {
        let uploads = Arc::new(Uploads::default());
        let abandon_upload = {
            let uploads = uploads.clone();
            Box::new(move || uploads.abandon_one(None, Instant::now()))
        };
        let space = Arc::new(open::open(config, abandon_upload)?);
        let maintenance = maintenance::MaintenanceThread::start(space.clone(), uploads.clone());
        Ok(Store {
            space,
            uploads,
            chunk_lists: chunk_lists::ChunkLists::default(),
            maintenance: Some(maintenance),
        })
    }

    /// What it has done since it was opened.
    pub fn counts(&self) -> &StoreCounts {
        &self.space.counts
    }

    /// For how long what was evicted last had not been used, or for how long this process knows of it, if
    /// that is shorter; `None` while nothing was evicted.
    pub fn retention(&self) -> Option<Duration> {
        self.space.ages.lock().retention()
    }

    /// The largest blob that is taken.
    pub fn maximum_blob_size(&self) -> u64 {
        self.space.maximum_blob_size()
    }

    /// The largest blob that is taken from an instance name, which may have a limit of its own.
    pub fn maximum_blob_size_of(&self, instance: &InstanceName) -> u64 {
        let limits = &self.space.limits;
        let own = limits.largest(limits.of(instance));
        self.maximum_blob_size().min(own)
    }

    /// Bytes on disk.
    pub fn used(&self) -> u64 {
        self.space.used()
    }

    /// Blobs and action results.
    pub fn count(&self) -> usize {
        self.space.index.len()
    }

    /// Whether the blob is there.
    pub fn contains(&self, digest: &Digest) -> bool {
        digest.is_empty_blob() || self.find(digest).is_some() && self.require_directory().is_ok()
    }

    /// An error while the directory of the store is known to be removed or unmounted: nothing is there then.
    pub fn require_directory(&self) -> Result<(), Error> {
        self.space.require_directory()
    }

    /// Those that are not there, in the order given, repetitions included. What is there becomes
    /// recently used.
    pub fn find_missing(&self, digests: &[Digest]) -> Vec<Digest> {
        let missing = digests.iter().filter(|digest| !self.contains(digest));
        missing.copied().collect()
    }

    /// What uploads with an instance name count towards.
    pub fn limit_of(&self, instance: &InstanceName) -> LimitId {
        self.space.limits.of(instance)
    }

    fn find(&self, digest: &Digest) -> Option<IndexEntry> {
        let found = self.entry(digest);
        self.space.counts.looked_up(found.is_some());
        found
    }

    /// Of a blob, which becomes recently used; it is not counted.
    fn entry(&self, digest: &Digest) -> Option<IndexEntry> {
        let key = IndexKey::blob(digest);
        let found = self.space.index.find(&key, self.space.now())?;
        (found.size == digest.size()).then_some(found)
    }

    /// Opens a blob for reading.
    pub fn blob(&self, digest: &Digest) -> Result<Blob, Error> {
        let missing = || Error::Missing(vec![*digest]);
        if digest.is_empty_blob() {
            return Ok(Blob::Small(Bytes::new()));
        }
        self.require_directory()?;
        let found = self.find(digest).ok_or_else(missing)?;
        match found.place {
            Location::Segment { .. } => self
                .space
                .content(found)
                .map(Blob::Small)
                .ok_or_else(missing),
            Location::File => match self.space.large(&found) {
                Ok(Some(blob)) => Ok(Blob::Large {
                    digest: *digest,
                    blob,
                }),
                Ok(None) => Err(missing()),
                Err(error) => Err(error),
            },
        }
    }

    /// A whole blob of at most `limit` bytes.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Bytes, Error> {
        if digest.size() > limit {
            return Err(Error::TooLarge {
                digest: *digest,
                limit,
            });
        }
        let blob = self.blob(digest)?;
        let content = blob.read(0, digest.size());
        if content.is_err() {
            self.forget_damaged(digest);
            return Err(Error::Missing(vec![*digest]));
        }
        content
    }

    /// Writes a blob into an open, empty file.
    pub fn read_to_file(&self, digest: &Digest, file: &File) -> Result<(), Error> {
        let blob = self.blob(digest)?;
        for start in (0..digest.size()).step_by(STREAMED as usize) {
            let piece = blob.read(start, start + STREAMED).inspect_err(|_| {
                self.forget_damaged(digest);
            })?;
            file.write_all_at(&piece, start).map_err(Error::of_file)?;
        }
        Ok(())
    }

    /// A blob's bytes from `start` to `end`, piece by piece. A piece is read when it is
    /// asked for.
    pub async fn stream(
        self: &Arc<Self>,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> Result<BlobStream, Error> {
        let (store, digest) = (self.clone(), *digest);
        let blob = match self.read_cached(&digest, SMALL) {
            Some(small) => Blob::Small(small?),
            None => blocking(move || store.blob(&digest)).await??,
        };
        if let Blob::Small(_) = blob {
            let data = blob.read(start, end)?;
            return Ok(stream::once(async { Ok(data) }).boxed());
        }
        let (store, blob) = (self.clone(), Arc::new(blob));
        let pieces = stream::try_unfold(start, move |at| {
            let (blob, store) = (blob.clone(), store.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = (at + STREAMED - at % STREAMED).min(end);
                let piece = blocking(move || {
                    blob.read(at, next)
                        .inspect_err(|_| store.forget_damaged(&digest))
                });
                Ok(Some((piece.await??, next)))
            }
        });
        Ok(pieces.boxed())
    }

    /// Removes a blob whose content cannot be read, so that it is uploaded again.
    pub fn forget_damaged(&self, digest: &Digest) {
        if let Some(found) = self.space.index.peek(&IndexKey::blob(digest)) {
            self.space.forget_damaged(&found);
        }
    }

    /// Stores whole blobs that count towards no limit, each of which succeeds or fails on its own.
    pub fn put(&self, blobs: &[(Digest, Bytes)]) -> Vec<Result<(), Error>> {
        self.put_within(blobs, LimitId::NONE)
    }

    /// The same for blobs that count towards a limit.
    pub fn put_within(&self, blobs: &[(Digest, Bytes)], limit: LimitId) -> Vec<Result<(), Error>> {
        let mut small = Vec::new();
        let mut results: Vec<Result<(), Error>> = blobs
            .iter()
            .map(|(digest, content)| {
                verify(digest, digest.function().digest_of(content))?;
                if self.contains(digest) {
                    return Ok(());
                }
                if digest.size() <= SMALL {
                    small.push(NewContent {
                        key: IndexKey::blob(digest),
                        limit,
                        content: content.clone(),
                    });
                    return Ok(());
                }
                let mut upload = self.writer(*digest, limit)?;
                upload.write(content)?;
                upload.finish()
            })
            .collect();
        if let Err(error) = self.space.store_small(&small) {
            for ((digest, _), result) in blobs.iter().zip(&mut results) {
                if result.is_ok() && !self.contains(digest) {
                    *result = Err(error.clone());
                }
            }
        }
        results
    }

    /// Stores what is not there of these contents of our own, which count towards a limit.
    pub fn store_all(&self, blobs: Vec<(Digest, Content)>, limit: LimitId) -> Result<(), Error> {
        let mut whole = Vec::new();
        for (digest, content) in blobs {
            match content {
                Content::Bytes(content) => whole.push((digest, content)),
                _ if self.contains(&digest) => {}
                Content::File(_) | Content::FilePart { .. } => {
                    let mut upload = self.writer(digest, limit)?;
                    while upload.received() < digest.size() {
                        let start = upload.received();
                        let end = (start + STREAMED).min(digest.size());
                        upload.write(&content.part(&digest, start, end)?)?;
                    }
                    upload.finish()?;
                }
            }
        }
        self.put_within(&whole, limit).into_iter().collect()
    }

    /// Those that arrive in several messages.
    pub fn uploads(&self) -> &Arc<Uploads> {
        &self.uploads
    }

    /// Gives a new call of `owner` the right to write to an upload.
    pub fn lease_upload(
        &self,
        name: &str,
        owner: &str,
        limit: LimitId,
        now: Instant,
    ) -> Result<WriteLease, Error> {
        self.uploads.lease(&self.space, name, owner, limit, now)
    }

    /// Starts to store a blob piece by piece, which counts towards a limit.
    pub fn writer(&self, digest: Digest, limit: LimitId) -> Result<BlobWriter, Error> {
        BlobWriter::start(self.space.clone(), digest, limit)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(maintenance) = self.maintenance.take() {
            maintenance.stop();
        }
        // They hold on to the space, which holds on to them to make room.
        self.uploads.clear();
    }
}
