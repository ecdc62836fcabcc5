//! The life of one daemon: when it is ready, what it says of itself, and when it must leave.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use super::{
    Failure,
    health::{Health, Heartbeat},
    process::notify,
    reloadable::Refresh,
};
use crate::config::Validate;

/// How old the line of `systemctl status` can be.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// Tells a daemon once to stop, and systemd when the daemon is ready. Clones are handles of the same
/// daemon's.
#[derive(Clone, Default)]
pub struct Lifecycle {
    stopping: CancellationToken,
    files: Arc<Mutex<Vec<Weak<dyn Refresh>>>>,
    live: Arc<Mutex<Vec<Arc<LiveKeys>>>>,
    status: Arc<Mutex<Status>>,
    pub(super) health: Arc<Health>,
}

#[derive(Debug, Default)]
struct Status {
    /// `None` until the daemon is ready.
    line: Option<String>,
    /// What the last reload could not apply; empty if nothing.
    reload: String,
}

impl Status {
    /// What `systemctl status` shows, once the daemon is ready.
    fn shown(&self) -> Option<String> {
        let line = self.line.as_ref()?;
        Some(match self.reload.as_str() {
            "" => line.clone(),
            reload => format!("{line}; {reload}"),
        })
    }
}

/// Keys, or sections, that a daemon takes up without a restart.
pub(super) struct LiveKeys {
    pub keys: &'static [&'static str],
    /// Takes up a whole configuration; an error changes nothing.
    pub apply: Box<ApplyConfig>,
}

type ApplyConfig = dyn Fn(toml::Table, &Lifecycle) -> Result<(), Failure> + Send + Sync;

impl LiveKeys {
    /// Whether a key is one of them, or below one.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|live| {
            let below = key.strip_prefix(live);
            below.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    }
}

impl Lifecycle {
    /// Of a daemon that is starting.
    pub fn new() -> Self {
        Lifecycle::default()
    }

    /// Cancelled when the daemon should finish what it does and leave.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// Asks the daemon to finish what it does and leave.
    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// All sockets are open, and requests are answered (sd_notify(3)).
    pub fn ready(&self, status: &str) {
        tracing::info!("ready: {status}");
        self.status.lock().line = Some(status.to_owned());
        notify(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// Changes the line of `systemctl status`, once the daemon is ready.
    pub fn status(&self, status: &str) {
        let shown = {
            let mut known = self.status.lock();
            if let Some(line) = &mut known.line {
                status.clone_into(line);
            }
            known.shown()
        };
        notify(&[NotifyState::Status(shown.as_deref().unwrap_or(status))]);
    }

    /// Calls `status` with what `line` says, whenever that changes; never returns.
    pub async fn keep_status(&self, line: impl Fn() -> String) {
        let mut last = None;
        loop {
            tokio::time::sleep(STATUS_INTERVAL).await;
            let line = line();
            if last.as_ref() != Some(&line) {
                self.status(&line);
                last = Some(line);
            }
        }
    }

    /// Registers a check that returns soon as long as the daemon works: see `Health::add_check`.
    pub fn liveness_check(&self, name: &'static str, check: impl Fn() + Send + Sync + 'static) {
        self.health.add_check(name, check);
    }

    /// Registers a loop that must go on, within `next` for the first time: see `Heartbeat`.
    pub fn heartbeat(&self, name: impl Into<String>, next: Duration) -> Heartbeat {
        Health::add_heartbeat(&self.health, name.into(), next)
    }

    /// Has files read again when they change, and at each reload, for as long as somebody uses them.
    pub(super) fn keep_fresh<T: Refresh + 'static>(&self, files: &Arc<T>) {
        let files: Weak<dyn Refresh> = Arc::downgrade(&(files.clone() as Arc<dyn Refresh>));
        self.files.lock().push(files);
    }

    /// Has `apply` take up a configuration at each reload that has other values of these keys, or of keys
    /// below them; its error changes nothing.
    pub fn apply_on_reload<C: Validate>(
        &self,
        keys: &'static [&'static str],
        apply: impl Fn(C, &Lifecycle) -> Result<(), Failure> + Send + Sync + 'static,
    ) {
        let apply = Box::new(move |table: toml::Table, lifecycle: &Lifecycle| {
            let config = C::deserialize(table).map_err(|error| Failure::Environment {
                message: error.to_string(),
            })?;
            apply(config, lifecycle)
        });
        self.live.lock().push(Arc::new(LiveKeys { keys, apply }));
    }

    /// What was registered for reloads.
    pub(super) fn live_keys(&self) -> Vec<Arc<LiveKeys>> {
        self.live.lock().clone()
    }

    /// A reload is over; `outcome` is shown beside the line of `systemctl status`.
    pub(super) fn reloaded(&self, outcome: String) {
        let shown = {
            let mut status = self.status.lock();
            status.reload = outcome;
            status.shown()
        };
        // A daemon that is still starting says when it is ready by itself.
        if let Some(shown) = shown {
            notify(&[NotifyState::Ready, NotifyState::Status(&shown)]);
        }
    }

    /// Reads files that have changed; `is_asked` when somebody waits for it.
    pub async fn refresh(&self, is_asked: bool) {
        let files: Vec<Arc<dyn Refresh>> = {
            let mut known = self.files.lock();
            known.retain(|files| files.strong_count() > 0);
            known.iter().filter_map(Weak::upgrade).collect()
        };
        if !files.is_empty() {
            let look = move || files.iter().for_each(|files| files.refresh(is_asked));
            // Its end is all that is waited for.
            let _ = tokio::task::spawn_blocking(look).await;
        }
    }
}
