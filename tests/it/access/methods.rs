//! Every method that there is, and a call of each.

use std::time::Duration;

use bb_remote_execution::{
    daemon::Channel,
    digest::DigestFunction,
    instance::InstanceName,
    proto::{
        self, bytestream, reapi,
        remoteworker::{CurrentState, SynchronizeRequest, current_state},
    },
    scheduler::operation_name::OperationName,
};
use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use tonic::{
    Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};
use uuid::Uuid;

use crate::harness::digest_of;

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

/// What a method is asked with, so that it gets as far as to ask whether it may.
fn request(path: &str) -> Bytes {
    let blob = digest_of(b"blob");
    let (hash, size) = (&blob.hash, blob.size_bytes);
    let written = format!("uploads/1/blobs/{hash}/{size}");
    let message = match path.rsplit('/').next().unwrap() {
        "WaitExecution" => reapi::WaitExecutionRequest {
            name: operation_name("", b"blob", Uuid::new_v4()),
        }
        .encode_to_vec(),
        "Read" => bytestream::ReadRequest {
            resource_name: format!("blobs/{hash}/{size}"),
            ..Default::default()
        }
        .encode_to_vec(),
        "Write" => bytestream::WriteRequest {
            resource_name: written,
            ..Default::default()
        }
        .encode_to_vec(),
        "QueryWriteStatus" => bytestream::QueryWriteStatusRequest {
            resource_name: written,
        }
        .encode_to_vec(),
        "Synchronize" => SynchronizeRequest {
            current_state: Some(CurrentState {
                worker_state: Some(current_state::WorkerState::Idle(())),
            }),
            platform: Some(reapi::Platform::default()),
            ..Default::default()
        }
        .encode_to_vec(),
        _ => Vec::new(),
    };
    message.into()
}

/// The name of an operation, as schedulers give them.
pub fn operation_name(instance: &str, action: &[u8], operation: Uuid) -> String {
    let name = OperationName {
        operation,
        scheduler: 1,
        instance: InstanceName::parse(instance).unwrap(),
        digest: DigestFunction::Sha256.digest_of(action),
        priority: 0,
        skip_cache_lookup: true,
        invocation: Default::default(),
    };
    name.to_string()
}

/// One call, until its first answer or its end.
pub async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await?;
    let mut asked = Request::new(request(path));
    // Workers' calls are held.
    asked.set_timeout(Duration::from_millis(500));
    let answer = client.server_streaming(asked, path.parse().unwrap(), Raw);
    let mut stream = answer.await?.into_inner();
    stream.message().await.map(drop)
}

/// The paths of all methods that there are.
pub fn methods() -> Vec<String> {
    let mut paths = Vec::new();
    for set in [
        proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        for file in prost_types::FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let service = format!("{}.{}", file.package(), service.name());
                    paths.push(format!("/{service}/{}", method.name()));
                }
            }
        }
    }
    paths
}
