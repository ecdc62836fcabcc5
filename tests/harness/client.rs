//! A client of a farm, and what it asks for.

use bb_remote_execution::{
    daemon::{self, Channel},
    digest::DigestFunction,
    proto::{
        longrunning::{Operation, operation},
        reapi::{
            self, BatchUpdateBlobsRequest, ExecuteRequest, ExecuteResponse,
            action_cache_client::ActionCacheClient, batch_update_blobs_request,
            content_addressable_storage_client::ContentAddressableStorageClient,
            execution_client::ExecutionClient,
        },
        unpack,
    },
};
use prost::Message;

pub fn is_ok(response: &ExecuteResponse) -> bool {
    response
        .status
        .as_ref()
        .is_none_or(|status| status.code == 0)
        && response.result.as_ref().is_some_and(|r| r.exit_code == 0)
}

/// An action in the making.
#[derive(Clone, Debug)]
pub struct Task {
    pub command: reapi::Command,
    pub input_root: reapi::Directory,
    pub action: reapi::Action,
}

impl Task {
    pub fn shell(script: &str) -> Task {
        Task::new(&["/bin/sh", "-c", script])
    }

    pub fn new(arguments: &[&str]) -> Task {
        Task {
            command: reapi::Command {
                arguments: arguments.iter().map(|s| (*s).to_owned()).collect(),
                environment_variables: vec![reapi::command::EnvironmentVariable {
                    name: "PATH".to_owned(),
                    value: "/usr/bin:/bin".to_owned(),
                }],
                ..Default::default()
            },
            input_root: reapi::Directory::default(),
            action: reapi::Action {
                do_not_cache: true,
                platform: Some(reapi::Platform {
                    properties: vec![reapi::platform::Property {
                        name: "OSFamily".to_owned(),
                        value: "linux".to_owned(),
                    }],
                }),
                ..Default::default()
            },
        }
    }

    pub fn outputs(mut self, paths: &[&str]) -> Task {
        self.command.output_paths = paths.iter().map(|s| (*s).to_owned()).collect();
        self
    }
}

#[derive(Clone)]
pub struct Client {
    pub channel: Channel,
    pub instance: String,
}

pub fn digest_of(data: &[u8]) -> reapi::Digest {
    DigestFunction::Sha256.digest_of(data).to_proto()
}

impl Client {
    pub fn connect(address: &str) -> Client {
        Client {
            channel: daemon::connect(&format!("grpc://{address}").parse().unwrap()),
            instance: String::new(),
        }
    }

    pub fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.channel.clone())
            .max_decoding_message_size(64 << 20)
    }

    pub fn action_cache(&self) -> ActionCacheClient<Channel> {
        ActionCacheClient::new(self.channel.clone())
    }

    pub fn execution(&self) -> ExecutionClient<Channel> {
        ExecutionClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Small blobs, a thousand at a time.
    pub async fn upload_many(&self, blobs: Vec<Vec<u8>>) {
        for batch in blobs.chunks(1000) {
            let requests = batch
                .iter()
                .map(|data| batch_update_blobs_request::Request {
                    digest: Some(digest_of(data)),
                    data: data.clone().into(),
                    ..Default::default()
                });
            let request = BatchUpdateBlobsRequest {
                instance_name: self.instance.clone(),
                requests: requests.collect(),
                ..Default::default()
            };
            let response = self.cas().batch_update_blobs(request).await.unwrap();
            for response in response.into_inner().responses {
                assert_eq!(response.status.unwrap_or_default().code, 0);
            }
        }
    }

    pub async fn try_upload(&self, data: Vec<u8>) -> Result<reapi::Digest, tonic::Status> {
        let digest = digest_of(&data);
        let response = self
            .cas()
            .batch_update_blobs(BatchUpdateBlobsRequest {
                instance_name: self.instance.clone(),
                requests: vec![batch_update_blobs_request::Request {
                    digest: Some(digest.clone()),
                    data: data.into(),
                    ..Default::default()
                }],
                ..Default::default()
            })
            .await?
            .into_inner();
        match response.responses.first().and_then(|r| r.status.as_ref()) {
            Some(status) if status.code != 0 => Err(tonic::Status::new(
                status.code.into(),
                status.message.clone(),
            )),
            _ => Ok(digest),
        }
    }

    pub async fn upload(&self, data: impl Into<Vec<u8>>) -> reapi::Digest {
        self.try_upload(data.into()).await.unwrap()
    }

    pub async fn upload_message(&self, message: &impl Message) -> reapi::Digest {
        self.upload(message.encode_to_vec()).await
    }

    /// The whole blob, by ByteStream.
    pub async fn read(&self, digest: &reapi::Digest) -> Vec<u8> {
        use bb_remote_execution::proto::bytestream::{
            ReadRequest, byte_stream_client::ByteStreamClient,
        };
        let mut stream = ByteStreamClient::new(self.channel.clone())
            .max_decoding_message_size(64 << 20)
            .read(ReadRequest {
                resource_name: format!("blobs/{}/{}", digest.hash, digest.size_bytes),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        let mut data = Vec::new();
        while let Some(response) = stream.message().await.unwrap() {
            data.extend_from_slice(&response.data);
        }
        data
    }

    /// Uploads what the action needs; its digest.
    pub async fn prepare(&self, task: &Task) -> Result<reapi::Digest, tonic::Status> {
        let mut action = task.action.clone();
        action.command_digest = Some(self.try_upload(task.command.encode_to_vec()).await?);
        if action.input_root_digest.is_none() {
            action.input_root_digest =
                Some(self.try_upload(task.input_root.encode_to_vec()).await?);
        }
        self.try_upload(action.encode_to_vec()).await
    }

    pub async fn execute(&self, action: reapi::Digest) -> Result<ExecuteResponse, tonic::Status> {
        let mut stream = self
            .execution()
            .execute(ExecuteRequest {
                instance_name: self.instance.clone(),
                action_digest: Some(action),
                skip_cache_lookup: true,
                ..Default::default()
            })
            .await?
            .into_inner();
        while let Some(operation) = stream.message().await? {
            if let Some(response) = finished(&operation) {
                return Ok(response);
            }
        }
        Err(tonic::Status::unknown("the stream ended before the action"))
    }

    pub async fn try_run(&self, task: &Task) -> Result<ExecuteResponse, tonic::Status> {
        let action = self.prepare(task).await?;
        self.execute(action).await
    }

    pub async fn run(&self, task: &Task) -> ExecuteResponse {
        self.try_run(task).await.unwrap()
    }

    pub async fn standard_output(&self, response: &ExecuteResponse) -> String {
        let result = response.result.as_ref().unwrap();
        if !result.stdout_raw.is_empty() {
            return String::from_utf8_lossy(&result.stdout_raw).into_owned();
        }
        match &result.stdout_digest {
            Some(digest) if digest.size_bytes > 0 => {
                String::from_utf8_lossy(&self.read(digest).await).into_owned()
            }
            _ => String::new(),
        }
    }
}

pub fn finished(operation: &Operation) -> Option<ExecuteResponse> {
    match (&operation.done, &operation.result) {
        (true, Some(operation::Result::Response(any))) => {
            Some(unpack(any).expect("an ExecuteResponse"))
        }
        (true, other) => panic!("a finished operation without a response: {other:?}"),
        (false, _) => None,
    }
}
