//! One server of a shard: its client, its health, and its name in errors.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::storage::{
    Error,
    breaker::{AttemptKind, Breaker},
    grpc::Client,
};

pub(super) struct Member {
    /// The shard's name, and where it is.
    name: String,
    pub(super) client: Client,
    breaker: Breaker,
    /// How often any server was taken out of use.
    losses: Arc<AtomicU64>,
}

impl Member {
    /// Checks its health from now on, as long as somebody has it. Within a runtime.
    pub(super) fn start(
        name: String,
        client: Client,
        (faults, interval): (u32, Duration),
        losses: Arc<AtomicU64>,
    ) -> Arc<Self> {
        let member = Arc::new(Member {
            name,
            client,
            breaker: Breaker::new(faults),
            losses,
        });
        let weak = Arc::downgrade(&member);
        tokio::spawn(async move {
            while let Some(member) = weak.upgrade() {
                let begun = tokio::time::Instant::now();
                member.check_health().await;
                drop(member);
                // What did not answer in time has taken that time already.
                tokio::time::sleep_until(begun + interval).await;
            }
        });
        member
    }

    pub(super) fn is_usable(&self) -> bool {
        self.breaker.is_usable()
    }

    /// Does work of this server's client, which ends when the server is taken out of use.
    pub(super) async fn call<T>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Error> {
        let result = tokio::select! {
            biased;
            result = work => result,
            () = self.breaker.opened() => {
                let text = "it is out of use, since it does not answer".to_owned();
                Err(Error::Unavailable(text))
            }
        };
        self.note(result.as_ref().err());
        result.map_err(|error| self.named(error))
    }

    /// The same where each part has a result of its own.
    pub(super) async fn call_many<T>(
        &self,
        count: usize,
        work: impl Future<Output = Vec<Result<T, Error>>> + Send,
    ) -> Vec<Result<T, Error>> {
        let results = tokio::select! {
            biased;
            results = work => results,
            () = self.breaker.opened() => {
                let error = || Error::Unavailable("it is out of use, since it does not answer".to_owned());
                (0..count).map(|_| Err(error())).collect()
            }
        };
        let errors = || results.iter().filter_map(|result| result.as_ref().err());
        // One call, one fault.
        self.note(errors().find(|error| is_fault(error)));
        let named = |result: Result<T, Error>| result.map_err(|error| self.named(error));
        results.into_iter().map(named).collect()
    }

    fn note(&self, error: Option<&Error>) {
        match error.filter(|error| is_fault(error)) {
            None => {
                self.breaker.succeed(AttemptKind::Call);
            }
            Some(error) => self.fail(AttemptKind::Call, error),
        }
    }

    fn fail(&self, attempt: AttemptKind, error: &Error) {
        if self.breaker.fail(attempt, Instant::now()) {
            self.losses.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                shard = self.name,
                %error,
                "a server of the storage is out of use until it answers; what only it has is missing, \
                 and other shards take what is uploaded"
            );
        }
    }

    async fn check_health(&self) {
        if !self.breaker.is_due(Instant::now()) {
            return;
        }
        match self.client.probe().await {
            Err(error @ Error::Unavailable(_)) => {
                self.fail(AttemptKind::HealthCheck, &error);
            }
            // Whatever it said, it answered.
            _ => {
                if self.breaker.succeed(AttemptKind::HealthCheck) {
                    tracing::info!(shard = self.name, "a server of the storage answers again");
                }
            }
        }
    }

    fn named(&self, error: Error) -> Error {
        let name = |text: String| format!("shard {}: {text}", self.name);
        match error {
            Error::Unavailable(text) => Error::Unavailable(name(text)),
            Error::Invalid(text) => Error::Invalid(name(text)),
            Error::Full(text) => Error::Full(name(text)),
            Error::Internal(text) => Error::Internal(name(text)),
            Error::Corrupt { expected, actual } => {
                tracing::warn!(
                    shard = self.name,
                    blob = %expected,
                    "a server of the storage gave other bytes than those of the blob; look at its disk"
                );
                Error::Corrupt { expected, actual }
            }
            error => error,
        }
    }
}

/// Whether an error says that its server is in trouble.
fn is_fault(error: &Error) -> bool {
    matches!(error, Error::Unavailable(_))
}
