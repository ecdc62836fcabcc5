//! The layer `containment.seccomp`: a filter of system calls (seccomp(2)). It refuses what builds and
//! tests never need and what keeps no promise about other users' business: keyrings, BPF, userfaultfd,
//! mounts, user namespaces (with which they would have mounts and network interfaces of their own, and
//! so most of the kernel's privileged code), modules, kexec, clocks, performance counters, rings.
//! `syscalls` is the list, `filter` what is decided for each ABI, `bpf` has instructions and a binary search; a new
//! process installs it (`spawn::child`).
//!
//! 1. They fail with EPERM, or, where programs have a way around them, with ENOSYS, as on a kernel without them.
//! 2. So do calls that are newer than the list, on every ABI: a program that knows them knows older
//!    kernels too.
//! 3. 32-bit programs are filtered by their own numbers, out of the same list. Numbers of the x32 ABI
//!    and programs of other architectures are refused as a whole.
//!
//! Tracing is allowed: sanitizers and debuggers trace their own processes, and others are in other
//! namespaces and have other users.

mod bpf;
mod filter;
mod syscalls;

pub(crate) use filter::SeccompFilter;

use super::containment_layer::{Layer, Layers, Probe};
use crate::{config::runner::Config, runner::proc_self_status};

pub(super) const LAYER: Layer = Layer {
    flag: Layers::SECCOMP,
    key: "containment.seccomp",
    demand: |containment| containment.seccomp,
    needs: Layers::empty(),
    probe: Probe::Function(is_built_in),
    unshared_namespace: None,
    on: "system calls that builds never need are refused",
    off: "actions may use all system calls",
};

/// A kernel that was built without it has no such field.
fn is_built_in(_: &Config) -> Result<(), String> {
    proc_self_status::bits("Seccomp:")
        .map(drop)
        .ok_or_else(|| "this kernel has no seccomp filters".to_owned())
}
