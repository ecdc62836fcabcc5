//! The action's user as its programs look it up in /etc/passwd and /etc/group (passwd(5), group(5)):
//! with the same name on every host and in every slot, so that outputs do not depend on it, and a home
//! directory.
//!
//! 1. Each room has files of its own mounted on these two, in memory and read-only: an entry of the
//!    action's first, then what its root has there.
//! 2. The entry is written before the action's first process exists; nobody but root may write them.
//! 3. When a file that is mounted on is replaced on the host, as useradd(8) does it, the kernel takes
//!    the mount away everywhere. So a room whose root has others by now is not used.
//!
//! A root without such a file does without. So does an input root that is the root: what it holds is
//! what the client says.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::mount::mount_bind;

use super::{
    mount::{READ_ONLY, set_attributes},
    template::c_path,
};

/// What the user and its group are called.
pub const NAME: &str = "build";

#[derive(Clone, Copy, Debug)]
enum Kind {
    User,
    Group,
}

const FILES: [(Kind, &str); 2] = [(Kind::User, "etc/passwd"), (Kind::Group, "etc/group")];

/// The two files of one room. None: its users have no names.
#[derive(Debug, Default)]
pub struct Account(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    kind: Kind,
    /// Empty until the action has a user.
    file: File,
    /// Of all others.
    entries: Vec<u8>,
    /// What it is mounted on, as this daemon sees it, with its device and inode number.
    below: PathBuf,
    identity: (u64, u64),
}

impl Account {
    /// On a thread that is in the room, whose root is `root` for this daemon. `scratch` is a directory
    /// of the room's in memory, which is left as it is.
    pub fn prepare(root: &Path, scratch: &Path) -> io::Result<Self> {
        let mut account = Account::default();
        for (kind, name) in FILES {
            let place = Path::new("/").join(name);
            // A link leads elsewhere inside of another root than from this daemon.
            if root != Path::new("/") && place.is_symlink() {
                continue;
            }
            let entries = match fs::read(&place) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let metadata = fs::metadata(&place)?;
            let source = scratch.join(".account");
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&source)?;
            mount_bind(&source, &place)?;
            fs::remove_file(&source)?;
            set_attributes(&c_path(&place)?, READ_ONLY, 0, 0)?;
            account.0.push(Entry {
                kind,
                file,
                entries,
                below: root.join(name),
                identity: (metadata.dev(), metadata.ino()),
            });
        }
        Ok(account)
    }

    /// Whether the files are still mounted on what the root has.
    pub fn is_current(&self) -> bool {
        self.0.iter().all(|entry| {
            fs::metadata(&entry.below)
                .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == entry.identity)
        })
    }

    /// Gives the user `id`, and the group of that number, its name; once.
    pub fn name(&self, id: u32, home: &str) -> io::Result<()> {
        for Entry {
            kind,
            file,
            entries,
            ..
        } in &self.0
        {
            let mut text = line(*kind, id, home).into_bytes();
            text.extend(entries);
            file.write_all_at(&text, 0)?;
        }
        Ok(())
    }
}

fn line(kind: Kind, id: u32, home: &str) -> String {
    // No path can have these in there.
    let home = match home.contains([':', '\n']) {
        true => "/nonexistent",
        false => home,
    };
    match kind {
        Kind::User => format!("{NAME}:x:{id}:{id}:Build action:{home}:/bin/sh\n"),
        Kind::Group => format!("{NAME}:x:{id}:\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_as_many_fields_as_they_must() {
        for (kind, fields) in [(Kind::User, 7), (Kind::Group, 4)] {
            for home in ["/build/home", "/a:b/home", "/a\nroot::0:0::/:/bin/sh"] {
                let line = line(kind, 58_003, home);
                assert_eq!(line.trim_end().split(':').count(), fields, "{line:?}");
                assert_eq!(line.matches('\n').count(), 1);
                assert!(line.starts_with("build:x:58003:"));
            }
        }
    }
}
