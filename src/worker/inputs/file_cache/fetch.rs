//! Brings files into the cache that an action needs and that are not in it.

use std::{collections::HashSet, io, sync::Arc};

use futures::{StreamExt, stream};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::{
    cache::FileCache,
    create_input_file::CreateMode,
    eviction::EVICTION_ATTEMPTS,
    index::FileClaim,
    key::FileKey,
    pins::{KEYS_AT_A_TIME, PinnedFiles},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    storage,
    worker::{blocking::blocking, fault::Fault, inputs::batches::batches},
};

/// From this size on a file is streamed to disk rather than read into memory.
const SMALLEST_STREAMED: u64 = 1 << 20;
/// How many batches and large files of one action are fetched at a time.
const CONCURRENCY: usize = 8;

impl FileCache {
    /// Brings those files into the cache that are absent, and pins them. Tells all that the storage lacks in one fault.
    pub async fn fetch(
        self: &Arc<Self>,
        instance: &InstanceName,
        pinned: &mut PinnedFiles,
    ) -> Result<(), Fault> {
        let mut missing = HashSet::new();
        // Pins what was fetched, until each occurrence is pinned.
        let mut fetched = PinnedFiles::none(self);
        while !pinned.absent.is_empty() {
            let (claim, others) = self.claim(pinned).await;
            if !claim.keys.is_empty() {
                self.check_size(pinned, &claim.keys)?;
                let sizes = claim.keys.iter().map(|key| key.digest.size());
                self.uses.fetched_bytes.add(sizes.sum());
                let keys = claim.keys.clone();
                self.download(instance, claim, keys, &mut fetched, &mut missing)
                    .await?;
            }
            // Whoever is waited for may fail: then this action claims these next, or a third one does.
            for done in others {
                done.cancelled().await;
            }
            pinned
                .absent
                .retain(|(key, _)| !missing.contains(&key.digest));
        }
        none_missing(missing)?;
        let wrong = std::mem::take(&mut pinned.wrong);
        match wrong.is_empty() {
            true => Ok(()),
            false => self.restore(instance, wrong).await,
        }
    }

    /// Fetches files again that are gone from the disk, though they should be there.
    pub async fn restore(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: Vec<FileKey>,
    ) -> Result<(), Fault> {
        let mut missing = HashSet::new();
        let mut fetched = PinnedFiles::none(self);
        let mut rest = keys;
        while !rest.is_empty() {
            let (claim, others) = self.claim_gone(&mut rest);
            if !claim.keys.is_empty() {
                let cache = self.clone();
                let forget = move || {
                    // Others may have brought some since they were found to be gone, and have linked them.
                    let mut gone = claim.keys.clone();
                    gone.retain(|key| cache.usable_inode(key).is_none());
                    for key in &gone {
                        cache.forget_extra_inodes(key);
                    }
                    (claim, gone)
                };
                let (claim, gone) = blocking("forget input files", forget).await?;
                self.download(instance, claim, gone, &mut fetched, &mut missing)
                    .await?;
            }
            for done in others {
                done.cancelled().await;
            }
            // What others have brought meanwhile is there.
            let cache = self.clone();
            let look = move || {
                rest.retain(|key| cache.directory.open_inode(key, 0).is_err());
                rest
            };
            rest = blocking("look for input files", look).await?;
        }
        none_missing(missing)
    }

    /// Claims those of some files that nobody else fetches or changes. Those that others do stay in `keys`, with what
    /// to wait for.
    fn claim_gone(&self, keys: &mut Vec<FileKey>) -> (FileClaim, Vec<CancellationToken>) {
        let mut claim = FileClaim::new(&self.index);
        let mut others = Vec::new();
        let mut index = self.index.lock();
        keys.retain(|key| match index.in_progress.get(key) {
            Some(other) if other.claim_id == claim.id => false,
            Some(other) => {
                others.push(other.done.clone());
                true
            }
            None => {
                claim.add(&mut index, *key);
                false
            }
        });
        drop(index);
        (claim, others)
    }

