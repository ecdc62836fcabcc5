//! Uploads that arrive in several messages, by the names that their clients chose.
//!
//! 1. At most one call writes to an upload: a newer one takes over from an older one, whose client may
//!    be gone without our knowing.
//! 2. An upload that no call writes to waits for its client to come back, for a while.
//! 3. All of them together have a quarter of the store, or one of them alone what a blob may have; so
//!    they never evict more than that, however many are begun and never finished.
//! 4. Nobody has more of them, nor of their bytes, than remain for others; but one alone may have all.
//! 5. When space is short, an upload that nobody writes to is given up before any blob is evicted; and
//!    so is one that makes no progress.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use super::{
    super::{Error, UploadError},
    blob_writer::BlobWriter,
    instance_limits::LimitId,
    space::Space,
};
use crate::digest::Digest;

/// How long an upload waits for its client to come back.
const WAITING_TIMEOUT: Duration = Duration::from_secs(300);

/// Uploads, at most: each has a file open, or up to 64 KiB in memory.
const MAXIMUM_UPLOADS: usize = 2048;

/// Without a byte for so long, or slower than this on average, an upload makes no progress.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);
const MINIMUM_RATE: u64 = 64 << 10;

/// The uploads that are under way.
#[derive(Default)]
pub struct Uploads {
    next_lease: AtomicU64,
    uploads: Mutex<HashMap<String, OwnedUpload>>,
    received: Mutex<ReceivedBytes>,
}

/// Bytes of uploads that are not finished.
#[derive(Default)]
struct ReceivedBytes {
    all: u64,
    by_owner: BTreeMap<Arc<str>, u64>,
}

type SharedUpload = Arc<Mutex<UploadState>>;

/// An upload, and whose it is.
struct OwnedUpload {
    owner: Arc<str>,
    shared: SharedUpload,
}

/// Locked while its upload writes to the disk, so only by threads that may block.
struct UploadState {
    /// The number of the lease that may write; older ones are void.
    lease: u64,
    upload: Option<CountedUpload>,
    phase: UploadPhase,
}

/// Since when, and when a byte came last.
enum UploadPhase {
    UnderWay {
        begun: Instant,
        last: Instant,
    },
    /// The last call that wrote has ended.
    Waiting(Instant),
}

/// An upload that counts among all.
struct CountedUpload {
    upload: BlobWriter,
    count: ByteCount,
}

struct ByteCount {
    uploads: Arc<Uploads>,
    owner: Arc<str>,
    bytes: u64,
}

impl Drop for ByteCount {
    fn drop(&mut self) {
        let mut received = self.uploads.received.lock();
        received.all -= self.bytes;
        if let Some(own) = received.by_owner.get_mut(&self.owner) {
            *own -= self.bytes;
            if *own == 0 {
                received.by_owner.remove(&self.owner);
            }
        }
    }
}

/// A call's right to write to an upload, until a newer call takes it over.
pub struct WriteLease {
    uploads: Arc<Uploads>,
    space: Arc<Space>,
    name: String,
    /// Whose the upload is.
    owner: Arc<str>,
    /// What the blob counts towards.
    limit: LimitId,
    shared: SharedUpload,
    number: u64,
}

impl Uploads {
    /// Gives a new call of `owner` the right to write.
    pub(super) fn lease(
        self: &Arc<Self>,
        space: &Arc<Space>,
        name: &str,
        owner: &str,
        limit: LimitId,
        now: Instant,
    ) -> Result<WriteLease, Error> {
        let number = self.next_lease.fetch_add(1, Ordering::Relaxed) + 1;
        let (all, own) = self.count(owner);
        if all >= MAXIMUM_UPLOADS && !self.abandon_one(None, now) {
            return Err(Error::Full(format!(
                "{MAXIMUM_UPLOADS} uploads are under way in this store, which is the most; try again later"
            )));
        }
        // As many remain for others.
        let share = (MAXIMUM_UPLOADS.saturating_sub(all) + own) / 2;
        if own >= share.max(1) && !self.abandon_one(Some(owner), now) {
            return Err(Error::Full(format!(
                "{own} uploads of yours are under way, which leaves no more than that for others; finish some of them"
            )));
        }
        let mut uploads = self.uploads.lock();
        let fresh = || {
            Arc::new(Mutex::new(UploadState {
                lease: 0,
                upload: None,
                phase: UploadPhase::UnderWay {
                    begun: now,
                    last: now,
                },
            }))
        };
        let entry = uploads.entry(name.to_owned());
        let upload = entry.or_insert_with(|| OwnedUpload {
            owner: owner.into(),
            shared: fresh(),
        });
        Ok(WriteLease {
            uploads: self.clone(),
            space: space.clone(),
            name: name.to_owned(),
            owner: upload.owner.clone(),
            limit,
            shared: upload.shared.clone(),
            number,
        })
    }

    /// How many there are, and how many of them are somebody's.
    fn count(&self, owner: &str) -> (usize, usize) {
        let uploads = self.uploads.lock();
        let own = uploads.values().filter(|upload| *upload.owner == *owner);
        (uploads.len(), own.count())
    }

