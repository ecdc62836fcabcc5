//! What surrounds an action: layers of containment, made ahead, one set for each action.
//!
//! In the order to read it:
//!
//! - `containment_layer`: what a layer is; `detect`: the table of all, and which of them this host allows;
//! - `spec`: what all sandboxes are made from; `builder`: one sandbox, and how it is made; `pool`:
//!   those that wait for actions; `error`: why there is none;
//! - a file for each layer:
//!   - `cgroups`, with `cgroup_limits`, `cgroup_usage`, `own_cgroup`,
//!   - `mounts`, with `mount_template` (what all sandboxes have mounted), `mount_watch` (whether that is still
//!     so), `passwd` (the action's user by name), `mount_calls`,
//!   - `pid_namespace`, with `init_program`,
//!   - `ipc`, `hostname`, `network`, `devices`, `hidden_paths`, `seccomp`;
//! - `namespace`: what most of them are made of.

mod builder;
mod cgroup_limits;
mod cgroup_usage;
mod cgroups;
mod containment_layer;
mod detect;
mod devices;
mod error;
mod hidden_paths;
mod hostname;
mod init_program;
mod ipc;
mod mount_calls;
mod mount_template;
mod mount_watch;
mod mounts;
mod namespace;
mod network;
mod own_cgroup;
mod passwd;
mod pid_namespace;
mod pool;
mod seccomp;
mod spec;

pub(super) use builder::Sandbox;
pub(super) use cgroup_usage::{CgroupUsage, MemoryUsage};
pub(super) use cgroups::ActionCgroup;
pub(super) use containment_layer::Layers;
pub(super) use detect::{check, detect};
pub(super) use error::SandboxError;
pub(super) use mount_calls::copy_of_directory;
pub(super) use mount_watch::DirectoryId;
pub(super) use mounts::{SandboxMounts, identity};
pub(super) use own_cgroup::mount_point as cgroup_mount_point;
pub(super) use pid_namespace::{NamespaceEnd, daemon_pid_namespace};
pub(super) use pool::SandboxPool;
pub(super) use seccomp::SeccompFilter;
pub(super) use spec::SandboxContext;
