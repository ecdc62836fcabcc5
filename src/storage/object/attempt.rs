//! What one attempt of a call to a service comes to.

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::storage::{Error, retry::Transience};

/// Why an attempt failed, and whether another one may not.
pub(super) struct FailedAttempt {
    pub error: Error,
    pub transience: Transience,
}

impl FailedAttempt {
    pub(super) fn permanent(error: Error) -> Self {
        FailedAttempt {
            error,
            transience: Transience::Permanent,
        }
    }

    pub(super) fn unavailable(text: String) -> Self {
        FailedAttempt {
            error: Error::Unavailable(text),
            transience: Transience::Transient,
        }
    }
}

/// Bytes of a value, in their order.
pub(super) type Pieces = BoxStream<'static, Result<Bytes, FailedAttempt>>;

/// What identifies a part that was written.
pub(super) struct WrittenPart(pub String);
