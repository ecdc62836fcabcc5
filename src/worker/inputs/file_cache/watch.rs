//! Whether somebody else writes to files of the cache: an administrator by mistake, or a program that
//! is root.
//!
//! inotify(7) on the shards tells of contents and attributes that are changed by way of a name in
//! them. The worker causes no such event: it writes files in `incoming`, and a link that comes or
//! goes is none. Events are there as soon as the change is, so that whoever looks after an action
//! knows what happened while it ran.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};

use super::{FileCache, FileClaim, FileKey};

/// What was changed since the last look.
#[derive(Debug, PartialEq)]
enum ChangedFiles {
    /// In `contents`, or, in what `attributes` has, modes, owners or times alone.
    CacheDirectory {
        contents: Vec<FileKey>,
        attributes: Vec<FileKey>,
    },
    /// More than is known one by one.
    Unknown,
}

pub struct ChangeWatch(OwnedFd);

impl ChangeWatch {
    pub fn new(shards: &[OwnedFd]) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        for shard in shards {
            let path = format!("/proc/self/fd/{}", shard.as_raw_fd());
            let events = WatchFlags::MODIFY | WatchFlags::ATTRIB;
            inotify::add_watch(&inotify, path, events)?;
        }
        Ok(ChangeWatch(inotify))
    }

    /// Does not wait.
    fn changed(&self) -> ChangedFiles {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.0, &mut buffer);
        let (mut contents, mut attributes) = (Vec::new(), Vec::new());
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    return ChangedFiles::Unknown;
                }
                // What has another name is no file of the cache; what has none is a shard.
                Ok(event) => {
                    let name = event.file_name().and_then(|name| name.to_str().ok());
                    let key = name.and_then(FileKey::parse_name).map(|(key, _)| key);
                    match event.events().contains(ReadFlags::MODIFY) {
                        true => contents.extend(key),
                        false => attributes.extend(key),
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        for files in [&mut contents, &mut attributes] {
            files.sort_unstable();
            files.dedup();
        }
        ChangedFiles::CacheDirectory {
            contents,
            attributes,
        }
    }
}

impl FileCache {
    /// How often it was found that somebody else had changed files, which are gone from the disk then.
    /// Looks again; a change that came before the call is counted.
    pub fn modifications(&self) -> u64 {
        let mut modifications = self.modifications.lock();
        let Some(watch) = &self.watch else {
            return *modifications;
        };
        let changed = match watch.changed() {
            ChangedFiles::CacheDirectory {
                mut contents,
                attributes,
            } => {
                // Whoever sets what was set already does no harm.
                let changed = |key: &FileKey| !self.files.is_as_made(key);
                contents.extend(attributes.into_iter().filter(changed));
                contents.sort_unstable();
                contents.dedup();
                contents
            }
            ChangedFiles::Unknown => self.state.lock().kept.keys(),
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

    /// These files are not what they should be; `why` is said in the log.
    pub(super) fn report_modified(&self, wrong: &[FileKey], why: &str) {
        self.count_and_remove(&mut self.modifications.lock(), wrong, why);
    }

    fn count_and_remove(&self, modifications: &mut u64, wrong: &[FileKey], why: &str) {
        *modifications += 1;
        let first = wrong.first().map(|key| self.files.path_of(key));
        tracing::error!(
            directory = %self.path().display(),
            files = wrong.len(),
            first = %first.unwrap_or_default().display(),
            "{why}; only this worker may write to files of the cache; what is wrong is removed and fetched again, all that is kept of input roots is forgotten, and actions that ran meanwhile fail"
        );
        self.remove_wrong(wrong);
    }

    /// Removes files that are not what they should be. Pins stay: whoever links such a file finds it
    /// gone.
    pub(super) fn remove_wrong(&self, wrong: &[FileKey]) {
        let _one_at_a_time = self.duplicating.lock();
        let mut claim = FileClaim::new(self);
        let mut state = self.state.lock();
        let mut all = Vec::with_capacity(wrong.len());
        for key in wrong {
            all.push((key, state.take_further(key)));
            if state.kept.remove(key).is_some() {
                claim.add(&mut state, *key);
            }
        }
        drop(state);
        for (key, copies) in all {
            if let Err(error) = self.files.remove(key, copies) {
                tracing::error!(digest = %key.digest, %error, "could not remove a wrong file from the cache");
            }
        }
    }
}
