//! What the services answer when they refuse: whose fault it is, and what to do about it.

use std::fmt::Display;

use prost::Message;
use prost_types::value::Kind;
use tonic::{Code, Request, Status};

use super::queue::{
    self, DrainRefusal, ExecuteRefusal, KillRefusal, NoWorkers, QueueFull, UnknownInvocation,
    UnknownOperation, UnknownQueue,
};
use crate::{
    daemon::Access,
    digest::Digest,
    instance::InstanceName,
    proto::{self, auth::AuthenticationMetadata, rpc},
    resource::missing_blobs,
    storage,
};

pub(super) fn invalid(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn stopping() -> Status {
    Status::unavailable("The scheduler is stopping; its successor takes up what workers run")
}

/// Who the client proved to be; its name is for everybody to see.
pub(super) fn user<T>(request: &Request<T>) -> Option<AuthenticationMetadata> {
    let access = Access::of(request);
    let identity = access.identity();
    (!identity.is_nobody()).then(|| AuthenticationMetadata {
        public: Some(prost_types::Value {
            kind: Some(Kind::StringValue(identity.name().to_owned())),
        }),
        ..Default::default()
    })
}

/// Clients then execute the action anew.
pub(super) fn unknown_name(name: &str, reason: &dyn Display) -> Status {
    let name = crate::text::shorten(name);
    Status::not_found(format!("Operation with name {name:?} not found: {reason}"))
}

pub(super) fn execute(refusal: ExecuteRefusal) -> Status {
    match refusal {
        ExecuteRefusal::NoWorkers(refusal) => no_workers(refusal),
        ExecuteRefusal::QueueFull(refusal) => queue_full(&refusal),
    }
}

fn no_workers(error: NoWorkers) -> Status {
    match error.transient {
        true => Status::unavailable(error.to_string()),
        false => Status::failed_precondition(error.to_string()),
    }
}

/// Clients try again when they are told when.
fn queue_full(full: &QueueFull) -> Status {
    let retry = rpc::RetryInfo {
        retry_delay: Some(proto::proto_duration(full.retry_after)),
    };
    let status = rpc::Status {
        details: vec![proto::pack(&retry)],
        ..proto::status(rpc::Code::ResourceExhausted, full.to_string())
    };
    let details = status.encode_to_vec().into();
    Status::with_details(Code::ResourceExhausted, status.message, details)
}

pub(super) fn unknown_queue(error: UnknownQueue) -> Status {
    Status::not_found(error.to_string())
}

pub(super) fn unknown_invocation(error: UnknownInvocation) -> Status {
    Status::not_found(error.to_string())
}

pub(super) fn unknown_operation(error: UnknownOperation) -> Status {
    Status::not_found(error.to_string())
}

pub(super) fn unknown_action(digest: &Digest) -> Status {
    Status::not_found(format!(
        "There is no action {digest} in the storage; it was evicted, or is another instance's"
    ))
}

/// A blob is there, and it is something else.
pub(super) fn no_action(digest: &Digest, why: &dyn Display) -> Status {
    Status::not_found(format!(
        "{digest} is in the storage, but is no Action: {why}"
    ))
}

pub(super) fn no_result(digest: &Digest, instance: &InstanceName) -> Status {
    Status::not_found(format!(
        "There is no result of action {digest} with instance name {:?}",
        instance.as_str()
    ))
}

pub(super) fn no_store() -> Status {
    Status::failed_precondition(
        "This scheduler has no embedded store: its storage is elsewhere, as storage.cas says; ask there",
    )
}

pub(super) fn no_action_cache() -> Status {
    Status::failed_precondition(
        "This scheduler has no results of its own: they are elsewhere, as storage.action_cache says; ask there",
    )
}

pub(super) fn failed_task(error: &dyn Display) -> Status {
    Status::internal(format!("A task of the store failed: {error}"))
}

pub(super) fn kill(refusal: KillRefusal) -> Status {
    match refusal {
        KillRefusal::UnknownQueue(error) => unknown_queue(error),
        KillRefusal::HasWorkers => Status::failed_precondition(refusal.to_string()),
    }
}

pub(super) fn drain(refusal: DrainRefusal) -> Status {
    match refusal {
        DrainRefusal::TooMany { .. } => Status::resource_exhausted(refusal.to_string()),
    }
}

/// What was done holds until the next start only.
pub(super) fn not_kept(error: &dyn Display) -> Status {
    Status::unavailable(format!(
        "It holds, but would be forgotten at a restart of the scheduler: {error}"
    ))
}

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
