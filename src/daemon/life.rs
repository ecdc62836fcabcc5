//! The life of one daemon: when it is ready, when it must leave, and whether it still works.
//!
//! What the daemon cannot do without is registered here: locks as *vitals*, loops as *hearts*. The
//! watchdog looks at all of them; see `watchdog`.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

/// How old the line of `systemctl status` can be.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// Told to stop once, says when it is ready. Clones are the same life.
#[derive(Clone, Debug, Default)]
pub struct Life {
    stopping: CancellationToken,
    signs: Arc<Signs>,
}

#[derive(Default)]
struct Signs {
    vitals: Mutex<Vec<Vital>>,
    hearts: Mutex<Vec<Arc<Pulse>>>,
    /// None until the daemon is ready.
    status: Mutex<Option<String>>,
    /// What the last reload said, which goes on being true; empty if nothing.
    news: Mutex<String>,
}

/// Something that returns soon as long as the daemon works.
#[derive(Clone)]
pub(super) struct Vital {
    pub(super) name: &'static str,
    pub(super) check: Arc<dyn Fn() + Send + Sync>,
}

struct Pulse {
    name: String,
    due: Mutex<Instant>,
}

/// A loop that must go on. The watchdog forgets it when it is dropped.
pub struct Heart {
    pulse: Arc<Pulse>,
    signs: Arc<Signs>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Life {
    pub fn new() -> Self {
        Life::default()
    }

    /// Cancelled when the daemon should finish what it does and leave.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    pub fn stop(&self) {
        self.stopping.cancel();
    }

    /// All sockets are open, and requests are answered (sd_notify(3)).
    pub fn ready(&self, status: &str) {
        tracing::info!("ready: {status}");
        *lock(&self.signs.status) = Some(status.to_owned());
        let _ = sd_notify::notify(&[
            sd_notify::NotifyState::Ready,
            sd_notify::NotifyState::Status(status),
        ]);
    }

    /// One line for `systemctl status`.
    pub fn status(&self, status: &str) {
        if let Some(last) = &mut *lock(&self.signs.status) {
            status.clone_into(last);
        }
        let status = self.with_news(status);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&status)]);
    }

    /// From now on every line ends with it.
    pub(super) fn set_news(&self, news: String) {
        *lock(&self.signs.news) = news;
    }

    fn with_news(&self, status: &str) -> String {
        match lock(&self.signs.news).as_str() {
            "" => status.to_owned(),
            news => format!("{status}; {news}"),
        }
    }

    /// Says what `line` says, whenever that changes, once the daemon is ready; never returns.
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

    /// The line that `systemctl status` shows, once the daemon is ready.
    pub(super) fn last_status(&self) -> Option<String> {
        let status = lock(&self.signs.status).clone();
        status.map(|status| self.with_news(&status))
    }

    /// From now on the watchdog calls `check`, on a thread of its own, several times per period.
    /// While it does not return, such as from taking the lock that everything depends on, the
    /// daemon is taken for hung.
    pub fn vital(&self, name: &'static str, check: impl Fn() + Send + Sync + 'static) {
        lock(&self.signs.vitals).push(Vital {
            name,
            check: Arc::new(check),
        });
    }

    /// A loop that promises to beat within `next`, and after that within what each beat says. When
    /// it is late, the daemon is taken for hung.
    pub fn heart(&self, name: impl Into<String>, next: Duration) -> Heart {
        let pulse = Arc::new(Pulse {
            name: name.into(),
            due: Mutex::new(Instant::now() + next),
        });
        lock(&self.signs.hearts).push(pulse.clone());
        Heart {
            pulse,
            signs: self.signs.clone(),
        }
    }

    pub(super) fn vitals(&self) -> Vec<Vital> {
        lock(&self.signs.vitals).clone()
    }

    /// A heart whose beat was due before `now`, and for how long it has been.
    pub(super) fn late_heart(&self, now: Instant) -> Option<(String, Duration)> {
        lock(&self.signs.hearts)
            .iter()
            .map(|pulse| (pulse, now.saturating_duration_since(*lock(&pulse.due))))
            .filter(|(_, late)| !late.is_zero())
            .max_by_key(|(_, late)| *late)
            .map(|(pulse, late)| (pulse.name.clone(), late))
    }
}

impl Heart {
    /// The loop goes on; it will have gone on again within `next`.
    pub fn beat(&self, next: Duration) {
        *lock(&self.pulse.due) = Instant::now() + next;
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        lock(&self.signs.hearts).retain(|pulse| !Arc::ptr_eq(pulse, &self.pulse));
    }
}

impl fmt::Debug for Signs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signs")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_is_late_from_its_promise_until_it_beats_or_is_dropped() {
        let life = Life::new();
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        let slow = life.heart("slow", 2 * hour);
        let quick = life.heart("quick", Duration::ZERO);
        assert!(life.late_heart(now - hour).is_none());
        assert_eq!(life.late_heart(now + hour).unwrap().0, "quick");
        quick.beat(4 * hour);
        assert!(life.late_heart(now + hour).is_none());
        assert_eq!(life.late_heart(now + 3 * hour).unwrap().0, "slow");
        drop(slow);
        assert!(life.late_heart(now + 3 * hour).is_none());
    }
}
