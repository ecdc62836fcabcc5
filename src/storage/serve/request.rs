//! What requests name: instances, digest functions and digests.

use tonic::Status;

use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi,
};

pub(super) fn instance(name: &str) -> Result<InstanceName, Status> {
    Ok(InstanceName::parse(name)?)
}

pub(super) fn function(value: i32) -> Result<Option<DigestFunction>, Status> {
    Ok(DigestFunction::from_proto(value)?)
}

pub(super) fn digest(
    function_value: i32,
    digest: Option<&reapi::Digest>,
) -> Result<Digest, Status> {
    Ok(Digest::parse_required(function(function_value)?, digest)?)
}
