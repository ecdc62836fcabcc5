//! Whether cached files still have the content that their digests say: disks and memory fail, and who
//! is root can write to anything.
//!
//! 1. What this worker fetched, or took from an action, it read then. What an earlier worker left is
//!    read before it is used for the first time.
//! 2. In the background all files are read, one after another and again and again, so many bytes a
//!    second, through one buffer.
//! 3. What is wrong is removed, counted and fetched again. When it was used already, all that is kept of
//!    input roots is forgotten, and actions that ran meanwhile fail.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    panic::resume_unwind,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    cache::FileCache, cache_counts::VerificationCounts, key::FileKey,
    worker_files::has_expected_attributes,
};
use crate::digest::Hasher;

/// How many bytes are read at a time.
const READ_SIZE: usize = 64 << 10;
/// How many bytes looking at a file counts for, beside those that are read.
const PER_FILE: u64 = 4 << 10;
/// The time between portions of what is read in the background.
const PORTION_INTERVAL: Duration = Duration::from_secs(1);
/// How long the background rests after having read all files.
const PASS_PAUSE: Duration = Duration::from_secs(600);
const VERIFICATION_THREADS: usize = 8;

/// What became of reading a portion of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion {
    Read,
    /// It ended with the last file; the next portion begins anew.
    Last,
    /// The cache is dropped.
    Gone,
}

/// A file that is being read.
struct FileBeingRead {
    key: FileKey,
    inode_index: u32,
    file: File,
    inode: u64,
    hasher: Hasher,
}

/// Reads a cache in the background, in portions.
pub struct Verifier {
    cache: Weak<FileCache>,
    /// Where `Lru::next` goes on.
    next_place: usize,
    /// The last file, and the next of its extra inodes that is to be read.
    extra_inodes: Option<(FileKey, u32)>,
    reading: Option<FileBeingRead>,
    buffer: Vec<u8>,
}

impl Verifier {
    pub fn new(cache: &Arc<FileCache>) -> Self {
        Verifier {
            cache: Arc::downgrade(cache),
            next_place: 0,
            extra_inodes: None,
            reading: None,
            buffer: vec![0; READ_SIZE],
        }
    }

    /// Starts a thread of low priority that reads so many bytes a second for as long as the cache lives.
    pub fn start(mut self, bytes: u64) -> io::Result<()> {
        let verify = move || {
            // It may be forbidden, which does no harm.
            let _ = rustix::process::nice(19);
            loop {
                match self.portion(bytes) {
                    Portion::Read => std::thread::sleep(PORTION_INTERVAL),
                    Portion::Last => std::thread::sleep(PASS_PAUSE),
                    Portion::Gone => return,
                }
            }
        };
        let thread = std::thread::Builder::new().name("verify-cache".to_owned());
        thread.spawn(verify).map(drop)
    }

    /// Reads so many bytes, from where the last portion ended.
    pub fn portion(&mut self, bytes: u64) -> Portion {
        let Some(cache) = self.cache.upgrade() else {
            return Portion::Gone;
        };
        let mut rest = bytes;
        while rest > 0 {
            let Some(mut reading) = self.reading.take() else {
                let Some((key, inode_index)) = self.next(&cache) else {
                    self.next_place = 0;
                    return Portion::Last;
                };
                self.reading = cache.open_for_reading(key, inode_index);
                rest = rest.saturating_sub(PER_FILE);
                continue;
            };
            let most = self
                .buffer
                .len()
                .min(usize::try_from(rest).unwrap_or(READ_SIZE));
            let read = read_at(
                &reading.file,
                &mut self.buffer[..most],
                reading.hasher.size(),
            );
            match read {
                Ok(0) => cache.check_digest(reading, None),
                Ok(length) => {
                    reading.hasher.update(&self.buffer[..length]);
                    rest -= length as u64;
                    self.reading = Some(reading);
                }
                Err(error) => cache.check_digest(reading, Some(error)),
            }
        }
        Portion::Read
    }

    /// The next file to read, and which of its inodes; `None` after the last one.
    fn next(&mut self, cache: &FileCache) -> Option<(FileKey, u32)> {
        let index = cache.index.lock();
        if let Some((key, inode_index)) = self.extra_inodes.take()
            && inode_index < index.inodes_of(&key)
        {
            self.extra_inodes = Some((key, inode_index + 1));
            return Some((key, inode_index));
        }
        let (key, _, place) = index.files.next(self.next_place)?;
        self.next_place = place;
        self.extra_inodes = Some((*key, 1));
        Some((*key, 0))
    }
}

impl FileCache {
    pub fn verified(&self) -> &VerificationCounts {
        &self.verified
    }

    /// Opens one of a file's inodes; `None` when it is gone, or already looks wrong.
    fn open_for_reading(&self, key: FileKey, inode_index: u32) -> Option<FileBeingRead> {
        let file = self.directory.open_inode(&key, inode_index).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        if !has_expected_attributes(&stat, &key, rustix::process::geteuid().as_raw()) {
            self.report_wrong(&key, inode_index, "has another size, mode, owner or mtime");
            return None;
        }
        Some(FileBeingRead {
            hasher: key.digest.function().hasher(key.digest.size()),
            inode: stat.st_ino,
            key,
            inode_index,
            file,
        })
    }

