//! Segments: pairs of files that small blobs and action results are appended to.
//!
//! NUMBER.data has the contents, one after another. NUMBER.table has a slot of 64 bytes for each: a
//! checksum of the slot, then whose content it is, where it is, and the content's checksum.
//!
//! 1. A slot is written after its content, so that a slot without content is only seen after a
//!    loss of power; the checksums tell.
//! 2. Bytes that a slot describes never change, and a file is never cut below them.
//! 3. Files are read with pread(2), never mapped: where the disk cannot read what a mapping is of, the
//!    kernel ends the process (SIGBUS); here the blob is damaged, and nothing else.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use bytes::Bytes;
use rustix::io::ReadWriteFlags;

use super::{file::has_name, instance_limits::LimitId, key::IndexKey};

/// Blobs of at most this size share segments; larger ones are files of their own.
pub const SMALL: u64 = 64 << 10;

pub(super) const SLOT: usize = 64;

/// Slots are reserved for contents of this size on average; smaller ones fill a segment earlier.
const AVERAGE: u64 = 512;

/// One slot's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub key: IndexKey,
    pub size: u64,
    pub offset: u32,
    pub checksum: u32,
    pub used: u32,
    pub limit: LimitId,
}

/// A content that is to be appended.
pub(super) struct NewContent {
    pub key: IndexKey,
    pub limit: LimitId,
    pub content: Bytes,
}

