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
//! 4. Every link and unlink sets the ctime, so that it tells at the next start when a file was used.

#![expect(unsafe_code, reason = "it calls what has no safe wrapper")]

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT},
    io::Errno,
};
use walkdir::WalkDir;

use super::key::FileKey;
use crate::worker::attributes;

const SHARDS: usize = 256;

/// Of every input file, and of every directory in an input root: 2000-01-01T00:00:00Z.
pub const MTIME: i64 = 946_684_800;

/// Seconds after which the kernel has written a change to the disk; by default after 35
/// (vm.dirty_expire_centisecs, vm.dirty_writeback_centisecs).
const WRITE_BACK: i64 = 120;

fn mode(executable: bool) -> Mode {
    Mode::from_raw_mode(if executable { 0o555 } else { 0o444 })
}

/// Key, which of its inodes (0 is the first), inode number, last use as in `ScannedFile`.
type Scanned = (FileKey, u32, u64, (bool, i64, i64));

pub(super) struct CacheDirectory {
    path: PathBuf,
    /// Locked for as long as this worker runs.
    _lock: OwnedFd,
    shards: Vec<OwnedFd>,
    incoming: Arc<OwnedFd>,
    sequence: AtomicU64,
}

/// A file that was there at start.
pub(super) struct ScannedFile {
    pub key: FileKey,
    pub inode: u64,
    /// Seconds and nanoseconds; in front of it whether an input root has it, of which a worker that
    /// was killed left the links.
    pub last_used: (bool, i64, i64),
}

/// A file being written; removed on drop unless published.
pub(super) struct IncomingFile {
    directory: Arc<OwnedFd>,
    /// Empty once published.
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
    /// Makes what is not there, and removes what was being written. EWOULDBLOCK when another
    /// worker uses the directory.
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

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Of the n-th extra inode, or of the first one (0).
    pub(super) fn path_of(&self, key: &FileKey, number: u32) -> PathBuf {
        let mut name = String::new();
        key.write_name(number, &mut name);
        self.path.join(format!("{:02x}", key.shard())).join(name)
    }

    pub(super) fn shards(&self) -> &[OwnedFd] {
        &self.shards
    }

