//! What identifies a cached file, and its name on disk: FUNCTION-HASH-SIZE+x when it is executable, else
//! FUNCTION-HASH-SIZE-x, such as sha256-…-12-x; its n-th extra inode has `.n` behind that.

use std::str::FromStr;

use crate::{
    digest::{Digest, DigestFunction},
    text::push_hex,
};

/// What identifies a cached file: the same content may be there as an executable too. A cached file has one or several
/// inodes, which are told apart by their inode index: 0 is the first one, the extra ones are numbered from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileKey {
    pub digest: Digest,
    pub executable: bool,
}

impl FileKey {
    /// Which of the directories of the cache it is in.
    pub(super) fn shard(&self) -> usize {
        usize::from(self.digest.hash_bytes()[0])
    }

    /// Writes the name of one of its inodes into a buffer that is used again and again.
    pub(super) fn write_name(&self, inode_index: u32, name: &mut String) {
        use std::fmt::Write;
        name.clear();
        name.push_str(self.digest.function().name());
        name.push('-');
        push_hex(name, self.digest.hash_bytes());
        let sign = if self.executable { '+' } else { '-' };
        let _ = write!(name, "-{}{sign}x", self.digest.size());
        if inode_index > 0 {
            let _ = write!(name, ".{inode_index}");
        }
    }

    /// The file and the inode index that a name tells; `None` when the cache gives no such names.
    pub(super) fn parse_name(name: &str) -> Option<(Self, u32)> {
        let (name, inode_index) = match name.split_once('.') {
            Some((name, inode_index)) => (
                name,
                u32::from_str(inode_index)
                    .ok()
                    .filter(|inode_index| *inode_index > 0)?,
            ),
            None => (name, 0),
        };
        let (name, executable) = match name.strip_suffix("+x") {
            Some(name) => (name, true),
            None => (name.strip_suffix("-x")?, false),
        };
        let mut parts = name.split('-');
        let (function, hash, size) = (parts.next()?, parts.next()?, parts.next()?);
        let function = DigestFunction::ALL
            .into_iter()
            .find(|known| known.name() == function)?;
        let size = i64::from_str(size).ok()?;
        let digest = Digest::parse_parts(Some(function), hash, size).ok()?;
        parts
            .next()
            .is_none()
            .then_some((FileKey { digest, executable }, inode_index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_what_the_file_is() {
        for function in DigestFunction::ALL {
            for executable in [false, true] {
                for inode_index in [0, 1, 17] {
                    let digest = function.digest_of(b"x");
                    let key = FileKey { digest, executable };
                    let mut name = String::new();
                    key.write_name(inode_index, &mut name);
                    assert_eq!(FileKey::parse_name(&name), Some((key, inode_index)));
                }
            }
        }
        for wrong in ["", "sha256", "sha256-ab-1-x", "sha256-ab-1-x.0", "x+x"] {
            assert_eq!(FileKey::parse_name(wrong), None, "{wrong}");
        }
    }
}
