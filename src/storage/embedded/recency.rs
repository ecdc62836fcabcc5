//! When what was last used, so that eviction goes on in the same order after a restart.
//!
//! The file is rewritten every few minutes and when the store is closed. It is only a hint: an entry
//! that it lacks counts as used when it was written, and a damaged file is ignored.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
    sync::atomic::Ordering,
};

use super::space::Space;

/// Its first words; then come 12 bytes for each entry, then a checksum.
const FORMAT: &[u8; 8] = b"bbrecen1";

pub(super) struct Recency {
    /// The clock.
    pub written: u64,
    pub used: HashMap<u64, u32>,
}

pub(super) fn save(space: &Space) -> io::Result<()> {
    let path = space.directory.join("recency");
    let temporary = space.directory.join("recency.new");
    let mut file = Summed {
        file: BufWriter::new(File::create(&temporary)?),
        checksum: crc32fast::Hasher::new(),
    };
    file.write(FORMAT)?;
    file.write(&space.written.load(Ordering::Relaxed).to_le_bytes())?;
    let mut result = Ok(());
    space.index.for_each(|found| {
        if result.is_ok() {
            let mut entry = [0; 12];
            entry[..8].copy_from_slice(&found.key.short().to_le_bytes());
            entry[8..].copy_from_slice(&found.used.to_le_bytes());
            result = file.write(&entry);
        }
    });
    result?;
    let checksum = file.checksum.clone().finalize();
    file.write(&checksum.to_le_bytes())?;
    file.file.flush()?;
    fs::rename(temporary, path)
}

struct Summed {
    file: BufWriter<File>,
    checksum: crc32fast::Hasher,
}

impl Summed {
    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.checksum.update(data);
        self.file.write_all(data)
    }
}

/// `None` when there is none, or it is damaged.
pub(super) fn load(directory: &Path) -> Option<Recency> {
    let bytes = fs::read(directory.join("recency")).ok()?;
    let (content, checksum) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(content) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let (written, entries) = content.strip_prefix(FORMAT)?.split_first_chunk::<8>()?;
    let mut used = HashMap::with_capacity(entries.len() / 12);
    for entry in entries.chunks_exact(12) {
        let (key, stamp) = entry.split_first_chunk::<8>()?;
        used.insert(
            u64::from_le_bytes(*key),
            u32::from_le_bytes(*stamp.first_chunk()?),
        );
    }
    Some(Recency {
        written: u64::from_le_bytes(*written),
        used,
    })
}
