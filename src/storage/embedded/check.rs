//! What operators ask of the store: whether what it has can be read, what it is used for, and that a
//! wrong result goes.

use super::{
    Store, file,
    index::{IndexEntry, Location},
    instance_limits::InstanceUsage,
    key::IndexKey,
};
use crate::{daemon, digest::Digest, instance::InstanceName};

/// What the store takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUsage {
    /// Where it is.
    pub directory: std::path::PathBuf,
    /// Bytes on disk.
    pub used: u64,
    /// Of `used`.
    pub maximum: u64,
    /// Free on its file system.
    pub free: u64,
    /// Blobs and action results.
    pub entries: usize,
    /// Of instance names that have limits of their own.
    pub instances: Vec<InstanceUsage>,
}

/// How far a check is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckProgress {
    /// Entries that were looked at.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that were damaged, and are gone.
    pub removed: u64,
}

/// Entries between two tells of progress.
const ROUND: u64 = 1_000;

impl Store {
    /// What it takes now.
    pub fn usage(&self) -> StoreUsage {
        let directory = &self.space.directory;
        StoreUsage {
            directory: directory.clone(),
            used: self.used(),
            maximum: self.space.maximum_size,
            free: daemon::disk::space(directory).map_or(0, |disk| disk.available),
            entries: self.count(),
            instances: self.space.limits.usage(),
        }
    }

    /// The size of the blob that has a digest's hash, whatever size the digest says.
    pub fn size_of(&self, digest: &Digest) -> Option<u64> {
        let found = self.space.index.peek(&IndexKey::blob(digest))?;
        Some(found.size)
    }

    /// Reads every entry, and removes those that are damaged. Nothing becomes recently used. Tells how far
    /// it is now and then, and ends early when `go_on` says so.
    pub fn check(&self, mut go_on: impl FnMut(CheckProgress) -> bool) -> CheckProgress {
        let mut progress = CheckProgress::default();
        let mut keys: Vec<IndexKey> = Vec::with_capacity(self.count());
        self.space.index.for_each(|found| keys.push(found.key));
        for key in keys {
            let Some(found) = self.space.index.peek(&key) else {
                continue;
            };
            progress.entries += 1;
            progress.bytes += found.size;
            progress.removed += u64::from(!self.is_sound(&found));
            if progress.entries.is_multiple_of(ROUND) && !go_on(progress) {
                break;
            }
        }
        progress
    }

    fn is_sound(&self, found: &IndexEntry) -> bool {
        match found.place {
            // Evicted in between is not damaged.
            Location::Segment { .. } => {
                if self.space.content(*found).is_none() {
                    return self.space.index.peek(&found.key).is_some();
                }
                self.space.mend_slot(found);
                true
            }
            Location::File => {
                let Ok(Some(blob)) = self.space.large(found) else {
                    return self.space.index.peek(&found.key).is_some();
                };
                let pieces = (0..found.size).step_by(file::PIECE as usize);
                let is_sound = pieces
                    .map(|start| blob.read(start, (start + file::PIECE).min(found.size)))
                    .all(|piece| piece.is_some());
                if !is_sound {
                    self.space.forget_damaged(found);
                }
                is_sound
            }
        }
    }

    /// Takes an action's result back. False when there is none.
    pub fn remove_action_result(&self, instance: &InstanceName, action: &Digest) -> bool {
        let key = IndexKey::action(instance, action);
        // It may be moved in between.
        while let Some(found) = self.space.index.peek(&key) {
            if !self.space.remove(&found) {
                continue;
            }
            self.space.discount_live(&found);
            // Else it would come back at the next start.
            self.space.erase_slot(found.place);
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{digest::DigestFunction, proto::reapi::ActionResult};

    #[test]
    fn a_result_that_was_taken_back_stays_away_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let action = DigestFunction::Sha256.digest_of(b"action");
        let instance = InstanceName::parse("a").unwrap();
        let result = ActionResult {
            exit_code: 3,
            ..Default::default()
        };
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        assert!(!store.remove_action_result(&instance, &action));
        store
            .update_action_result(&instance, &action, &result)
            .unwrap();
        assert!(!store.remove_action_result(&InstanceName::empty(), &action));
        assert!(store.remove_action_result(&instance, &action));
        assert_eq!(store.action_result(&instance, &action).unwrap(), None);
        drop(store);
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        assert_eq!(store.action_result(&instance, &action).unwrap(), None);
    }

    #[test]
    fn a_small_blob_that_a_check_removed_stays_away_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let content = Bytes::from_static(b"what will be damaged");
        let digest = DigestFunction::Sha256.digest_of(&content);
        assert!(store.put(&[(digest, content)]).remove(0).is_ok());
        let path = directory.path().join("segments/00000000.data");
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"W", 0).unwrap();
        assert_eq!(store.check(|_| true).removed, 1);
        drop(store);
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        assert_eq!(store.count(), 0);
    }

    #[test]
    fn a_check_finds_what_is_damaged_and_keeps_what_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), 64 << 20).unwrap();
        let blobs: Vec<_> = (0..20u8)
            .map(|number| {
                let content = Bytes::from(vec![number; if number < 10 { 100 } else { 300_000 }]);
                (DigestFunction::Sha256.digest_of(&content), content)
            })
            .collect();
        assert!(store.put(&blobs).iter().all(Result::is_ok));
        let all = CheckProgress {
            entries: 20,
            bytes: 10 * 100 + 10 * 300_000,
            removed: 0,
        };
        assert_eq!(store.check(|_| true), all);
        let files = walkdir::WalkDir::new(directory.path().join("files"));
        let file = files.into_iter().flatten().find(|entry| {
            entry.file_type().is_file() && entry.metadata().is_ok_and(|found| found.len() > 300_000)
        });
        let path = file.unwrap().into_path();
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x!", 200_000).unwrap();
        assert_eq!(store.check(|_| true), CheckProgress { removed: 1, ..all });
        assert_eq!(store.check(|_| true).removed, 0);
        assert_eq!(store.usage().entries, 19);
    }
}
