//! Placeholder until its author fills it.

use crate::{
    config::scheduler::Config,
    daemon::{Failure, Life, Program},
};

pub const PROGRAM: Program = Program {
    name: "bb_scheduler",
    about: "Queues build actions of REAPI clients and hands them to workers; with an embedded store by default",
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
