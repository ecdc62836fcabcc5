//! Logging: to the journal when systemd started the daemon, else to standard error.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

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
    // A second start, as in tests that run several daemons in one process, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(Journal::open(program).with_filter(filter))
        .try_init();
    Levels(Some(handle))
}

/// Lines that others can cause without end: so many in a while, and then a count of the rest.
pub struct LineLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<Lines>,
}

struct Lines {
    since: Option<Instant>,
    written: u32,
    withheld: u64,
}

impl LineLimit {
    pub const fn new(burst: u32, interval: Duration) -> Self {
        LineLimit {
            burst,
            interval,
            state: Mutex::new(Lines {
                since: None,
                written: 0,
                withheld: 0,
            }),
        }
    }

    /// Whether a line may be written, and how many before it were not.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut lines = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if lines
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= self.interval)
        {
            lines.since = Some(now);
            lines.written = 0;
        }
        if lines.written == self.burst {
            lines.withheld += 1;
            return None;
        }
        lines.written += 1;
        Some(std::mem::take(&mut lines.withheld))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_cause_is_logged_so_often_and_then_counted() {
        let minute = Duration::from_secs(60);
        let limit = LineLimit::new(2, minute);
        let now = Instant::now();
        let said: Vec<_> = (0..5).map(|_| limit.admit(now)).collect();
        assert_eq!(said, [Some(0), Some(0), None, None, None]);
        assert_eq!(limit.admit(now + minute), Some(3));
        assert_eq!(limit.admit(now + minute), Some(0));
        assert_eq!(limit.admit(now + minute), None);
    }
}
