//! A Directory message, parsed: every name is one path component and occurs once; files, directories
//! and symlinks are in the order of their names.

use prost::Message;

use super::file_cache::FileKey;
use crate::{digest::Digest, path::Component, proto::reapi};

/// How many directories may be below one another. A path of more has over 2,000 bytes, half of PATH_MAX.
pub const MAXIMUM_DEPTH: u32 = 1_024;

/// How many files, directories and symbolic links one input root may have. A few hundred bytes of Directory
/// messages that repeat one another can describe more than any disk holds.
pub const MAXIMUM_ENTRIES: u64 = 2_000_000;

/// What a Directory message of REAPI says.
#[derive(Debug, Default, PartialEq)]
pub struct Directory {
    pub files: Vec<FileEntry>,
    pub directories: Vec<(Component, Digest)>,
    pub symlinks: Vec<(Component, Box<str>)>,
    /// The properties of those entries that have any, by name; `None` stands for the directory itself.
    pub properties: Vec<(Option<Component>, NodeProperties)>,
}

#[derive(Debug, PartialEq)]
pub struct FileEntry {
    pub name: Component,
    pub key: FileKey,
}

/// The properties of a Directory or an entry of it (REAPI: NodeProperties), as far as file systems have them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeProperties {
    /// Seconds since the epoch, and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    pub unix_mode: Option<u32>,
}

impl NodeProperties {
    /// `None` when there are none that a file system has.
    fn parse(message: Option<&reapi::NodeProperties>) -> Result<Option<Self>, String> {
        let Some(message) = message else {
            return Ok(None);
        };
        let mtime = match &message.mtime {
            None => None,
            Some(mtime) => match u32::try_from(mtime.nanos) {
                Ok(nanos @ 0..=999_999_999) => Some((mtime.seconds, nanos)),
                _ => return Err(format!("its mtime has {} nanoseconds", mtime.nanos)),
            },
        };
        let properties = NodeProperties {
            mtime,
            unix_mode: message.unix_mode,
        };
        Ok((mtime.is_some() || message.unix_mode.is_some()).then_some(properties))
    }
}

impl Directory {
    /// Parses a message. The error says what is wrong, and reads as a sentence after the Directory's name.
    pub fn parse(digest: &Digest, data: &[u8]) -> Result<Self, String> {
        let message = reapi::Directory::decode(data)
            .map_err(|error| format!("it is no Directory message: {error}"))?;
        let name = |name: &str| Component::parse(name).map_err(|error| error.to_string());
        let child = |name: &str, child: Option<&reapi::Digest>| {
            Digest::parse_required(Some(digest.function()), child)
                .map_err(|error| format!("the digest of its entry {name:?} is wrong: {error}"))
        };
        let mut directory = Directory::default();
        let properties = |name: &str, of: Option<&reapi::NodeProperties>| {
            NodeProperties::parse(of)
                .map_err(|error| format!("a node property of its entry {name:?} is wrong: {error}"))
        };
        let own = properties(".", message.node_properties.as_ref())?;
        directory.properties.extend(own.map(|own| (None, own)));
        directory.files.reserve_exact(message.files.len());
        for file in &message.files {
            if let Some(of_file) = properties(&file.name, file.node_properties.as_ref())? {
                let entry = (Some(name(&file.name)?), of_file);
                directory.properties.push(entry);
            }
            directory.files.push(FileEntry {
                name: name(&file.name)?,
                key: FileKey {
                    digest: child(&file.name, file.digest.as_ref())?,
                    executable: file.is_executable,
                },
            });
        }
        directory
            .directories
            .reserve_exact(message.directories.len());
        for entry in &message.directories {
            directory.directories.push((
                name(&entry.name)?,
                child(&entry.name, entry.digest.as_ref())?,
            ));
        }
        for symlink in &message.symlinks {
            if symlink.target.is_empty()
                || symlink.target.len() > 4095
                || symlink.target.contains('\0')
            {
                return Err(format!(
                    "the target of its symbolic link {:?} is empty, longer than 4095 bytes, or has a NUL character",
                    symlink.name
                ));
            }
            if let Some(of_link) = properties(&symlink.name, symlink.node_properties.as_ref())? {
                let entry = (Some(name(&symlink.name)?), of_link);
                directory.properties.push(entry);
            }
            directory
                .symlinks
                .push((name(&symlink.name)?, symlink.target.as_str().into()));
        }
        directory.sort();
        // Twice is ambiguous.
        let mut names: Vec<&str> = directory.names().collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("it has two entries with the name {:?}", pair[0])),
            None => Ok(directory),
        }
    }

    /// Sorts each list by name, as REAPI wants it; comparing two directories relies on it.
    pub fn sort(&mut self) {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
        self.directories.sort_by(|a, b| a.0.cmp(&b.0));
        self.symlinks.sort_by(|a, b| a.0.cmp(&b.0));
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let files = self.files.iter().map(|file| &file.name);
        let directories = self.directories.iter().map(|(name, _)| name);
        let symlinks = self.symlinks.iter().map(|(name, _)| name);
        files.chain(directories).chain(symlinks).map(|n| n.as_str())
    }

    /// How many bytes the directory takes on disk, if each entry takes so many beside its name.
    pub fn size_on_disk(&self, beside_a_name: u64) -> u64 {
        self.names()
            .fold(0, |sum, name| sum + name.len() as u64 + beside_a_name)
    }

    /// How many files, directories and symbolic links there are.
    pub fn entries(&self) -> u64 {
        (self.files.len() + self.directories.len() + self.symlinks.len()) as u64
    }

    /// How many bytes it takes in memory, roughly.
    pub fn weight(&self) -> u64 {
        let fixed = size_of::<Self>()
            + self.files.len() * size_of::<FileEntry>()
            + self.directories.len() * size_of::<(Component, Digest)>()
            + self.symlinks.len() * size_of::<(Component, Box<str>)>()
            + self.properties.len() * (size_of::<(Option<Component>, NodeProperties)>() + 32);
        let names: usize = self.names().map(|name| name.len() + 16).sum();
        let targets: usize = self.symlinks.iter().map(|(_, target)| target.len()).sum();
        (fixed + names + targets + 128) as u64
    }
}
