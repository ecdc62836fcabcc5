//! Instance names: whose blobs, whose actions, whose workers.

#![warn(missing_docs)]

use std::{fmt, sync::Arc};

use crate::text::shorten;

/// REAPI: words that would make resource names ambiguous.
const RESERVED: [&str; 7] = [
    "blobs",
    "uploads",
    "actions",
    "actionResults",
    "operations",
    "capabilities",
    "compressed-blobs",
];

/// Components separated by slashes; may have none. No component is empty or reserved, nor leads elsewhere in a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceName(Arc<str>);

/// The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum InstanceNameError {
    #[error("instance name {0:?} starts or ends with a slash, or has two in a row")]
    EmptyComponent(String),
    #[error("instance name {0:?} contains the reserved word {1:?}")]
    Reserved(String, &'static str),
    #[error(
        "instance name {0:?} has the component {1:?}, which leads elsewhere in paths of pages and files"
    )]
    Dots(String, String),
    #[error("instance name {0:?} has a NUL or control character in it")]
    ControlCharacter(String),
    #[error("instance name of {0} bytes is longer than 1024 bytes")]
    TooLong(usize),
}

impl InstanceName {
    /// A name, if it is one by REAPI's rules.
    pub fn parse(name: &str) -> Result<Self, InstanceNameError> {
        if name.len() > 1024 {
            return Err(InstanceNameError::TooLong(name.len()));
        }
        if name.chars().any(char::is_control) {
            return Err(InstanceNameError::ControlCharacter(shorten(name)));
        }
        if !name.is_empty() {
            for component in name.split('/') {
                if component.is_empty() {
                    return Err(InstanceNameError::EmptyComponent(shorten(name)));
                }
                if matches!(component, "." | "..") {
                    return Err(InstanceNameError::Dots(shorten(name), component.to_owned()));
                }
                if let Some(word) = RESERVED.into_iter().find(|word| *word == component) {
                    return Err(InstanceNameError::Reserved(shorten(name), word));
                }
            }
        }
        Ok(InstanceName(name.into()))
    }

    /// The name without components.
    pub fn empty() -> Self {
        InstanceName("".into())
    }

    /// The name as it is written: components with slashes between them.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it has no components.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The components, from the first one on.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|component| !component.is_empty())
    }

    /// This name without `prefix`, when `prefix` is made of its first components.
    pub fn strip_prefix(&self, prefix: &InstanceName) -> Option<InstanceName> {
        if prefix.is_empty() {
            return Some(self.clone());
        }
        match self.0.strip_prefix(&*prefix.0)? {
            "" => Some(Self::empty()),
            rest => rest.strip_prefix('/').map(|rest| InstanceName(rest.into())),
        }
    }

    /// This name without its last component.
    pub fn parent(&self) -> Option<InstanceName> {
        match self.0.rsplit_once('/') {
            Some((parent, _)) => Some(InstanceName(parent.into())),
            None if self.is_empty() => None,
            None => Some(Self::empty()),
        }
    }

    /// The name that begins with this one and ends with `suffix`.
    pub fn join(&self, suffix: &InstanceName) -> InstanceName {
        match (self.is_empty(), suffix.is_empty()) {
            (true, _) => suffix.clone(),
            (_, true) => self.clone(),
            _ => InstanceName(format!("{}/{}", self.0, suffix.0).into()),
        }
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> InstanceName {
        InstanceName::parse(text).unwrap()
    }

    #[test]
    fn prefixes_are_whole_components() {
        assert_eq!(name("a/b").strip_prefix(&name("a")), Some(name("b")));
        assert_eq!(name("a/b").strip_prefix(&name("a/b")), Some(name("")));
        assert_eq!(name("a/b").strip_prefix(&name("")), Some(name("a/b")));
        assert_eq!(name("ab").strip_prefix(&name("a")), None);
        assert_eq!(name("a/b/c").parent(), Some(name("a/b")));
        assert_eq!(name("a").parent(), Some(name("")));
        assert_eq!(name("").parent(), None);
        assert_eq!(name("a").join(&name("b")), name("a/b"));
        assert_eq!(name("").join(&name("b")), name("b"));
        assert_eq!(name("a").join(&name("")), name("a"));
    }

    #[test]
    fn reserved_words_and_stray_slashes_are_refused() {
        for bad in [
            "/",
            "a/",
            "/a",
            "a//b",
            "blobs",
            "a/uploads/b",
            "compressed-blobs",
            "a\0b",
            "a/../b",
            "..",
            "a/.",
        ] {
            assert!(InstanceName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(InstanceName::parse("blobs2/main").is_ok());
        assert!(InstanceName::parse("v1.0/...").is_ok());
    }
}