    /// Compares the digest of an inode that was read to its end, or to an error, with that of its file.
    fn check_digest(&self, reading: FileBeingRead, error: Option<io::Error>) {
        let FileBeingRead {
            key,
            inode_index,
            file,
            hasher,
            ..
        } = reading;
        self.verified.files.fetch_add(1, Ordering::Relaxed);
        let counted = &self.verified.bytes;
        counted.fetch_add(hasher.size(), Ordering::Relaxed);
        // What was evicted meanwhile is no concern any more.
        let gone = rustix::fs::fstat(&file).is_ok_and(|stat| stat.st_nlink == 0);
        let found = hasher.finish();
        match error {
            None if found == key.digest => {}
            _ if gone || !self.knows(&key, reading.inode) => {}
            None => self.report_wrong(&key, inode_index, &format!("has the content {found}")),
            Some(error) => {
                self.report_wrong(&key, inode_index, &format!("cannot be read: {error}"))
            }
        }
    }

    /// Whether the cache knows an inode to be one of a file's.
    fn knows(&self, key: &FileKey, inode: u64) -> bool {
        let index = self.index.lock();
        let first = index.files.peek(key).map(|file| file.inode);
        first == Some(inode) || index.has_extra(key, inode)
    }

    /// Counts and removes a file that is wrong, and that may have been used.
    fn report_wrong(&self, key: &FileKey, inode_index: u32, what: &str) {
        self.verified.wrong.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path_of(key, inode_index);
        self.remove_modified(
            &[(*key, inode_index)],
            &format!(
                "a cached file is not what it was, by a fault of the disk or the memory, or because somebody wrote to it: {} {what}",
                path.display()
            ),
        );
    }

    /// Reads files that an earlier worker left, and removes those that are wrong, which are returned. The
    /// error is that of a file that could not be opened, and of which nothing is known thus. Blocks.
    pub(super) fn verify_first_use(&self, mut keys: Vec<FileKey>) -> io::Result<Vec<FileKey>> {
        keys.sort_unstable();
        keys.dedup();
        let began = std::time::Instant::now();
        let threads =
            std::thread::available_parallelism().map_or(1, |n| n.get().min(VERIFICATION_THREADS));
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = vec![0; READ_SIZE];
            let mut wrong = Vec::new();
            while let Some(key) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
                // One that is gone is found so when it is linked.
                if let Some(inode) = self.wrong_inode(key, &mut buffer)? {
                    wrong.push((*key, inode));
                }
            }
            Ok(wrong)
        };
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(keys.len()))
                .map(|_| scope.spawn(work))
                .collect();
            found.push(work());
            for other in others {
                // What it found must not be taken for nothing.
                found.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
        });
        let found: io::Result<Vec<Vec<(FileKey, u64)>>> = found.into_iter().collect();
        let wrong = found?.concat();
        tracing::debug!(
            files = keys.len(),
            microseconds = began.elapsed().as_micros() as u64,
            "read files that an earlier worker left"
        );
        self.remove_at_first_use(&wrong);
        let wrong: Vec<FileKey> = wrong.into_iter().map(|(key, _)| key).collect();
        // Not before: others use what is marked.
        let unusable: HashSet<&FileKey> = wrong.iter().collect();
        let mut index = self.index.lock();
        for key in keys.iter().filter(|key| !unusable.contains(key)) {
            if let Some(file) = index.files.peek_mut(key) {
                file.verified = true;
            }
        }
        drop(index);
        Ok(wrong)
    }

    /// Removes files whose first inodes are wrong, unless others have done that meanwhile.
    fn remove_at_first_use(&self, wrong: &[(FileKey, u64)]) {
        let index = self.index.lock();
        // Others may have read the same file, and used it, before it went wrong.
        let (mut used, mut unused) = (Vec::new(), Vec::new());
        for (key, inode) in wrong {
            match index.files.peek(key) {
                Some(file) if file.inode == *inode && file.verified => used.push((*key, 0)),
                Some(file) if file.inode == *inode => unused.push(*key),
                _ => {}
            }
        }
        drop(index);
        let count = (used.len() + unused.len()) as u64;
        self.verified.wrong.fetch_add(count, Ordering::Relaxed);
        if !used.is_empty() {
            self.remove_modified(
                &used,
                "cached files cannot be read any more, by a fault of the disk",
            );
        }
        if let Some(first) = unused.first() {
            tracing::error!(
                files = unused.len(),
                first = %self.directory.path_of(first, 0).display(),
                "cached files that were there at start are not what they were, by a fault of the disk or the memory, or because somebody wrote to them; they are removed and fetched again"
            );
            self.remove_wrong(&unused);
        }
    }

    /// The inode number of a file's first inode, if its content is not what it should be; `None` also when it is not
    /// there. Errors are a shortage of this process's or the host's, such as EMFILE, and say nothing of the file.
    fn wrong_inode(&self, key: &FileKey, buffer: &mut [u8]) -> io::Result<Option<u64>> {
        let file = match self.directory.open_inode(key, 0) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Err(error),
                    _ => Ok(self.index.lock().files.peek(key).map(|file| file.inode)),
                };
            }
        };
        let inode = rustix::fs::fstat(&file)?.st_ino;
        let mut hasher = key.digest.function().hasher(key.digest.size());
        self.verified.files.fetch_add(1, Ordering::Relaxed);
        loop {
            match read_at(&file, buffer, hasher.size()) {
                Ok(0) => break,
                Ok(length) => hasher.update(&buffer[..length]),
                Err(_) => return Ok(Some(inode)),
            }
        }
        self.verified
            .bytes
            .fetch_add(hasher.size(), Ordering::Relaxed);
        Ok((hasher.finish() != key.digest).then_some(inode))
    }
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
