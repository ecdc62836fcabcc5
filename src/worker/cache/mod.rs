//! The file cache: input files by digest, on local disk, from which input roots are linked.
//!
//! 1. It stays within its limits of bytes, of files, and of what its file system has free; only what
//!    is pinned may exceed them, and no single action is allowed to pin more than the limit.
//! 2. A pinned file is not evicted. Every link in an input root that is kept is a pin, so that the
//!    number of its inode is given to no other file. When only pins are left, the keeper of input
//!    roots is asked to let go of some.
//! 3. A file is fetched once, however many actions ask for it at the same time.
//! 4. Whoever holds the lock does no I/O; a key being fetched or evicted is marked `busy` instead.
//! 5. A file that somebody else changed is removed and fetched again; whoever used it learns of it.

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

use super::{
    directories::batches,
    fault::Fault,
    lru::{Handle, Lru},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    storage::{self, remote::Client},
};

mod files;
mod pins;
mod room;
mod watch;

use files::Files;
pub use files::{Key, is_the_workers, seal};
use pins::Claim;
pub use pins::{Link, Links, Pins};
use room::is_full;
use watch::Watch;

/// From this size on a file is streamed to disk rather than read into memory.
const LARGE: u64 = 1 << 20;
/// Batches and large files of one action that are fetched at a time.
const CONCURRENCY: usize = 8;
/// So many keys are looked up under one lock.
const KEYS_AT_A_TIME: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: u64,
    pub files: u64,
    /// Bytes of the file system that are left free.
    pub minimum_free: u64,
}

pub struct Cache {
    files: Files,
    limits: Limits,
    storage: Client,
    state: Mutex<State>,
    /// Held while a second inode is made.
    duplicating: Mutex<()>,
    /// Lets go of kept input roots; `false` when there are none.
    release: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    /// `None` where the host allows no more watches.
    watch: Option<Watch>,
    /// How often somebody else changed files; held while they are removed.
    alterations: Mutex<u64>,
}

/// A file on disk.
#[derive(Clone, Copy)]
struct Stored {
    copies: u32,
    /// Of the first copy.
    inode: u64,
}

#[derive(Default)]
struct State {
    kept: Lru<Key, Stored>,
    busy: HashMap<Key, Busy>,
    claims: u64,
}

struct Busy {
    /// By which claim.
    claim: u64,
    done: CancellationToken,
}

/// Why a file of the cache could not be linked.
#[derive(Debug)]
pub enum LinkError {
    /// Somebody removed it from the disk, or put another one in its place.
    Vanished,
    Other(io::Error),
}

