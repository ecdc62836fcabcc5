//! Calls, each of which ends: within its time, or after as many attempts as are worth it.

use std::time::{Duration, Instant};

use tonic::{Code, Response, Status};

use super::status::{may_be_too_large, wait};
use crate::{
    digest::Digest,
    storage::{
        Error,
        retry::{Attempts, RetryPolicy},
    },
};

/// Calls until there is an answer, or it is no use. Each answer takes no longer than `limit`;
/// `digest` is what NOT_FOUND is about.
pub(super) async fn unary<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
    limit: Duration,
    retry: &RetryPolicy,
    digest: Option<&Digest>,
    call: impl Fn() -> F + Send,
) -> Result<T, Error> {
    let mut attempts = retry.attempts();
    loop {
        let begun = Instant::now();
        match timely(limit, call()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => {
                wait_after(&mut attempts, &status, digest, begun).await?;
            }
        }
    }
}

/// The same as `unary` for a call that can be made in parts; the inner error is a refusal of its size.
pub(super) async fn divisible<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
    limit: Duration,
    retry: &RetryPolicy,
    call: impl Fn() -> F + Send,
) -> Result<Result<T, Status>, Error> {
    let mut attempts = retry.attempts();
    loop {
        let begun = Instant::now();
        match timely(limit, call()).await {
            Ok(answer) => return Ok(Ok(answer.into_inner())),
            Err(status) if may_be_too_large(&status) => return Ok(Err(status)),
            Err(status) => {
                wait_after(&mut attempts, &status, None, begun).await?;
            }
        }
    }
}

/// The same as `wait` for a call that was made then. A server that said nothing has been failing since it was asked:
/// whoever waits has waited for as long.
async fn wait_after(
    attempts: &mut Attempts,
    status: &Status,
    digest: Option<&Digest>,
    begun: Instant,
) -> Result<(), Error> {
    if status.code() == Code::DeadlineExceeded {
        attempts.failing_since(begun);
    }
    wait(attempts, status, digest).await
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
    Status::deadline_exceeded(format!(
        "the storage did not answer within {} seconds",
        limit.as_secs()
    ))
}
