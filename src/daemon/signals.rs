//! What signals ask a daemon for: to stop, and to read its configuration again.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use super::{Lifecycle, logging::LevelHandle, process::notify, reload::ReloadableConfig};
use crate::config::Validate;

/// How often files are looked at that may change.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// Obeys signals until the runtime ends: the first SIGTERM or SIGINT asks the daemon to finish, a
/// second one ends it at once, and SIGHUP reads the configuration again. Files that change
/// by themselves are read again, too.
pub(super) async fn obey<C: Validate>(
    lifecycle: Lifecycle,
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
            Signal::Look => lifecycle.refresh(false).await,
            Signal::Reload => reload(&lifecycle, &mut config, &level).await,
            Signal::Stop if !lifecycle.stopping().is_cancelled() => {
                tracing::info!("stopping");
                notify(&[NotifyState::Stopping]);
                lifecycle.stop();
            }
            Signal::Stop => {
                tracing::warn!("stopping at once");
                std::process::exit(1);
            }
        }
    }
}

/// Says RELOADING=1 and READY=1 around it (sd_notify(3)).
async fn reload<C: Validate>(
    lifecycle: &Lifecycle,
    config: &mut ReloadableConfig<C>,
    level: &LevelHandle,
) {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
    lifecycle.refresh(true).await;
    let live = lifecycle.live_keys();
    // It reads files, and nobody waits for this thread but those who asked.
    let outcome = tokio::task::block_in_place(|| config.reload(level, &live, lifecycle));
    lifecycle.reloaded(outcome);
}
