//! The file cache: input files by digest, on local disk, from which input roots are linked.
//!
//! 1. It stays within its limits of bytes, of files, and of what its file system has free; only what
//!    is pinned may exceed them, and no single action is allowed to pin more than the limit.
//! 2. A pinned file is not evicted. Every file of an input root that is kept pins what it is made of,
//!    so that the number of an inode with links is given to no other file, and blocks that are shared
//!    are counted. When only pins are left, the keeper of input roots is asked to let go of some.
//! 3. A file is fetched once, however many actions ask for it at the same time.
//! 4. Whoever holds the lock does no I/O; a key being fetched or evicted is marked `busy` instead.
//! 5. A file that somebody else changed is removed and fetched again; whoever used it learns of it.
//! 6. No content is used that this worker has not read (`verification`).
//! 7. Every inode counts: cached files, their further inodes (`link`), and files of kept input roots
//!    that have inodes of their own.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::BorrowedFd,
    path::Path,
    sync::{Arc, OnceLock},
};

use futures::{StreamExt, stream};
use parking_lot::Mutex;
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::directories::batches;
use crate::{
    digest::Digest,
    instance::InstanceName,
    storage::{self, grpc::Client},
    worker::{
        fault::Fault,
        lru::{Handle, Lru},
    },
};

mod disk;
mod eviction;
mod key;
mod link;
mod pins;
mod verification;
mod watch;

use disk::CacheDirectory;
pub use disk::{is_the_workers, seal};
use eviction::is_full;
pub use key::FileKey;
use link::ExtraInodes;
pub use link::{LinkError, LinkMode};
use pins::FileClaim;
pub use pins::{InputFile, InputFileKind, InputFiles, Pinned};
pub use verification::{Portion, VerificationCounts, Verifier};
use watch::ChangeWatch;

/// From this size on a file is streamed to disk rather than read into memory.
const LARGE: u64 = 1 << 20;
/// Batches and large files of one action that are fetched at a time.
const CONCURRENCY: usize = 8;
/// So many keys are looked up under one lock.
const KEYS_AT_A_TIME: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    pub bytes: u64,
    pub files: u64,
    /// Bytes of the file system that are left free.
    pub minimum_free: u64,
}

pub struct FileCache {
    files: CacheDirectory,
    limits: CacheLimits,
    storage: Client,
    state: Mutex<Index>,
    /// Held while further inodes of files are made or removed.
    duplicating: Mutex<()>,
    /// Lets go of kept input roots; `false` when there are none.
    release: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    /// Whether files can share blocks.
    reflinks: bool,
    /// `None` where the host allows no more watches.
    watch: Option<ChangeWatch>,
    /// How often somebody else changed files; held while they are removed.
    modifications: Mutex<u64>,
    verified: VerificationCounts,
}

/// A file on disk.
#[derive(Clone, Copy)]
struct CachedFile {
    /// Of the first copy.
    inode: u64,
    /// Whether its content was read by this worker.
    verified: bool,
}

#[derive(Default)]
struct Index {
    kept: Lru<FileKey, CachedFile>,
    /// Of those files that have more than one inode.
    further: ExtraInodes,
    /// Inodes in input roots that are not the cache's.
    own: u64,
    busy: HashMap<FileKey, InProgress>,
    claims: u64,
}

struct InProgress {
    /// By which claim.
    claim: u64,
    done: CancellationToken,
}

impl FileCache {
    /// Takes up what an earlier worker left. Blocks for a second per million files.
    pub fn open(path: &Path, limits: CacheLimits, storage: Client) -> io::Result<Self> {
        let files = CacheDirectory::open(path)?;
        let reflinks = files.shares_blocks()?;
        let mut state = Index::default();
        for found in files.scan()? {
            let stored = CachedFile {
                inode: found.inode,
                verified: false,
            };
            let size = found.key.digest.size();
            state.kept.insert(found.key, stored, size);
            for inode in found.others {
                state.add_further(&found.key, inode);
            }
        }
        // Before anything is used; what was changed earlier shows by its size, mode or mtime.
        let watch = files.watch().inspect_err(|error| {
            tracing::warn!(
                directory = %path.display(),
                %error,
                "could not watch the cache for changes by others; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            );
        });
        let cache = FileCache {
            files,
            limits,
            storage,
            state: Mutex::new(state),
            reflinks,
            duplicating: Mutex::new(()),
            release: OnceLock::new(),
            watch: watch.ok(),
            modifications: Mutex::default(),
            verified: VerificationCounts::default(),
        };
        cache.evict_to_fit();
        Ok(cache)
    }

    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// Bytes that are to stay free on the file system.
    pub fn minimum_free(&self) -> u64 {
        self.limits.minimum_free
    }

    /// Files and bytes.
    pub fn usage(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.kept.len() as u64, state.kept.weight())
    }

