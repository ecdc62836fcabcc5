//! What a file of an input root is made of.

use crate::worker::lru::Handle;

/// A file of an input root.
#[derive(Clone, Copy, Debug)]
pub struct InputInode {
    pub inode: u64,
    /// Of the cached file; empty files are none.
    pin: Option<Handle>,
    /// Which inode of the cached file it is, or `OWN`.
    number: u32,
}

/// An inode of its own, that no other name leads to.
const OWN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputInodeKind {
    /// Made for this place alone, as there is nothing in it.
    Empty,
    /// An inode of its own with the content of a cached file.
    Own(Handle),
    /// Another name of the n-th inode of a cached file.
    HardLink(Handle, u32),
}

impl InputInode {
    pub(super) fn new(kind: InputInodeKind, inode: u64) -> Self {
        let (pin, number) = match kind {
            InputInodeKind::Empty => (None, OWN),
            InputInodeKind::Own(handle) => (Some(handle), OWN),
            InputInodeKind::HardLink(handle, number) => (Some(handle), number),
        };
        InputInode { inode, pin, number }
    }

    pub fn kind(&self) -> InputInodeKind {
        match (self.pin, self.number) {
            (None, _) => InputInodeKind::Empty,
            (Some(handle), OWN) => InputInodeKind::Own(handle),
            (Some(handle), number) => InputInodeKind::HardLink(handle, number),
        }
    }

    /// Whether only this place in the root holds the number of its inode: when the file is gone,
    /// another one may get it.
    pub fn has_own_inode(&self) -> bool {
        self.number == OWN
    }
}
