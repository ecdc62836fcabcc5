//! Whether a daemon still works; systemd hears of it as long as it does (systemd.service(5),
//! WatchdogSec=).
//!
//! What the daemon cannot do without is registered here: locks and pools with a *liveness check*, loops
//! with a *heartbeat*.
//!
//! 1. A ping follows only a whole round: the runtime ran a task, each check returned, no heartbeat is
//!    late. So a hung runtime, a deadlock and a stuck loop end in a restart.
//! 2. The rounds run on a thread outside the runtime, or the runtime could not be found hung.
//! 3. Before systemd restarts the daemon, the log says what it was that hung.

use std::{
    fmt,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::process::notify;

/// What the watchdog looks at.
#[derive(Default)]
pub(super) struct Health {
    checks: Mutex<Vec<LivenessCheck>>,
    heartbeats: Mutex<Vec<Arc<HeartbeatDeadline>>>,
}

#[derive(Clone)]
struct LivenessCheck {
    name: &'static str,
    check: Arc<dyn Fn() + Send + Sync>,
}

struct HeartbeatDeadline {
    name: String,
    due: Mutex<Instant>,
}

/// A loop that must go on. The watchdog forgets it when it is dropped.
pub struct Heartbeat {
    deadline: Arc<HeartbeatDeadline>,
    health: Arc<Health>,
}

impl Health {
    /// From now on the watchdog calls `check`, on a thread of its own, several times per period.
    /// While it does not return, such as from taking the lock that everything depends on, the
    /// daemon is taken for hung.
    pub(super) fn add_check(&self, name: &'static str, check: impl Fn() + Send + Sync + 'static) {
        let check = Arc::new(check);
        self.checks.lock().push(LivenessCheck { name, check });
    }

    /// A loop that promises to beat within `next`, and after that within what each beat says. When
    /// it is late, the daemon is taken for hung.
    pub(super) fn add_heartbeat(this: &Arc<Self>, name: String, next: Duration) -> Heartbeat {
        let due = Mutex::new(Instant::now() + next);
        let deadline = Arc::new(HeartbeatDeadline { name, due });
        this.heartbeats.lock().push(deadline.clone());
        Heartbeat {
            deadline,
            health: this.clone(),
        }
    }

    /// The heartbeat that is late for longest at `now`, and for how long.
    fn late_heartbeat(&self, now: Instant) -> Option<(String, Duration)> {
        self.heartbeats
            .lock()
            .iter()
            .map(|deadline| {
                (
                    deadline,
                    now.saturating_duration_since(*deadline.due.lock()),
                )
            })
            .filter(|(_, late)| !late.is_zero())
            .max_by_key(|(_, late)| *late)
            .map(|(deadline, late)| (deadline.name.clone(), late))
    }
}

impl Heartbeat {
    /// The loop goes on; it will have gone on again within `next`.
    pub fn beat(&self, next: Duration) {
        *self.deadline.due.lock() = Instant::now() + next;
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        let mut heartbeats = self.health.heartbeats.lock();
        heartbeats.retain(|deadline| !Arc::ptr_eq(deadline, &self.deadline));
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").finish_non_exhaustive()
    }
}

/// Starts the rounds, if systemd wants to hear of them.
pub(super) fn start_watchdog(health: &Arc<Health>, runtime: &Handle) {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let round = Round::default();
    let pause = period / 4;
    let (health, runtime, seen) = (health.clone(), runtime.clone(), round.clone());
    spawn("watchdog", move || {
        let mut was_late = None;
        loop {
            match round.run(&health, &runtime) {
                Ok(()) => {
                    was_late = None;
                    notify(&[sd_notify::NotifyState::Watchdog]);
                }
                Err((heartbeat, late)) if was_late.as_ref() != Some(&heartbeat) => {
                    tracing::error!(
                        heartbeat,
                        late = %humantime::format_duration(Duration::from_secs(late.as_secs())),
                        "a loop does not go on; systemd will restart this daemon"
                    );
                    was_late = Some(heartbeat);
                }
                Err(_) => {}
            }
            thread::sleep(pause);
        }
    });
    spawn("watchdog-log", move || {
        let mut said = None;
        loop {
            thread::sleep(pause);
            let waiting = seen.waiting();
            if let Some((what, since)) = waiting
                && since.elapsed() > period / 2
                && said != Some(since)
            {
                tracing::error!(what, "hangs; systemd will restart this daemon");
                said = Some(since);
            }
        }
    });
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(body);
    if let Err(error) = spawned {
        tracing::error!(%error, "could not start the watchdog's thread; systemd will restart this daemon");
    }
}

/// What a round waits for, and since when.
#[derive(Clone, Default)]
struct Round(Arc<Mutex<Option<(&'static str, Instant)>>>);

impl Round {
    /// Returns when everything has answered; an error is a heartbeat that is late.
    fn run(&self, health: &Health, runtime: &Handle) -> Result<(), (String, Duration)> {
        self.wait("the runtime", || {
            let (sender, answer) = mpsc::channel();
            runtime.spawn(async move { sender.send(()) });
            // A runtime that is shut down drops the task, which is an answer too.
            let _ = answer.recv();
        });
        let checks = health.checks.lock().clone();
        for check in checks {
            self.wait(check.name, &*check.check);
        }
        match health.late_heartbeat(Instant::now()) {
            Some(late) => Err(late),
            None => Ok(()),
        }
    }

    fn wait(&self, what: &'static str, check: impl FnOnce()) {
        *self.0.lock() = Some((what, Instant::now()));
        check();
        *self.0.lock() = None;
    }

    fn waiting(&self) -> Option<(&'static str, Instant)> {
        *self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_is_late_from_its_promise_until_it_beats_or_is_dropped() {
        let health = Arc::new(Health::default());
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        let slow = Health::add_heartbeat(&health, "slow".to_owned(), 2 * hour);
        let quick = Health::add_heartbeat(&health, "quick".to_owned(), Duration::ZERO);
        assert!(health.late_heartbeat(now - hour).is_none());
        assert_eq!(health.late_heartbeat(now + hour).unwrap().0, "quick");
        quick.beat(4 * hour);
        assert!(health.late_heartbeat(now + hour).is_none());
        assert_eq!(health.late_heartbeat(now + 3 * hour).unwrap().0, "slow");
        drop(slow);
        assert!(health.late_heartbeat(now + 3 * hour).is_none());
    }

    #[test]
    fn a_round_ends_when_everything_answers_and_names_what_does_not() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let health = Arc::new(Health::default());
        let round = Round::default();
        assert!(round.run(&health, runtime.handle()).is_ok());

        let heartbeat = Health::add_heartbeat(&health, "slot 3".to_owned(), Duration::ZERO);
        let late = round.run(&health, runtime.handle()).unwrap_err();
        assert_eq!(late.0, "slot 3");
        drop(heartbeat);

        let queue = Arc::new(Mutex::new(()));
        let checked = queue.clone();
        health.add_check("the queue", move || drop(checked.lock()));
        let held = queue.lock();
        let (handle, seen) = (runtime.handle().clone(), round.clone());
        let going = thread::spawn(move || seen.run(&health, &handle).is_ok());
        while round.waiting().map(|(what, _)| what) != Some("the queue") {
            thread::yield_now();
        }
        assert!(!going.is_finished());
        drop(held);
        assert!(going.join().unwrap());
        assert!(round.waiting().is_none());
    }
}
