//! What a server's status means: whose fault it is, whether trying again may help, and whether less in
//! one call may.

use tonic::{Code, Status};

use crate::{
    digest::Digest,
    storage::{
        Error,
        retry::{Attempts, Transience},
    },
};

/// Waits before the next attempt at a call that failed. The error of the call when there should be
/// none; `digest` is what NOT_FOUND is about.
pub(super) async fn wait(
    attempts: &mut Attempts,
    status: &Status,
    digest: Option<&Digest>,
) -> Result<(), Error> {
    match attempts.wait(transience(status)).await {
        true => Ok(()),
        false => Err(error(status, digest)),
    }
}

fn transience(status: &Status) -> Transience {
    match status.code() {
        Code::Unavailable | Code::Aborted | Code::Cancelled | Code::DeadlineExceeded => {
            Transience::Transient
        }
        _ if is_of_the_connection(status) => Transience::Transient,
        Code::Internal | Code::Unknown | Code::ResourceExhausted => Transience::Doubtful,
        _ => Transience::Permanent,
    }
}

/// Whether one blob of a batch should be asked for again, whose status this is.
pub(super) fn may_pass(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Aborted | Code::ResourceExhausted
    )
}

/// Whether a call of more than one item may have been too large, so that parts of it may pass.
///
/// gRPC libraries refuse large messages with RESOURCE_EXHAUSTED, as others refuse when a disk is
/// full; they are told apart by their words.
pub(super) fn may_be_too_large(status: &Status) -> bool {
    if is_of_the_connection(status) {
        return false;
    }
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => true,
        Code::ResourceExhausted => {
            let text = status.message();
            ["larger than max", "exceeds maximum", "too large"]
                .iter()
                .any(|words| text.contains(words))
        }
        _ => false,
    }
}

/// Not an answer of the peer's: the connection ended under the call. Such errors show themselves as
/// INTERNAL or UNKNOWN, too, and as RESOURCE_EXHAUSTED where an end of HTTP/2 finds the other one too
/// busy (RFC 9113, ENHANCE_YOUR_CALM).
fn is_of_the_connection(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// What a status means to whoever called. `digest` is what NOT_FOUND is about.
pub(super) fn error(status: &Status, digest: Option<&Digest>) -> Error {
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
    let mut text = match is_of_the_connection(status) {
        true => format!("no answer from storage: {}", status.message()),
        false => format!("storage answered {:?}: {}", status.code(), status.message()),
    };
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

    #[test]
    fn a_full_disk_is_no_large_message() {
        let full = Status::resource_exhausted("No space left on device");
        assert!(!may_be_too_large(&full));
        let large = "grpc: received message larger than max (5242880 vs. 4194304)";
        assert!(may_be_too_large(&Status::resource_exhausted(large)));
        assert!(may_be_too_large(&Status::invalid_argument("anything")));
        assert!(!may_be_too_large(&Status::unavailable("too large")));
    }
}
