//! Paths that peers send, turned into ones that cannot lead elsewhere.
//!
//! Lexical only: that no symbolic link on the disk leads elsewhere either is for those who open
//! them (`openat2(2)`, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS).

#![warn(missing_docs)]

use std::{fmt, sync::Arc};

use crate::text::shorten;

/// The name of one directory entry: not empty, not `.` or `..`, no slash, no NUL, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Component(Arc<str>);

/// A path below some root, as a list of components; none means the root itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelativePath(Vec<Component>);

/// The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum PathError {
    #[error("{0:?} is not the name of a directory entry: it is {1}")]
    Component(String, &'static str),
    #[error("path {0:?} is absolute; it must be relative")]
    Absolute(String),
    #[error("path {0:?} leads outside of the {1}")]
    Escapes(String, &'static str),
    #[error("path of {0} bytes is longer than 4096 bytes")]
    TooLong(usize),
}

impl Component {
    /// The path, if it is one that stays below where it begins.
    pub fn parse(name: &str) -> Result<Self, PathError> {
        let wrong = |reason| Err(PathError::Component(shorten(name), reason));
        match name {
            "" => wrong("empty"),
            "." | ".." => wrong("a reference to a directory"),
            _ if name.contains('/') => wrong("more than one component, as it has a slash"),
            _ if name.contains('\0') => wrong("cut short by a NUL character"),
            _ if name.len() > 255 => wrong("longer than 255 bytes"),
            _ => Ok(Component(name.into())),
        }
    }

    /// The component as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RelativePath {
    /// The path of the directory itself.
    pub fn root() -> Self {
        RelativePath(Vec::new())
    }

    /// A path relative to `base`, which lies below the same root. `..` may climb as far as the
    /// root and no further; `root` names that root in the message.
    pub fn resolve(base: &RelativePath, path: &str, root: &'static str) -> Result<Self, PathError> {
        if path.len() > 4096 {
            return Err(PathError::TooLong(path.len()));
        }
        if path.starts_with('/') {
            return Err(PathError::Absolute(shorten(path)));
        }
        let mut resolved = base.0.clone();
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    if resolved.pop().is_none() {
                        return Err(PathError::Escapes(shorten(path), root));
                    }
                }
                name => resolved.push(Component::parse(name)?),
            }
        }
        Ok(RelativePath(resolved))
    }

    /// The components, from the outermost one on.
    pub fn components(&self) -> &[Component] {
        &self.0
    }

    /// Whether it has no components.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory that holds this, and its name in it. `None` for the root.
    pub fn split_last(&self) -> Option<(RelativePath, &Component)> {
        let (name, parent) = self.0.split_last()?;
        Some((RelativePath(parent.to_vec()), name))
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: Component) -> Self {
        let mut joined = self.0.clone();
        joined.push(name);
        RelativePath(joined)
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `.` for the root, so that the text can be opened.
impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str(".");
        }
        for (i, component) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("/")?;
            }
            f.write_str(&component.0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(base: &str, path: &str) -> Result<String, PathError> {
        let base = RelativePath::resolve(&RelativePath::root(), base, "input root")?;
        RelativePath::resolve(&base, path, "input root").map(|path| path.to_string())
    }

    #[test]
    fn dots_climb_to_the_root_and_no_further() {
        assert_eq!(resolve("a/b", "../c").unwrap(), "a/c");
        assert_eq!(resolve("a/b", "../..").unwrap(), ".");
        assert_eq!(
            resolve("a/b", "../../../c"),
            Err(PathError::Escapes("../../../c".into(), "input root"))
        );
        assert_eq!(resolve("", "a//./b/").unwrap(), "a/b");
        assert!(matches!(resolve("", "/etc"), Err(PathError::Absolute(_))));
        assert!(matches!(
            resolve("", "a\0b"),
            Err(PathError::Component(_, _))
        ));
    }

    #[test]
    fn a_component_is_one_entry() {
        for bad in ["", ".", "..", "a/b", "a\0", &"x".repeat(256)] {
            assert!(Component::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Component::parse("...").is_ok());
        assert!(Component::parse(&"x".repeat(255)).is_ok());
    }
}
