//! Writing one blob by ByteStream: one of our own, resumed where it was interrupted, or a client's
//! upload that is passed on as it comes.

use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture, stream};
use tokio::sync::mpsc;
use tonic::{Code, Response, Status};
use uuid::Uuid;

use super::{
    Client,
    call::{self, silent, timely},
    status::observed,
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::bytestream::{QueryWriteStatusRequest, WriteRequest, WriteResponse},
    resource::{Compressor, WriteName},
    storage::{
        Content, Error, UploadError, blocking,
        compression::{self, Encoder},
    },
};

/// One message of a stream.
const MESSAGE_SIZE: u64 = 1 << 20;

/// What the server says that it has: `committed_size`.
type WriteAnswer = Result<i64, Status>;

/// One Write under way. A stream that moves is not cut, however slow it is.
struct WriteCall {
    messages: mpsc::Sender<WriteRequest>,
    answer: BoxFuture<'static, WriteAnswer>,
    /// How long the server may take nothing.
    silence: Duration,
}

impl WriteCall {
    fn start<F>(silence: Duration, write: impl FnOnce(mpsc::Receiver<WriteRequest>) -> F) -> Self
    where
        F: Future<Output = Result<Response<WriteResponse>, Status>> + Send + 'static,
    {
        // What is under way to the peer is bounded by its windows: each message that is taken from
        // here means that others have arrived.
        let (messages, taken) = mpsc::channel(1);
        let answer = write(taken).map(|answer| Ok(answer?.into_inner().committed_size));
        WriteCall {
            messages,
            answer: answer.boxed(),
            silence,
        }
    }

    /// Hands over a message once the one before it is on its way. The error is an answer that has come
    /// early, or why there is none.
    async fn send(&mut self, message: WriteRequest) -> Result<(), WriteAnswer> {
        let sent = tokio::time::timeout(self.silence, self.messages.send(message));
        tokio::select! {
            biased;
            answer = &mut self.answer => Err(answer),
            sent = sent => match sent {
                Ok(Ok(())) => Ok(()),
                // Nobody takes any more, so that the answer is on its way.
                Ok(Err(_)) => Err(timely(self.silence, &mut self.answer).await),
                Err(_) => Err(Err(silent(self.silence))),
            },
        }
    }

    /// Waits for the answer to all that was sent; `last` is how long the server may look at it.
    async fn finish(self, last: Duration) -> WriteAnswer {
        let WriteCall {
            messages, answer, ..
        } = self;
        drop(messages);
        timely(last, answer).await
    }
}

impl Client {
    fn write_call(&self) -> WriteCall {
        let mut client = self.bytes();
        WriteCall::start(self.0.timeouts.idle, |taken| async move {
            let messages = stream::unfold(taken, |mut taken| async move {
                taken.recv().await.map(|message| (message, taken))
            });
            client.write(messages).await
        })
    }

    /// How long a server may take after the last byte: some look at all of it before they answer.
    fn last_silence(&self, digest: &Digest) -> Duration {
        self.0.timeouts.idle + Duration::from_secs(digest.size() >> 20)
    }

    /// Uploads a blob by a stream, resumed where it was interrupted.
    pub(super) async fn write_stream(
        &self,
        instance: &InstanceName,
        digest: Digest,
        content: Content,
    ) -> Result<(), Error> {
        let mut compressor = self.stream_compressor(instance, digest.size()).await;
        if compressor == Compressor::Zstd && !is_compressible(&digest, &content).await? {
            compressor = Compressor::Identity;
        }
        let instance = &self.name_there(instance);
        let name = |compressor| WriteName::format_as(instance, Uuid::new_v4(), &digest, compressor);
        let mut resource_name = name(compressor);
        let mut attempts = self.0.cas_server.attempts();
        let mut offset = 0;
        loop {
            let permit = self.0.uploads.acquire().await;
            let sent = match compressor {
                Compressor::Identity => {
                    let answer = self.send(&resource_name, digest, &content, offset);
                    (answer.await?, digest.size())
                }
                Compressor::Zstd => {
                    self.send_compressed(&resource_name, digest, &content)
                        .await?
                }
            };
            drop(permit);
            let (answer, length) = sent;
            let status = match answer {
                Ok(committed) if is_complete(committed, &digest) => return Ok(()),
                Ok(committed) if u64::try_from(committed) == Ok(length) => return Ok(()),
                Ok(committed) => observed(
                    Code::Aborted,
                    format!(
                        "took {committed} of {} bytes of blob {digest}",
                        digest.size()
                    ),
                ),
                Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
                // Perhaps it does not take what it announces.
                Err(status)
                    if compressor == Compressor::Zstd
                        && matches!(status.code(), Code::InvalidArgument | Code::Unimplemented) =>
                {
                    compressor = Compressor::Identity;
                    resource_name = name(compressor);
                    continue;
                }
                Err(status) => status,
            };
            let server = &self.0.cas_server;
            server.wait(&mut attempts, &status, None).await?;
            // From the start when the server cannot tell.
            let committed = self.committed_size(&resource_name).await.unwrap_or(0);
            offset = match compressor {
                Compressor::Identity => committed.min(digest.size()),
                Compressor::Zstd => 0,
            };
        }
    }

