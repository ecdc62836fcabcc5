//! The life of one daemon: when it is ready, what it says of itself, and when it must leave.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{
    Failure,
    health::{Health, Heartbeat},
    logging::LevelHandle,
    process::notify,
    reload::{LiveKeys, ReloadableConfig},
    reloadable::Refresh,
};
use crate::config::Validate;

/// How old the line of `systemctl status` can be.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// How often files are looked at that may change.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

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

    /// Obeys signals until the runtime ends: the first SIGTERM or SIGINT asks the daemon to finish, a
    /// second one ends it at once, and SIGHUP reads the configuration again. Files that change
    /// by themselves are read again, too.
    pub(super) async fn obey_signals<C: Validate>(
        self,
        mut config: ReloadableConfig<C>,
        level: LevelHandle,
    ) {
        let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hang_up)) = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::hangup()),
        ) else {
            tracing::error!("could not listen for signals; SIGTERM will end this daemon at once");
            return;
        };
        enum Signal {
            Stop,
            Reload,
            Look,
        }
        loop {
            let signal = tokio::select! {
                _ = terminate.recv() => Signal::Stop,
                _ = interrupt.recv() => Signal::Stop,
                _ = hang_up.recv() => Signal::Reload,
                () = tokio::time::sleep(REFRESH_INTERVAL) => Signal::Look,
            };
            match signal {
                Signal::Look => self.refresh(false).await,
                Signal::Reload => self.reload(&mut config, &level).await,
                Signal::Stop if !self.stopping.is_cancelled() => {
                    tracing::info!("stopping");
                    notify(&[NotifyState::Stopping]);
                    self.stop();
                }
                Signal::Stop => {
                    tracing::warn!("stopping at once");
                    std::process::exit(1);
                }
            }
        }
    }

    /// Says RELOADING=1 and READY=1 around it (sd_notify(3)).
    async fn reload<C: Validate>(&self, config: &mut ReloadableConfig<C>, level: &LevelHandle) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        self.refresh(true).await;
        let live = self.live.lock().clone();
        // It reads files, and nobody waits for this thread but those who asked.
        let reload = tokio::task::block_in_place(|| config.reload(level, &live, self));
        let shown = {
            let mut status = self.status.lock();
            status.reload = reload;
            status.shown()
        };
        // A daemon that is still starting says when it is ready by itself.
        if let Some(shown) = shown {
            notify(&[NotifyState::Ready, NotifyState::Status(&shown)]);
        }
    }
}
