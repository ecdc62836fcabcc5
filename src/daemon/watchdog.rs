//! Tells systemd that the daemon works, as long as it does (systemd.service(5), WatchdogSec=).
//!
//! 1. A ping follows only a whole round: the runtime ran a task, each vital returned, no heart is
//!    late. So a hung runtime, a deadlock and a stuck loop end in a restart.
//! 2. The rounds run on a thread outside the runtime, or the runtime could not be found hung.
//! 3. Before systemd restarts the daemon, the log says what it was that hung.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::Life;

/// Starts the rounds, if systemd wants to hear of them.
pub fn start(life: &Life, runtime: &Handle) {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let round = Round::default();
    let pause = period / 4;
    let (life, runtime, seen) = (life.clone(), runtime.clone(), round.clone());
    spawn("watchdog", move || {
        let mut was_late = None;
        loop {
            match round.go(&life, &runtime) {
                Ok(()) => {
                    was_late = None;
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                }
                Err((heart, late)) if was_late.as_ref() != Some(&heart) => {
                    tracing::error!(
                        heart,
                        late = %humantime::format_duration(Duration::from_secs(late.as_secs())),
                        "a loop does not go on; systemd will restart this daemon"
                    );
                    was_late = Some(heart);
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
    /// Returns when everything has answered; an error is a heart that is late.
    fn go(&self, life: &Life, runtime: &Handle) -> Result<(), (String, Duration)> {
        self.wait("the runtime", || {
            let (sender, answer) = mpsc::channel();
            runtime.spawn(async move { sender.send(()) });
            // A runtime that is shut down drops the task, which is an answer too.
            let _ = answer.recv();
        });
        for vital in life.vitals() {
            self.wait(vital.name, &*vital.check);
        }
        match life.late_heart(Instant::now()) {
            Some(late) => Err(late),
            None => Ok(()),
        }
    }

    fn wait(&self, what: &'static str, check: impl FnOnce()) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((what, Instant::now()));
        check();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn waiting(&self) -> Option<(&'static str, Instant)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_ends_when_everything_answers_and_names_what_does_not() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let life = Life::new();
        let round = Round::default();
        assert!(round.go(&life, runtime.handle()).is_ok());

        let heart = life.heart("slot 3", Duration::ZERO);
        assert_eq!(round.go(&life, runtime.handle()).unwrap_err().0, "slot 3");
        drop(heart);

        let queue = Arc::new(Mutex::new(()));
        let checked = queue.clone();
        life.vital("the queue", move || drop(checked.lock()));
        let held = queue.lock();
        let (handle, seen) = (runtime.handle().clone(), round.clone());
        let going = thread::spawn(move || seen.go(&life, &handle).is_ok());
        while round.waiting().map(|(what, _)| what) != Some("the queue") {
            thread::yield_now();
        }
        assert!(!going.is_finished());
        drop(held);
        assert!(going.join().unwrap());
        assert!(round.waiting().is_none());
    }
}
