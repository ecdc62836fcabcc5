//! Contents by their index entries; what is damaged is removed.

use std::{fs, io, sync::atomic::Ordering};

use bytes::Bytes;
use parking_lot::MutexGuard;

use super::{
    super::Error,
    file::{self, BlobFile, BlobFileWriter},
    index::{IndexEntry, Location},
    instance_limits::LimitId,
    key::IndexKey,
    segment::{Read, Record},
    space::Space,
};
use crate::daemon::message_id;

impl Space {
    /// The content of an entry in a segment. `None` when it is gone or damaged.
    pub(super) fn content(&self, mut found: IndexEntry) -> Option<Bytes> {
        loop {
            let content = self.content_there(&found, Read::Waiting);
            if content.is_some() {
                return content;
            }
            // Perhaps it was moved in between.
            let again = self.index.peek(&found.key)?;
            if again.place == found.place {
                self.forget_damaged(&found);
                return None;
            }
            found = again;
        }
    }

    /// The content at the very place that an entry names. `None` says nothing about the entry.
    pub(super) fn content_there(&self, found: &IndexEntry, read: Read) -> Option<Bytes> {
        let Location::Segment {
            number,
            offset,
            checksum,
            ..
        } = found.place
        else {
            return None;
        };
        let segment = self.segment(number)?;
        let content = segment.read(offset, found.size as usize, read)?;
        (crc32fast::hash(&content) == checksum).then_some(content)
    }

    /// Writes an entry's slot again if it is not as it should be: else the content would be gone at the next start.
    pub(super) fn mend_slot(&self, found: &IndexEntry) {
        let Location::Segment {
            number,
            slot,
            offset,
            checksum,
        } = found.place
        else {
            return;
        };
        let Some(segment) = self.segment(number) else {
            return;
        };
        let record = Record {
            key: found.key,
            size: found.size,
            offset,
            checksum,
            used: found.used,
            limit: found.limit,
        };
        match segment.mend_slot(slot, &record) {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!(
                    segment = number,
                    slot,
                    "wrote a damaged slot of the embedded store again"
                );
                // Who removed or replaced it meanwhile had erased the slot.
                let now = self.index.peek(&found.key);
                if now.is_none_or(|now| now.place != found.place) {
                    self.erase_slot(found.place);
                }
            }
            Err(error) => tracing::error!(%error, "could not write in a segment"),
        }
    }

    /// `None` when it is gone or damaged.
    pub(super) fn large(&self, found: &IndexEntry) -> Result<Option<BlobFile>, Error> {
        for _ in 0..2 {
            let path = self.file_of(found);
            let error = match BlobFile::open(&path, found.size) {
                Ok(blob) => return Ok(Some(blob)),
                Err(error) => error,
            };
            // A file that is not there is no damage when all of them are gone.
            self.require_directory_now()?;
            match error.kind() {
                io::ErrorKind::InvalidData => break,
                // Evicted just now, and perhaps uploaded again.
                io::ErrorKind::NotFound if self.index.peek(&found.key).is_none() => {
                    return Ok(None);
                }
                io::ErrorKind::NotFound => {}
                _ => {
                    return Err(Error::Internal(format!(
                        "could not read {}: {error}",
                        path.display()
                    )));
                }
            }
        }
        self.forget_damaged(found);
        Ok(None)
    }

    /// Removes an entry whose content is not what it should be.
    pub(super) fn forget_damaged(&self, found: &IndexEntry) {
        if !self.remove(found) {
            return;
        }
        match found.place {
            Location::Segment { number, slot, .. } => {
                self.discount_live(found);
                self.erase_slot(found.place);
                tracing::error!(
                    message_id = message_id::BLOB_DAMAGED,
                    segment = number,
                    slot,
                    "removed a blob that was damaged on disk"
                );
            }
            Location::File => {
                let path = self.file_of(found);
                self.unlink_large(found);
                tracing::error!(
                    message_id = message_id::BLOB_DAMAGED,
                    path = %path.display(),
                    "removed a blob that was damaged on disk"
                );
            }
        }
    }

    /// Gives a file that was written its name, and an entry.
    pub(super) fn commit_large(
        &self,
        writer: BlobFileWriter,
        key: IndexKey,
        limit: LimitId,
        size: u64,
    ) -> io::Result<()> {
        let _lock = self.file_lock(&key);
        // Whoever was first keeps it, also under its name.
        let first = self.index.peek(&key);
        let limit = first.map_or(limit, |first| first.limit);
        writer.commit(&self.files(), &key, limit)?;
        self.written.fetch_add(size, Ordering::Relaxed);
        self.counts.written.add(size);
        self.set_location(&IndexEntry {
            key,
            size,
            place: Location::File,
            used: self.now(),
            limit,
        });
        Ok(())
    }

    /// Removes an entry that was seen. False when it is no longer what was seen.
    pub(super) fn remove(&self, found: &IndexEntry) -> bool {
        let is_removed = self.index.remove(found);
        if is_removed {
            self.limits.subtract(found.limit, found.footprint());
        }
        is_removed
    }

    fn file_of(&self, found: &IndexEntry) -> std::path::PathBuf {
        file::path(&self.files(), &found.key, found.size, found.limit)
    }

    /// Removes the file of an entry that has been removed.
    pub(super) fn unlink_large(&self, found: &IndexEntry) {
        let _lock = self.file_lock(&found.key);
        self.give_back(file::footprint(found.size));
        if let Some(new) = self.index.peek(&found.key)
            && new.limit == found.limit
        {
            // It was uploaded again in between; the file is the new one.
            return;
        }
        let path = self.file_of(found);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = %path.display(), %error, "could not remove a blob");
            }
            _ => {}
        }
    }

    fn file_lock(&self, key: &IndexKey) -> MutexGuard<'_, ()> {
        self.file_locks[key.short() as usize % self.file_locks.len()].lock()
    }
}
