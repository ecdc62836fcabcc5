//! Placeholder until its author fills it.

pub mod client;
pub mod execute;
pub mod slot;
pub mod task;

use crate::{
    config::worker::Config,
    daemon::{Failure, Life, Program},
};

pub const PROGRAM: Program = Program {
    name: "bb_worker",
    about: "Lays out input roots, has a runner run build actions in them, and uploads their outputs",
};

/// What would keep `run` from working.
pub async fn probe(_config: &Config) -> Vec<Failure> {
    Vec::new()
}

/// Runs until told to stop.
pub async fn run(_config: Config, life: Life) -> Result<(), Failure> {
    life.stopping().cancelled().await;
    Ok(())
}
