//! The files of the cache on disk.
//!
//! ```text
//! DIRECTORY/00 … ff/    by the first byte of the hash: FUNCTION-HASH-SIZE+x, FUNCTION-HASH-SIZE-x
//!                       (executable or not), and …+x.1, …+x.2, extra inodes of a file that
//!                       is hard-linked several times into one input root, or has so many links
//!                       that one inode does not take them
//! DIRECTORY/incoming/   what is being written; emptied at start
//! DIRECTORY/boot_id     of the host when a worker last started (random(4))
//! DIRECTORY/starts      how often a worker started (fencing.rs)
//! ```
//!
//! 1. A name in a shard appears by one rename or link, after content, owner, mode and mtime are
//!    final and the content is verified. So what a killed worker leaves in shards is whole.
//! 2. After a crash of the host a file may have lost content that was not yet written back. Most
//!    show it by their size; after a start of the host, what was used less than `WRITE_BACK` before the newest
//!    use is removed whatever its size.
//! 3. Files belong to the worker, are 0444 or 0555, and have the mtime 2000-01-01T00:00:00Z, as
//!    Buildbarn's. Nobody has them open for writing.
//! 4. Every link and unlink sets the ctime, so that it tells at the next start when a file was used; of
//!    a file that reflinks are made of, when it was added.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, FlockOperation, Mode, OFlags, Stat},
    io::Errno,
};
use walkdir::WalkDir;

use super::{
    key::FileKey,
    worker_files::{copy_content, has_expected_attributes, set_mode_and_mtime},
};

const SHARDS: usize = 256;

/// Seconds after which the kernel has written a change to the disk; by default after 35
/// (vm.dirty_expire_centisecs, vm.dirty_writeback_centisecs).
const WRITE_BACK: i64 = 120;

/// Key, inode index, inode number, and last use as in `ScannedFile`.
type Scanned = (FileKey, u32, u64, (bool, i64, i64));

pub(super) struct CacheDirectory {
    path: PathBuf,
    /// The directory itself, locked for as long as this worker runs.
    _lock: OwnedFd,
    shards: Vec<OwnedFd>,
    incoming: Arc<OwnedFd>,
    sequence: AtomicU64,
}

/// A file that was there at start.
pub(super) struct ScannedFile {
    pub key: FileKey,
    pub inode: u64,
    /// Whether it has links in input roots, which a worker that was killed left; then its ctime, in seconds and
    /// nanoseconds.
    pub last_used: (bool, i64, i64),
}

/// A file being written; removed on drop unless published.
pub(super) struct IncomingFile {
    directory: Arc<OwnedFd>,
    /// The name in `incoming`; empty once the file is published.
    name: String,
    pub file: Arc<File>,
}

impl Drop for IncomingFile {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            let _ = rustix::fs::unlinkat(&*self.directory, &self.name, AtFlags::empty());
        }
    }
}

