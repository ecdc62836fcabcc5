//! Adds outputs of actions to the cache, so that later actions find them there.

use std::{fs::File, io, os::fd::BorrowedFd};

use rustix::io::Errno;

use super::{cache::FileCache, index::FileClaim, key::FileKey};

impl FileCache {
    /// Adds an output, so that it becomes an input of later actions without a download. `is_owned` says that the file
    /// itself may enter the cache; otherwise a copy does. What cannot enter is fetched when it is wanted.
    pub fn add_output(
        &self,
        key: FileKey,
        file: &File,
        is_owned: bool,
        directory: BorrowedFd<'_>,
        name: &str,
    ) {
        // Empty files are made, not cached.
        if key.digest.size() > self.limits.bytes / 4 || key.digest.size() == 0 {
            return;
        }
        let mut claim = FileClaim::new(&self.index);
        let mut index = self.index.lock();
        if index.files.get(&key).is_some() || index.in_progress.contains_key(&key) {
            return;
        }
        claim.add(&mut index, key);
        drop(index);
        let added = match is_owned {
            true => match self.directory.link_into_cache(&key, directory, name) {
                // A file that the cache does not know of.
                Err(Errno::EXIST) => self
                    .directory
                    .remove(&key, 1)
                    .and_then(|()| Ok(self.directory.link_into_cache(&key, directory, name)?)),
                result => result.map_err(io::Error::from),
            },
            false => self.directory.duplicate(file, &key, 0),
        };
        match added {
            Ok(inode) => {
                let handle = self.admit(key, inode);
                self.index.lock().files.unpin(handle);
                // Not pinned any more: what has no room beside what must stay free goes itself.
                self.evict_to_fit();
            }
            Err(error) => {
                tracing::debug!(digest = %key.digest, %error, "could not add an output to the cache");
            }
        }
    }
}
