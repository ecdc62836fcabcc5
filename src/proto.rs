//! The messages and services of proto/, under short names.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::{Message, Name};
use prost_types::{Any, Timestamp};

#[allow(
    clippy::all,
    clippy::allow_attributes,
    rustdoc::all,
    unreachable_pub,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

pub use generated::bb_remote_execution::{control, live_output};
pub use generated::build::bazel::remote::execution::v2 as reapi;
pub use generated::build::bazel::semver;
pub use generated::buildbarn::{
    auth, buildqueuestate, cas, completedactionlogger, iscc, remoteactionrouter, remoteworker,
    resourceusage, runner,
};
pub use generated::google::{bytestream, longrunning, rpc};
pub use generated::opentelemetry::proto as opentelemetry;

/// A FileDescriptorSet of everything above.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Packs a message as `type.googleapis.com/FULL.NAME`.
pub fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

/// Unpacks a message when it is of this type.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Option<M> {
    let (_, name) = any.type_url.rsplit_once('/')?;
    if name != M::full_name() {
        return None;
    }
    M::decode(&*any.value).ok()
}

pub fn status(code: rpc::Code, message: impl Into<String>) -> rpc::Status {
    rpc::Status {
        code: code as i32,
        message: message.into(),
        details: Vec::new(),
    }
}

/// What `ErrorInfo.reason` says, with `ERROR_DOMAIN`, of an action that its worker could execute, but for
/// the storage.
const STORAGE_UNAVAILABLE: &str = "STORAGE_UNAVAILABLE";
const ERROR_DOMAIN: &str = "bb_remote_execution";

/// UNAVAILABLE, since a storage did not do what it was asked.
pub fn storage_unavailable(message: impl Into<String>) -> rpc::Status {
    let reason = rpc::ErrorInfo {
        reason: STORAGE_UNAVAILABLE.to_owned(),
        domain: ERROR_DOMAIN.to_owned(),
        ..Default::default()
    };
    rpc::Status {
        details: vec![pack(&reason)],
        ..status(rpc::Code::Unavailable, message)
    }
}

/// Whether a status is one that `storage_unavailable` makes.
pub fn is_storage_unavailable(status: &rpc::Status) -> bool {
    status.code == rpc::Code::Unavailable as i32
        && status.details.iter().any(|any| {
            unpack::<rpc::ErrorInfo>(any).is_some_and(|info| {
                info.domain == ERROR_DOMAIN && info.reason == STORAGE_UNAVAILABLE
            })
        })
}

pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// `None` for what no SystemTime can hold.
pub fn system_time(timestamp: &Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(timestamp.seconds).ok()?;
    let nanos = u32::try_from(timestamp.nanos)
        .ok()
        .filter(|n| *n < 1_000_000_000)?;
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

pub fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

/// `None` when negative or ill-formed.
pub fn duration(duration: &prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u32::try_from(duration.nanos)
        .ok()
        .filter(|n| *n < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}
