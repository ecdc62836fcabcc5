//! Placeholder until its author fills it.

use crate::{
    config::runner::Config,
    daemon::{Failure, Life, Program},
};

pub const PROGRAM: Program = Program {
    name: "bb_runner",
    about: "Runs the commands of build actions as other Unix users",
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
