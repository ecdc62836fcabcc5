//! Making an action's first process, waiting for it, and what it used.
//!
//! In the order to read it:
//!
//! - `spec`: all that a process is made from, decided before it exists;
//! - `limits`: the kernel's limits for each action;
//! - `child`: what the new process does before it becomes the action's command;
//! - `process`: the process as this daemon has it.

mod child;
mod limits;
mod process;
mod spec;

pub(super) use child::give_up_privileges;
pub(super) use process::{Exit, Process, SpawnError, TerminationStatus, WaitOutcome};
pub(super) use spec::{InheritedState, PathBase, PidNamespaces, SetupStep, SpawnSpec, SpawnStage};
