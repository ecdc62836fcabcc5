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

/// An input root with the directories that are mounted on in it; those that were made are removed on drop.
#[derive(Debug)]
pub(super) struct InputRootChroot {
    directory: OwnedFd,
    /// Where the input root is mounted in the sandbox, before it becomes `/`.
    mount_point: CString,
    /// Names of the directories that were not among the inputs.
    made: Vec<&'static str>,
}

/// Why an input root cannot be made `/`.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputRootChrootError {
    /// The action's inputs have something else there; the client must act.
    #[error(
        "/{0} of the input root must be a directory, or absent, as the input root is the action's /"
    )]
    NoDirectory(&'static str),
    #[error(transparent)]
    Make(#[from] Errno),
}

/// What is mounted in the sandbox and is mounted in the input root, too.
const COPIED: [&CStr; 2] = [c"/proc", c"/dev"];
/// Where the action's temporary directory is mounted, in the input root.
const TEMPORARY: &CStr = c"/tmp";

impl InputRootChroot {
    /// Makes those directories that the input root lacks. `mount_point` is where it will be mounted in the sandbox.
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

    /// The steps that make it the root, once it is mounted.
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

    /// A path of the input root, as the sandbox has it.
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
