//! What the services answer when they refuse: whose fault it is, and what to do about it.

use prost::Message;
use tonic::{Code, Status};

use super::queue::{self, ExecuteRefusal};
use crate::{proto::rpc, resource::missing_blobs, storage};

pub(super) fn refused(refusal: queue::Refusal) -> Status {
    match &refusal {
        queue::Refusal::AlreadySynchronizing { news, .. }
        | queue::Refusal::Executing { news, .. } => {
            if *news {
                tracing::warn!("refused a worker: {refusal}");
            }
            Status::resource_exhausted(refusal.to_string())
        }
        queue::Refusal::SizeClass { .. } => invalid(refusal),
        queue::Refusal::TooMany { .. } => Status::resource_exhausted(refusal.to_string()),
    }
}

pub(super) fn invalid(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn stopping() -> Status {
    Status::unavailable("The scheduler is stopping; its successor takes up what workers run")
}

pub(super) fn not_queued(refusal: ExecuteRefusal) -> Status {
    match &refusal {
        ExecuteRefusal::NoWorkers(error) if error.transient => {
            Status::unavailable(refusal.to_string())
        }
        ExecuteRefusal::NoWorkers(_) => Status::failed_precondition(refusal.to_string()),
        ExecuteRefusal::QueueFull(_) => Status::resource_exhausted(refusal.to_string()),
    }
}

pub(super) fn storage(prefix: &str, error: storage::Error) -> Status {
    use storage::Error;
    let message = format!("{prefix}: {error}");
    let code = match &error {
        Error::Missing(digests) => {
            let status = missing_blobs(message, digests);
            let details = status.encode_to_vec().into();
            return Status::with_details(Code::FailedPrecondition, status.message, details);
        }
        Error::TooLarge { .. } | Error::Invalid(_) => rpc::Code::InvalidArgument,
        Error::Unavailable(_) => rpc::Code::Unavailable,
        Error::Full(_) => rpc::Code::ResourceExhausted,
        Error::Corrupt { .. } | Error::Internal(_) => rpc::Code::Internal,
    };
    Status::new(Code::from_i32(code as i32), message)
}
