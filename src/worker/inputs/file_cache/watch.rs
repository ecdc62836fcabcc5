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

use super::key::FileKey;

/// What was changed since the last look.
#[derive(Debug, PartialEq)]
pub(super) enum ChangedFiles {
    /// These files, each with an inode index. Of those in `contents` the content may be another one; of those in
    /// `attributes` only mode, owner or times.
    Files {
        contents: Vec<(FileKey, u32)>,
        attributes: Vec<(FileKey, u32)>,
    },
    /// So many that they are not known one by one.
    Unknown,
}

pub(super) struct ChangeWatch(OwnedFd);

impl ChangeWatch {
    pub(super) fn new(shards: &[OwnedFd]) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        for shard in shards {
            let path = format!("/proc/self/fd/{}", shard.as_raw_fd());
            let events = WatchFlags::MODIFY | WatchFlags::ATTRIB;
            inotify::add_watch(&inotify, path, events)?;
        }
        Ok(ChangeWatch(inotify))
    }

    /// The files that were changed since the last call. Does not wait.
    pub(super) fn changed(&self) -> ChangedFiles {
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
                    let file = name.and_then(FileKey::parse_name);
                    match event.events().contains(ReadFlags::MODIFY) {
                        true => contents.extend(file),
                        false => attributes.extend(file),
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
        ChangedFiles::Files {
            contents,
            attributes,
        }
    }
}