    /// Those digests of `keys` that are not here.
    pub fn absent(&self, keys: Vec<FileKey>) -> Vec<Digest> {
        let state = self.state.lock();
        let mut digests: Vec<Digest> = keys
            .into_iter()
            .filter(|key| !state.kept.contains(key))
            .map(|key| key.digest)
            .collect();
        drop(state);
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    /// Brings all these files here, with repetitions, and pins them. Tells all that are missing in one
    /// fault.
    pub async fn obtain(
        self: &Arc<Self>,
        instance: &InstanceName,
        mut wanted: Vec<FileKey>,
        link_mode: LinkMode,
    ) -> Result<Pinned, Fault> {
        self.check_occurrences(&wanted, link_mode)?;
        let mut pins = Pinned {
            cache: self.clone(),
            handles: Vec::with_capacity(wanted.len()),
        };
        let mut missing = Vec::new();
        let mut unverified = Vec::new();
        while !wanted.is_empty() {
            let mut claim = FileClaim::new(self);
            let mut waiting = Vec::new();
            for keys in wanted.chunks(KEYS_AT_A_TIME) {
                self.claim(keys, &mut pins, &mut claim, &mut waiting, &mut unverified);
                if wanted.len() > KEYS_AT_A_TIME {
                    tokio::task::yield_now().await;
                }
            }
            if !claim.keys.is_empty() {
                self.check_size(&pins, &claim)?;
                self.fetch(instance, &claim.keys, &mut pins, &mut missing)
                    .await?;
            }
            drop(claim);
            wanted.clear();
            // Whoever is waited for may fail: then these become ours, or a third one's.
            for (key, done) in waiting {
                done.cancelled().await;
                wanted.push(key);
            }
        }
        none_missing(missing)?;
        if !unverified.is_empty() {
            let cache = self.clone();
            let verify = move || cache.verify_first_use(unverified);
            let wrong = crate::daemon::spawn_blocking(verify).await;
            let wrong = wrong.map_err(|error| {
                Fault::Internal(format!("could not verify cached input files: {error}"))
            })?;
            if !wrong.is_empty() {
                self.restore(instance, wrong).await?;
            }
        }
        Ok(pins)
    }

    /// Fetches files again that are gone from the disk, though they should be there.
    pub async fn restore(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: Vec<FileKey>,
    ) -> Result<(), Fault> {
        let mut missing = Vec::new();
        let mut pins = Pinned {
            cache: self.clone(),
            handles: Vec::new(),
        };
        let (cache, gone) = (self.clone(), keys.clone());
        let forgotten = crate::daemon::spawn_blocking(move || {
            for key in &gone {
                cache.forget_further(key);
            }
        });
        let _ = forgotten.await;
        self.fetch(instance, &keys, &mut pins, &mut missing).await?;
        none_missing(missing)
    }

    /// Sorts keys into those that are here, which it pins, some of them unverified; those that are ours
    /// to fetch; and those that others change.
    fn claim(
        &self,
        keys: &[FileKey],
        pins: &mut Pinned,
        claim: &mut FileClaim<'_>,
        waiting: &mut Vec<(FileKey, CancellationToken)>,
        unverified: &mut Vec<FileKey>,
    ) {
        let mut state = self.state.lock();
        for key in keys {
            if let Some(handle) = state.kept.pin(key) {
                pins.handles.push(handle);
                let stored = state.kept.value_of(handle);
                if stored.is_some_and(|stored| !stored.verified) {
                    unverified.push(*key);
                }
                continue;
            }
            match state.busy.get(key) {
                // Twice in one input root: one fetch. It is pinned once, which is enough.
                Some(busy) if busy.claim == claim.number => {}
                Some(busy) => waiting.push((*key, busy.done.clone())),
                None => claim.add(&mut state, *key),
            }
        }
    }

    /// Each occurrence is a file of its own, and takes blocks unless it shares them.
    fn check_occurrences(&self, wanted: &[FileKey], link_mode: LinkMode) -> Result<(), Fault> {
        let shared = match link_mode {
            LinkMode::Reflink => true,
            LinkMode::HardLink => false,
            LinkMode::Copy => self.reflinks,
        };
        let sizes = wanted.iter().map(|key| match shared {
            true => 0,
            false => key.digest.size(),
        });
        let bytes = sizes.fold(0, u64::saturating_add);
        self.check_limits(wanted.len() as u64, bytes)
    }

    fn check_size(&self, pins: &Pinned, claim: &FileClaim<'_>) -> Result<(), Fault> {
        let mut handles = pins.handles.clone();
        handles.sort_unstable();
        handles.dedup();
        let state = self.state.lock();
        let here: u64 = handles.iter().map(|h| state.kept.weight_of(*h)).sum();
        drop(state);
        let bytes = claim
            .keys
            .iter()
            .fold(here, |sum, key| sum.saturating_add(key.digest.size()));
        let files = (handles.len() + claim.keys.len()) as u64;
        self.check_limits(files, bytes)
    }

    fn check_limits(&self, files: u64, bytes: u64) -> Result<(), Fault> {
        if bytes > self.limits.bytes || files > self.limits.files {
            return Err(Fault::Exhausted(format!(
                "the input root has {files} files of {bytes} bytes, but the cache of this worker \
                 holds no more than {} files of {} bytes; raise cache.maximum_files and \
                 cache.maximum_size in bb_worker.toml",
                self.limits.files, self.limits.bytes
            )));
        }
        Ok(())
    }

    async fn fetch(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: &[FileKey],
        pins: &mut Pinned,
        missing: &mut Vec<Digest>,
    ) -> Result<(), Fault> {
        let (large, small): (Vec<FileKey>, Vec<FileKey>) =
            keys.iter().partition(|key| key.digest.size() >= LARGE);
        let mut jobs = batches(small, |key: &FileKey| key.digest.size());
        jobs.extend(large.into_iter().map(|key| vec![key]));
        let mut fetches = stream::iter(jobs)
            .map(|keys| self.fetch_batch(instance, keys))
            .buffer_unordered(CONCURRENCY);
        while let Some(fetched) = fetches.next().await {
            let (mut fetched, absent) = fetched?;
            pins.handles.append(&mut fetched.handles);
            missing.extend(absent);
        }
        Ok(())
    }

    /// One large file, or many small ones. Returns pins of what came, and what is missing.
    async fn fetch_batch(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: Vec<FileKey>,
    ) -> Result<(Pinned, Vec<Digest>), Fault> {
        let mut pins = Pinned {
            cache: self.clone(),
            handles: Vec::new(),
        };
        let mut missing = Vec::new();
        if let [key] = keys[..]
            && key.digest.size() >= LARGE
        {
            match self.fetch_large(instance, key).await? {
                Some(inode) => {
                    let cache = self.clone();
                    let admit = move || {
                        let handles = vec![cache.admit(key, inode)];
                        cache.evict_to_fit();
                        Pinned { cache, handles }
                    };
                    let admitted = crate::daemon::spawn_blocking(admit).await;
                    pins = admitted.map_err(|error| {
                        Fault::Internal(format!("could not count an input file: {error}"))
                    })?;
                }
                None => missing.push(key.digest),
            }
            return Ok((pins, missing));
        }
        let digests: Vec<Digest> = keys.iter().map(|key| key.digest).collect();
        let results = self.storage.read_many(instance, &digests, LARGE).await;
        let write = move || {
            let cache = pins.cache.clone();
            for (key, result) in keys.into_iter().zip(results) {
                match result {
                    Ok(content) => {
                        let write = || cache.files.write(&key, &content);
                        let inode = cache.write_evicting(&key, write)?;
                        pins.handles.push(cache.admit(key, inode));
                    }
                    Err(storage::Error::Missing(_)) => missing.push(key.digest),
                    Err(error) => {
                        let what = format!("obtain input file {}", key.digest);
                        return Err(Fault::of_storage(what, error));
                    }
                }
            }
            cache.evict_to_fit();
            Ok((pins, missing))
        };
        crate::daemon::spawn_blocking(write)
            .await
            .map_err(|error| Fault::Internal(format!("could not write input files: {error}")))?
    }

    /// The inode number; `None` when it is missing.
    async fn fetch_large(
        self: &Arc<Self>,
        instance: &InstanceName,
        key: FileKey,
    ) -> Result<Option<u64>, Fault> {
        let mut attempts = 0;
        loop {
            let incoming = self
                .files
                .create()
                .map_err(|error| self.disk_fault(&key, error))?;
            // Says at once when the disk is full; the size stays, for the sake of `CacheDirectory`'s rule 2.
            let reserved = rustix::fs::fallocate(
                &incoming.file,
                rustix::fs::FallocateFlags::KEEP_SIZE,
                0,
                key.digest.size(),
            );
            let file = incoming
                .file
                .try_clone()
                .map_err(|error| self.disk_fault(&key, error))?;
            let result = match reserved {
                Err(Errno::NOSPC) => Err(storage::Error::Full(format!(
                    "the file system of {} is full",
                    self.path().display()
                ))),
                _ => {
                    let read = self
                        .storage
                        .read_to_file(instance, &key.digest, Arc::new(file));
                    read.await
                }
            };
            match result {
                Ok(()) => {
                    let inode = self
                        .files
                        .publish(incoming, &key, 0)
                        .map_err(|error| self.disk_fault(&key, error))?;
                    return Ok(Some(inode));
                }
                Err(storage::Error::Missing(_)) => return Ok(None),
                Err(storage::Error::Full(_)) if attempts < 4 && self.evict_when_full(&key) => {
                    attempts += 1;
                }
                Err(storage::Error::Full(_)) => {
                    return Err(self.disk_fault(&key, io::ErrorKind::StorageFull.into()));
                }
                Err(error) => {
                    let what = format!("obtain input file {}", key.digest);
                    return Err(Fault::of_storage(what, error));
                }
            }
        }
    }

    /// An output becomes an input of later actions without a download. `sealed` says that the file
    /// itself may enter the cache; otherwise a copy does. What cannot be kept is not: it will be
    /// fetched.
    pub fn keep_output(
        &self,
        key: FileKey,
        file: &File,
        sealed: bool,
        directory: BorrowedFd<'_>,
        name: &str,
    ) {
        // Empty files are made, not cached.
        if key.digest.size() > self.limits.bytes / 4 || key.digest.size() == 0 {
            return;
        }
        let mut claim = FileClaim::new(self);
        let mut state = self.state.lock();
        if state.kept.get(&key).is_some() || state.busy.contains_key(&key) {
            return;
        }
        claim.add(&mut state, key);
        drop(state);
        let kept = match sealed {
            true => match self.files.adopt(&key, directory, name) {
                // A file that the cache does not know of.
                Err(Errno::EXIST) => self
                    .files
                    .remove(&key, 1)
                    .and_then(|()| Ok(self.files.adopt(&key, directory, name)?)),
                result => result.map_err(io::Error::from),
            },
            false => self.files.duplicate(file, &key, 0),
        };
        match kept {
            Ok(inode) => {
                let handle = self.admit(key, inode);
                self.state.lock().kept.unpin(handle);
                // Not pinned any more: what has no room beside what must stay free goes itself.
                self.evict_to_fit();
            }
            Err(error) => {
                tracing::debug!(digest = %key.digest, %error, "could not keep an output in the cache");
            }
        }
    }

    /// Counts and pins a file that is on disk now, and evicts others for it.
    fn admit(&self, key: FileKey, inode: u64) -> Handle {
        let handle = {
            let mut state = self.state.lock();
            let stored = CachedFile {
                inode,
                verified: true,
            };
            state.kept.insert(key, stored, key.digest.size());
            // One that was gone from the disk has a new inode.
            if let Some(known) = state.kept.peek_mut(&key) {
                *known = stored;
            }
            state.kept.pin(&key).expect("just inserted")
        };
        self.enforce_limits();
        handle
    }

    fn disk_fault(&self, key: &FileKey, error: io::Error) -> Fault {
        let remedy = match is_full(&error) {
            true => "; make room on its file system, or lower cache.maximum_size",
            false => "",
        };
        let what = format!(
            "write input file {} to the cache in {}{remedy}",
            key.digest,
            self.path().display()
        );
        Fault::of_disk(what, error)
    }
}

fn none_missing(mut missing: Vec<Digest>) -> Result<(), Fault> {
    if missing.is_empty() {
        return Ok(());
    }
    missing.sort_unstable();
    missing.dedup();
    Err(Fault::of_storage(
        "obtain the input files",
        storage::Error::Missing(missing),
    ))
}
