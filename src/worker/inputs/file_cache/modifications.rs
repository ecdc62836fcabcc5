//! Counts and removes files of the cache that somebody else changed.

use super::{cache::FileCache, index::FileClaim, key::FileKey, watch::ChangedFiles};

impl FileCache {
    /// Looks which files somebody else has changed by now, and removes these from the disk. Returns how often there
    /// were any since the start; a change that came before the call is counted.
    pub fn poll_modifications(&self) -> u64 {
        let mut modifications = self.modifications.lock();
        let Some(watch) = &self.watch else {
            return *modifications;
        };
        let changed = match watch.changed() {
            ChangedFiles::Files {
                mut contents,
                attributes,
            } => {
                // Whoever sets what was set already does no harm.
                let changed = |(key, inode_index): &(FileKey, u32)| {
                    !self.directory.is_intact_or_absent(key, *inode_index)
                };
                contents.extend(attributes.into_iter().filter(changed));
                contents.sort_unstable();
                // All inodes of a file go with it: the first of them that was changed tells.
                contents.dedup_by_key(|(key, _)| *key);
                contents
            }
            ChangedFiles::Unknown => {
                let keys = self.index.lock().files.keys();
                keys.into_iter().map(|key| (key, 0)).collect()
            }
        };
        if changed.is_empty() {
            return *modifications;
        }
        self.count_and_remove(
            &mut modifications,
            &changed,
            "somebody changed files of the cache",
        );
        *modifications
    }

    /// Counts and removes files that are not what they should be, each in one of its inodes; `why` is said in the log.
    pub(super) fn remove_modified(&self, wrong: &[(FileKey, u32)], why: &str) {
        self.count_and_remove(&mut self.modifications.lock(), wrong, why);
    }

    fn count_and_remove(&self, modifications: &mut u64, wrong: &[(FileKey, u32)], why: &str) {
        *modifications += 1;
        let first = wrong.first();
        let first = first.map(|(key, inode_index)| self.directory.path_of(key, *inode_index));
        tracing::error!(
            directory = %self.path().display(),
            files = wrong.len(),
            first = %first.unwrap_or_default().display(),
            "{why}; only this worker may write to files of the cache; what is wrong is removed and fetched again, all that is kept of input roots is forgotten, and actions that ran meanwhile fail"
        );
        let keys: Vec<FileKey> = wrong.iter().map(|(key, _)| *key).collect();
        self.remove_wrong(&keys);
    }

    /// Removes files that are not what they should be. Pins stay: whoever links such a file finds it
    /// gone.
    pub(super) fn remove_wrong(&self, wrong: &[FileKey]) {
        let _one_at_a_time = self.changing_extra_inodes.lock();
        let mut claim = FileClaim::new(&self.index);
        let mut index = self.index.lock();
        let mut all = Vec::with_capacity(wrong.len());
        for key in wrong {
            all.push((key, index.forget_extra(key)));
            if index.files.remove(key).is_some() {
                claim.add(&mut index, *key);
            }
        }
        drop(index);
        for (key, inodes) in all {
            if let Err(error) = self.directory.remove(key, inodes) {
                tracing::error!(digest = %key.digest, %error, "could not remove a wrong file from the cache");
            }
        }
    }
}