    /// One attempt. The outer error is about our own content.
    async fn send(
        &self,
        name: &str,
        digest: Digest,
        content: &Content,
        offset: u64,
    ) -> Result<WriteAnswer, Error> {
        let mut call = self.write_call();
        let mut at = offset;
        loop {
            let end = (at + MESSAGE_SIZE).min(digest.size());
            let data = match content {
                Content::Bytes(_) => content.part(&digest, at, end)?,
                Content::File(_) | Content::FilePart { .. } => {
                    let content = content.clone();
                    blocking(move || content.part(&digest, at, end)).await??
                }
            };
            let finish_write = end == digest.size();
            let message = WriteRequest {
                resource_name: if at == offset {
                    name.to_owned()
                } else {
                    String::new()
                },
                write_offset: at as i64,
                finish_write,
                data,
            };
            if let Err(answer) = call.send(message).await {
                return Ok(answer);
            }
            if finish_write {
                return Ok(call.finish(self.last_silence(&digest)).await);
            }
            at = end;
        }
    }

    /// One attempt, from the start; with the bytes that were sent. The outer error is about our own
    /// content.
    async fn send_compressed(
        &self,
        name: &str,
        digest: Digest,
        content: &Content,
    ) -> Result<(WriteAnswer, u64), Error> {
        let mut call = self.write_call();
        let mut encoder = Some(Encoder::new(digest.size())?);
        let (mut at, mut sent) = (0, 0);
        let mut resource_name = name.to_owned();
        while let Some(open) = encoder.take() {
            let end = (at + MESSAGE_SIZE).min(digest.size());
            let content = content.clone();
            let data = blocking(move || content.part(&digest, at, end)).await??;
            let last = end == digest.size();
            let (still, data) = compression::encode(open, data, last).await?;
            (encoder, at) = (still, end);
            if data.is_empty() {
                continue;
            }
            let length = data.len() as u64;
            let message = WriteRequest {
                resource_name: std::mem::take(&mut resource_name),
                write_offset: sent as i64,
                finish_write: last,
                data,
            };
            sent += length;
            if let Err(answer) = call.send(message).await {
                return Ok((answer, sent));
            }
        }
        Ok((call.finish(self.last_silence(&digest)).await, sent))
    }

    /// How many bytes of a client's upload the server has; one attempt.
    pub async fn upload_progress(&self, resource_name: &str) -> Result<u64, Error> {
        self.committed_size(&self.upload_name_there(resource_name))
            .await
    }

    /// The name of a client's upload that is passed on.
    fn upload_name_there(&self, resource_name: &str) -> String {
        match self.0.instance_name_prefix.is_empty() {
            true => resource_name.to_owned(),
            false => format!("{}/{resource_name}", self.0.instance_name_prefix),
        }
    }

    /// How many bytes of an upload the server has; one attempt.
    async fn committed_size(&self, resource_name: &str) -> Result<u64, Error> {
        let request = QueryWriteStatusRequest {
            resource_name: resource_name.to_owned(),
        };
        let mut client = self.bytes();
        let answer = call::timely(self.0.timeouts.call, client.query_write_status(request)).await;
        let answer = answer.map_err(|status| self.0.cas_server.error(&status, None))?;
        Ok(u64::try_from(answer.into_inner().committed_size).unwrap_or(0))
    }

    /// Passes on an upload of a client, who resumes it himself.
    pub fn forward_upload(&self, resource_name: &str, digest: Digest) -> ForwardedUpload {
        ForwardedUpload {
            client: self.clone(),
            call: self.write_call(),
            resource_name: self.upload_name_there(resource_name),
            digest,
            received: 0,
            answer: None,
            last: self.last_silence(&digest),
        }
    }
}

