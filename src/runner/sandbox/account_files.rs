//! The action's user as its programs look it up in /etc/passwd and /etc/group (passwd(5), group(5)):
//! with the same name on every host and in every slot, so that outputs do not depend on it, and a home
//! directory.
//!
//! 1. Each sandbox has files of its own mounted on these two, in memory and read-only: an entry of the
//!    action's first, then what its root has there.
//! 2. The entry is written before any process of the action exists; nobody but root may write them.
//! 3. When a file that is mounted on is replaced on the host, as useradd(8) does it, the kernel takes
//!    the mount away everywhere. So a sandbox whose root has others by now is not used.
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

use super::mount_calls::{READ_ONLY, c_path, set_attributes};

/// What the user and its group are called.
pub(super) const USER_NAME: &str = "build";

/// Which of the two files it is.
#[derive(Clone, Copy, Debug)]
enum Database {
    User,
    Group,
}

const FILES: [(Database, &str); 2] = [
    (Database::User, "etc/passwd"),
    (Database::Group, "etc/group"),
];

/// The two files of one sandbox. Those that its root lacks are left out, and both where users have no names.
#[derive(Debug, Default)]
pub(crate) struct AccountFiles(Vec<AccountFile>);

#[derive(Debug)]
struct AccountFile {
    database: Database,
    /// What is mounted, which is empty until the action has a user.
    file: File,
    /// The entries that the root's own file has.
    entries: Vec<u8>,
    /// The file that it is mounted on, as this daemon sees it, with the device and inode number that it had.
    below: PathBuf,
    identity: (u64, u64),
}

impl AccountFiles {
    /// Mounts the files, on a thread that is in the sandbox, whose root is `root` for this daemon. `scratch` is a
    /// directory of the sandbox's in memory, which is left as it is.
    pub(crate) fn prepare(root: &Path, scratch: &Path) -> io::Result<Self> {
        let mut files = AccountFiles::default();
        for (database, name) in FILES {
            let mount_point = Path::new("/").join(name);
            // A link leads elsewhere inside of another root than from this daemon.
            if root != Path::new("/") && mount_point.is_symlink() {
                continue;
            }
            let entries = match fs::read(&mount_point) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let metadata = fs::metadata(&mount_point)?;
            let source = scratch.join(".files");
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&source)?;
            mount_bind(&source, &mount_point)?;
            fs::remove_file(&source)?;
            set_attributes(&c_path(&mount_point)?, READ_ONLY, 0, 0)?;
            files.0.push(AccountFile {
                database,
                file,
                entries,
                below: root.join(name),
                identity: (metadata.dev(), metadata.ino()),
            });
        }
        Ok(files)
    }

    /// Whether the files are still mounted on what the root has.
    pub(crate) fn is_current(&self) -> bool {
        self.0.iter().all(|entry| {
            fs::metadata(&entry.below)
                .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == entry.identity)
        })
    }

    /// Writes the entries of the user `id`, and of the group of that number. To be called once.
    pub(crate) fn write_entry(&self, id: u32, home: &str) -> io::Result<()> {
        for AccountFile {
            database,
            file,
            entries,
            ..
        } in &self.0
        {
            let mut text = line(*database, id, home).into_bytes();
            text.extend(entries);
            file.write_all_at(&text, 0)?;
        }
        Ok(())
    }
}

/// The entry of the action's user, or of its group.
fn line(database: Database, id: u32, home: &str) -> String {
    // No path can have these in there.
    let home = match home.contains([':', '\n']) {
        true => "/nonexistent",
        false => home,
    };
    match database {
        Database::User => format!("{USER_NAME}:x:{id}:{id}:Build action:{home}:/bin/sh\n"),
        Database::Group => format!("{USER_NAME}:x:{id}:\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_as_many_fields_as_they_must() {
        for (database, fields) in [(Database::User, 7), (Database::Group, 4)] {
            for home in ["/build/home", "/a:b/home", "/a\nroot::0:0::/:/bin/sh"] {
                let line = line(database, 58_003, home);
                assert_eq!(line.trim_end().split(':').count(), fields, "{line:?}");
                assert_eq!(line.matches('\n').count(), 1);
                assert!(line.starts_with("build:x:58003:"));
            }
        }
    }
}
