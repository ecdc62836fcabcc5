//! The server that is asked, and the calls that rules are made of.

use std::{collections::HashSet, sync::Mutex, time::Duration};

use bb_remote_execution::{
    daemon::{self, Credentials},
    digest::DigestFunction,
    proto::{
        bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
        reapi::{
            self, BatchReadBlobsRequest, BatchUpdateBlobsRequest, FindMissingBlobsRequest,
            GetActionResultRequest, GetCapabilitiesRequest, ServerCapabilities,
            action_cache_client::ActionCacheClient, batch_read_blobs_response,
            batch_update_blobs_request, batch_update_blobs_response,
            capabilities_client::CapabilitiesClient,
            content_addressable_storage_client::ContentAddressableStorageClient,
            execution_client::ExecutionClient,
        },
    },
};
use bytes::Bytes;
use futures::stream;
use prost::Message;
use tonic::{
    Code, Request, Status,
    metadata::{AsciiMetadataKey, AsciiMetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
};
use uuid::Uuid;

use super::{
    Options,
    execution::Runs,
    rule::{Expect, Stop, fail, unsupported},
};

pub type Channel = InterceptedService<daemon::Channel, Headers>;

/// What `--header` adds to all calls.
#[derive(Clone)]
pub struct Headers(Vec<(AsciiMetadataKey, AsciiMetadataValue)>);

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.0 {
            request.metadata_mut().insert(name, value.clone());
        }
        Ok(request)
    }
}

/// No answer that a rule asks for is larger.
const LARGEST_ANSWER: usize = 64 << 20;

pub struct Server {
    pub instance: String,
    pub platform: reapi::Platform,
    pub shell: String,
    pub capabilities: Result<ServerCapabilities, Status>,
    /// Of all but the rules about others.
    pub function: DigestFunction,
    /// Whether actions are executed here; found out by the first rule that needs it.
    pub runs: tokio::sync::OnceCell<Runs>,
    channel: Channel,
    execution: Channel,
    random: Mutex<fastrand::Rng>,
}

impl Server {
    pub async fn connect(options: &Options) -> Result<Self, String> {
        let headers = options.headers.iter().map(|(name, value)| {
            let name = name.to_ascii_lowercase();
            match (
                AsciiMetadataKey::from_bytes(name.as_bytes()),
                AsciiMetadataValue::try_from(value.as_str()),
            ) {
                (Ok(name), Ok(value)) => Ok((name, value)),
                _ => Err(format!("{name:?} is no header of gRPC")),
            }
        });
        let headers = Headers(headers.collect::<Result<_, _>>()?);
        let credentials = Credentials::of("tls", &options.tls);
        let connect = |endpoint| {
            let channel = daemon::connect_with(endpoint, &credentials);
            InterceptedService::new(channel, headers.clone())
        };
        let channel = connect(&options.endpoint);
        let execution = match &options.execution {
            Some(endpoint) => connect(endpoint),
            None => channel.clone(),
        };
        let ask = async |channel: &Channel| {
            let request = GetCapabilitiesRequest {
                instance_name: options.instance.clone(),
            };
            let mut client = CapabilitiesClient::new(channel.clone());
            let answer = client.get_capabilities(request);
            match tokio::time::timeout(options.timeout, answer).await {
                Ok(Ok(answer)) => Ok(Ok(answer.into_inner())),
                Ok(Err(status)) if status.code() == Code::Unavailable => {
                    Err(status.message().to_owned())
                }
                Ok(Err(status)) => Ok(Err(status)),
                Err(_) => Err("GetCapabilities was not answered in time".to_owned()),
            }
        };
        let mut capabilities = ask(&channel).await?;
        if options.execution.is_some()
            && let Ok(there) = ask(&execution).await?
            && let Ok(here) = &mut capabilities
        {
            here.execution_capabilities = there.execution_capabilities;
        }
        let mut server = Server {
            instance: options.instance.clone(),
            platform: reapi::Platform {
                properties: options
                    .platform
                    .iter()
                    .map(|(name, value)| reapi::platform::Property {
                        name: name.clone(),
                        value: value.clone(),
                    })
                    .collect(),
            },
            shell: options.shell.clone(),
            capabilities,
            function: DigestFunction::Sha256,
            runs: tokio::sync::OnceCell::new(),
            channel,
            execution,
            random: Mutex::new(fastrand::Rng::new()),
        };
        if let Some(first) = server.functions().first()
            && !server.functions().contains(&DigestFunction::Sha256)
        {
            server.function = *first;
        }
        Ok(server)
    }

