//! Logging: to the journal when systemd started the daemon, else to standard error.

use std::io::IsTerminal;

use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use super::journal::Journal;
use crate::config::Level;

/// Changes what is logged while the daemon runs.
#[derive(Default)]
pub struct Levels(Option<reload::Handle<Targets, Registry>>);

impl Levels {
    pub fn set(&self, level: Level) {
        if let Some(handle) = &self.0
            && let Err(error) = handle.reload(targets(level))
        {
            tracing::error!(%error, "could not change log.level");
        }
    }
}

pub fn start(program: &'static str, level: Level) -> Levels {
    let (filter, handle) = reload::Layer::new(targets(level));
    let output: Box<dyn Layer<Registry> + Send + Sync> = match Journal::connect(program) {
        Some(journal) => journal.boxed(),
        None => tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
    };
    // A second start, as in tests that run several daemons in one process, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(output.with_filter(filter))
        .try_init();
    Levels(Some(handle))
}

/// Libraries talk about every frame; only our own words count.
fn targets(level: Level) -> Targets {
    let level = match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("bb_remote_execution", level)
}