/// Whether compressing makes a blob smaller, by its beginning.
async fn is_compressible(digest: &Digest, content: &Content) -> Result<bool, Error> {
    const SAMPLE: u64 = 64 << 10;
    let (digest, content) = (*digest, content.clone());
    let sample = SAMPLE.min(digest.size());
    blocking(move || {
        let sample = content.part(&digest, 0, sample)?;
        let compressed = compression::encode_whole(&sample)?;
        Ok(compressed.len() < sample.len() / 16 * 15)
    })
    .await?
}

/// REAPI: the whole size also when the server has it from somebody else, before all of it was sent;
/// and -1 when the blob is there and was sent compressed, which some servers give always.
fn is_complete(committed: i64, digest: &Digest) -> bool {
    committed == -1 || committed == digest.size() as i64
}

/// A client's upload that is passed on as it comes.
pub struct ForwardedUpload {
    client: Client,
    call: WriteCall,
    /// Empty once it has been sent.
    resource_name: String,
    digest: Digest,
    received: u64,
    /// One that has come early.
    answer: Option<WriteAnswer>,
    last: Duration,
}

impl ForwardedUpload {
    /// Passes on what begins at `offset`.
    pub async fn write(&mut self, offset: i64, data: Bytes) -> Result<(), UploadError> {
        self.received = offset as u64 + data.len() as u64;
        self.send(offset, data, false).await;
        match &self.answer {
            Some(Err(status)) => Err(self.client.0.cas_server.error(status, None).into()),
            _ => Ok(()),
        }
    }

    async fn send(&mut self, offset: i64, data: Bytes, finish_write: bool) {
        if self.answer.is_some() {
            return;
        }
        let message = WriteRequest {
            resource_name: std::mem::take(&mut self.resource_name),
            write_offset: offset,
            finish_write,
            data,
        };
        self.answer = self.call.send(message).await.err();
    }

    /// Waits until the server has all of it.
    pub async fn finish(mut self, finish_write: bool) -> Result<(), UploadError> {
        if finish_write {
            self.send(self.received as i64, Bytes::new(), true).await;
        }
        let answer = match self.answer {
            Some(answer) => answer,
            None => self.call.finish(self.last).await,
        };
        let server = &self.client.0.cas_server;
        let (size, received) = (self.digest.size(), self.received);
        match answer {
            Ok(committed) if is_complete(committed, &self.digest) => Ok(()),
            // The client sent all of it, and said so.
            Ok(committed) if finish_write && received >= size => Err(Error::Internal(format!(
                "storage {server} answered a Write with committed_size {committed}, after all {size} bytes \
                 of blob {}; see what its log says of this upload",
                self.digest
            ))
            .into()),
            Ok(committed) => Err(UploadError::Unfinished {
                received: u64::try_from(committed).unwrap_or(0).min(received),
                size,
            }),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(server.error(&status, None).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> WriteRequest {
        WriteRequest::default()
    }

    fn committed(committed_size: i64) -> Result<Response<WriteResponse>, Status> {
        Ok(Response::new(WriteResponse { committed_size }))
    }

    #[tokio::test]
    async fn an_upload_may_take_any_time_as_long_as_it_moves() {
        let silence = Duration::from_secs(1);
        let slow = |mut taken: mpsc::Receiver<WriteRequest>| async move {
            while taken.recv().await.is_some() {
                tokio::time::sleep(silence / 20).await;
            }
            committed(30)
        };
        let mut call = WriteCall::start(silence, slow);
        for _ in 0..30 {
            call.send(message()).await.unwrap();
        }
        assert_eq!(call.finish(silence).await.unwrap(), 30);
    }

    #[tokio::test]
    async fn an_upload_that_stands_still_is_given_up() {
        let silence = Duration::from_millis(1);
        let never = |taken: mpsc::Receiver<WriteRequest>| async move {
            let _taken = taken;
            std::future::pending().await
        };
        let mut call = WriteCall::start(silence, never);
        call.send(message()).await.unwrap();
        let error = call.send(message()).await.unwrap_err();
        assert_eq!(error.unwrap_err().code(), Code::DeadlineExceeded);
        // All of it was sent, and no answer comes.
        let call = WriteCall::start(silence, never);
        let error = call.finish(silence).await;
        assert_eq!(error.unwrap_err().code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn an_answer_that_comes_early_ends_the_upload() {
        let silence = Duration::from_secs(10);
        let mut call = WriteCall::start(silence, |_| async { committed(7) });
        assert_eq!(call.send(message()).await.unwrap_err().unwrap(), 7);
    }
}