    /// What is there, the longest unused first. Removes what nobody can use, and extra inodes of files.
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
        for (key, number, inode, last_used) in files {
            match number {
                0 => found.push(ScannedFile {
                    key,
                    inode,
                    last_used,
                }),
                // They are seldom, and quickly made of the first one, which is read before it is used.
                _ => self.remove_inode(&key, number)?,
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

    /// Whether size, mode, owner and mtime of the n-th extra inode, or of the first one (0), are right; also
    /// when it is not there.
    pub(super) fn is_intact(&self, key: &FileKey, number: u32) -> bool {
        match self.stat(key, number) {
            Ok(stat) => is_intact(&stat, key, rustix::process::geteuid().as_raw()),
            Err(error) => error == Errno::NOENT,
        }
    }

    fn stat(&self, key: &FileKey, number: u32) -> Result<Stat, Errno> {
        let mut name = String::new();
        key.write_name(number, &mut name);
        let shard = &self.shards[key.shard()];
        rustix::fs::statat(shard, &name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Every usable file with the number among its inodes, inode number and last use. Removes all else.
    fn scan_shards(&self, shards: std::ops::Range<usize>) -> io::Result<Vec<Scanned>> {
        let owner = rustix::process::geteuid().as_raw();
        let mut files = Vec::new();
        for number in shards {
            let shard = &self.shards[number];
            let path = self.path.join(format!("{number:02x}"));
            for entry in WalkDir::new(path).min_depth(1).max_depth(1) {
                let entry = entry?;
                let name = entry.file_name();
                let stat = rustix::fs::statat(shard, name, AtFlags::SYMLINK_NOFOLLOW)?;
                let usable = name
                    .to_str()
                    .and_then(FileKey::parse_name)
                    .filter(|(key, _)| key.shard() == number && is_intact(&stat, key, owner));
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

    pub(super) fn create(&self) -> io::Result<IncomingFile> {
        let name = self.sequence.fetch_add(1, Ordering::Relaxed).to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&*self.incoming, &name, flags, Mode::from_raw_mode(0o600))?;
        Ok(IncomingFile {
            directory: self.incoming.clone(),
            name,
            file: Arc::new(file.into()),
        })
    }

    /// Makes a written and verified file the n-th extra inode of `key`, or the first one (0); tells its inode number.
    ///
    /// Where the name is taken, `kept` tells the number of the inode that is there, if that is to stay, which is
    /// returned then: input roots may have it, and count on the cache to have it too.
    pub(super) fn publish(
        &self,
        mut incoming: IncomingFile,
        key: &FileKey,
        number: u32,
        kept: impl Fn() -> Option<u64>,
    ) -> io::Result<u64> {
        finish(incoming.file.as_fd(), key.executable)?;
        let inode = rustix::fs::fstat(&incoming.file)?.st_ino;
        let mut name = String::new();
        key.write_name(number, &mut name);
        loop {
            match self.move_to_shard(&incoming.name, &self.shards[key.shard()], &name) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(inode) = kept() {
                return Ok(inode);
            }
            // A file that the cache does not know of.
            self.remove_inode(key, number)?;
        }
        incoming.name.clear();
        Ok(inode)
    }

    /// EEXIST when the name is taken.
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

    /// Whether the n-th extra inode of `key`, or the first one (0), is on the disk, has this inode number, and is
    /// as it was made.
    pub(super) fn is_inode(&self, key: &FileKey, number: u32, inode: u64) -> bool {
        let owner = rustix::process::geteuid().as_raw();
        let stat = self.stat(key, number);
        stat.is_ok_and(|stat| stat.st_ino == inode && is_intact(&stat, key, owner))
    }

    /// Writes a file whose content is known to match its digest; `kept` is as in `publish`.
    pub(super) fn write(
        &self,
        key: &FileKey,
        content: &[u8],
        kept: impl Fn() -> Option<u64>,
    ) -> io::Result<u64> {
        let incoming = self.create()?;
        (&*incoming.file).write_all(content)?;
        self.publish(incoming, key, 0, kept)
    }

    /// Links the n-th extra inode of `key`, or the first one (0), into a directory.
    pub(super) fn link(
        &self,
        key: &FileKey,
        number: u32,
        directory: BorrowedFd<'_>,
        name: &str,
        buffer: &mut String,
    ) -> Result<(), Errno> {
        key.write_name(number, buffer);
        let shard = &self.shards[key.shard()];
        rustix::fs::linkat(shard, buffer.as_str(), directory, name, AtFlags::empty())
    }

    /// Makes a file that the worker owns the first inode of `key`, by one more link to it.
    pub(super) fn link_in(
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

    /// Makes another inode with the content of `source`, sharing its blocks where the file system
    /// can.
    pub(super) fn duplicate(&self, source: &File, key: &FileKey, number: u32) -> io::Result<u64> {
        let incoming = self.create()?;
        copy_content(source, &incoming.file, key.digest.size())?;
        // It is made because none is known.
        self.publish(incoming, key, number, || None)
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

    /// Whether copies share blocks on this file system.
    pub(super) fn shares_blocks(&self) -> io::Result<bool> {
        let (one, other) = (self.create()?, self.create()?);
        (&*one.file).write_all(&[0; 4096])?;
        Ok(reflink_copy::reflink_file(&one.file, &other.file).is_ok())
    }

    pub(super) fn open_inode(&self, key: &FileKey, number: u32) -> io::Result<File> {
        let mut name = String::new();
        key.write_name(number, &mut name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let shard = &self.shards[key.shard()];
        Ok(rustix::fs::openat(shard, &name, flags, Mode::empty())?.into())
    }

    /// Removes all inodes of a file, of which there are so many.
    pub(super) fn remove(&self, key: &FileKey, inodes: u32) -> io::Result<()> {
        // The last one first, so that a worker killed in between leaves no gap.
        for number in (0..inodes).rev() {
            self.remove_inode(key, number)?;
        }
        Ok(())
    }

    pub(super) fn remove_inode(&self, key: &FileKey, number: u32) -> io::Result<()> {
        let mut name = String::new();
        key.write_name(number, &mut name);
        match rustix::fs::unlinkat(&self.shards[key.shard()], &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Who may write to a file of an input root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteAccess {
    Nobody,
    Everybody,
}

fn create(
    directory: BorrowedFd<'_>,
    name: &str,
    executable: bool,
    access: WriteAccess,
) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = match access {
        WriteAccess::Nobody => mode(executable),
        WriteAccess::Everybody => mode(executable) | Mode::from_raw_mode(0o222),
    };
    Ok(rustix::fs::openat(directory, name, flags, mode)?.into())
}

/// Makes a file of its own in a directory, with the content of a cached one, sharing its blocks where
/// the file system can; tells its inode number. Whoever `access` says may write to it.
pub(super) fn copy(
    source: &File,
    key: &FileKey,
    directory: BorrowedFd<'_>,
    name: &str,
    access: WriteAccess,
) -> io::Result<u64> {
    let file = create(directory, name, key.executable, access)?;
    copy_content(source, &file, key.digest.size())?;
    set_mtime(file.as_fd())?;
    Ok(rustix::fs::fstat(&file)?.st_ino)
}

/// Makes an empty file in a directory; tells its inode number.
pub(super) fn make_empty(
    directory: BorrowedFd<'_>,
    name: &str,
    executable: bool,
    access: WriteAccess,
) -> io::Result<u64> {
    let file = create(directory, name, executable, access)?;
    set_mtime(file.as_fd())?;
    Ok(rustix::fs::fstat(&file)?.st_ino)
}

/// Whether a file is one that the worker made, for the cache or for an input root, and that nobody
/// changed since.
pub fn is_made_by_worker(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && matches!(stat.st_mode & 0o7777, 0o444 | 0o555)
        && (stat.st_mtime, stat.st_mtime_nsec) == (MTIME, 0)
        && stat.st_uid == rustix::process::geteuid().as_raw()
}

pub(super) fn is_intact(stat: &rustix::fs::Stat, key: &FileKey, owner: u32) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(key.digest.size())
        && stat.st_mode & 0o7777 == mode(key.executable).as_raw_mode()
        && stat.st_mtime == MTIME
        && stat.st_uid == owner
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Shares the blocks where the file system can.
fn copy_content(source: &File, to: &File, size: u64) -> io::Result<()> {
    if reflink_copy::reflink_file(source, to).is_ok() {
        return Ok(());
    }
    let (mut from, mut at) = (0, 0);
    while from < size {
        let rest = usize::try_from(size - from).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(source, Some(&mut from), to, Some(&mut at), rest)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Gives a file its final mode and mtime.
fn finish(file: BorrowedFd<'_>, executable: bool) -> io::Result<()> {
    rustix::fs::fchmod(file, mode(executable))?;
    set_mtime(file)
}

fn set_mtime(file: BorrowedFd<'_>) -> io::Result<()> {
    rustix::fs::futimens(
        file,
        &Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: MTIME,
                tv_nsec: 0,
            },
        },
    )?;
    Ok(())
}

/// Takes a file away from the action that wrote it, so that it can enter the cache as it is.
/// `false` when that is not possible: then only a copy can.
///
/// True only if nobody else has the file: no other name leads to it, no extended attribute or ACL
/// is on it, no process has it open for writing or mapped writable.
pub fn take_ownership(file: &File, executable: bool) -> bool {
    let fd = file.as_fd();
    let alone = |fd| rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_nlink == 1);
    // Before anything is changed: an input that the action linked elsewhere stays as it is.
    if !alone(fd) || !attributes::has_none(fd) {
        return false;
    }
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(fd, Some(user), Some(group)).is_ok()
        && finish(fd, executable).is_ok()
        && alone(fd)
        && has_no_writer(fd)
}

/// fcntl(2), F_SETLEASE: a read lease is granted only while nobody has the file open for writing.
fn has_no_writer(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: these commands take an integer, and touch no memory of ours.
    unsafe {
        let leased = libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0;
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK);
        leased
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn a_file_that_somebody_can_still_write_is_not_taken_from_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let writer = File::create(&path).unwrap();
        let file = File::open(&path).unwrap();
        assert!(!take_ownership(&file, false));
        drop(writer);
        assert!(take_ownership(&file, false));
        std::fs::hard_link(&path, directory.path().join("g")).unwrap();
        assert!(!take_ownership(&file, false));
    }
    #[test]
    fn an_inode_that_input_roots_may_have_is_not_replaced() {
        let place = tempfile::tempdir().unwrap();
        let directory = CacheDirectory::open(place.path()).unwrap();
        let key = FileKey {
            digest: DigestFunction::Sha256.digest_of(b"content"),
            executable: false,
        };
        let write = |known: Option<u64>| {
            let kept = || known.filter(|inode| directory.is_inode(&key, 0, *inode));
            directory.write(&key, b"content", kept).unwrap()
        };
        let first = write(None);
        assert_eq!(write(Some(first)), first);
        assert!(directory.is_inode(&key, 0, first));
        // A leftover that nobody knows is.
        let second = write(None);
        assert!(second != first && directory.is_inode(&key, 0, second));
        assert!(!directory.is_inode(&key, 0, first));
        // And one that somebody changed.
        let path = directory.path_of(&key, 0);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .unwrap();
        let third = write(Some(second));
        assert!(directory.is_inode(&key, 0, third));
        assert_eq!(
            std::fs::read_dir(place.path().join("incoming"))
                .unwrap()
                .count(),
            0
        );
    }
}
