//! Trying again: what is worth it, how often, and what the last error means.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tonic::{Code, Response, Status};

use super::limits::may_be_too_large;
use crate::{digest::Digest, storage::Error};

/// From the first failure, how long a call is tried again.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a server may say that the trouble is its own, or that it is full, before it is believed.
const BELIEVED_AFTER: u32 = 5;

/// The failures of one call.
#[derive(Default)]
pub struct Failures {
    first: Option<Instant>,
    count: u32,
}

impl Failures {
    /// Waits before the next attempt. An error when there should be none.
    pub async fn wait(&mut self, status: &Status, digest: Option<&Digest>) -> Result<(), Error> {
        let give_up = Err(error(status, digest));
        let believed = match status.code() {
            Code::Unavailable | Code::Aborted | Code::Cancelled | Code::DeadlineExceeded => {
                u32::MAX
            }
            _ if is_of_the_connection(status) => u32::MAX,
            Code::Internal | Code::Unknown | Code::ResourceExhausted => BELIEVED_AFTER,
            _ => return give_up,
        };
        self.count += 1;
        let first = *self.first.get_or_insert_with(Instant::now);
        if self.count >= believed || first.elapsed() >= PATIENCE {
            return give_up;
        }
        let longest = Duration::from_millis(50 << self.count.min(6));
        // Between half of it and all, so that many clients do not come back at once.
        let jitter = RandomState::new().hash_one(self.count) as u32;
        tokio::time::sleep(
            longest / 2 + longest.mul_f64(f64::from(jitter) / f64::from(u32::MAX) / 2.0),
        )
        .await;
        Ok(())
    }
}

/// Calls until there is an answer, or it is no use. Each answer takes no longer than `limit`;
/// `digest` is what NOT_FOUND is about.
pub async fn unary<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
    limit: Duration,
    digest: Option<&Digest>,
    call: impl Fn() -> F + Send,
) -> Result<T, Error> {
    let mut failures = Failures::default();
    loop {
        match timely(limit, call()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => failures.wait(&status, digest).await?,
        }
    }
}

/// The same for a call that can be made in parts; the inner error is a refusal of its size.
pub async fn divisible<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
    limit: Duration,
    call: impl Fn() -> F + Send,
) -> Result<Result<T, Status>, Error> {
    let mut failures = Failures::default();
    loop {
        match timely(limit, call()).await {
            Ok(answer) => return Ok(Ok(answer.into_inner())),
            Err(status) if may_be_too_large(&status) => return Ok(Err(status)),
            Err(status) => failures.wait(&status, None).await?,
        }
    }
}

/// Waits for an answer as long as `progress` changes, and `silence` after each change, or `last`
/// once nothing can change it any more.
pub async fn moving<T>(
    silence: Duration,
    last: Duration,
    mut progress: watch::Receiver<u64>,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let mut answer = std::pin::pin!(answer);
    loop {
        let moved = tokio::select! {
            answer = &mut answer => return answer,
            moved = tokio::time::timeout(silence, progress.changed()) => moved,
        };
        match moved {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return timely(last, answer).await,
            Err(_) => return Err(silent(silence)),
        }
    }
}

fn silent(limit: Duration) -> Status {
    Status::deadline_exceeded(format!(
        "the storage did not answer within {} seconds",
        limit.as_secs()
    ))
}

pub async fn timely<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(silent(limit)),
    }
}

/// Not an answer of the peer's: the connection ended under the call. Such errors show themselves as
/// INTERNAL or UNKNOWN, too, and as RESOURCE_EXHAUSTED where an end of HTTP/2 finds the other one too
/// busy (RFC 9113, ENHANCE_YOUR_CALM).
pub fn is_of_the_connection(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// What a status means to whoever called. `digest` is what NOT_FOUND is about.
pub fn error(status: &Status, digest: Option<&Digest>) -> Error {
    let text = describe(status);
    if is_of_the_connection(status) {
        return Error::Unavailable(text);
    }
    match (status.code(), digest) {
        (Code::NotFound, Some(digest)) => Error::Missing(vec![*digest]),
        (Code::InvalidArgument | Code::OutOfRange, _) => Error::Invalid(text),
        (Code::ResourceExhausted, _) => Error::Full(text),
        (
            Code::Unavailable
            | Code::Aborted
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unknown,
            _,
        ) => Error::Unavailable(text),
        _ => Error::Internal(text),
    }
}

/// With the causes, which name the endpoint that could not be reached.
fn describe(status: &Status) -> String {
    let mut text = format!("storage answered {:?}: {}", status.code(), status.message());
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_upload_may_take_any_time_as_long_as_it_moves() {
        let silence = Duration::from_secs(1);
        let (progress, moved) = watch::channel(0);
        let slow = async {
            for piece in 0..30 {
                tokio::time::sleep(silence / 20).await;
                progress.send_replace(piece);
            }
            Ok(())
        };
        moving(silence, silence, moved, slow).await.unwrap();
    }

    #[tokio::test]
    async fn an_upload_that_stands_still_is_given_up() {
        let silence = Duration::from_millis(1);
        let (progress, moved) = watch::channel(0);
        let never = std::future::pending::<Result<(), Status>>;
        let error = moving(silence, silence, moved.clone(), never()).await;
        assert_eq!(error.unwrap_err().code(), Code::DeadlineExceeded);
        // All of it was sent, and no answer comes.
        drop(progress);
        let error = moving(silence, silence, moved, never()).await;
        assert_eq!(error.unwrap_err().code(), Code::DeadlineExceeded);
    }
}
