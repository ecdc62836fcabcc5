//! Why an action has no result, and who must act.

use std::{fmt, io};

use crate::{
    digest::Digest,
    proto::{self, rpc},
    resource::missing_blobs,
    storage,
};

/// At most so many MISSING violations in one status, so that it fits into a gRPC message. A client
/// that uploads these learns of the rest at its next attempt.
const NAMED_MISSING: usize = 5_000;

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// The client: the action can never work.
    #[error("{0}")]
    Invalid(String),
    /// The client: what it asked for does not fit what the command did.
    #[error("{0}")]
    Precondition(String),
    /// The client: it uploads these and tries again.
    #[error("{text}")]
    Missing { text: String, digests: Vec<Digest> },
    /// The command took longer than its timeout.
    #[error("{0}")]
    Late(String),
    /// Nobody: the scheduler did not want the action any more.
    #[error("the action was cancelled")]
    Cancelled,
    /// The administrator: a limit or a disk is too small.
    #[error("{0}")]
    Exhausted(String),
    /// The farm: this host, or what it needs, is at fault; elsewhere or later it may work.
    #[error("{0}")]
    Unavailable(String),
    /// Likewise, but an action may have brought it about: it says nothing of this host.
    #[error("{0}")]
    Contended(String),
    /// The farm: its storage did not do what it was asked, for as long as this host tried. Elsewhere it may
    /// work only if it is this host that cannot reach it.
    #[error("{0}")]
    Storage(String),
    /// The farm: a defect.
    #[error("{0}")]
    Internal(String),
    /// As the runner says.
    #[error("{text}")]
    Runner { code: i32, text: String },
}

impl Fault {
    pub fn status(&self) -> rpc::Status {
        use rpc::Code;
        let code = match self {
            Fault::Missing { text, digests } => {
                let named = &digests[..digests.len().min(NAMED_MISSING)];
                return missing_blobs(text, named);
            }
            Fault::Invalid(_) => Code::InvalidArgument,
            Fault::Precondition(_) => Code::FailedPrecondition,
            Fault::Late(_) => Code::DeadlineExceeded,
            Fault::Cancelled => Code::Cancelled,
            Fault::Exhausted(_) => Code::ResourceExhausted,
            Fault::Unavailable(_) | Fault::Contended(_) => Code::Unavailable,
            Fault::Storage(text) => return proto::storage_unavailable(text),
            Fault::Internal(_) => Code::Internal,
            Fault::Runner { code, text } => {
                return rpc::Status {
                    code: *code,
                    message: text.clone(),
                    details: Vec::new(),
                };
            }
        };
        proto::status(code, self.to_string())
    }

    pub fn is_unavailable(&self) -> bool {
        self.status().code == rpc::Code::Unavailable as i32
    }

    /// `what` reads as "could not WHAT".
    pub fn of_storage(what: impl fmt::Display, error: storage::Error) -> Self {
        use storage::Error;
        let text = format!("could not {what}: {error}");
        match error {
            Error::Missing(digests) => Fault::Missing { text, digests },
            Error::TooLarge { .. } | Error::Invalid(_) => Fault::Invalid(text),
            Error::Unavailable(_) => Fault::Storage(format!(
                "{text}; see whether that storage is up and can be reached from this worker's host, and what its log says"
            )),
            Error::Full(_) => Fault::Exhausted(text),
            Error::Corrupt { .. } | Error::Internal(_) => Fault::Internal(text),
        }
    }

    /// An operation on the worker's own files. `what` reads as "could not WHAT".
    pub fn of_disk(what: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let text = format!("could not {what}: {error}");
        let broken = error.raw_os_error() == Some(libc::EIO);
        match error.kind() {
            _ if broken => Fault::Unavailable(format!("{text}; look after the disk of this host")),
            // Another worker may have room, and this one later.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Fault::Contended(text),
            _ => Fault::Unavailable(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unavailable_storage_is_told_apart_from_an_unavailable_worker() {
        let error = || storage::Error::Unavailable("storage grpc://store:1 is down".to_owned());
        let status = Fault::of_storage("upload the outputs", error()).status();
        assert_eq!(status.code, rpc::Code::Unavailable as i32);
        assert!(proto::is_storage_unavailable(&status));
        let expected = "could not upload the outputs: storage grpc://store:1 is down; see whether";
        assert!(status.message.starts_with(expected), "{status:?}");
        let status = Fault::Unavailable("no runner".to_owned()).status();
        assert!(!proto::is_storage_unavailable(&status));
    }
}
