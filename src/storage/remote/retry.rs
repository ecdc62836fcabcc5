//! Trying again: what is worth it, how often, and what the last error means.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use tonic::{Code, Response, Status};

use crate::{digest::Digest, storage::Error};

/// From the first failure, how long a call is tried again.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a server may say that the trouble is its own, or that it is full, before it is believed.
const BELIEVED_AFTER: u32 = 5;

/// A unary call's answer takes no longer.
const UNARY_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two messages of a stream passes no more time.
pub const STREAM_TIMEOUT: Duration = Duration::from_secs(60);

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
            // Transport errors show themselves as INTERNAL or UNKNOWN, too.
            Code::Internal | Code::Unknown if std::error::Error::source(status).is_some() => {
                u32::MAX
            }
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

/// Calls until there is an answer, or it is no use. `digest` is what NOT_FOUND is about.
pub async fn unary<T, F: Future<Output = Result<Response<T>, Status>> + Send>(
    digest: Option<&Digest>,
    call: impl Fn() -> F + Send,
) -> Result<T, Error> {
    let mut failures = Failures::default();
    loop {
        match timely(UNARY_TIMEOUT, call()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => failures.wait(&status, digest).await?,
        }
    }
}

pub async fn timely<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!(
            "the storage did not answer within {} seconds",
            limit.as_secs()
        ))),
    }
}

/// What a status means to whoever called. `digest` is what NOT_FOUND is about.
pub fn error(status: &Status, digest: Option<&Digest>) -> Error {
    let text = describe(status);
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
