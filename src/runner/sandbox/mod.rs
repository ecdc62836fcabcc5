//! What surrounds an action: layers of containment, made ahead, one set for each action.
//!
//! In the order to read it:
//!
//! - `containment_layer`: what a layer is; `detect`: the table of all, and which of them this host allows;
//! - `sandbox_context`: what all sandboxes are made from; `action_sandbox`: one sandbox; `builder`: how one is
//!   made; `pool`: those that wait for actions; `error`: why there is none;
//! - a file for each layer:
//!   - `cgroups`, with `cgroup_limits`, `cgroup_usage`, `proc_self_cgroup`,
//!   - `mount_namespace`, with `mount_template` (what all sandboxes have mounted), `mount_generation` (whether that
//!     is still so), `account_files` (the action's user by name), `mount_calls`,
//!   - `pid_namespace`, with `init_program`,
//!   - `ipc_namespace`, `uts_namespace`, `network_namespace`, `devices`, `hidden_paths`, `seccomp`;
//! - `namespace_fd`: an open namespace of any kind, and how to enter it (setns(2)); `builder` unshares most of them.

mod account_files;
mod action_sandbox;
mod builder;
mod cgroup_limits;
mod cgroup_usage;
mod cgroups;
mod containment_layer;
mod detect;
mod devices;
mod error;
mod hidden_paths;
mod init_program;
mod ipc_namespace;
mod mount_calls;
mod mount_generation;
mod mount_namespace;
mod mount_template;
mod namespace_fd;
mod network_namespace;
mod pid_namespace;
mod pool;
mod proc_self_cgroup;
mod sandbox_context;
mod seccomp;
mod uts_namespace;

pub(super) use action_sandbox::Sandbox;
pub(super) use cgroup_usage::{CgroupUsage, MemoryUsage};
pub(super) use cgroups::ActionCgroup;
pub(super) use containment_layer::Layers;
pub(super) use detect::{check, enable_layers};
pub(super) use error::SandboxError;
pub(super) use mount_calls::clone_mount_restricted;
pub(super) use mount_generation::DirectoryId;
pub(super) use mount_namespace::SandboxMounts;
pub(super) use pid_namespace::{NamespaceEnd, daemon_pid_namespace};
pub(super) use pool::SandboxPool;
pub(super) use proc_self_cgroup::mount_point as cgroup_mount_point;
pub(super) use sandbox_context::SandboxContext;
pub(super) use seccomp::SeccompFilter;
