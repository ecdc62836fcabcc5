//! Large blobs: one file for each.
//!
//! A file is the content, then a checksum (CRC-32) of each 256 KiB of it, then a checksum of these
//! checksums and the size, then a word that names the format.
//!
//! 1. A file is written under a name of its own in `uploads/` and renamed to its key's name in
//!    `files/` when its content proved right; it never changes afterwards.
//! 2. What is read is checked piece by piece, since a loss of power can leave a file with its
//!    length but not its content. It is read with pread(2), so that what the disk cannot read is an
//!    error like any other damage, and no SIGBUS.

use std::{
    fmt::Write,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::{instance_limits::LimitId, key::IndexKey};
use crate::text::{parse_hex, push_hex};

/// Bytes per checksum; whoever reads in multiples of it has each byte checked once.
pub(super) const PIECE: u64 = 256 << 10;

const FORMAT: &[u8; 8] = b"bbblob01";

/// Bytes on disk.
pub(super) fn footprint(size: u64) -> u64 {
    const BLOCK: u64 = 4096;
    (size + 4 * size.div_ceil(PIECE) + 12).next_multiple_of(BLOCK)
}

/// `files/AB/KEY-SIZE` or `files/AB/KEY-SIZE-LIMIT`, AB being the first byte of the hash.
pub(super) fn path(directory: &Path, key: &IndexKey, size: u64, limit: LimitId) -> PathBuf {
    let bytes = key.to_bytes();
    let mut name = String::with_capacity(90);
    push_hex(&mut name, &bytes[1..2]);
    name.push('/');
    push_hex(&mut name, &bytes);
    let _ = write!(name, "-{size}");
    if limit != LimitId::NONE {
        let _ = write!(name, "-{:08x}", limit.to_u32());
    }
    directory.join(name)
}

/// A large blob: its size, and the limit that it counts towards.
pub(super) type LargeBlob = (IndexKey, u64, LimitId);

fn parse_name(name: &str) -> Option<LargeBlob> {
    let (key, rest) = name.split_once('-')?;
    let (size, limit) = match rest.split_once('-') {
        Some((size, limit)) => (size, u32::from_str_radix(limit, 16).ok()?),
        None => (rest, 0),
    };
    let mut bytes = [0; 33];
    if !parse_hex(key, &mut bytes) {
        return None;
    }
    Some((
        IndexKey::from_bytes(&bytes),
        size.parse().ok()?,
        LimitId::from_u32(limit),
    ))
}

/// Whether an open file still has this name.
pub(super) fn has_name(file: &File, name: &Path) -> bool {
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    let (held, named) = (
        file.metadata().map(identity),
        fs::metadata(name).map(identity),
    );
    matches!((held, named), (Ok(held), Ok(named)) if held == named)
}

/// Where the blobs are whose hashes begin with this byte.
pub(super) fn directory_of(directory: &Path, byte: u8) -> PathBuf {
    directory.join(format!("{byte:02x}"))
}

/// Makes the 256 directories.
pub(super) fn prepare(directory: &Path) -> io::Result<()> {
    for byte in 0..=255 {
        fs::create_dir_all(directory_of(directory, byte))?;
    }
    Ok(())
}

/// All large blobs. Names are enough: contents are checked when they are read.
pub(super) fn list(directory: &Path) -> io::Result<Vec<LargeBlob>> {
    let mut found = Vec::new();
    for byte in 0..=255 {
        found.extend(list_one(directory, byte)?);
    }
    Ok(found)
}

/// Those whose hashes begin with this byte.
pub(super) fn list_one(directory: &Path, byte: u8) -> io::Result<Vec<LargeBlob>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory_of(directory, byte))? {
        if let Some(blob) = entry?.file_name().to_str().and_then(parse_name) {
            found.push(blob);
        }
    }
    Ok(found)
}

/// A file that is being written; removed when dropped before it is committed.
pub(super) struct BlobFileWriter {
    path: PathBuf,
    file: File,
    size: u64,
    checksums: Vec<u8>,
    piece: crc32fast::Hasher,
    committed: bool,
}