    /// How much of an upload is there.
    pub fn received(&self, name: &str) -> u64 {
        let shared = self.uploads.lock().get(name).map(|it| it.shared.clone());
        shared
            .and_then(|shared| Some(shared.lock().upload.as_ref()?.upload.received()))
            .unwrap_or(0)
    }

    /// Drops uploads whose clients have not come back.
    pub fn expire(&self, now: Instant) {
        let over = |state: &UploadState| match state.phase {
            UploadPhase::Waiting(since) => now.saturating_duration_since(since) >= WAITING_TIMEOUT,
            UploadPhase::UnderWay { .. } => false,
        };
        // One that is locked is being written to.
        let is_over = |shared: &SharedUpload| shared.try_lock().is_some_and(|state| over(&state));
        let mut uploads = self.uploads.lock();
        let names: Vec<String> = uploads
            .iter()
            .filter(|(_, upload)| is_over(&upload.shared))
            .map(|(name, _)| name.clone())
            .collect();
        let dropped: Vec<OwnedUpload> = names
            .iter()
            .filter_map(|name| uploads.remove(name))
            .collect();
        drop(uploads);
        // Their files are removed here, while nobody waits for the lock.
        drop(dropped);
    }

    /// Drops the upload that nobody writes to for longest, or else one that makes no progress; `of` is
    /// whose it must be, if anybody's. False when there is none.
    pub fn abandon_one(&self, of: Option<&str>, now: Instant) -> bool {
        let uploads = self.uploads.lock();
        let victim = uploads
            .iter()
            .filter(|(_, upload)| of.is_none_or(|of| *upload.owner == *of))
            .filter_map(|(name, OwnedUpload { shared, .. })| {
                let state = shared.try_lock()?;
                let received = state.upload.as_ref()?.upload.received();
                let rank = abandonment_rank(&state.phase, received, now)?;
                Some((rank, name.clone(), shared.clone()))
            })
            .max_by_key(|(rank, ..)| *rank);
        drop(uploads);
        let Some((_, name, shared)) = victim else {
            return false;
        };
        // Somebody may have taken it up in between.
        let Some(mut state) = shared.try_lock() else {
            return true;
        };
        let upload = state.upload.take();
        let waited = matches!(state.phase, UploadPhase::Waiting(_));
        drop(state);
        if waited {
            self.remove(&name, &shared);
        }
        tracing::debug!(name, given_up = upload.is_some(), "space is short");
        true
    }

    fn remove(&self, name: &str, shared: &SharedUpload) {
        let mut uploads = self.uploads.lock();
        if uploads
            .get(name)
            .is_some_and(|other| Arc::ptr_eq(&other.shared, shared))
        {
            uploads.remove(name);
        }
    }

    /// Forgets all of them, when their store is closed.
    pub fn clear(&self) {
        let uploads = std::mem::take(&mut *self.uploads.lock());
        for upload in uploads.into_values() {
            upload.shared.lock().upload = None;
        }
    }
}

/// Which upload is given up first: the greatest. `None` for one that makes progress.
fn abandonment_rank(phase: &UploadPhase, received: u64, now: Instant) -> Option<(bool, Duration)> {
    match phase {
        UploadPhase::Waiting(since) => Some((true, now.saturating_duration_since(*since))),
        UploadPhase::UnderWay { begun, last } => {
            let age = now.saturating_duration_since(*begun);
            let silence = now.saturating_duration_since(*last);
            let slow =
                age >= PROGRESS_TIMEOUT && received < age.as_secs().saturating_mul(MINIMUM_RATE);
            (silence >= PROGRESS_TIMEOUT || slow).then_some((false, silence.max(age / 2)))
        }
    }
}

/// Bytes that all uploads of a store together may take.
fn largest_uploads(space: &Space) -> u64 {
    space.maximum_blob_size() / 3
}