    /// Whether the limits of the cache allow an input root of these files. Each occurrence is an inode of its own, and
    /// takes blocks unless it shares them.
    pub fn check_occurrences(
        &self,
        keys: &[FileKey],
        create_mode: CreateMode,
    ) -> Result<(), Fault> {
        let shared = match create_mode {
            CreateMode::Reflink => true,
            CreateMode::HardLink => false,
            CreateMode::Copy => self.supports_reflinks,
        };
        let sizes = keys.iter().map(|key| match shared {
            true => 0,
            false => key.digest.size(),
        });
        let bytes = sizes.fold(0, u64::saturating_add);
        self.check_limits(keys.len() as u64, bytes)
    }

    /// Pins those of the absent files that are in the cache by now, and claims those that nobody else fetches or
    /// changes. The rest stays absent, with what to wait for.
    async fn claim(&self, pinned: &mut PinnedFiles) -> (FileClaim, Vec<CancellationToken>) {
        let mut claim = FileClaim::new(&self.index);
        let mut others = Vec::new();
        let absent = std::mem::take(&mut pinned.absent);
        for some in absent.chunks(KEYS_AT_A_TIME) {
            self.claim_some(some, pinned, &mut claim, &mut others);
            if absent.len() > KEYS_AT_A_TIME {
                tokio::task::yield_now().await;
            }
        }
        (claim, others)
    }

    fn claim_some(
        &self,
        absent: &[(FileKey, usize)],
        pinned: &mut PinnedFiles,
        claim: &mut FileClaim,
        others: &mut Vec<CancellationToken>,
    ) {
        let mut index = self.index.lock();
        for (key, at) in absent {
            if let Some(handle) = index.files.pin(key) {
                pinned.handles[*at] = Some(handle);
                continue;
            }
            pinned.absent.push((*key, *at));
            match index.in_progress.get(key) {
                // Twice in one input root: one fetch.
                Some(other) if other.claim_id == claim.id => {}
                Some(other) => others.push(other.done.clone()),
                None => claim.add(&mut index, *key),
            }
        }
    }

