//! Whether the store's directory is where it was opened.
//!
//! Somebody may remove it, or unmount its file system. The files that are open can still be written and read then,
//! but nobody finds them at the next start; the others are gone already.
//!
//! 1. The directory is there as long as its path leads to the lock that this process holds.
//! 2. While it is not, nothing is taken and nothing is given: each call is UNAVAILABLE, and nothing is written in
//!    what is there instead. Once it is back, the store goes on.
//! 3. Directories that somebody removed within it are made again, and what was in them is missing.

use std::{
    fs, io,
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{
    super::Error,
    file,
    index::{IndexEntry, Location},
    space::Space,
};
use crate::daemon::LogRateLimit;

/// Lines that say again that the directory is gone.
static REMINDERS: LogRateLimit = LogRateLimit::new(1, Duration::from_secs(300));

impl Space {
    /// An error while the directory is known to be gone.
    pub(super) fn require_directory(&self) -> Result<(), Error> {
        match self.is_gone.load(Ordering::Relaxed) {
            true => self.require_directory_now(),
            false => Ok(()),
        }
    }

    /// An error when the directory is gone, whether that is known or not.
    pub(super) fn require_directory_now(&self) -> Result<(), Error> {
        match self.look_for_directory() {
            true => Ok(()),
            false => Err(self.gone()),
        }
    }

    /// Looks whether the directory is there; false when it is gone. Tells when that is news.
    pub(super) fn look_for_directory(&self) -> bool {
        let is_there = file::has_name(&self.lock, &self.directory.join("lock"));
        let was_gone = self.is_gone.swap(!is_there, Ordering::Relaxed);
        let directory = self.directory.display();
        if is_there && was_gone {
            tracing::info!(%directory, "the directory of the embedded store is back; it goes on");
        }
        if !is_there && (REMINDERS.admit(Instant::now()).is_some() || !was_gone) {
            tracing::error!(%directory, error = %self.gone(), "the embedded store refuses all calls");
        }
        is_there
    }

    fn gone(&self) -> Error {
        Error::Unavailable(format!(
            "the directory of the embedded store, {}, was removed, or its file system was unmounted; mount it again, \
             or restart bb_scheduler to begin with an empty store",
            self.directory.display()
        ))
    }

    /// Makes directories again that were removed within this one, and forgets what was in them.
    pub(super) fn mend_directories(&self) {
        let directory = self.directory.display();
        let made = self.make_missing_directories();
        let mut lost = self.forget_lost_segments();
        match made {
            Ok(false) => {}
            Ok(true) => lost += self.forget_lost_files(),
            Err(ref error) => tracing::error!(
                %directory,
                %error,
                "could not make directories of the embedded store again that somebody removed"
            ),
        }
        if lost > 0 || matches!(made, Ok(true)) {
            tracing::error!(
                %directory,
                lost,
                "somebody removed files or directories of the embedded store; what was in them is missing"
            );
        }
    }

    /// False when all were there.
    fn make_missing_directories(&self) -> io::Result<bool> {
        let files = self.files();
        let mut made = make_missing(&self.directory.join("uploads"))?;
        made |= make_missing(&self.segments_directory())?;
        made |= make_missing(&files)?;
        for byte in 0..=255 {
            made |= make_missing(&file::directory_of(&files, byte))?;
        }
        Ok(made)
    }

    /// How many they were.
    fn forget_lost_files(&self) -> usize {
        let files = self.files();
        let mut large: Vec<IndexEntry> = Vec::new();
        self.index.for_each(|found| {
            if found.place == Location::File {
                large.push(found);
            }
        });
        let is_lost = |found: &IndexEntry| {
            let path = file::path(&files, &found.key, found.size, found.limit);
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let mut lost = 0;
        for found in large.into_iter().filter(is_lost) {
            if self.remove(&found) {
                self.unlink_large(&found);
                lost += 1;
            }
        }
        lost
    }

    /// How many blobs and results were in segments whose files are gone. Nothing more is appended to these.
    fn forget_lost_segments(&self) -> usize {
        let segments = self.segments.read();
        let gone = segments.values().filter(|segment| !segment.is_there());
        let gone: Vec<_> = gone.cloned().collect();
        drop(segments);
        let mut lost = 0;
        for segment in gone {
            self.active
                .lock()
                .take_if(|active| active.segment.number == segment.number);
            if self.segments.write().remove(&segment.number).is_none() {
                continue;
            }
            let had = self.index.entries_in(segment.number);
            lost += had.iter().filter(|found| self.remove(found)).count();
            // One of its files may be there still.
            if let Err(error) = segment.unlink() {
                tracing::error!(%error, "could not remove a segment");
            }
            self.give_back(segment.disk());
        }
        lost
    }
}

/// False when it was there.
fn make_missing(directory: &Path) -> io::Result<bool> {
    match fs::create_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        // A file system that is read-only says so of directories that are there, too.
        Err(error) if !directory.is_dir() => Err(error),
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        digest::{Digest, DigestFunction},
        storage::embedded::{Store, instance_limits::LimitId},
    };

    fn blob(seed: u8, size: usize) -> (Digest, Bytes) {
        let content = Bytes::from(vec![seed; size]);
        (DigestFunction::Sha256.digest_of(&content), content)
    }

    fn assert_gone<T>(result: Result<T, Error>, directory: &Path) {
        let error = result.err().unwrap();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&directory.display().to_string()), "{text}");
    }

    #[test]
    fn while_its_directory_is_gone_a_store_takes_and_gives_nothing_and_then_it_goes_on() {
        let place = tempfile::tempdir().unwrap();
        let (directory, away) = (place.path().join("store"), place.path().join("away"));
        let store = Store::open(&directory, 64 << 20).unwrap();
        let stored = [blob(1, 100), blob(2, 300_000)];
        let new = [blob(3, 100), blob(4, 300_000)];
        let digests = |blobs: &[(Digest, Bytes)]| blobs.iter().map(|(digest, _)| *digest).collect();
        let stored_digests: Vec<Digest> = digests(&stored);
        assert!(store.put(&stored).iter().all(Result::is_ok));
        fs::rename(&directory, &away).unwrap();
        // What is mounted there, or was made there, is not the store.
        fs::create_dir(&directory).unwrap();
        // Whoever needs a file of it notices.
        assert_gone(store.blob(&stored[1].0), &directory);
        for (digest, _) in &stored {
            assert_gone(store.blob(digest), &directory);
        }
        assert_eq!(store.find_missing(&stored_digests), stored_digests);
        assert_gone(store.require_directory(), &directory);
        for result in store.put(&new) {
            assert_gone(result, &directory);
        }
        assert_gone(store.writer(new[1].0, LimitId::NONE), &directory);
        assert_eq!(store.check(|_| true).removed, 0);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir(&directory).unwrap();
        fs::rename(&away, &directory).unwrap();
        store.require_directory().unwrap();
        assert_eq!(store.find_missing(&stored_digests), []);
        for (digest, content) in &stored {
            assert_eq!(store.read(digest, 1 << 20).unwrap(), content);
        }
        assert!(store.put(&new).iter().all(Result::is_ok));
    }

    #[test]
    fn a_store_whose_directory_was_removed_notices_it_by_the_upload_of_a_large_blob() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("store");
        let store = Store::open(&directory, 64 << 20).unwrap();
        store.put(&[blob(1, 100)]).remove(0).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_gone(store.put(&[blob(2, 300_000)]).remove(0), &directory);
        // Which nobody would find after a restart.
        assert_gone(store.put(&[blob(3, 100)]).remove(0), &directory);
        assert_eq!(store.find_missing(&[blob(1, 100).0]), [blob(1, 100).0]);
    }

    #[test]
    fn directories_that_are_removed_within_it_are_made_again_and_what_was_there_is_missing() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path(), 64 << 20).unwrap();
        let (small, large) = (blob(1, 100), blob(2, 300_000));
        assert!(
            store
                .put(&[small.clone(), large.clone()])
                .iter()
                .all(Result::is_ok)
        );
        let used = store.used();
        fs::remove_dir_all(place.path().join("files")).unwrap();
        // Without waiting for the maintenance.
        store.put(&[blob(3, 300_000)]).remove(0).unwrap();
        assert_eq!(
            store.read(&blob(3, 300_000).0, 1 << 20).unwrap().len(),
            300_000
        );
        store.space.mend_directories();
        let missing = store.find_missing(&[small.0, large.0, blob(3, 300_000).0]);
        assert_eq!(missing, [large.0]);
        assert_eq!(store.used(), used);
        fs::remove_dir_all(place.path().join("uploads")).unwrap();
        store.put(&[large]).remove(0).unwrap();
    }

    #[test]
    fn segments_that_are_removed_take_nothing_more_and_what_was_in_them_is_missing() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path(), 64 << 20).unwrap();
        let (before, after) = (blob(1, 100), blob(2, 100));
        store.put(std::slice::from_ref(&before)).remove(0).unwrap();
        let used = store.used();
        fs::remove_dir_all(place.path().join("segments")).unwrap();
        store.space.mend_directories();
        assert_eq!(store.find_missing(&[before.0]), [before.0]);
        assert!(store.used() < used);
        store.put(std::slice::from_ref(&after)).remove(0).unwrap();
        assert_eq!(store.used(), used);
        drop(store);
        let store = Store::open(place.path(), 64 << 20).unwrap();
        assert_eq!(store.find_missing(&[before.0, after.0]), [before.0]);
        assert_eq!(store.read(&after.0, 1 << 20).unwrap(), after.1);
    }
}