impl CacheDirectory {
    /// Opens the directory, makes what is not in it, and removes what an earlier worker was writing. EWOULDBLOCK
    /// when another worker uses it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        // An action that escaped its root must not even learn what is cached.
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o700))?;
        let within = |name: &str| -> io::Result<OwnedFd> {
            match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = flags | OFlags::NOFOLLOW;
            Ok(rustix::fs::openat(&directory, name, flags, Mode::empty())?)
        };
        let shards = (0..SHARDS)
            .map(|shard| within(&format!("{shard:02x}")))
            .collect::<io::Result<_>>()?;
        let files = CacheDirectory {
            path: path.to_owned(),
            incoming: Arc::new(within("incoming")?),
            shards,
            sequence: AtomicU64::new(0),
            _lock: directory,
        };
        for entry in std::fs::read_dir(path.join("incoming"))? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(files)
    }

    /// Whether somebody has removed a part of it, so that nothing can be written there until it is opened anew.
    pub(super) fn is_removed(&self) -> bool {
        let parts = self.shards.iter().chain([&*self.incoming]);
        let is_gone = |part: &OwnedFd| rustix::fs::fstat(part).is_ok_and(|it| it.st_nlink == 0);
        parts.into_iter().any(is_gone)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of one of a file's inodes.
    pub(super) fn path_of(&self, key: &FileKey, inode_index: u32) -> PathBuf {
        let mut name = String::new();
        key.write_name(inode_index, &mut name);
        self.path.join(format!("{:02x}", key.shard())).join(name)
    }

    pub(super) fn shards(&self) -> &[OwnedFd] {
        &self.shards
    }

    /// Every file that is on disk, the longest unused first. Removes what nobody can use, and extra inodes of files.
    pub(super) fn scan(&self) -> io::Result<Vec<ScannedFile>> {
        // A directory's inodes are read one by one: two threads take half of the time.
        let (low, high) = std::thread::scope(|scope| {
            let low = scope.spawn(|| self.scan_shards(0..SHARDS / 2));
            let high = self.scan_shards(SHARDS / 2..SHARDS);
            (
                low.join()
                    .unwrap_or_else(|_| Err(io::ErrorKind::Other.into())),
                high,
            )
        });
        let mut files = low?;
        files.append(&mut high?);
        files.sort_unstable();
        let mut found: Vec<ScannedFile> = Vec::new();
        for (key, inode_index, inode, last_used) in files {
            match inode_index {
                0 => found.push(ScannedFile {
                    key,
                    inode,
                    last_used,
                }),
                // They are seldom, and quickly made of the first one, which is read before it is used.
                _ => self.remove_inode(&key, inode_index)?,
            }
        }
        found.sort_unstable_by_key(|found| found.last_used);
        let boot_id = crate::daemon::boot_id()?;
        let known = self.path.join("boot_id");
        if !std::fs::read_to_string(&known).is_ok_and(|before| before == boot_id) {
            let changed = |found: &ScannedFile| found.last_used.1;
            let newest = found.iter().map(changed).max().unwrap_or(0);
            let (old, doubtful): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|found| changed(found) < newest - WRITE_BACK);
            for doubtful in doubtful {
                self.remove(&doubtful.key, 1)?;
            }
            found = old;
            std::fs::write(&known, boot_id)?;
        }
        Ok(found)
    }

    /// Whether size, mode, owner and mtime of one of a file's inodes are right; also when it is not there.
    pub(super) fn is_intact_or_absent(&self, key: &FileKey, inode_index: u32) -> bool {
        match self.stat(key, inode_index) {
            Ok(stat) => has_expected_attributes(&stat, key, rustix::process::geteuid().as_raw()),
            Err(error) => error == Errno::NOENT,
        }
    }

    fn stat(&self, key: &FileKey, inode_index: u32) -> Result<Stat, Errno> {
        let mut name = String::new();
        key.write_name(inode_index, &mut name);
        let shard = &self.shards[key.shard()];
        rustix::fs::statat(shard, &name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Every usable inode of a file in some of the shards. Removes all else from them.
    fn scan_shards(&self, shards: std::ops::Range<usize>) -> io::Result<Vec<Scanned>> {
        let owner = rustix::process::geteuid().as_raw();
        let mut files = Vec::new();
        for shard_index in shards {
            let shard = &self.shards[shard_index];
            let path = self.path.join(format!("{shard_index:02x}"));
            for entry in WalkDir::new(path).min_depth(1).max_depth(1) {
                let entry = entry?;
                let name = entry.file_name();
                let stat = rustix::fs::statat(shard, name, AtFlags::SYMLINK_NOFOLLOW)?;
                let usable = name
                    .to_str()
                    .and_then(FileKey::parse_name)
                    .filter(|(key, _)| {
                        key.shard() == shard_index && has_expected_attributes(&stat, key, owner)
                    });
                match usable {
                    Some((key, extra)) => {
                        let changed = (stat.st_nlink > 1, stat.st_ctime, stat.st_ctime_nsec as i64);
                        files.push((key, extra, stat.st_ino, changed));
                    }
                    None if entry.file_type().is_dir() => std::fs::remove_dir_all(entry.path())?,
                    None => std::fs::remove_file(entry.path())?,
                }
            }
        }
        Ok(files)
    }

    /// Creates a file in `incoming`, to be written and published.
    pub(super) fn create_incoming(&self) -> io::Result<IncomingFile> {
        let name = self.sequence.fetch_add(1, Ordering::Relaxed).to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&*self.incoming, &name, flags, Mode::from_raw_mode(0o600))?;
        Ok(IncomingFile {
            directory: self.incoming.clone(),
            name,
            file: Arc::new(file.into()),
        })
    }

    /// Makes a written and verified file one of the inodes of `key`, and returns its inode number.
    ///
    /// Where the name is taken, `inode_to_keep` tells the inode number of what is there, if that is to stay, which is
    /// returned then: input roots may have it, and count on the cache to have it too.
    pub(super) fn publish(
        &self,
        mut incoming: IncomingFile,
        key: &FileKey,
        inode_index: u32,
        inode_to_keep: impl Fn() -> Option<u64>,
    ) -> io::Result<u64> {
        set_mode_and_mtime(incoming.file.as_fd(), key.executable)?;
        let inode = rustix::fs::fstat(&incoming.file)?.st_ino;
        let mut name = String::new();
        key.write_name(inode_index, &mut name);
        loop {
            match self.move_to_shard(&incoming.name, &self.shards[key.shard()], &name) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(inode) = inode_to_keep() {
                return Ok(inode);
            }
            // A file that the cache does not know of.
            self.remove_inode(key, inode_index)?;
        }
        incoming.name.clear();
        Ok(inode)
    }

    /// Moves a file from `incoming` to its name in a shard; EEXIST when that is taken.
    fn move_to_shard(&self, from: &str, shard: &OwnedFd, name: &str) -> Result<(), Errno> {
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(&*self.incoming, from, shard, name, flags) {
            // Not every file system has that.
            Err(Errno::INVAL) => {
                rustix::fs::linkat(&*self.incoming, from, shard, name, AtFlags::empty())?;
                rustix::fs::unlinkat(&*self.incoming, from, AtFlags::empty())
            }
            moved => moved,
        }
    }

    /// Whether one of the inodes of `key` is on the disk, has this inode number, and is as it was made.
    pub(super) fn has_intact_inode(&self, key: &FileKey, inode_index: u32, inode: u64) -> bool {
        let owner = rustix::process::geteuid().as_raw();
        let stat = self.stat(key, inode_index);
        stat.is_ok_and(|stat| stat.st_ino == inode && has_expected_attributes(&stat, key, owner))
    }

    /// Writes the first inode of a file whose content is known to match its digest; `inode_to_keep` is as in `publish`.
    pub(super) fn write(
        &self,
        key: &FileKey,
        content: &[u8],
        inode_to_keep: impl Fn() -> Option<u64>,
    ) -> io::Result<u64> {
        let incoming = self.create_incoming()?;
        (&*incoming.file).write_all(content)?;
        self.publish(incoming, key, 0, inode_to_keep)
    }

    /// Makes a file of an input root a hard link to one of the inodes of `key`. `buffer` is used again and again.
    pub(super) fn link_into_root(
        &self,
        key: &FileKey,
        inode_index: u32,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), Errno> {
        key.write_name(inode_index, buffer);
        let shard = &self.shards[key.shard()];
        rustix::fs::linkat(shard, buffer.as_str(), directory, name, AtFlags::empty())
    }

    /// Makes a file that the worker owns the first inode of `key`, by one more link to it; returns its inode number.
    pub(super) fn link_into_cache(
        &self,
        key: &FileKey,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Result<u64, Errno> {
        let mut target = String::new();
        key.write_name(0, &mut target);
        let shard = &self.shards[key.shard()];
        rustix::fs::linkat(directory, name, shard, &target, AtFlags::empty())?;
        Ok(rustix::fs::statat(shard, &target, AtFlags::SYMLINK_NOFOLLOW)?.st_ino)
    }

    /// Makes one of the inodes of `key`, with the content of `source`, whose blocks it shares where the file system
    /// can; returns its inode number.
    pub(super) fn duplicate(
        &self,
        source: &File,
        key: &FileKey,
        inode_index: u32,
    ) -> io::Result<u64> {
        let incoming = self.create_incoming()?;
        copy_content(source, &incoming.file, key.digest.size())?;
        // It is made because no inode with this index is known.
        self.publish(incoming, key, inode_index, || None)
    }

    /// Bytes and inodes that unprivileged users can still take on the file system.
    pub(super) fn free(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstatvfs(&*self.incoming)?;
        // Some file systems have no fixed number of inodes, and say 0.
        let inodes = match stat.f_files {
            0 => u64::MAX,
            _ => stat.f_favail,
        };
        Ok((stat.f_bavail.saturating_mul(stat.f_frsize), inodes))
    }

    /// Finds out, by trying, whether copies share blocks on this file system.
    pub(super) fn probe_reflinks(&self) -> io::Result<bool> {
        let (one, other) = (self.create_incoming()?, self.create_incoming()?);
        (&*one.file).write_all(&[0; 4096])?;
        Ok(reflink_copy::reflink_file(&one.file, &other.file).is_ok())
    }

    /// Opens one of a file's inodes for reading.
    pub(super) fn open_inode(&self, key: &FileKey, inode_index: u32) -> io::Result<File> {
        let mut name = String::new();
        key.write_name(inode_index, &mut name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let shard = &self.shards[key.shard()];
        Ok(rustix::fs::openat(shard, &name, flags, Mode::empty())?.into())
    }

    /// Removes all inodes of a file, which has so many of them.
    pub(super) fn remove(&self, key: &FileKey, inodes: u32) -> io::Result<()> {
        // The last one first, so that a worker killed in between leaves no gap.
        for inode_index in (0..inodes).rev() {
            self.remove_inode(key, inode_index)?;
        }
        Ok(())
    }

    /// Removes one of a file's inodes, if it is there.
    pub(super) fn remove_inode(&self, key: &FileKey, inode_index: u32) -> io::Result<()> {
        let mut name = String::new();
        key.write_name(inode_index, &mut name);
        match rustix::fs::unlinkat(&self.shards[key.shard()], &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether an error says that the disk, or a quota, is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn an_inode_that_input_roots_may_have_is_not_replaced() {
        let place = tempfile::tempdir().unwrap();
        let directory = CacheDirectory::open(place.path()).unwrap();
        let key = FileKey {
            digest: DigestFunction::Sha256.digest_of(b"content"),
            executable: false,
        };
        let write = |known: Option<u64>| {
            let inode_to_keep =
                || known.filter(|inode| directory.has_intact_inode(&key, 0, *inode));
            directory.write(&key, b"content", inode_to_keep).unwrap()
        };
        let first = write(None);
        assert_eq!(write(Some(first)), first);
        assert!(directory.has_intact_inode(&key, 0, first));
        // A leftover that nobody knows is replaced.
        let second = write(None);
        assert!(second != first && directory.has_intact_inode(&key, 0, second));
        assert!(!directory.has_intact_inode(&key, 0, first));
        // So is one that somebody changed.
        let path = directory.path_of(&key, 0);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .unwrap();
        let third = write(Some(second));
        assert!(directory.has_intact_inode(&key, 0, third));
        assert_eq!(
            std::fs::read_dir(place.path().join("incoming"))
                .unwrap()
                .count(),
            0
        );
    }
}
