//! Open descriptors of namespaces (namespaces(7)), and how they are entered (setns(2)); others make them (unshare(2)).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use nix::sched::{CloneFlags, setns};
use rustix::thread::LinkNameSpaceType;

use crate::runner::spawn::SetupStep;

/// A kind of namespace: its flag (unshare(2)), its link in /proc, and what setns(2) expects of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NamespaceKind {
    pub flag: CloneFlags,
    pub name: &'static str,
    pub link: LinkNameSpaceType,
}

/// An open namespace, which lasts at least as long as this.
#[derive(Debug)]
pub(crate) struct NamespaceFd {
    descriptor: OwnedFd,
    kind: NamespaceKind,
}

impl NamespaceFd {
    pub(crate) fn new(descriptor: OwnedFd, kind: NamespaceKind) -> Self {
        NamespaceFd { descriptor, kind }
    }

    /// The namespace of this kind that this thread is in.
    pub(crate) fn current(kind: NamespaceKind) -> io::Result<Self> {
        let path = format!("/proc/thread-self/ns/{}", kind.name);
        Ok(NamespaceFd::new(fs::File::open(path)?.into(), kind))
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(NamespaceFd::new(self.descriptor.try_clone()?, self.kind))
    }

    /// Moves this thread into it.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.descriptor, self.kind.flag)?)
    }

    /// The step that moves an action's process into it.
    pub(crate) fn setup_step(&self) -> SetupStep<'_> {
        SetupStep::EnterNamespace(self.descriptor.as_fd(), self.kind.link)
    }
}