impl Record {
    fn to_bytes(self) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        bytes[4..37].copy_from_slice(&self.key.to_bytes());
        bytes[40..48].copy_from_slice(&self.size.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.offset.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.used.to_le_bytes());
        bytes[60..64].copy_from_slice(&self.limit.to_u32().to_le_bytes());
        let checksum = crc32fast::hash(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` for a slot that was never written, only in part, or erased.
    fn from_bytes(bytes: &[u8; SLOT]) -> Option<Self> {
        let (checksum, rest) = bytes.split_first_chunk::<4>()?;
        let (key, rest) = rest.split_first_chunk::<33>()?;
        let (_, rest) = rest.split_first_chunk::<3>()?;
        let (size, rest) = rest.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<4>()?;
        let (content, rest) = rest.split_first_chunk::<4>()?;
        let (used, rest) = rest.split_first_chunk::<4>()?;
        let (limit, _) = rest.split_first_chunk::<4>()?;
        if key[0] == 0 || u32::from_le_bytes(*checksum) != crc32fast::hash(&bytes[4..]) {
            return None;
        }
        Some(Record {
            key: IndexKey::from_bytes(key),
            size: u64::from_le_bytes(*size),
            offset: u32::from_le_bytes(*offset),
            checksum: u32::from_le_bytes(*content),
            used: u32::from_le_bytes(*used),
            limit: LimitId::from_u32(u32::from_le_bytes(*limit)),
        })
    }
}

pub(super) struct Segment {
    pub number: u32,
    data_path: PathBuf,
    table_path: PathBuf,
    data: File,
    table: File,
    /// Bytes of contents that it can have.
    capacity: u64,
    /// Slots that the table's file has.
    slot_count: AtomicU32,
    /// Bytes of contents and slots that the index points to.
    live: AtomicU64,
    /// Bytes on disk, both files.
    disk: AtomicU64,
    /// How many write to it, and have not told the index.
    writers: AtomicU32,
}

/// Where the next contents go.
#[derive(Clone, Copy, Debug)]
pub(super) struct AppendPosition {
    pub offset: u64,
    pub slot: u32,
}

/// What a segment's table says.
pub(super) struct Records {
    /// By slot.
    pub records: Vec<(u32, Record)>,
    /// Slots that were written and have no record.
    pub damaged: Vec<u32>,
    /// Where the next one goes.
    pub end: AppendPosition,
}

fn paths(directory: &Path, number: u32) -> (PathBuf, PathBuf) {
    (
        directory.join(format!("{number:08x}.data")),
        directory.join(format!("{number:08x}.table")),
    )
}

/// The numbers of all segments in a directory, ascending. Halves of pairs are removed.
pub(super) fn list(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let Some(number) = name
            .to_str()
            .and_then(|name| name.split_once('.'))
            .and_then(|(number, _)| u32::from_str_radix(number, 16).ok())
        else {
            continue;
        };
        let (data, table) = paths(directory, number);
        if data.exists() && table.exists() {
            numbers.push(number);
        } else {
            remove(&data)?;
            remove(&table)?;
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes of both files of a segment that holds `capacity` bytes.
pub(super) fn footprint(capacity: u64) -> u64 {
    capacity + slots_for(capacity) * SLOT as u64
}

/// Bytes that a content of this size takes, with its slot.
pub(super) fn weight(size: u64) -> u64 {
    size + SLOT as u64
}

/// Whether a read may wait for the disk.
#[derive(Clone, Copy)]
pub(super) enum Read {
    Waiting,
    /// An error where the page cache has not all of it.
    Cached,
}

/// Does not wait for the disk (preadv2(2), RWF_NOWAIT).
fn read_cached(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    let wanted = bytes.len();
    let mut buffers = [io::IoSliceMut::new(bytes)];
    let read = rustix::io::preadv2(file, &mut buffers, at, ReadWriteFlags::NOWAIT)?;
    match read == wanted {
        true => Ok(()),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

fn slots_for(capacity: u64) -> u64 {
    capacity.div_ceil(AVERAGE).max(64)
}

impl Segment {
    /// A new, empty segment; its space is allocated, so that a full disk is met here.
    pub(super) fn create(directory: &Path, number: u32, capacity: u64) -> io::Result<Self> {
        let (data_path, table_path) = paths(directory, number);
        let created = Self::create_files(number, capacity, &data_path, &table_path);
        if created.is_err() {
            let _ = remove(&data_path);
            let _ = remove(&table_path);
        }
        created
    }

    fn create_files(
        number: u32,
        capacity: u64,
        data_path: &Path,
        table_path: &Path,
    ) -> io::Result<Self> {
        let new = |path: &Path, length: u64| -> io::Result<File> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length)?;
            Ok(file)
        };
        let data = new(data_path, capacity)?;
        let table = new(table_path, slots_for(capacity) * SLOT as u64)?;
        Self::of_files(number, data_path, table_path, data, table)
    }

    pub(super) fn open(directory: &Path, number: u32) -> io::Result<Self> {
        let (data_path, table_path) = paths(directory, number);
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let (data, table) = (open(&data_path)?, open(&table_path)?);
        Self::of_files(number, &data_path, &table_path, data, table)
    }

    fn of_files(
        number: u32,
        data_path: &Path,
        table_path: &Path,
        data: File,
        table: File,
    ) -> io::Result<Self> {
        let (capacity, slots) = (data.metadata()?.len(), table.metadata()?.len());
        let disk = AtomicU64::new(capacity + slots);
        let slot_count = AtomicU32::new(u32::try_from(slots / SLOT as u64).unwrap_or(u32::MAX));
        Ok(Segment {
            number,
            data_path: data_path.to_owned(),
            table_path: table_path.to_owned(),
            data,
            table,
            capacity,
            slot_count,
            live: AtomicU64::new(0),
            disk,
            writers: AtomicU32::new(0),
        })
    }

    /// Whether its files still have their names.
    pub(super) fn is_there(&self) -> bool {
        has_name(&self.data, &self.data_path) && has_name(&self.table, &self.table_path)
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn slot_count(&self) -> u32 {
        self.slot_count.load(Ordering::Acquire)
    }

    pub(super) fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    pub(super) fn disk(&self) -> u64 {
        self.disk.load(Ordering::Relaxed)
    }

    /// Bytes that moving to another segment would gain.
    pub(super) fn dead(&self) -> u64 {
        self.disk().saturating_sub(self.live())
    }

    pub(super) fn add_live(&self, size: u64) {
        self.live.fetch_add(weight(size), Ordering::Relaxed);
    }

    pub(super) fn remove_live(&self, size: u64) {
        self.live.fetch_sub(weight(size), Ordering::Relaxed);
    }

    pub(super) fn begin_writing(&self) {
        self.writers.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn end_writing(&self) {
        self.writers.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn is_being_written(&self) -> bool {
        self.writers.load(Ordering::Acquire) != 0
    }

    /// One slot's bytes. `None` when there is none, or it cannot be read.
    fn slot(&self, slot: u32) -> Option<[u8; SLOT]> {
        if slot >= self.slot_count() {
            return None;
        }
        let mut bytes = [0; SLOT];
        let at = u64::from(slot) * SLOT as u64;
        self.table.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    }

    /// Slots from `first` on, as many as are read at once; those of a part that cannot be read one by one.
    fn slots(&self, first: u32) -> Vec<Option<[u8; SLOT]>> {
        const AT_ONCE: u32 = 16 << 10;
        let count = AT_ONCE.min(self.slot_count().saturating_sub(first));
        let mut bytes = vec![0; count as usize * SLOT];
        let at = u64::from(first) * SLOT as u64;
        match self.table.read_exact_at(&mut bytes, at) {
            Ok(()) => bytes.as_chunks().0.iter().copied().map(Some).collect(),
            Err(_) => (first..)
                .take(count as usize)
                .map(|slot| self.slot(slot))
                .collect(),
        }
    }

    pub(super) fn records(&self) -> Records {
        let mut records = Vec::new();
        let mut damaged = Vec::new();
        let mut end = AppendPosition { offset: 0, slot: 0 };
        let mut next = 0;
        loop {
            let slots = self.slots(next);
            if slots.is_empty() {
                break;
            }
            for (slot, bytes) in (next..).zip(&slots) {
                // What cannot be read may have been something.
                if bytes.is_some_and(|bytes| bytes == [0; SLOT]) {
                    continue;
                }
                end.slot = slot + 1;
                if let Some(record) = bytes.as_ref().and_then(Record::from_bytes)
                    && u64::from(record.offset) + record.size <= self.capacity()
                {
                    end.offset = end.offset.max(u64::from(record.offset) + record.size);
                    records.push((slot, record));
                } else {
                    damaged.push(slot);
                }
            }
            next += slots.len() as u32;
        }
        Records {
            records,
            damaged,
            end,
        }
    }

    /// Bytes of contents, which are not checked. `None` when they cannot be read, or not in this way.
    pub(super) fn read(&self, offset: u32, size: usize, read: Read) -> Option<Bytes> {
        let mut bytes = vec![0; size];
        let at = offset.into();
        match read {
            Read::Waiting => self.data.read_exact_at(&mut bytes, at),
            Read::Cached => read_cached(&self.data, &mut bytes, at),
        }
        .ok()?;
        Some(bytes.into())
    }

    /// Writes contents and slots into the part that was reserved for them; gives the records, in the order of
    /// their slots.
    pub(super) fn write(
        &self,
        end: AppendPosition,
        contents: &[NewContent],
        used: u32,
    ) -> io::Result<Vec<Record>> {
        const GATHERED: usize = 256 << 10;
        let mut slots = Vec::with_capacity(contents.len() * SLOT);
        let mut records = Vec::with_capacity(contents.len());
        let mut gathered = Vec::new();
        let mut written = end.offset;
        let mut offset = end.offset;
        for new in contents {
            let content = &new.content;
            let record = Record {
                key: new.key,
                limit: new.limit,
                size: content.len() as u64,
                offset: offset as u32,
                checksum: crc32fast::hash(content),
                used,
            };
            slots.extend_from_slice(&record.to_bytes());
            records.push(record);
            offset += content.len() as u64;
            if contents.len() == 1 {
                self.data.write_all_at(content, written)?;
                continue;
            }
            gathered.extend_from_slice(content);
            if gathered.len() >= GATHERED {
                self.data.write_all_at(&gathered, written)?;
                written += gathered.len() as u64;
                gathered.clear();
            }
        }
        self.data.write_all_at(&gathered, written)?;
        self.table
            .write_all_at(&slots, u64::from(end.slot) * SLOT as u64)?;
        Ok(records)
    }

    /// Writes a record's slot again unless it has that record, whenever that was used last; whether it did.
    pub(super) fn mend_slot(&self, slot: u32, record: &Record) -> io::Result<bool> {
        let found = self.slot(slot).as_ref().and_then(Record::from_bytes);
        let used = found.map_or(record.used, |found| found.used);
        if found == Some(Record { used, ..*record }) {
            return Ok(false);
        }
        self.table
            .write_all_at(&record.to_bytes(), u64::from(slot) * SLOT as u64)?;
        Ok(true)
    }

    /// Forgets a record, also for those who open the store later.
    pub(super) fn erase(&self, slot: u32) -> io::Result<()> {
        self.table
            .write_all_at(&[0; SLOT], u64::from(slot) * SLOT as u64)
    }

    /// Gives back the space beyond `end`. Nobody may append any more. Returns the bytes freed.
    pub(super) fn seal(&self, end: AppendPosition) -> io::Result<u64> {
        // Nobody looks for a slot beyond the count.
        self.slot_count.store(end.slot, Ordering::Release);
        let table = u64::from(end.slot) * SLOT as u64;
        self.table.set_len(table)?;
        self.data.set_len(end.offset)?;
        let before = self.disk.swap(end.offset + table, Ordering::Relaxed);
        Ok(before.saturating_sub(self.disk()))
    }

    /// Removes the files; readers keep what they hold.
    pub(super) fn unlink(&self) -> io::Result<()> {
        remove(&self.table_path)?;
        remove(&self.data_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    fn content(segment: &Segment, record: &Record) -> Option<Bytes> {
        let content = segment.read(record.offset, record.size as usize, Read::Waiting)?;
        (crc32fast::hash(&content) == record.checksum).then_some(content)
    }

    fn record(segment: &Segment, slot: u32) -> Option<Record> {
        Record::from_bytes(&segment.slot(slot)?)
    }

    fn blob(text: &'static str) -> NewContent {
        let digest = DigestFunction::Sha256.digest_of(text.as_bytes());
        NewContent {
            key: IndexKey::blob(&digest),
            limit: LimitId::from_u32(text.len() as u32),
            content: Bytes::from_static(text.as_bytes()),
        }
    }

    #[test]
    fn what_was_written_is_found_again_and_what_is_damaged_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let segment = Segment::create(directory.path(), 7, 1 << 16).unwrap();
        segment
            .write(
                AppendPosition { offset: 0, slot: 0 },
                &[blob("one"), blob("two")],
                5,
            )
            .unwrap();
        // A slot in between whose writer died.
        segment
            .write(AppendPosition { offset: 9, slot: 3 }, &[blob("three")], 6)
            .unwrap();
        drop(segment);

        assert_eq!(list(directory.path()).unwrap(), [7]);
        let segment = Segment::open(directory.path(), 7).unwrap();
        let Records { records, end, .. } = segment.records();
        let slots: Vec<u32> = records.iter().map(|(slot, _)| *slot).collect();
        assert_eq!(slots, [0, 1, 3]);
        assert_eq!((end.offset, end.slot), (14, 4));
        assert_eq!(&*content(&segment, &records[2].1).unwrap(), b"three");
        assert_eq!(records[2].1.used, 6);
        assert_eq!(records[2].1.limit, LimitId::from_u32(5));

        segment.data.write_all_at(b"x", 1).unwrap();
        assert!(content(&segment, &records[0].1).is_none());
        assert_eq!(&*content(&segment, &records[1].1).unwrap(), b"two");
        segment.table.write_all_at(&[0xff], 60).unwrap();
        assert_eq!(record(&segment, 0), None);
        segment.erase(1).unwrap();
        assert_eq!(record(&segment, 1), None);
    }

    #[test]
    fn a_reader_keeps_what_it_holds_when_the_segment_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let segment = Segment::create(directory.path(), 1, 1 << 16).unwrap();
        segment
            .write(AppendPosition { offset: 0, slot: 0 }, &[blob("kept")], 0)
            .unwrap();
        let first = record(&segment, 0).unwrap();
        let held = content(&segment, &first).unwrap();
        segment.seal(AppendPosition { offset: 4, slot: 1 }).unwrap();
        segment.unlink().unwrap();
        drop(segment);
        assert_eq!(&*held, b"kept");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
