//! Why storage did not do what it was asked, and who must act.

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::{daemon, digest::Digest};

/// Why storage did not do what it was asked; each variant says who must act.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum Error {
    /// Blobs that are not there. The client uploads them and tries again.
    #[error("{} of the blobs asked for {} not in the Content Addressable Storage, the first being {}", .0.len(), if .0.len() == 1 { "is" } else { "are" }, .0[0])]
    Missing(Vec<Digest>),
    /// Content that does not match its digest: from a client, its fault; from a server, the farm's.
    #[error("blob {expected} has a content whose digest is {actual}")]
    Corrupt {
        expected: Digest,
        actual: Box<Digest>,
    },
    #[error("blob {digest} is larger than the limit of {limit} bytes")]
    TooLarge { digest: Digest, limit: u64 },
    /// The request itself is at fault.
    #[error("{0}")]
    Invalid(String),
    /// Cannot be reached, or is overloaded; later it may work.
    #[error("{0}")]
    Unavailable(String),
    /// The disk or the store's limit is full; the administrator must act.
    #[error("{0}")]
    Full(String),
    /// A defect of the farm.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// What a failed write of a blob to a file means.
    pub(super) fn of_file(error: std::io::Error) -> Self {
        let text = format!("could not write a blob to a file: {error}");
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Error::Full(text),
            _ => Error::Internal(text),
        }
    }
}

/// Whether a content has the digest that it should have.
pub(super) fn verify(expected: &Digest, actual: Digest) -> Result<(), Error> {
    match actual == *expected {
        true => Ok(()),
        false => Err(Error::Corrupt {
            expected: *expected,
            actual: Box::new(actual),
        }),
    }
}

/// Why a call cannot go on; the client must act.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum UploadError {
    #[error("another call writes to this upload now; use a UUID for each upload")]
    TakenOver,
    #[error("this upload has failed, or was given up when space was short; start it again")]
    GivenUp,
    #[error(
        "write_offset is {offset}, but {received} bytes of this upload have been received; go on \
         there, or start again at 0"
    )]
    Offset { offset: i64, received: u64 },
    #[error(
        "the stream ended after {received} of {size} bytes, without finish_write; go on at the \
         committed_size that QueryWriteStatus tells"
    )]
    Unfinished { received: u64, size: u64 },
    #[error(transparent)]
    Storage(#[from] Error),
}

/// The pieces of a blob, in their order.
pub type BlobStream = BoxStream<'static, Result<Bytes, Error>>;

/// Work on so few bytes takes less time than handing it to another thread and being woken up.
const BRIEF: u64 = 16 << 10;

/// Work on so many bytes, which waits for nothing but a processor.
pub(super) async fn computing<T: Send + 'static>(
    bytes: u64,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    match bytes <= BRIEF {
        true => Ok(work()),
        false => blocking(work).await,
    }
}

/// Away from the threads that serve.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    daemon::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("a storage task failed: {error}")))
}
