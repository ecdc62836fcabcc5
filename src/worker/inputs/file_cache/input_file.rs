//! What a file of an input root is made of: its inode, and the cached file that it pins.

use crate::worker::lru::Handle;

/// A file of an input root, in as few bytes as may be, since the worker records all files of the roots that it keeps.
#[derive(Clone, Copy, Debug)]
pub struct InputFile {
    /// Its inode number; until it is made on disk, that of the first inode of the cached file, or 0 for an empty one.
    pub inode: u64,
    /// The cached file that it pins; `None` for an empty file, which is made of none.
    pin: Option<Handle>,
    /// Which inode of the cached file it is (0 is the first one), or `UNSHARED`.
    inode_index: u32,
}

/// Stands for an inode that is no other file's, neither of the cache nor of another root.
const UNSHARED: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFileKind {
    /// An unshared inode without content, made of no cached file.
    Empty,
    /// An unshared inode with the content of a cached file: a reflink or a copy.
    Unshared(Handle),
    /// A hard link to an inode of a cached file, by its inode index (0 is the first one).
    HardLink(Handle, u32),
}

impl InputFile {
    pub(super) fn new(kind: InputFileKind, inode: u64) -> Self {
        let (pin, inode_index) = match kind {
            InputFileKind::Empty => (None, UNSHARED),
            InputFileKind::Unshared(handle) => (Some(handle), UNSHARED),
            InputFileKind::HardLink(handle, inode_index) => (Some(handle), inode_index),
        };
        InputFile {
            inode,
            pin,
            inode_index,
        }
    }

    pub fn kind(&self) -> InputFileKind {
        match (self.pin, self.inode_index) {
            (None, _) => InputFileKind::Empty,
            (Some(handle), UNSHARED) => InputFileKind::Unshared(handle),
            (Some(handle), inode_index) => InputFileKind::HardLink(handle, inode_index),
        }
    }

    /// Whether its inode is no other file's: when the file is gone, another file may get the inode number.
    pub fn has_unshared_inode(&self) -> bool {
        self.inode_index == UNSHARED
    }
}
