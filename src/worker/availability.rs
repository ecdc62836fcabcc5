//! Whether the slots of one runner can and may run actions: `health` with a clock, a lock and words.

use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    fault::Fault,
    health::{ActionVerdict, HealthChange, HostHealth},
};
use crate::{daemon::message_id, text::shorten};

pub struct Availability {
    /// For messages.
    runner: String,
    health: Mutex<HostHealth>,
    /// Before this no slot asks for work.
    paused: watch::Sender<Instant>,
}

/// Why a slot does not ask for work.
#[derive(Debug)]
pub enum NotReady {
    Because(String),
    Paused { until: Instant },
}

impl Availability {
    pub fn new(runner: impl ToString) -> Self {
        Availability {
            runner: runner.to_string(),
            health: Mutex::default(),
            paused: watch::Sender::new(Instant::now()),
        }
    }

    /// When slots may ask for work again; changes with each pause.
    pub fn paused(&self) -> watch::Receiver<Instant> {
        self.paused.subscribe()
    }

    /// A slot begins an execution; when, by the clock that `ended` counts with.
    pub fn begin(&self, slot: usize) -> Instant {
        let now = Instant::now();
        self.health.lock().began(now, slot);
        now
    }

    /// An execution that began at `began` has ended, with this fault or none.
    pub fn ended(&self, began: Instant, fault: Option<&Fault>) {
        let verdict = match fault {
            None => ActionVerdict::Ran,
            Some(Fault::Unavailable(reason) | Fault::Storage(reason)) => {
                ActionVerdict::Fault(reason.clone())
            }
            Some(_) => ActionVerdict::Neither,
        };
        let now = Instant::now();
        let change = self.health.lock().ended(now, began, verdict);
        match change {
            HealthChange::None => {}
            HealthChange::Pause {
                until,
                faults,
                out_of_service,
            } => {
                self.paused.send_replace(until);
                if out_of_service {
                    let seconds = until.saturating_duration_since(now).as_secs();
                    let error = fault.map(ToString::to_string);
                    tracing::error!(
                        message_id = message_id::OUT_OF_SERVICE,
                        runner = self.runner,
                        faults,
                        seconds,
                        error,
                        "out of service: actions failed in a row that are not to blame for it; one is tried after the pause"
                    );
                }
            }
            HealthChange::Recovered => {
                tracing::info!(runner = self.runner, "in service again");
            }
        }
    }

    /// A slot's readiness was checked; whether it may ask for work.
    pub fn admit(&self, slot: usize, checked: Result<(), String>) -> Result<(), NotReady> {
        checked.map_err(NotReady::Because)?;
        let admitted = self.health.lock().admit(Instant::now(), slot);
        admitted.map_err(|until| NotReady::Paused { until })
    }

    /// For the status line; `None` while all is well.
    pub fn trouble(&self) -> Option<String> {
        let health = self.health.lock();
        let (faults, reason) = health.out_of_service()?;
        Some(format!(
            "runner {} is out of service after {faults} failures in a row, the last: {}",
            self.runner,
            shorten(reason)
        ))
    }
}