impl WriteLease {
    fn lock(&self) -> Result<MutexGuard<'_, UploadState>, UploadError> {
        let state = self.shared.lock();
        if state.lease != self.number {
            return Err(UploadError::TakenOver);
        }
        Ok(state)
    }

    /// Takes up the upload where it was left, or starts it.
    pub fn begin(&self, digest: Digest, offset: i64, now: Instant) -> Result<(), UploadError> {
        let mut state = self.shared.lock();
        if state.lease > self.number {
            return Err(UploadError::TakenOver);
        }
        state.lease = self.number;
        state.phase = UploadPhase::UnderWay {
            begun: now,
            last: now,
        };
        if offset == 0 || state.upload.is_none() {
            state.upload = None;
            state.upload = Some(CountedUpload {
                upload: BlobWriter::start(self.space.clone(), digest, self.limit)?,
                count: ByteCount {
                    uploads: self.uploads.clone(),
                    owner: self.owner.clone(),
                    bytes: 0,
                },
            });
        }
        Ok(())
    }

    /// Appends what begins at `offset`.
    pub fn write(&self, offset: i64, data: &Bytes, now: Instant) -> Result<(), UploadError> {
        let mut state = self.lock()?;
        if let UploadPhase::UnderWay { last, .. } = &mut state.phase {
            *last = now;
        }
        let counted = state.upload.as_mut().ok_or(UploadError::GivenUp)?;
        let received = counted.upload.received();
        if u64::try_from(offset) != Ok(received) {
            return Err(UploadError::Offset { offset, received });
        }
        counted
            .count
            .grow(data.len() as u64, largest_uploads(&self.space), now)?;
        counted.upload.write(data)?;
        Ok(())
    }

    /// Makes the blob visible. Without being asked to, only one that is complete.
    pub fn finish(&self, digest: &Digest, asked: bool) -> Result<(), UploadError> {
        let mut state = self.lock()?;
        let upload = state.upload.as_ref().ok_or(UploadError::GivenUp)?;
        let received = upload.upload.received();
        if received < digest.size() && !asked {
            return Err(UploadError::Unfinished {
                received,
                size: digest.size(),
            });
        }
        // What it counts is given back when it is stored.
        if let Some(CountedUpload {
            upload,
            count: _count,
        }) = state.upload.take()
        {
            upload.finish()?;
        }
        Ok(())
    }
}

impl ByteCount {
    /// Counts bytes that are about to be written.
    fn grow(&mut self, bytes: u64, most: u64, now: Instant) -> Result<(), Error> {
        loop {
            let mut received = self.uploads.received.lock();
            let all = received.all;
            let own = received.by_owner.get(&self.owner).copied().unwrap_or(0);
            // As many remain for others.
            let share = (most.saturating_sub(all) + own) / 2;
            let is_alone = all == self.bytes;
            let fits = is_alone || all + bytes <= most;
            let fits_share = own == self.bytes || own + bytes <= share;
            if fits && fits_share {
                received.all += bytes;
                *received.by_owner.entry(self.owner.clone()).or_default() += bytes;
                self.bytes += bytes;
                return Ok(());
            }
            drop(received);
            let of = fits.then_some(&*self.owner);
            if self.uploads.abandon_one(of, now) {
                continue;
            }
            return Err(Error::Full(match fits {
                false => format!(
                    "uploads under way take {all} bytes of this store, and may take {most}; try again \
                     later, or raise storage.embedded.maximum_size"
                ),
                true => format!(
                    "uploads of yours that are not finished take {own} bytes, which leaves no more than \
                     that for others; finish some of them, or raise storage.embedded.maximum_size"
                ),
            }));
        }
    }
}

impl Drop for WriteLease {
    fn drop(&mut self) {
        // A state that is locked has been taken over.
        let Some(mut state) = self.shared.try_lock() else {
            return;
        };
        if state.lease != self.number && state.lease != 0 {
            return;
        }
        if state.upload.is_some() {
            state.phase = UploadPhase::Waiting(Instant::now());
        } else {
            drop(state);
            self.uploads.remove(&self.name, &self.shared);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::embedded::Store;

    #[test]
    fn whoever_leaves_bytes_unfinished_leaves_as_many_to_others() {
        let uploads = Arc::new(Uploads::default());
        let now = Instant::now();
        let count = |owner: &str| ByteCount {
            uploads: uploads.clone(),
            owner: owner.into(),
            bytes: 0,
        };
        let mut first = count("greedy");
        // One alone may have more than all together.
        first.grow(1500, 1000, now).unwrap();
        drop(first);
        let mut greedy: Vec<ByteCount> = (0..100).map(|_| count("greedy")).collect();
        let refused = greedy
            .iter_mut()
            .filter_map(|upload| upload.grow(10, 1000, now).err());
        let refused: Vec<String> = refused.map(|error| error.to_string()).collect();
        assert_eq!(refused.len(), 50, "{refused:?}");
        assert!(refused[0].contains("uploads of yours that are not finished take 500 bytes"));
        count("other").grow(400, 1000, now).unwrap();
        drop(greedy);
        let received = uploads.received.lock();
        assert_eq!((received.all, received.by_owner.len()), (0, 0));
    }

    #[test]
    fn an_upload_whose_client_left_waits_a_while_and_is_then_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let digest = crate::digest::DigestFunction::Sha256.digest_of(&[7; 1000]);
        let now = Instant::now();
        let lease = store
            .lease_upload("name", "somebody", LimitId::NONE, now)
            .unwrap();
        lease.begin(digest, 0, now).unwrap();
        lease.write(0, &Bytes::from_static(&[7; 600]), now).unwrap();
        drop(lease);
        let left = Instant::now();
        store
            .uploads()
            .expire(now + WAITING_TIMEOUT - Duration::from_secs(1));
        assert_eq!(store.uploads().received("name"), 600);
        store.uploads().expire(left + WAITING_TIMEOUT);
        assert_eq!(store.uploads().received("name"), 0);
        assert_eq!(store.uploads().received.lock().all, 0);
    }
}
