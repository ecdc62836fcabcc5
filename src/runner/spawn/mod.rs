//! How an action's command process is made and waited for, and what it used.
//!
//! In the order to read it:
//!
//! - `spawn_spec`: all that a process is made from, decided before it exists, with `setup_step`, how it
//!   enters namespaces, mounts and changes its root (control group, PID namespace and filter are in the former);
//! - `rlimits`: the kernel's limits for each action;
//! - `child`: what the new process does before it becomes the action's command, and `spawn_stage`, how far it came;
//! - `process`: the process as this daemon has it.

mod child;
mod process;
mod rlimits;
mod setup_step;
mod spawn_spec;
mod spawn_stage;

pub(super) use child::give_up_privileges;
pub(super) use process::{Exit, ExitStatus, Process, SpawnError, WaitOutcome};
pub(super) use setup_step::SetupStep;
pub(super) use spawn_spec::{InheritedState, PathBase, PidNamespaces, SpawnSpec};
pub(super) use spawn_stage::SpawnStage;
