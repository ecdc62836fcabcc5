//! What a command finds in its environment besides what was sent, and where its own directories are as
//! it sees them.
//!
//! 1. What was sent wins. What is added is the same on every host and in every slot, as far as
//!    containment.mounts allows.
//! 2. PATH, HOME and TZ are there, since clients that send an empty environment mean "as usual", and
//!    compilers that find no linker then are of use to nobody.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::BTreeMap;

use crate::path::RelativePath;

/// PATH as systemd gives it to services (systemd.exec(5)).
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The name of the home directory, which lies beside the input root.
pub(super) const HOME: &str = "home";
/// The temporary or home directory where an action sees none that the worker made.
const TEMPORARY: &str = "/tmp";

/// What the runner's configuration adds.
#[derive(Clone, Debug)]
pub(super) struct AddedVariables {
    pub view: BuildDirectoryView,
    /// Whether TMPDIR is added, where the worker made a temporary directory.
    pub tmpdir: bool,
    /// Whether PATH, HOME and TZ are added.
    pub defaults: bool,
}

/// How actions see the build directory, whose absolute path is the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BuildDirectoryView {
    /// Actions see all of it, as the host does.
    Whole(String),
    /// The directory that the input root lies in is mounted on it. The temporary directory is there, too, where it
    /// lies beside the input root; else it is /tmp.
    OwnDirectory(String),
    /// Actions do not see it: the input root is `/`, and the temporary directory is /tmp.
    InputRoot,
}

impl BuildDirectoryView {
    /// The path of the temporary directory, as the action sees it.
    pub(super) fn tmpdir(&self, temporary: &RelativePath, input_root: &RelativePath) -> String {
        match self {
            BuildDirectoryView::Whole(directory) => format!("{directory}/{temporary}"),
            BuildDirectoryView::InputRoot => TEMPORARY.to_owned(),
            BuildDirectoryView::OwnDirectory(directory) => {
                match (temporary.split_last(), input_root.split_last()) {
                    (Some((own, name)), Some((root, _))) if own == root && !own.is_root() => {
                        format!("{directory}/{name}")
                    }
                    (_, Some((own, _))) if own.is_root() => format!("{directory}/{temporary}"),
                    _ => TEMPORARY.to_owned(),
                }
            }
        }
    }

    /// The path of the home directory, as the action sees it: `HOME` beside the input root, or else the temporary one.
    pub(super) fn home(
        &self,
        temporary: Option<&RelativePath>,
        input_root: &RelativePath,
    ) -> String {
        match (self, input_root.split_last()) {
            (BuildDirectoryView::Whole(directory), Some((own, _))) if !own.is_root() => {
                format!("{directory}/{own}/{HOME}")
            }
            (BuildDirectoryView::OwnDirectory(directory), Some((own, _))) if !own.is_root() => {
                format!("{directory}/{HOME}")
            }
            _ => match temporary {
                Some(temporary) => self.tmpdir(temporary, input_root),
                None => TEMPORARY.to_owned(),
            },
        }
    }
}

impl AddedVariables {
    /// Names and values of what `sent` lacks, for a command whose home directory is `home`.
    pub(super) fn missing_from(
        &self,
        sent: &BTreeMap<String, String>,
        home: &str,
        temporary: Option<&RelativePath>,
        input_root: &RelativePath,
    ) -> Vec<(String, String)> {
        let mut added = Vec::new();
        if let (true, Some(temporary)) = (self.tmpdir, temporary) {
            added.push(("TMPDIR", self.view.tmpdir(temporary, input_root)));
        }
        if self.defaults {
            added.push(("PATH", PATH.to_owned()));
            added.push(("HOME", home.to_owned()));
            added.push(("TZ", "UTC".to_owned()));
        }
        added
            .into_iter()
            .filter(|(name, _)| !sent.contains_key(*name))
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelativePath {
        RelativePath::resolve(&RelativePath::root(), text, "build directory").unwrap()
    }

    #[test]
    fn directories_are_where_the_action_sees_them() {
        let build = || "/build".to_owned();
        let (whole, own) = (
            BuildDirectoryView::Whole(build()),
            BuildDirectoryView::OwnDirectory(build()),
        );
        for (view, input_root, temporary, tmpdir, home) in [
            (&whole, "3/root", "3/tmp", "/build/3/tmp", "/build/3/home"),
            (&own, "3/root", "3/tmp", "/build/tmp", "/build/home"),
            // Where the input root has no directory around it, nothing but this is the action's own.
            (&whole, "root", "tmp", "/build/tmp", "/build/tmp"),
            (&own, "root", "tmp", "/build/tmp", "/build/tmp"),
            (&own, "3/root", "4/tmp", "/tmp", "/build/home"),
            (
                &BuildDirectoryView::InputRoot,
                "3/root",
                "3/tmp",
                "/tmp",
                "/tmp",
            ),
        ] {
            let (input_root, temporary) = (path(input_root), path(temporary));
            assert_eq!(view.tmpdir(&temporary, &input_root), tmpdir);
            assert_eq!(view.home(Some(&temporary), &input_root), home);
        }
    }
}
