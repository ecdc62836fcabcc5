//! What a runner tells Prometheus and `bb_runner status`: its layers of containment, and what became of its
//! actions.

use std::{fmt, sync::Arc};

use super::{counts::RunCounts, sandbox::Layers, user_pool::UserPool};
use crate::daemon::{Exposition, Metrics};

/// What a runner's numbers are taken from.
#[derive(Clone)]
pub(super) struct RunnerSources {
    pub counts: Arc<RunCounts>,
    pub users: Arc<UserPool>,
    /// How many users actions can run as.
    pub user_count: u32,
    pub layers: Layers,
}

/// The names of layers, as keys of `containment` have them.
fn names(layers: Layers) -> Vec<String> {
    layers
        .iter_names()
        .map(|(name, _)| name.to_lowercase())
        .collect()
}

/// All that a runner tells Prometheus.
pub(super) fn metrics(sources: RunnerSources) -> Metrics {
    Metrics::new().with(move |exposition| sources.expose(exposition))
}

impl RunnerSources {
    fn expose(&self, exposition: &mut Exposition<'_>) -> fmt::Result {
        let layers = names(Layers::all()).into_iter().map(|name| {
            let is_on = names(self.layers).contains(&name);
            (vec![("layer", name)], f64::from(u8::from(is_on)))
        });
        exposition.gauges(
            "bb_runner_containment",
            "1 for each layer of containment that is in force, 0 for the others",
            layers,
        )?;
        let users_in_use = self.users.in_use() as f64;
        exposition.gauge(
            "bb_runner_running_actions",
            "Actions that run",
            users_in_use,
        )?;
        let users = f64::from(self.user_count);
        exposition.gauge("bb_runner_users", "Users that actions can run as", users)?;
        exposition.counter(
            "bb_runner_started_actions",
            "Actions that were begun",
            self.counts.started.get(),
        )?;
        let rows = self.counts.rows().map(|(outcome, count)| {
            let labels = vec![("outcome", outcome.to_owned())];
            (labels, count)
        });
        exposition.counters(
            "bb_runner_actions",
            "Actions that are over: those that ran out of memory have ended, too",
            rows,
        )
    }

    /// What `bb_runner status` shows.
    pub(super) fn status(&self) -> serde_json::Value {
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "running": self.users.in_use(),
            "users": self.user_count,
            "layers": names(self.layers),
            "missing_layers": names(Layers::all().difference(self.layers)),
            "started": self.counts.started.get(),
            "ended": self.counts.ended.get(),
            "stopped": self.counts.stopped.get(),
            "out_of_memory": self.counts.out_of_memory.get(),
            "failed": self.counts.failed.get(),
        })
    }
}
