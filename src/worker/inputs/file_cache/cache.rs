//! The cache itself: the files on disk, and what is known of them.

use std::{
    io,
    path::Path,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;

use super::{
    cache_counts::{CacheUses, VerificationCounts},
    cache_directory::{self, CacheDirectory},
    index::{CacheIndex, CachedFile},
    key::FileKey,
    watch::ChangeWatch,
};
use crate::{
    digest::Digest,
    storage::Backend,
    worker::{fault::Fault, lru::Handle},
};

#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    pub bytes: u64,
    pub files: u64,
    /// How many bytes of the file system are left free.
    pub minimum_free: u64,
}

pub struct FileCache {
    pub(super) directory: CacheDirectory,
    pub(super) limits: CacheLimits,
    pub(super) storage: Backend,
    pub(super) index: Arc<Mutex<CacheIndex>>,
    /// Held while extra inodes of files are made or removed.
    pub(super) changing_extra_inodes: Mutex<()>,
    /// Lets go of an idle input root or a stashed subtree; `false` when there are none.
    pub(super) reclaim: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    /// Whether files can share blocks on this file system.
    pub(super) supports_reflinks: bool,
    /// Hears of what others change; `None` where the host allows no more watches.
    pub(super) watch: Option<ChangeWatch>,
    /// How often somebody else changed files; held while they are removed.
    pub(super) modifications: Mutex<u64>,
    pub(super) verified: VerificationCounts,
    pub(super) uses: CacheUses,
}

impl FileCache {
    /// Opens the cache, with the files that an earlier worker left. Blocks for a second per million files.
    pub fn open(path: &Path, limits: CacheLimits, storage: Backend) -> io::Result<Self> {
        let directory = CacheDirectory::open(path)?;
        let supports_reflinks = directory.probe_reflinks()?;
        let mut index = CacheIndex::default();
        for found in directory.scan()? {
            let file = CachedFile {
                inode: found.inode,
                verified: false,
            };
            let size = found.key.digest.size();
            index.files.insert(found.key, file, size);
        }
        // Before anything is used; what was changed earlier shows by its size, mode or mtime.
        let watch = ChangeWatch::new(directory.shards()).inspect_err(|error| {
            tracing::warn!(
                directory = %path.display(),
                %error,
                "could not watch the cache for changes by others; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            );
        });
        let cache = FileCache {
            directory,
            limits,
            storage,
            index: Arc::new(Mutex::new(index)),
            supports_reflinks,
            changing_extra_inodes: Mutex::new(()),
            reclaim: OnceLock::new(),
            watch: watch.ok(),
            modifications: Mutex::default(),
            verified: VerificationCounts::default(),
            uses: CacheUses::default(),
        };
        cache.evict_to_fit();
        Ok(cache)
    }

    /// Has large files fetched by their chunks, as far as other files of the cache have these.
    pub fn offer_local_files(self: &Arc<Self>) {
        // The storage is the cache's, so that it must not keep the cache.
        let cache = Arc::downgrade(self);
        let open = move |digest: &Digest| {
            let cache = cache.upgrade()?;
            let key = |executable| FileKey {
                digest: *digest,
                executable,
            };
            let open = |executable| cache.directory.open_inode(&key(executable), 0).ok();
            open(false).or_else(|| open(true))
        };
        self.storage.set_local_files(Arc::new(open));
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// How many bytes are to stay free on the file system.
    pub fn minimum_free(&self) -> u64 {
        self.limits.minimum_free
    }

    /// How the cache was used since the start.
    pub fn uses(&self) -> &CacheUses {
        &self.uses
    }

    pub fn limits(&self) -> CacheLimits {
        self.limits
    }

    /// How many files and bytes are in the cache.
    pub fn usage(&self) -> (u64, u64) {
        let index = self.index.lock();
        (index.files.len() as u64, index.files.weight())
    }

    /// The digests of those of `keys` that are not in the cache, each once.
    pub fn absent(&self, keys: Vec<FileKey>) -> Vec<Digest> {
        let index = self.index.lock();
        let mut digests: Vec<Digest> = keys
            .into_iter()
            .filter(|key| !index.files.contains(key))
            .map(|key| key.digest)
            .collect();
        drop(index);
        digests.sort_unstable();
        digests.dedup();
        digests
    }

    /// The inode number of a file's first inode, if this worker has read its content, and it is on the disk as it was
    /// made.
    pub(super) fn usable_inode(&self, key: &FileKey) -> Option<u64> {
        let known = self.index.lock().files.peek(key).copied();
        let file = known.filter(|file| file.verified)?;
        self.directory
            .has_intact_inode(key, 0, file.inode)
            .then_some(file.inode)
    }

    /// Counts and pins a file whose first inode is on disk now, and evicts others for it.
    pub(super) fn admit(&self, key: FileKey, inode: u64) -> Handle {
        let handle = {
            let mut index = self.index.lock();
            let file = CachedFile {
                inode,
                verified: true,
            };
            index.files.insert(key, file, key.digest.size());
            // One that was gone from the disk has a new inode.
            if let Some(known) = index.files.peek_mut(&key) {
                *known = file;
            }
            index.files.pin(&key).expect("just inserted")
        };
        self.enforce_limits();
        handle
    }

    /// An error when somebody has removed the directories of the cache under this worker. Blocks.
    pub fn require_directory(&self) -> Result<(), Fault> {
        match self.directory.is_removed() {
            false => Ok(()),
            true => Err(Fault::Unavailable(format!(
                "somebody removed what was in {}, the cache of this worker, while bb_worker ran; restart bb_worker, which makes it anew",
                self.path().display()
            ))),
        }
    }

    pub(super) fn disk_fault(&self, key: &FileKey, error: io::Error) -> Fault {
        if error.kind() == io::ErrorKind::NotFound
            && let Err(fault) = self.require_directory()
        {
            return fault;
        }
        let remedy = match cache_directory::is_full(&error) {
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
