//! The layer `containment.hidden`: paths that actions find empty, such as the daemons' own, but for the build
//! directory and the `writable_directories` below them.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
};

use rustix::mount::mount_bind;

use super::{
    containment_layer::{Layer, Layers, Probe},
    error::SandboxError,
    mount_calls::{c_path, mount_tmpfs},
};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::HIDDEN,
    key: "containment.hidden",
    demand: |containment| containment.hidden,
    needs: Layers::MOUNTS,
    probe: Probe::Sandbox,
    unshared_namespace: None,
    on: "containment.hidden_paths are empty for actions, but for what they may write to",
    off: "actions see the daemons' directories and sockets, as far as their permissions let them",
};

/// Hides paths, on a thread that is in the template: mounts an empty file system on each directory, and /dev/null on
/// each file. Passes over those that do not exist, and those that `is_writable` says are in what actions may write to.
/// Returns where file systems were mounted, which must be made read-only once all that is writable below is mounted.
pub(super) fn prepare_template(
    paths: &[PathBuf],
    is_writable: impl Fn(&Path) -> bool,
) -> Result<Vec<CString>, SandboxError> {
    let mut hiding_tmpfs: Vec<CString> = Vec::new();
    for path in paths {
        let Ok(path) = fs::canonicalize(path) else {
            continue;
        };
        if is_writable(&path) {
            continue;
        }
        let step = format!("hide {}", path.display());
        if path.is_dir() {
            let mounted = mount_tmpfs(&path, c"mode=755,size=64k").and_then(|()| c_path(&path));
            hiding_tmpfs.push(mounted.map_err(SandboxError::at(step))?);
        } else {
            mount_bind("/dev/null", &path).map_err(SandboxError::at(step))?;
        }
    }
    Ok(hiding_tmpfs)
}
