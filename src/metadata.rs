//! Request metadata: what travels in headers beside a message, between this project's daemons or
//! from its clients.

use prost::Message;
use tonic::{Request, metadata::MetadataValue};

use crate::{digest::Digest, instance::InstanceName, proto::reapi::RequestMetadata};

/// REAPI: RequestMetadata, serialised.
pub const REQUEST_METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// Between this project's worker and runner: whose the input files are.
const INPUTS_HEADER: &str = "bb-inputs";
const PRIVATE: &str = "private";

/// Between this project's worker and scheduler: whose blobs the reported action works with.
/// Buildbarn's worker does not say, and its scheduler does not ask.
const INSTANCE_HEADER: &str = "bb-instance-name-bin";

/// Says of which instance the action is that a worker reports.
pub fn set_instance<T>(request: &mut Request<T>, instance: &InstanceName) {
    let value = MetadataValue::from_bytes(instance.as_str().as_bytes());
    request.metadata_mut().insert_bin(INSTANCE_HEADER, value);
}

/// The instance that `set_instance` set; `None` when the header is absent or no instance name.
pub fn instance_of<T>(request: &Request<T>) -> Option<InstanceName> {
    let value = request.metadata().get_bin(INSTANCE_HEADER)?;
    let data = value.to_bytes().ok()?;
    InstanceName::parse(std::str::from_utf8(&data).ok()?).ok()
}

/// A request on behalf of an action, which its receiver may log (REAPI: RequestMetadata.action_id).
pub fn for_action<T>(message: T, action: &Digest) -> Request<T> {
    let metadata = RequestMetadata {
        action_id: action.hash_hex(),
        ..Default::default()
    };
    let mut request = Request::new(message);
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request
        .metadata_mut()
        .insert_bin(REQUEST_METADATA_HEADER, value);
    request
}

/// The hash of the action that a request is made for; empty when it does not say.
pub fn action_of<T>(request: &Request<T>) -> String {
    request
        .metadata()
        .get_bin(REQUEST_METADATA_HEADER)
        .and_then(|value| value.to_bytes().ok())
        .and_then(|data| RequestMetadata::decode(data).ok())
        .map(|metadata| metadata.action_id)
        .unwrap_or_default()
}

/// Says that nobody else has the files in the input root, so that they may become the action's.
pub fn set_private_inputs<T>(request: &mut Request<T>) {
    let private = MetadataValue::from_static(PRIVATE);
    request.metadata_mut().insert(INPUTS_HEADER, private);
}

/// Whether the worker called `set_private_inputs`.
pub fn has_private_inputs<T>(request: &Request<T>) -> bool {
    let value = request.metadata().get(INPUTS_HEADER);
    value.is_some_and(|value| value.as_bytes() == PRIVATE.as_bytes())
}
