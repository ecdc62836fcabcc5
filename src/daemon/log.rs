//! Logging: to the journal when systemd started the daemon, else to standard error.

use std::io::IsTerminal;

use tracing_subscriber::{
    Layer, Registry, filter::LevelFilter, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::config::Level;

pub fn start(level: Level) {
    let level = match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    // Peers' libraries talk about every frame; only our own words count.
    let targets = tracing_subscriber::filter::Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("bb_remote_execution", level);
    let output: Box<dyn Layer<Registry> + Send + Sync> = match journal() {
        Some(layer) => layer.boxed(),
        None => tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
    };
    // A second start, as in tests that run several daemons in one process, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(output.with_filter(targets))
        .try_init();
}

/// systemd.exec(5), JOURNAL_STREAM: set when standard error goes to the journal.
fn journal() -> Option<tracing_journald::Layer> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = stream.split_once(':')?;
    let stat = nix::sys::stat::fstat(std::io::stderr()).ok()?;
    let ours = stat.st_dev.to_string() == device && stat.st_ino.to_string() == inode;
    ours.then(|| tracing_journald::layer().ok())?
        .map(|layer| layer.with_field_prefix(None))
}
