//! An input root that is the action's `/`, with /proc, /dev and /tmp.
//!
//! What has to be there to mount these on is made before the action starts, and removed again when
//! nothing of the action is left, so that it is no output.

use std::{
    ffi::{CStr, CString},
    os::fd::OwnedFd,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, mkdirat, statat, unlinkat},
    io::Errno,
};

use super::spawn::SetupStep;

#[derive(Debug)]
pub(super) struct InputRootChroot {
    directory: OwnedFd,
    /// Where it is mounted in the sandbox.
    mount_point: CString,
    made: Vec<&'static str>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum InputRootChrootError {
    /// The action's inputs are at fault.
    #[error(
        "/{0} of the input root must be a directory, or absent, as the input root is the action's /"
    )]
    NoDirectory(&'static str),
    #[error(transparent)]
    Make(#[from] Errno),
}

/// Copied from the sandbox.
const COPIED: [&CStr; 2] = [c"/proc", c"/dev"];
const TEMPORARY: &CStr = c"/tmp";

impl InputRootChroot {
    /// `place` is where the directory will be mounted in the sandbox.
    pub(super) fn prepare(
        directory: OwnedFd,
        mount_point: &CStr,
    ) -> Result<Self, InputRootChrootError> {
        let mut chroot = InputRootChroot {
            directory,
            mount_point: mount_point.to_owned(),
            made: Vec::new(),
        };
        for name in ["proc", "dev", "tmp"] {
            match mkdirat(&chroot.directory, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => chroot.made.push(name),
                Err(Errno::EXIST) => {
                    let stat = statat(&chroot.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                        return Err(InputRootChrootError::NoDirectory(name));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(chroot)
    }

    /// What makes it the root, when it is mounted.
    pub(super) fn steps(&self) -> Vec<SetupStep<'static>> {
        let copies = COPIED.iter().map(|from| SetupStep::CopyMount {
            from: (*from).to_owned(),
            to: self.below(from),
        });
        let change = SetupStep::ChangeRoot(self.mount_point.clone());
        copies.chain([change]).collect()
    }

    /// Where the temporary directory must be mounted.
    pub(super) fn temporary_mount_point(&self) -> CString {
        self.below(TEMPORARY)
    }

    fn below(&self, path: &CStr) -> CString {
        // Neither of them has a NUL.
        CString::new([self.mount_point.to_bytes(), path.to_bytes()].concat()).unwrap_or_default()
    }
}

impl Drop for InputRootChroot {
    fn drop(&mut self) {
        for name in &self.made {
            // The action may have replaced it, and that is its output then.
            let _ = unlinkat(&self.directory, *name, AtFlags::REMOVEDIR);
        }
    }
}
