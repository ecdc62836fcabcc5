//! Calls, each of which ends: within its time, or after as many attempts as are worth it.

use std::{
    fmt,
    time::{Duration, Instant},
};

use tonic::{Code, Response, Status};

use super::status::{self, may_be_too_large, observed, transience};
use crate::{
    config::Endpoint,
    digest::Digest,
    storage::{
        Error,
        retry::{Attempts, RetryPolicy},
    },
};

/// A server that calls are made to.
pub(super) struct CalledServer {
    /// Where it is, for errors.
    name: String,
    /// From a unary call to its answer.
    timeout: Duration,
    retry: RetryPolicy,
}

impl CalledServer {
    pub(super) fn new(endpoint: &Endpoint, timeout: Duration, retry: RetryPolicy) -> Self {
        CalledServer {
            name: endpoint.to_string(),
            timeout,
            retry,
        }
    }

    /// How calls to it that fail are tried again.
    pub(super) fn attempts(&self) -> Attempts {
        self.retry.attempts()
    }

    /// Calls until there is an answer, or it is no use. `digest` is what NOT_FOUND is about.
    pub(super) async fn unary<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
        &self,
        digest: Option<&Digest>,
        call: impl Fn() -> F + Send,
    ) -> Result<T, Error> {
        let mut attempts = self.attempts();
        loop {
            let begun = Instant::now();
            match timely(self.timeout, call()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => {
                    self.wait_after(&mut attempts, &status, digest, begun)
                        .await?;
                }
            }
        }
    }

    /// The same as `unary` for a call that can be made in parts; the inner error is a refusal of its size.
    pub(super) async fn divisible<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
        &self,
        call: impl Fn() -> F + Send,
    ) -> Result<Result<T, Status>, Error> {
        let mut attempts = self.attempts();
        loop {
            let begun = Instant::now();
            match timely(self.timeout, call()).await {
                Ok(answer) => return Ok(Ok(answer.into_inner())),
                Err(status) if may_be_too_large(&status) => return Ok(Err(status)),
                Err(status) => {
                    self.wait_after(&mut attempts, &status, None, begun).await?;
                }
            }
        }
    }

    /// The same as `wait` for a call that was made then. A server that said nothing has been failing since it was asked:
    /// whoever waits has waited for as long.
    async fn wait_after(
        &self,
        attempts: &mut Attempts,
        status: &Status,
        digest: Option<&Digest>,
        begun: Instant,
    ) -> Result<(), Error> {
        if status.code() == Code::DeadlineExceeded {
            attempts.failing_since(begun);
        }
        self.wait(attempts, status, digest).await
    }

    /// Waits before the next attempt at a call that failed. The error of the call when there should be
    /// none; `digest` is what NOT_FOUND is about.
    pub(super) async fn wait(
        &self,
        attempts: &mut Attempts,
        status: &Status,
        digest: Option<&Digest>,
    ) -> Result<(), Error> {
        match attempts.wait(transience(status)).await {
            true => Ok(()),
            false => Err(self.error(status, digest)),
        }
    }

    /// What a status means to whoever called. `digest` is what NOT_FOUND is about.
    pub(super) fn error(&self, status: &Status, digest: Option<&Digest>) -> Error {
        status::error(&self.name, status, digest)
    }
}

impl fmt::Display for CalledServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Waits for an answer no longer than `limit`.
pub(super) async fn timely<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(silent(limit)),
    }
}

/// The status of a server that said nothing for so long.
pub(super) fn silent(limit: Duration) -> Status {
    let text = format!("did not answer within {} seconds", limit.as_secs());
    observed(Code::DeadlineExceeded, text)
}
