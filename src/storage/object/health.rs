//! Whether a service is asked: a circuit breaker of all calls to it, and the health checks that close it.
//!
//! 1. While a service is out of use, no call waits for it: each is refused at once, and those that were
//!    under way end. What is in the cache is read as before.
//! 2. A service that answers, or that is asked nothing, has no health checks: they may cost money.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;

use crate::{
    config::storage::Health,
    storage::{
        Error,
        breaker::{AttemptKind, Breaker},
    },
};

/// What is known of one service.
pub(super) struct ServiceHealth {
    /// The service and where it is, for the log.
    place: String,
    breaker: Breaker,
    /// Why the service is out of use, while it is.
    last_fault: Mutex<String>,
    calls_under_way: AtomicUsize,
    /// Attempts that it has answered, whatever it said.
    answers: AtomicU64,
}

/// A call that waits for the service.
struct CallUnderWay<'h>(&'h AtomicUsize);

impl<'h> CallUnderWay<'h> {
    fn begin(calls_under_way: &'h AtomicUsize) -> Self {
        calls_under_way.fetch_add(1, Ordering::Relaxed);
        CallUnderWay(calls_under_way)
    }
}

impl Drop for CallUnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ServiceHealth {
    /// The service is out of use after so many faults in a row.
    pub(super) fn new(place: String, faults: u32) -> Arc<Self> {
        Arc::new(ServiceHealth {
            place,
            breaker: Breaker::new(faults),
            last_fault: Mutex::default(),
            calls_under_way: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
        })
    }

    /// Looks at the service with `probe` when there is reason to, as long as somebody has this. Within a
    /// runtime.
    pub(super) fn watch<F>(
        self: &Arc<Self>,
        health: &Health,
        probe: impl Fn() -> F + Send + 'static,
    ) where
        F: Future<Output = Result<(), Error>> + Send,
    {
        let (interval, timeout) = (health.interval.get(), health.timeout.get());
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut answers = 0;
            loop {
                tokio::time::sleep(interval).await;
                let Some(health) = weak.upgrade() else {
                    return;
                };
                if health.needs_check(&mut answers, Instant::now()) {
                    let answer = tokio::time::timeout(timeout, probe()).await;
                    health.note_check(answer.unwrap_or_else(|_| {
                        Err(Error::Unavailable(format!(
                            "{} did not answer a health check within {} seconds",
                            health.place,
                            timeout.as_secs_f64()
                        )))
                    }));
                }
            }
        });
    }

    /// `answers` is what there were when this was asked before.
    fn needs_check(&self, answers: &mut u64, now: Instant) -> bool {
        let answers_before = std::mem::replace(answers, self.answers.load(Ordering::Relaxed));
        if !self.breaker.is_closed() {
            return self.breaker.is_due(now);
        }
        let is_silent = *answers == answers_before;
        is_silent && self.calls_under_way.load(Ordering::Relaxed) > 0
    }

    fn note_check(&self, answer: Result<(), Error>) {
        match answer {
            Err(error @ Error::Unavailable(_)) => self.fail(AttemptKind::HealthCheck, &error),
            // Whatever it said, it answered.
            _ => {
                if self.breaker.succeed(AttemptKind::HealthCheck) {
                    tracing::info!(service = self.place, "the storage answers again");
                }
            }
        }
    }

    /// The refusal of a call while the service is out of use.
    pub(super) fn require_usable(&self) -> Result<(), Error> {
        match self.breaker.is_usable() {
            true => Ok(()),
            false => Err(self.refusal()),
        }
    }

    /// Does all attempts of one call, which ends when the service is taken out of use.
    pub(super) async fn call<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let result = self.while_usable(work).await?;
        match result.as_ref().err().filter(|error| is_fault(error)) {
            Some(error) => self.fail(AttemptKind::Call, error),
            None => {
                self.breaker.succeed(AttemptKind::Call);
            }
        }
        result
    }

    /// Does what says nothing of the service when it fails.
    pub(super) async fn while_usable<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        self.require_usable()?;
        let _under_way = CallUnderWay::begin(&self.calls_under_way);
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = self.breaker.opened() => Err(self.refusal()),
        }
    }

    /// One attempt of a call has ended.
    pub(super) fn note_attempt(&self, error: Option<&Error>) {
        if !error.is_some_and(is_fault) {
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn fail(&self, attempt: AttemptKind, error: &Error) {
        // Whoever is refused from the next line on tells it.
        *self.last_fault.lock() = error.to_string();
        if self.breaker.fail(attempt, Instant::now()) {
            tracing::warn!(
                service = self.place,
                %error,
                "the storage is out of use until it answers; whoever needs it is refused at once"
            );
        }
    }

    fn refusal(&self) -> Error {
        let left = self.breaker.pause_left(Instant::now()).unwrap_or_default();
        let seconds = left.as_secs_f64().ceil().max(1.0);
        Error::Unavailable(format!(
            "{}; it is out of use until it answers, and is asked again in about {seconds} s",
            self.last_fault.lock()
        ))
    }
}

/// Whether an error says that the service is in trouble.
fn is_fault(error: &Error) -> bool {
    matches!(error, Error::Unavailable(_))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn fault() -> Error {
        Error::Unavailable("s3 bucket farm: connection refused".to_owned())
    }

    #[tokio::test]
    async fn calls_to_a_service_that_is_out_of_use_are_refused_and_say_why_and_for_how_long() {
        let health = ServiceHealth::new("s3 bucket farm".to_owned(), 2);
        let waiting = health.call(std::future::pending::<Result<(), Error>>());
        let faults = async {
            // One that says what is wrong with the call says nothing of the service.
            for error in [fault(), Error::Internal("403".to_owned()), fault(), fault()] {
                health.require_usable().unwrap();
                let failed = error.to_string();
                let told = health.call::<()>(async { Err(error) }).await.unwrap_err();
                assert_eq!(told.to_string(), failed);
            }
        };
        let (cut_off, ()) = tokio::join!(waiting, faults);
        let refused = health.call(async { Ok(()) }).await;
        for error in [cut_off.unwrap_err(), refused.unwrap_err()] {
            assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
            let text = error.to_string();
            assert!(
                text.contains("s3 bucket farm: connection refused"),
                "{text}"
            );
            assert!(text.contains("asked again in about 1 s"), "{text}");
        }
        health.note_check(Ok(()));
        health.call(async { Ok(()) }).await.unwrap();
    }

    #[tokio::test]
    async fn health_checks_are_of_services_that_are_silent_when_asked_and_of_those_out_of_use() {
        let health = ServiceHealth::new("redis".to_owned(), 1);
        let (mut answers, now) = (0, Instant::now());
        assert!(!health.needs_check(&mut answers, now));
        let call = health.call(async {
            assert!(health.needs_check(&mut answers, now));
            health.note_attempt(None);
            assert!(!health.needs_check(&mut answers, now));
            health.note_attempt(Some(&fault()));
            assert!(health.needs_check(&mut answers, now));
            // An answer, too.
            health.note_attempt(Some(&Error::Missing(Vec::new())));
            assert!(!health.needs_check(&mut answers, now));
            Ok(())
        });
        call.await.unwrap();
        assert!(!health.needs_check(&mut answers, now));
        health.note_check(Err(fault()));
        assert!(!health.needs_check(&mut answers, now));
        assert!(health.needs_check(&mut answers, now + Duration::from_secs(2)));
        health.note_check(Ok(()));
        // Half open.
        assert!(health.needs_check(&mut answers, now));
        health.note_check(Ok(()));
        assert!(!health.needs_check(&mut answers, now));
    }
}
