//! The statuses that errors of storage, and of what requests name, become.

use tonic::{Code, Status};

use crate::{
    daemon::LogRateLimit,
    digest::DigestError,
    instance::InstanceNameError,
    proto::rpc,
    resource::ResourceNameError,
    storage::{Error, UploadError, compression::DecodeError},
};

/// Lines about refusals, of which there is one for each blob.
static REFUSALS: LogRateLimit = LogRateLimit::new(5, std::time::Duration::from_secs(60));

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Missing(_) => Code::NotFound,
            Error::Corrupt { .. } | Error::TooLarge { .. } | Error::Invalid(_) => {
                Code::InvalidArgument
            }
            Error::Unavailable(_) => Code::Unavailable,
            Error::Full(_) => Code::ResourceExhausted,
            Error::Internal(_) => Code::Internal,
        };
        if let Error::Full(_) | Error::Internal(_) = &error
            && let Some(lines_withheld) = REFUSALS.admit(std::time::Instant::now())
        {
            tracing::warn!(%error, lines_withheld, "the store refused a blob");
        }
        Status::new(code, error.to_string())
    }
}

/// Of a blob that was to be read: one that is damaged is not the caller's fault, as one that it uploads would be.
pub(super) fn of_read(error: Error) -> Status {
    Status::from(match error {
        Error::Corrupt { .. } => Error::Internal(format!(
            "{error}, as its storage sent it: it is damaged there; remove it there, or repair that storage"
        )),
        error => error,
    })
}

impl From<UploadError> for Status {
    fn from(error: UploadError) -> Self {
        let code = match error {
            UploadError::Storage(error) => return error.into(),
            UploadError::TakenOver | UploadError::GivenUp => Code::Aborted,
            UploadError::Offset { .. } | UploadError::Unfinished { .. } => Code::InvalidArgument,
        };
        Status::new(code, error.to_string())
    }
}

impl From<DecodeError> for Status {
    fn from(error: DecodeError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<DigestError> for Status {
    fn from(error: DigestError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<InstanceNameError> for Status {
    fn from(error: InstanceNameError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl From<ResourceNameError> for Status {
    fn from(error: ResourceNameError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// The status of one blob of a batch.
pub(super) fn status_of(result: Result<(), Error>) -> rpc::Status {
    result.map_or_else(|error| in_batch(error.into()), |()| rpc::Status::default())
}

/// The status of one blob of a batch that was to be read.
pub(super) fn status_of_read(result: Result<(), Error>) -> rpc::Status {
    result.map_or_else(
        |error| in_batch(of_read(error)),
        |()| rpc::Status::default(),
    )
}

fn in_batch(status: Status) -> rpc::Status {
    rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    }
}
