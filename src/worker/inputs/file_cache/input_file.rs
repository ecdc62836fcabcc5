//! What a file of an input root is made of.

use crate::worker::lru::Handle;

/// A file of an input root.
#[derive(Clone, Copy, Debug)]
pub struct InputFile {
    /// Its inode number; before it is linked, that of the cached file, or 0 for an empty one.
    pub inode: u64,
    /// Of the cached file; empty files are none.
    pin: Option<Handle>,
    /// Which inode of the cached file it is, or `OWN`.
    number: u32,
}

/// An inode of its own, that no other name leads to.
const OWN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFileKind {
    /// Made for this place alone, as there is nothing in it.
    Empty,
    /// An inode of its own with the content of a cached file.
    Own(Handle),
    /// Another name of the n-th inode of a cached file.
    HardLink(Handle, u32),
}

impl InputFile {
    pub(super) fn new(kind: InputFileKind, inode: u64) -> Self {
        let (pin, number) = match kind {
            InputFileKind::Empty => (None, OWN),
            InputFileKind::Own(handle) => (Some(handle), OWN),
            InputFileKind::HardLink(handle, number) => (Some(handle), number),
        };
        InputFile { inode, pin, number }
    }

    pub fn kind(&self) -> InputFileKind {
        match (self.pin, self.number) {
            (None, _) => InputFileKind::Empty,
            (Some(handle), OWN) => InputFileKind::Own(handle),
            (Some(handle), number) => InputFileKind::HardLink(handle, number),
        }
    }

    /// Whether only this place in the root holds the number of its inode: when the file is gone,
    /// another one may get it.
    pub fn has_own_inode(&self) -> bool {
        self.number == OWN
    }
}