    /// What is announced of the cache; nothing when the server has no Capabilities.
    pub fn cache(&self) -> reapi::CacheCapabilities {
        let capabilities = self.capabilities.as_ref().ok();
        let cache = capabilities.and_then(|all| all.cache_capabilities.clone());
        cache.unwrap_or_default()
    }

    /// Digest functions that are announced and that are known here.
    pub fn functions(&self) -> Vec<DigestFunction> {
        let known = |value: &i32| DigestFunction::from_proto(*value).ok().flatten();
        self.cache()
            .digest_functions
            .iter()
            .filter_map(known)
            .collect()
    }

    pub fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.channel.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }

    pub fn byte_stream(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub fn action_cache(&self) -> ActionCacheClient<Channel> {
        ActionCacheClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub fn execution(&self) -> ExecutionClient<Channel> {
        ExecutionClient::new(self.execution.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// Content that nobody has stored before.
    pub fn random(&self, length: usize) -> Bytes {
        let mut content = vec![0; length];
        if let Ok(mut random) = self.random.lock() {
            random.fill(&mut content);
        }
        content.into()
    }

    pub fn digest(&self, content: &[u8]) -> reapi::Digest {
        self.function.digest_of(content).to_proto()
    }

    pub fn function_value(&self) -> i32 {
        self.function.to_proto() as i32
    }

    /// `HASH/SIZE`, after the digest function where it must be named.
    pub fn blob(&self, digest: &reapi::Digest) -> String {
        blob_of(self.function, digest)
    }

    fn prefix(&self) -> String {
        match self.instance.as_str() {
            "" => String::new(),
            instance => format!("{instance}/"),
        }
    }

    pub fn read_name(&self, digest: &reapi::Digest) -> String {
        format!("{}blobs/{}", self.prefix(), self.blob(digest))
    }

    pub fn write_name(&self, digest: &reapi::Digest) -> String {
        let (prefix, uuid) = (self.prefix(), Uuid::new_v4());
        format!("{prefix}uploads/{uuid}/blobs/{}", self.blob(digest))
    }

    /// Those of these that are missing.
    pub async fn find_missing(
        &self,
        digests: &[reapi::Digest],
    ) -> Result<HashSet<(String, i64)>, Stop> {
        let request = FindMissingBlobsRequest {
            instance_name: self.instance.clone(),
            blob_digests: digests.to_vec(),
            digest_function: self.function_value(),
        };
        let answer = self.cas().find_missing_blobs(request).await;
        let missing = answer.expect_ok("FindMissingBlobs")?.into_inner();
        let missing = missing.missing_blob_digests.into_iter();
        Ok(missing
            .map(|digest| (digest.hash, digest.size_bytes))
            .collect())
    }

    pub async fn is_missing(&self, digest: &reapi::Digest) -> Result<bool, Stop> {
        let missing = self.find_missing(std::slice::from_ref(digest)).await?;
        Ok(!missing.is_empty())
    }

    pub async fn batch_update(
        &self,
        requests: Vec<batch_update_blobs_request::Request>,
    ) -> Result<Vec<batch_update_blobs_response::Response>, Status> {
        let request = BatchUpdateBlobsRequest {
            instance_name: self.instance.clone(),
            requests,
            digest_function: self.function_value(),
        };
        let answer = self.cas().batch_update_blobs(request).await?;
        Ok(answer.into_inner().responses)
    }

    pub async fn batch_read(
        &self,
        digests: Vec<reapi::Digest>,
    ) -> Result<Vec<batch_read_blobs_response::Response>, Status> {
        let request = BatchReadBlobsRequest {
            instance_name: self.instance.clone(),
            digests,
            acceptable_compressors: Vec::new(),
            digest_function: self.function_value(),
        };
        let answer = self.cas().batch_read_blobs(request).await?;
        Ok(answer.into_inner().responses)
    }

    /// Stores a content, in a batch when it is small.
    pub async fn store(&self, content: Bytes) -> Result<reapi::Digest, Stop> {
        let digest = self.digest(&content);
        if content.len() > 1 << 20 {
            let name = self.write_name(&digest);
            let written = self.write(pieces(&name, &content, 1 << 20)).await;
            let committed = written.expect_ok("ByteStream.Write")?;
            if committed != digest.size_bytes {
                return fail(format!(
                    "ByteStream.Write of {} bytes answered committed_size {committed}",
                    digest.size_bytes
                ));
            }
            return Ok(digest);
        }
        let answer = self.batch_update(vec![update(&digest, content)]).await;
        let answer = answer.expect_ok("BatchUpdateBlobs")?;
        match answer.as_slice() {
            [one] => {
                let status = one.status.clone().unwrap_or_default();
                let result = match status.code {
                    0 => Ok(digest),
                    code => Err(Status::new(code.into(), status.message)),
                };
                result.expect_ok("a blob in BatchUpdateBlobs")
            }
            other => fail(format!(
                "BatchUpdateBlobs answered one blob with {} responses",
                other.len()
            )),
        }
    }

    pub async fn store_message(&self, message: &impl Message) -> Result<reapi::Digest, Stop> {
        self.store(message.encode_to_vec().into()).await
    }

    /// All that a Read answers.
    pub async fn read(&self, name: &str, offset: i64, limit: i64) -> Result<Vec<u8>, Status> {
        let request = ReadRequest {
            resource_name: name.to_owned(),
            read_offset: offset,
            read_limit: limit,
        };
        let mut stream = self.byte_stream().read(request).await?.into_inner();
        let mut content = Vec::new();
        while let Some(message) = stream.message().await? {
            content.extend_from_slice(&message.data);
            if content.len() > LARGEST_ANSWER {
                return Err(Status::data_loss("the stream has no end"));
            }
        }
        Ok(content)
    }

    /// The committed_size that a Write of these messages answers.
    pub async fn write(&self, messages: Vec<WriteRequest>) -> Result<i64, Status> {
        let answer = self.byte_stream().write(stream::iter(messages)).await?;
        Ok(answer.into_inner().committed_size)
    }

    /// Sends messages and then neither more nor an end, until the answer comes or some seconds have
    /// passed.
    pub async fn write_and_wait(
        &self,
        messages: Vec<WriteRequest>,
        limit: Duration,
    ) -> Option<Result<i64, Status>> {
        use futures::StreamExt;
        let messages = stream::iter(messages).chain(stream::pending());
        let mut client = self.byte_stream();
        let answer = client.write(messages);
        let answer = tokio::time::timeout(limit, answer).await.ok()?;
        Some(answer.map(|answer| answer.into_inner().committed_size))
    }

    pub async fn get_action_result(
        &self,
        action: &reapi::Digest,
        change: impl FnOnce(&mut GetActionResultRequest),
    ) -> Result<reapi::ActionResult, Status> {
        let mut request = GetActionResultRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.clone()),
            digest_function: self.function_value(),
            ..Default::default()
        };
        change(&mut request);
        Ok(self
            .action_cache()
            .get_action_result(request)
            .await?
            .into_inner())
    }

    /// What is announced of execution. Unsupported where there is none.
    pub fn execution_capabilities(&self) -> Result<reapi::ExecutionCapabilities, Stop> {
        match &self.capabilities {
            Err(_) => Ok(reapi::ExecutionCapabilities {
                exec_enabled: true,
                ..Default::default()
            }),
            Ok(all) => match &all.execution_capabilities {
                None => unsupported("no execution_capabilities are announced"),
                Some(execution) if !execution.exec_enabled => {
                    unsupported("exec_enabled is announced as false")
                }
                Some(execution) => Ok(execution.clone()),
            },
        }
    }
}

/// `HASH/SIZE`, after the digest function where it must be named.
pub fn blob_of(function: DigestFunction, digest: &reapi::Digest) -> String {
    let function = match function.is_told_by_length() {
        true => String::new(),
        false => format!("{}/", function.name()),
    };
    format!("{function}{}/{}", digest.hash, digest.size_bytes)
}

/// One blob's part of BatchUpdateBlobs.
pub fn update(digest: &reapi::Digest, data: Bytes) -> batch_update_blobs_request::Request {
    batch_update_blobs_request::Request {
        digest: Some(digest.clone()),
        data,
        compressor: 0,
    }
}

/// The messages of a Write, of at most `size` bytes each, with the name in the first one.
pub fn pieces(name: &str, content: &Bytes, size: usize) -> Vec<WriteRequest> {
    let mut messages = Vec::new();
    let mut at = 0;
    loop {
        let end = (at + size).min(content.len());
        messages.push(WriteRequest {
            resource_name: if at == 0 {
                name.to_owned()
            } else {
                String::new()
            },
            write_offset: at as i64,
            finish_write: end == content.len(),
            data: content.slice(at..end),
        });
        if end == content.len() {
            return messages;
        }
        at = end;
    }
}

/// Another hash of the same length.
pub fn wrong_hash(digest: &reapi::Digest) -> reapi::Digest {
    let turned = digest.hash.chars().map(|c| match c {
        '0' => '1',
        '1'..='9' => '0',
        _ => '5',
    });
    reapi::Digest {
        hash: turned.collect(),
        size_bytes: digest.size_bytes,
    }
}
