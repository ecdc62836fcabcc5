//! What surrounds an action: layers of containment, made ahead, one set for each action.
//!
//! In the order to read it:
//!
//! - `layer`: what a layer is; `detect`: the table of all, and which of them this host allows;
//! - `spec`: what all sandboxes are made from; `builder`: one sandbox, and how it is made; `pool`:
//!   those that wait for actions; `error`: why there is none;
//! - a file for each layer:
//!   - `cgroups`, with `cgroup_limits`, `cgroup_usage`, `cgroup_mount`,
//!   - `mounts`, with `template` (what all sandboxes have mounted), `mount_watch` (whether that is still
//!     so), `passwd` (the action's user by name), `mount_calls`,
//!   - `pid_namespace`, with `init_program`,
//!   - `ipc`, `hostname`, `network`, `devices`, `hidden`, `seccomp`;
//! - `namespace`: what most of them are made of.

mod builder;
mod cgroup_limits;
mod cgroup_mount;
mod cgroup_usage;
mod cgroups;
mod detect;
mod devices;
mod error;
mod hidden;
mod hostname;
mod init_program;
mod ipc;
mod layer;
mod mount_calls;
mod mount_watch;
mod mounts;
mod namespace;
mod network;
mod passwd;
mod pid_namespace;
mod pool;
mod seccomp;
mod spec;
mod template;

pub(super) use builder::Sandbox;
pub(super) use cgroup_mount::mount_point as cgroup_mount_point;
pub(super) use cgroup_usage::{CgroupUsage, MemoryUsage};
pub(super) use cgroups::ActionCgroup;
pub(super) use detect::{check, detect};
pub(super) use error::SandboxError;
pub(super) use layer::Layers;
pub(super) use mount_calls::copy_of_directory;
pub(super) use mount_watch::DirectoryId;
pub(super) use mounts::{SandboxMounts, identity};
pub(super) use pid_namespace::{NamespaceEnd, daemon_namespace};
pub(super) use pool::SandboxPool;
pub(super) use seccomp::SeccompFilter;
pub(super) use spec::SandboxSpec;