impl Cache {
    /// Takes up what an earlier worker left. Blocks for a second per million files.
    pub fn open(path: &Path, limits: Limits, storage: Client) -> io::Result<Self> {
        let files = Files::open(path)?;
        let mut state = State::default();
        for found in files.scan()? {
            let weight = found.key.digest.size() * u64::from(found.copies);
            let stored = Stored {
                copies: found.copies,
                inode: found.inode,
            };
            state.kept.insert(found.key, stored, weight);
        }
        // Before anything is used; what was changed earlier shows by its size, mode or mtime.
        let watch = files.watch().inspect_err(|error| {
            tracing::warn!(
                directory = %path.display(),
                %error,
                "could not watch the cache for changes by others; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            );
        });
        let cache = Cache {
            files,
            limits,
            storage,
            state: Mutex::new(state),
            duplicating: Mutex::new(()),
            release: OnceLock::new(),
            watch: watch.ok(),
            alterations: Mutex::default(),
        };
        cache.make_fit();
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

    /// Pins files that are to be linked. Those that are not here are the error.
    pub fn pin(self: &Arc<Self>, keys: impl Iterator<Item = Key>) -> Result<Links, Vec<Key>> {
        let mut links = Links {
            cache: self.clone(),
            of: Vec::with_capacity(keys.size_hint().0),
        };
        let mut absent = Vec::new();
        let mut state = self.state.lock();
        for key in keys {
            match state.kept.pin(&key) {
                Some(handle) => links.of.push(Link {
                    inode: state.kept.value_of(handle).map_or(0, |stored| stored.inode),
                    handle,
                }),
                None => absent.push(key),
            }
        }
        drop(state);
        match absent.is_empty() {
            true => Ok(links),
            false => Err(absent),
        }
    }

    /// Those digests of `keys` that are not here.
    pub fn absent(&self, keys: Vec<Key>) -> Vec<Digest> {
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

    /// Brings all these files here and pins them. Tells all that are missing in one fault.
    pub async fn obtain(
        self: &Arc<Self>,
        instance: &InstanceName,
        mut wanted: Vec<Key>,
    ) -> Result<Pins, Fault> {
        let mut pins = Pins {
            cache: self.clone(),
            handles: Vec::with_capacity(wanted.len()),
        };
        let mut missing = Vec::new();
        while !wanted.is_empty() {
            let mut claim = Claim::new(self);
            let mut waiting = Vec::new();
            for keys in wanted.chunks(KEYS_AT_A_TIME) {
                self.claim(keys, &mut pins, &mut claim, &mut waiting);
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
        Ok(pins)
    }

    /// Fetches files again that are gone from the disk, though they should be there.
    pub async fn restore(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: Vec<Key>,
    ) -> Result<(), Fault> {
        let mut missing = Vec::new();
        let mut pins = Pins {
            cache: self.clone(),
            handles: Vec::new(),
        };
        self.fetch(instance, &keys, &mut pins, &mut missing).await?;
        none_missing(missing)
    }

    /// Sorts keys into those that are here, which it pins, those that are ours to fetch, and those
    /// that others change.
    fn claim(
        &self,
        keys: &[Key],
        pins: &mut Pins,
        claim: &mut Claim<'_>,
        waiting: &mut Vec<(Key, CancellationToken)>,
    ) {
        let mut state = self.state.lock();
        for key in keys {
            if let Some(handle) = state.kept.pin(key) {
                pins.handles.push(handle);
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

    fn check_size(&self, pins: &Pins, claim: &Claim<'_>) -> Result<(), Fault> {
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
        keys: &[Key],
        pins: &mut Pins,
        missing: &mut Vec<Digest>,
    ) -> Result<(), Fault> {
        let (large, small): (Vec<Key>, Vec<Key>) =
            keys.iter().partition(|key| key.digest.size() >= LARGE);
        let mut jobs = batches(small, |key: &Key| key.digest.size());
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
        keys: Vec<Key>,
    ) -> Result<(Pins, Vec<Digest>), Fault> {
        let mut pins = Pins {
            cache: self.clone(),
            handles: Vec::new(),
        };
        let mut missing = Vec::new();
        if let [key] = keys[..]
            && key.digest.size() >= LARGE
        {
            match self.fetch_large(instance, key).await? {
                Some(inode) => {
                    pins.handles.push(self.admit(key, inode));
                    self.make_fit();
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
                        let inode = cache.with_room(&key, write)?;
                        pins.handles.push(cache.admit(key, inode));
                    }
                    Err(storage::Error::Missing(_)) => missing.push(key.digest),
                    Err(error) => {
                        let what = format!("obtain input file {}", key.digest);
                        return Err(Fault::of_storage(what, error));
                    }
                }
            }
            cache.make_fit();
            Ok((pins, missing))
        };
        tokio::task::spawn_blocking(write)
            .await
            .map_err(|error| Fault::Internal(format!("could not write input files: {error}")))?
    }

    /// The inode number; `None` when it is missing.
    async fn fetch_large(
        self: &Arc<Self>,
        instance: &InstanceName,
        key: Key,
    ) -> Result<Option<u64>, Fault> {
        let mut attempts = 0;
        loop {
            let incoming = self
                .files
                .create()
                .map_err(|error| self.disk_fault(&key, error))?;
            // Says at once when the disk is full; the size stays, for the sake of `Files`' rule 2.
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
                Err(storage::Error::Full(_)) if attempts < 4 && self.make_space(&key) => {
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
        key: Key,
        file: &File,
        sealed: bool,
        directory: BorrowedFd<'_>,
        name: &str,
    ) {
        if key.digest.size() > self.limits.bytes / 4 {
            return;
        }
        let mut claim = Claim::new(self);
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
                self.make_fit();
            }
            Err(error) => {
                tracing::debug!(digest = %key.digest, %error, "could not keep an output in the cache");
            }
        }
    }

    /// Counts and pins a file that is on disk now, and evicts others for it.
    fn admit(&self, key: Key, inode: u64) -> Handle {
        let handle = {
            let mut state = self.state.lock();
            let stored = Stored { copies: 1, inode };
            state.kept.insert(key, stored, key.digest.size());
            // One that was gone from the disk has a new inode.
            if let Some(stored) = state.kept.peek_mut(&key) {
                stored.inode = inode;
            }
            state.kept.pin(&key).expect("just inserted")
        };
        self.keep_limits();
        handle
    }

    fn disk_fault(&self, key: &Key, error: io::Error) -> Fault {
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

    /// Links a pinned file into an input root. `buffer` is used again and again.
    pub fn link(
        &self,
        key: &Key,
        link: &mut Link,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        let inode = || -> Result<u64, LinkError> {
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            let stat = rustix::fs::statat(directory, name, flags);
            Ok(stat.map_err(|error| LinkError::Other(error.into()))?.st_ino)
        };
        match self.files.link(key, 0, directory, name, buffer) {
            Ok(()) if inode()? != link.inode => Err(LinkError::Vanished),
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(LinkError::Vanished),
            Err(Errno::MLINK) => {
                self.link_other(key, directory, name, buffer)?;
                link.inode = inode()?;
                Ok(())
            }
            Err(error) => Err(LinkError::Other(error.into())),
        }
    }

    /// Whether copies of files take no room of their own until they are written to.
    pub fn shares_blocks(&self) -> bool {
        self.files.shares_blocks().unwrap_or(false)
    }

    /// Copies a pinned file into an input root, for an action that may change it.
    pub fn copy(
        &self,
        key: &Key,
        link: &Link,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), LinkError> {
        let copied = self.files.copy(key, link.inode, directory, name);
        copied.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESTALE) => LinkError::Vanished,
            _ => LinkError::Other(error),
        })
    }

    /// The first inode has all the links that the file system allows; uses another one.
    #[cold]
    fn link_other(
        &self,
        key: &Key,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), LinkError> {
        let other = |error: Errno| LinkError::Other(error.into());
        let _one_at_a_time = self.duplicating.lock();
        let copies = self
            .state
            .lock()
            .kept
            .peek(key)
            .map_or(1, |stored| stored.copies);
        for copy in (1..copies).rev() {
            match self.files.link(key, copy, directory, name, buffer) {
                Err(Errno::MLINK) => {}
                // Removed by somebody: as good as full.
                Err(Errno::NOENT) => {}
                result => return result.map_err(other),
            }
        }
        let copy = || {
            let first = self.files.open_copy(key, 0)?;
            self.files.duplicate(&first, key, copies)
        };
        copy().map_err(LinkError::Other)?;
        {
            let mut state = self.state.lock();
            if let Some(stored) = state.kept.peek_mut(key) {
                stored.copies = copies + 1;
            }
            state.kept.add_weight(key, key.digest.size());
        }
        self.files
            .link(key, copies, directory, name, buffer)
            .map_err(other)
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