    fn check_size(&self, pinned: &PinnedFiles, more: &[FileKey]) -> Result<(), Fault> {
        let mut handles: Vec<_> = pinned.handles.iter().flatten().collect();
        handles.sort_unstable();
        handles.dedup();
        let index = self.index.lock();
        let here: u64 = handles.iter().map(|h| index.files.weight_of(**h)).sum();
        drop(index);
        let sizes = more.iter().map(|key| key.digest.size());
        let bytes = sizes.fold(here, u64::saturating_add);
        self.check_limits((handles.len() + more.len()) as u64, bytes)
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

    /// Fetches some or all keys of a claim; adds pins to `fetched`, and what the storage lacks to `missing`.
    async fn download(
        self: &Arc<Self>,
        instance: &InstanceName,
        claim: FileClaim,
        keys: Vec<FileKey>,
        fetched: &mut PinnedFiles,
        missing: &mut HashSet<Digest>,
    ) -> Result<(), Fault> {
        let claim = Arc::new(claim);
        let (large, small): (Vec<FileKey>, Vec<FileKey>) = keys
            .into_iter()
            .partition(|key| key.digest.size() >= SMALLEST_STREAMED);
        let mut jobs = batches(small, |key: &FileKey| key.digest.size());
        jobs.extend(large.into_iter().map(|key| vec![key]));
        let mut fetches = stream::iter(jobs)
            .map(|keys| self.fetch_batch(instance, keys, claim.clone()))
            .buffer_unordered(CONCURRENCY);
        while let Some(batch) = fetches.next().await {
            let (mut some, absent) = batch?;
            fetched.handles.append(&mut some.handles);
            missing.extend(absent);
        }
        Ok(())
    }

    /// Fetches one large file, or many small ones. Returns pins of what came, and what the storage lacks.
    async fn fetch_batch(
        self: &Arc<Self>,
        instance: &InstanceName,
        keys: Vec<FileKey>,
        claim: Arc<FileClaim>,
    ) -> Result<(PinnedFiles, Vec<Digest>), Fault> {
        if let [key] = keys[..]
            && key.digest.size() >= SMALLEST_STREAMED
        {
            return self.fetch_large(instance, key, claim).await;
        }
        let digests: Vec<Digest> = keys.iter().map(|key| key.digest).collect();
        let results = self
            .storage
            .read_many(instance, &digests, SMALLEST_STREAMED)
            .await;
        let (mut pinned, mut missing) = (PinnedFiles::none(self), Vec::new());
        let write = move || {
            let _claim = claim;
            let cache = pinned.cache.clone();
            for (key, result) in keys.into_iter().zip(results) {
                match result {
                    Ok(content) => {
                        let inode_to_keep = || cache.usable_inode(&key);
                        let write = || cache.directory.write(&key, &content, inode_to_keep);
                        let inode = cache
                            .evicting_when_full(&key, write)
                            .map_err(|error| cache.disk_fault(&key, error))?;
                        pinned.handles.push(Some(cache.admit(key, inode)));
                    }
                    Err(storage::Error::Missing(_)) => missing.push(key.digest),
                    Err(error) => {
                        let what = format!("obtain input file {}", key.digest);
                        return Err(Fault::of_storage(what, error));
                    }
                }
            }
            cache.evict_to_fit();
            Ok((pinned, missing))
        };
        blocking("write input files", write).await?
    }

    async fn fetch_large(
        self: &Arc<Self>,
        instance: &InstanceName,
        key: FileKey,
        claim: Arc<FileClaim>,
    ) -> Result<(PinnedFiles, Vec<Digest>), Fault> {
        let mut attempts = 0;
        loop {
            let cache = self.clone();
            let create = move || {
                let incoming = cache.directory.create_incoming();
                let incoming = incoming.map_err(|error| cache.disk_fault(&key, error))?;
                // Says at once when the disk is full; the size stays, for the sake of
                // `CacheDirectory`'s rule 2.
                let keep_size = rustix::fs::FallocateFlags::KEEP_SIZE;
                let size = key.digest.size();
                let reserved = rustix::fs::fallocate(&incoming.file, keep_size, 0, size);
                Ok((incoming, reserved != Err(Errno::NOSPC)))
            };
            let (incoming, fits) = blocking("create an input file", create).await??;
            let result = match fits {
                false => Err(storage::Error::Full(format!(
                    "the file system of {} is full",
                    self.path().display()
                ))),
                true => {
                    let file = incoming.file.clone();
                    self.storage.read_to_file(instance, &key.digest, file).await
                }
            };
            let cache = self.clone();
            match result {
                Ok(()) => {
                    let publish = move || {
                        let _claim = claim;
                        let inode_to_keep = || cache.usable_inode(&key);
                        let inode = cache.directory.publish(incoming, &key, 0, inode_to_keep);
                        let inode = inode.map_err(|error| cache.disk_fault(&key, error))?;
                        let mut pinned = PinnedFiles::none(&cache);
                        pinned.handles.push(Some(cache.admit(key, inode)));
                        cache.evict_to_fit();
                        Ok((pinned, Vec::new()))
                    };
                    return blocking("keep an input file", publish).await?;
                }
                Err(storage::Error::Missing(_)) => {
                    return Ok((PinnedFiles::none(self), vec![key.digest]));
                }
                Err(storage::Error::Full(_)) => {
                    let evict = move || {
                        drop(incoming);
                        attempts < EVICTION_ATTEMPTS && cache.evict_when_full(&key)
                    };
                    if !blocking("evict input files", evict).await? {
                        return Err(self.disk_fault(&key, io::ErrorKind::StorageFull.into()));
                    }
                    attempts += 1;
                }
                Err(error) => {
                    let what = format!("obtain input file {}", key.digest);
                    return Err(Fault::of_storage(what, error));
                }
            }
        }
    }
}

fn none_missing(missing: HashSet<Digest>) -> Result<(), Fault> {
    if missing.is_empty() {
        return Ok(());
    }
    let mut missing: Vec<Digest> = missing.into_iter().collect();
    missing.sort_unstable();
    Err(Fault::of_storage(
        "obtain the input files",
        storage::Error::Missing(missing),
    ))
}
