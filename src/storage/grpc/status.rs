//! What a server's status means: whose fault it is, whether trying again may help, and whether less in
//! one call may.

use std::sync::Arc;

use tonic::{Code, Status};

use crate::{
    digest::Digest,
    storage::{Error, retry::Transience},
    text::with_causes,
};

/// What a server did, as its client saw it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct StatusSource(String);

/// The status of a call whose server did not answer it as it should; `text` reads as "storage SERVER TEXT".
pub(super) fn observed(code: Code, text: String) -> Status {
    let mut status = Status::new(code, text.clone());
    status.set_source(Arc::new(StatusSource(text)));
    status
}

pub(super) fn transience(status: &Status) -> Transience {
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

/// Not an answer of the peer's: the connection ended under the call, or what came was none. Such errors show themselves as
/// INTERNAL or UNKNOWN, too, and as RESOURCE_EXHAUSTED where an end of HTTP/2 finds the other one too
/// busy (RFC 9113, ENHANCE_YOUR_CALM).
fn is_of_the_connection(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// What a status of a server means to whoever called. `digest` is what NOT_FOUND is about.
pub(super) fn error(server: &str, status: &Status, digest: Option<&Digest>) -> Error {
    let text = describe(server, status);
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

/// With the causes. What a server only passes on from another one says already whose it is.
fn describe(server: &str, status: &Status) -> String {
    let (code, message) = (status.code(), status.message());
    if let Some(StatusSource(text)) =
        std::error::Error::source(status).and_then(|source| source.downcast_ref())
    {
        return format!("storage {server} {text}");
    }
    let mut text = match is_of_the_connection(status) {
        true => format!("no answer from storage {server}: {message}"),
        false if is_passed_on(message, code) => message.to_owned(),
        false => format!("storage {server} answered {code:?}: {message}"),
    };
    if matches!(code, Code::PermissionDenied | Code::Unauthenticated) {
        text.push_str("; let it give this daemon what it asks for, or see what storage.tls, storage.authorization_file and storage.add_metadata show it");
    }
    with_causes(text, status)
}

/// Whether a server says what `describe` made of another one's status.
fn is_passed_on(message: &str, code: Code) -> bool {
    let answered = format!(" answered {code:?}: ");
    message.contains("no answer from storage ")
        || message
            .split_once("storage ")
            .is_some_and(|(_, rest)| rest.contains(&answered))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_passes_on_from_another_one_is_told_once() {
        let told = |server: &str, status: &Status| error(server, status, None).to_string();
        let first = told("grpc://store:1", &Status::internal("broken"));
        assert_eq!(first, "storage grpc://store:1 answered Internal: broken");
        let second = told("grpc://scheduler:2", &Status::internal(&*first));
        assert_eq!(second, first);
        let of_a_shard = format!("shard a: {first}");
        let second = told("grpc://scheduler:2", &Status::internal(&*of_a_shard));
        assert_eq!(second, of_a_shard);
        let silent = observed(Code::DeadlineExceeded, "did not answer".to_owned());
        let silent = told("grpc://store:1", &silent);
        assert_eq!(silent, "storage grpc://store:1 did not answer");
    }

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
