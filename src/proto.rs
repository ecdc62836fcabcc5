//! The messages and services of proto/, under short names, and the few texts that travel beside them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::{Message, Name};
use prost_types::{Any, Timestamp};

use crate::{digest::Digest, instance::InstanceName, resource::blob_name};

#[allow(clippy::all, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

pub use generated::build::bazel::remote::execution::v2 as reapi;
pub use generated::build::bazel::semver;
pub use generated::buildbarn::{
    auth, buildqueuestate, cas, completedactionlogger, remoteworker, resourceusage, runner,
};
pub use generated::google::{bytestream, longrunning, rpc};

/// A FileDescriptorSet of everything above.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The header with a serialised RequestMetadata (REAPI: RequestMetadata).
pub const REQUEST_METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// Between this project's worker and runner: whose the input files are.
const INPUTS_HEADER: &str = "bb-inputs";
const PRIVATE: &str = "private";

/// Between this project's worker and scheduler: whose blobs the reported action works with.
/// Buildbarn's worker does not say, and its scheduler does not ask.
const INSTANCE_HEADER: &str = "bb-instance-name-bin";

/// Says of which instance the action is that a worker reports.
pub fn set_instance<T>(request: &mut tonic::Request<T>, instance: &InstanceName) {
    let value = tonic::metadata::MetadataValue::from_bytes(instance.as_str().as_bytes());
    request.metadata_mut().insert_bin(INSTANCE_HEADER, value);
}

/// What a worker said so; `None` when it said nothing that is an instance name.
pub fn instance_of<T>(request: &tonic::Request<T>) -> Option<InstanceName> {
    let value = request.metadata().get_bin(INSTANCE_HEADER)?;
    let data = value.to_bytes().ok()?;
    InstanceName::parse(std::str::from_utf8(&data).ok()?).ok()
}

/// A request on behalf of an action, which its receiver may log (REAPI: RequestMetadata.action_id).
pub fn for_action<T>(message: T, action: &Digest) -> tonic::Request<T> {
    let metadata = reapi::RequestMetadata {
        action_id: action.hash_hex(),
        ..Default::default()
    };
    let mut request = tonic::Request::new(message);
    let value = tonic::metadata::MetadataValue::from_bytes(&metadata.encode_to_vec());
    request
        .metadata_mut()
        .insert_bin(REQUEST_METADATA_HEADER, value);
    request
}

/// Says that nobody else has the files in the input root, so that they may become the action's.
pub fn set_private_inputs<T>(request: &mut tonic::Request<T>) {
    let private = tonic::metadata::MetadataValue::from_static(PRIVATE);
    request.metadata_mut().insert(INPUTS_HEADER, private);
}

/// Whether a worker said so.
pub fn has_private_inputs<T>(request: &tonic::Request<T>) -> bool {
    let value = request.metadata().get(INPUTS_HEADER);
    value.is_some_and(|value| value.as_bytes() == PRIVATE.as_bytes())
}

/// The hash of the action that a request is made for; empty when it does not say.
pub fn action_of<T>(request: &tonic::Request<T>) -> String {
    request
        .metadata()
        .get_bin(REQUEST_METADATA_HEADER)
        .and_then(|value| value.to_bytes().ok())
        .and_then(|data| reapi::RequestMetadata::decode(data).ok())
        .map(|metadata| metadata.action_id)
        .unwrap_or_default()
}

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

/// FAILED_PRECONDITION with one MISSING violation per digest, and no other detail: clients upload
/// the blobs and try again only if every violation says so (REAPI: Execute).
pub fn missing_blobs(message: impl Into<String>, digests: &[Digest]) -> rpc::Status {
    let failure = rpc::PreconditionFailure {
        violations: digests
            .iter()
            .map(|digest| rpc::precondition_failure::Violation {
                r#type: "MISSING".to_owned(),
                subject: blob_name(digest),
                description: String::new(),
            })
            .collect(),
    };
    rpc::Status {
        code: rpc::Code::FailedPrecondition as i32,
        message: message.into(),
        details: vec![pack(&failure)],
    }
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