impl BlobFileWriter {
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        Ok(BlobFileWriter {
            path,
            file,
            size: 0,
            checksums: Vec::new(),
            piece: crc32fast::Hasher::new(),
            committed: false,
        })
    }

    pub(super) fn append(&mut self, mut data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.size)?;
        while !data.is_empty() {
            let room = (PIECE - self.size % PIECE) as usize;
            let (now, rest) = data.split_at(room.min(data.len()));
            self.piece.update(now);
            self.size += now.len() as u64;
            if self.size.is_multiple_of(PIECE) {
                self.end_piece();
            }
            data = rest;
        }
        Ok(())
    }

    fn end_piece(&mut self) {
        let piece = std::mem::take(&mut self.piece);
        self.checksums
            .extend_from_slice(&piece.finalize().to_le_bytes());
    }

    /// Gives the file its name.
    pub(super) fn commit(
        mut self,
        directory: &Path,
        key: &IndexKey,
        limit: LimitId,
    ) -> io::Result<()> {
        if !self.size.is_multiple_of(PIECE) {
            self.end_piece();
        }
        let mut trailer = std::mem::take(&mut self.checksums);
        let checksum = checksum_of_trailer(&trailer, self.size);
        trailer.extend_from_slice(&checksum.to_le_bytes());
        trailer.extend_from_slice(FORMAT);
        self.file.write_all_at(&trailer, self.size)?;
        let path = path(directory, key, self.size, limit);
        let mut renamed = fs::rename(&self.path, &path);
        // Somebody removed the directory that it goes into, rather than the one that it is in.
        if let Err(error) = &renamed
            && error.kind() == io::ErrorKind::NotFound
            && self.path.exists()
            && let Some(parent) = path.parent()
        {
            fs::create_dir_all(parent)?;
            renamed = fs::rename(&self.path, &path);
        }
        renamed?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for BlobFileWriter {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn checksum_of_trailer(checksums: &[u8], size: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(checksums);
    hasher.update(&size.to_le_bytes());
    hasher.finalize()
}

/// An open large blob, which can be read even after it was evicted.
pub struct BlobFile {
    file: File,
    /// Of its pieces.
    checksums: Vec<u8>,
    size: u64,
}

impl BlobFile {
    /// An error of kind InvalidData when the file is damaged.
    pub fn open(path: &Path, size: u64) -> io::Result<Self> {
        let damaged = || io::Error::from(io::ErrorKind::InvalidData);
        let file = File::open(path)?;
        let checksums = 4 * size.div_ceil(PIECE);
        if file.metadata()?.len() != size + checksums + 12 {
            return Err(damaged());
        }
        let mut trailer = vec![0; checksums as usize + 12];
        let read = file.read_exact_at(&mut trailer, size);
        read.map_err(|_| damaged())?;
        let rest = trailer.split_off(checksums as usize);
        let expected = checksum_of_trailer(&trailer, size).to_le_bytes();
        if rest.get(..4) != Some(&expected) || rest.get(4..) != Some(FORMAT) {
            return Err(damaged());
        }
        Ok(BlobFile {
            file,
            checksums: trailer,
            size,
        })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes from `start` to `end`. `None` when they are damaged.
    pub fn read(&self, start: u64, end: u64) -> Option<Bytes> {
        let (start, end) = (start.min(self.size), end.min(self.size));
        if start >= end {
            return Some(Bytes::new());
        }
        let first = start / PIECE;
        let from = first * PIECE;
        let to = end.next_multiple_of(PIECE).min(self.size);
        let mut content = vec![0; (to - from) as usize];
        self.file.read_exact_at(&mut content, from).ok()?;
        let checksums = self.checksums.chunks_exact(4).skip(first as usize);
        for (piece, checksum) in content.chunks(PIECE as usize).zip(checksums) {
            if crc32fast::hash(piece).to_le_bytes() != *checksum {
                return None;
            }
        }
        let content = Bytes::from(content);
        Some(content.slice((start - from) as usize..(end - from) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn a_flipped_bit_anywhere_is_noticed_and_other_pieces_are_still_read() {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path()).unwrap();
        let content: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
        let size = content.len() as u64;
        let key = IndexKey::blob(&DigestFunction::Sha256.digest_of(&content));
        let mut writer = BlobFileWriter::create(directory.path().join("writer")).unwrap();
        for part in content.chunks(100_001) {
            writer.append(part).unwrap();
        }
        let limit = LimitId::from_u32(7);
        writer.commit(directory.path(), &key, limit).unwrap();
        assert_eq!(list(directory.path()).unwrap(), [(key, size, limit)]);
        let path = path(directory.path(), &key, size, limit);
        let open = || BlobFile::open(&path, size);
        assert_eq!(open().unwrap().read(0, size).unwrap(), content);
        assert_eq!(
            open().unwrap().read(300_000, 300_007).unwrap(),
            content[300_000..300_007]
        );

        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len())
            .step_by(9_973)
            .chain(whole.len() - 24..whole.len())
        {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert!(
                open().ok().and_then(|blob| blob.read(0, size)).is_none(),
                "{at}"
            );
            if at < 262_144 {
                assert!(open().unwrap().read(PIECE, size).is_some());
            }
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(open().is_err());
    }

    #[test]
    fn an_abandoned_draft_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = BlobFileWriter::create(directory.path().join("writer")).unwrap();
        writer.append(b"some").unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
