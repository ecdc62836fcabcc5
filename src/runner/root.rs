//! An input root that is the action's `/`, with /proc, /dev and /tmp.
//!
//! What has to be there to mount these on is made before the action starts, and removed again when
//! nothing of the action is left, so that it is no output.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::OwnedFd,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, mkdirat, statat, unlinkat},
    io::Errno,
};

#[derive(Debug)]
pub struct RootDirectory {
    directory: OwnedFd,
    made: Vec<&'static str>,
    /// From where in the room to where in the root.
    copies: Vec<(CString, CString)>,
    temporary: CString,
}

const COPIED: [&str; 2] = ["proc", "dev"];
const TEMPORARY: &str = "tmp";

impl RootDirectory {
    /// `place` is where the directory will be mounted in the room.
    pub fn prepare(directory: OwnedFd, place: &CStr) -> io::Result<Self> {
        let mut root = RootDirectory {
            directory,
            made: Vec::new(),
            copies: Vec::new(),
            temporary: below(place, TEMPORARY)?,
        };
        for name in COPIED.into_iter().chain([TEMPORARY]) {
            match mkdirat(&root.directory, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => root.made.push(name),
                Err(Errno::EXIST) => {
                    let stat = statat(&root.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                        return Err(io::Error::new(
                            io::ErrorKind::NotADirectory,
                            format!("/{name} of the input root must be a directory"),
                        ));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        for name in COPIED {
            root.copies.push((below(c"", name)?, below(place, name)?));
        }
        Ok(root)
    }

    pub fn copies(&self) -> &[(CString, CString)] {
        &self.copies
    }

    /// Where the temporary directory must be mounted.
    pub fn temporary(&self) -> Vec<CString> {
        vec![self.temporary.clone()]
    }
}

impl Drop for RootDirectory {
    fn drop(&mut self) {
        for name in &self.made {
            // The action may have replaced it, and that is its output then.
            let _ = unlinkat(&self.directory, *name, AtFlags::REMOVEDIR);
        }
    }
}

fn below(place: &CStr, name: &str) -> io::Result<CString> {
    let mut path = place.to_bytes().to_vec();
    path.push(b'/');
    path.extend(name.as_bytes());
    Ok(CString::new(path)?)
}
