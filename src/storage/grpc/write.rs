//! Writing blobs.

use std::{os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{Client, OVERHEAD, SMALL, group, halve, retry, weight};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::{
        bytestream::{QueryWriteStatusRequest, WriteRequest},
        reapi::{BatchUpdateBlobsRequest, batch_update_blobs_request::Request},
    },
    resource::WriteName,
    storage::{Content, Error, blocking},
};

/// One message of a stream.
const CHUNK: u64 = 1 << 20;

impl Client {
    /// Uploads what the CAS lacks. The content must match its digest: it is the server that checks.
    pub async fn upload(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
        let mut missing: std::collections::HashSet<Digest> = self
            .find_missing(instance, &digests)
            .await?
            .into_iter()
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let batch_size = self.batch_size(instance).await;
        let most = SMALL.min(batch_size.saturating_sub(OVERHEAD));
        let (small, large): (Vec<_>, Vec<_>) = blobs
            .into_iter()
            .filter(|(digest, _)| missing.remove(digest))
            .partition(|(digest, _)| digest.size() <= most);
        let batches = group(small, batch_size, |(digest, _)| digest.size());
        let batches = batches
            .into_iter()
            .map(|batch| futures::future::Either::Left(self.write_batch(instance, batch)));
        let streams = large.into_iter().map(|(digest, content)| {
            futures::future::Either::Right(self.write_stream(instance, digest, content))
        });
        stream::iter(batches.chain(streams))
            .map(Ok)
            .try_for_each_concurrent(None, |upload| upload)
            .await
    }

    /// One batch; in halves, and at last by streams, when the server does not take it.
    async fn write_batch(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        let size = |(digest, _): &(Digest, Content)| digest.size();
        let mut refused = false;
        // The most that went through at once.
        let mut accepted = 0;
        let mut open = vec![blobs];
        while let Some(blobs) = open.pop() {
            let (count, total) = (blobs.len(), blobs.iter().map(size).sum());
            let mut left = self.write_batch_once(instance, blobs).await?;
            match left.len() {
                0 => accepted = accepted.max(weight(count, total)),
                1 => {
                    refused = true;
                    for (digest, content) in left.drain(..) {
                        self.write_stream(instance, digest, content).await?;
                    }
                }
                _ => {
                    refused = true;
                    let [first, later] = halve(left, size);
                    open.extend([later, first]);
                }
            }
        }
        if refused && accepted > 0 {
            self.shared.limits.learn_batch_size(accepted);
        }
        Ok(())
    }

    /// What is left when the server refuses a call as a whole.
    async fn write_batch_once(
        &self,
        instance: &InstanceName,
        mut blobs: Vec<(Digest, Content)>,
    ) -> Result<Vec<(Digest, Content)>, Error> {
        let mut failures = retry::Failures::default();
        while let Some((first, _)) = blobs.first() {
            let function = first.function();
            let (same, other): (Vec<_>, Vec<_>) = blobs
                .into_iter()
                .partition(|(digest, _)| digest.function() == function);
            let permit = self.shared.uploads.acquire().await;
            let (same, requests) = blocking(move || {
                let requests = same
                    .iter()
                    .map(|(digest, content)| {
                        Ok(Request {
                            digest: Some(digest.to_proto()),
                            data: piece(digest, content, 0, digest.size())?,
                            compressor: 0,
                        })
                    })
                    .collect::<Result<Vec<_>, Error>>();
                (same, requests)
            })
            .await?;
            let request = BatchUpdateBlobsRequest {
                instance_name: instance.to_string(),
                requests: requests?,
                digest_function: function.to_proto() as i32,
            };
            let answer = retry::divisible(self.shared.timeouts.call, || {
                let (mut client, request) = (self.cas(), request.clone());
                async move { client.batch_update_blobs(request).await }
            });
            let answer = answer.await?;
            drop(permit);
            let Ok(answer) = answer else {
                return Ok(same.into_iter().chain(other).collect());
            };
            let mut statuses: std::collections::HashMap<_, _> = answer
                .responses
                .into_iter()
                .filter_map(|response| Some((response.digest?.hash, response.status)))
                .collect();
            let mut again = other;
            let mut trouble = None;
            for (digest, content) in same {
                let Some(status) = statuses.remove(&digest.hash_hex()) else {
                    return Err(Error::Internal(format!(
                        "the CAS answered a BatchUpdateBlobs without blob {digest}"
                    )));
                };
                let status = status.unwrap_or_default();
                let status = Status::new(Code::from_i32(status.code), status.message);
                match status.code() {
                    Code::Ok | Code::AlreadyExists => {}
                    Code::Unavailable | Code::Aborted | Code::ResourceExhausted => {
                        trouble = Some(status);
                        again.push((digest, content));
                    }
                    _ => return Err(retry::error(&status, None)),
                }
            }
            if let Some(status) = trouble {
                failures.wait(&status, None).await?;
            }
            blobs = again;
        }
        Ok(Vec::new())
    }

    /// By ByteStream, resumed where it was interrupted.
    async fn write_stream(
        &self,
        instance: &InstanceName,
        digest: Digest,
        content: Content,
    ) -> Result<(), Error> {
        let name = WriteName::format(instance, Uuid::new_v4(), &digest);
        let mut failures = retry::Failures::default();
        let mut offset = 0;
        loop {
            let permit = self.shared.uploads.acquire().await;
            let sent = self.send(&name, digest, &content, offset).await?;
            drop(permit);
            let status = match sent {
                // REAPI: also when the server has it from somebody else, before all of it was sent.
                Ok(committed) if committed == digest.size() as i64 => return Ok(()),
                // REAPI: the answer when the blob is there and was sent compressed; some servers
                // give it always.
                Ok(-1) => return Ok(()),
                Ok(committed) => Status::aborted(format!(
                    "the CAS took {committed} of {} bytes of blob {digest}",
                    digest.size()
                )),
                Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
                Err(status) => status,
            };
            failures.wait(&status, None).await?;
            offset = self.committed(&name, &digest).await;
        }
    }

    /// One attempt. The outer error is about our own content.
    async fn send(
        &self,
        name: &str,
        digest: Digest,
        content: &Content,
        offset: u64,
    ) -> Result<Result<i64, Status>, Error> {
        let (failed, mut failure) = tokio::sync::mpsc::channel(1);
        let content = content.clone();
        let resource_name = name.to_owned();
        let (progress, moved) = tokio::sync::watch::channel(offset);
        // What is under way to the peer is bounded by its windows: each piece that is taken from here
        // means that others have arrived.
        let parts = stream::unfold(Some((offset, progress)), move |state| {
            let (content, failed) = (content.clone(), failed.clone());
            let at = state.as_ref().map(|(at, _)| *at);
            let resource_name = if at == Some(offset) {
                resource_name.clone()
            } else {
                String::new()
            };
            async move {
                let (at, progress) = state?;
                progress.send_replace(at);
                let end = (at + CHUNK).min(digest.size());
                let data = match &content {
                    Content::Bytes(_) => piece(&digest, &content, at, end),
                    Content::File(_) => blocking(move || piece(&digest, &content, at, end))
                        .await
                        .and_then(|data| data),
                };
                let data = match data {
                    Ok(data) => data,
                    Err(error) => {
                        let _ = failed.try_send(error);
                        return None;
                    }
                };
                let finish_write = end == digest.size();
                let message = WriteRequest {
                    resource_name,
                    write_offset: at as i64,
                    finish_write,
                    data,
                };
                Some((message, (!finish_write).then_some((end, progress))))
            }
        });
        let silence = self.shared.timeouts.idle;
        // Some servers look at all of it before they answer.
        let last = silence + std::time::Duration::from_secs(digest.size() >> 20);
        let mut client = self.bytes();
        let answer = retry::moving(silence, last, moved, client.write(parts)).await;
        if let Ok(error) = failure.try_recv() {
            return Err(error);
        }
        Ok(answer.map(|answer| answer.into_inner().committed_size))
    }

    /// Where to go on; from the start when the server cannot tell.
    async fn committed(&self, name: &str, digest: &Digest) -> u64 {
        let request = QueryWriteStatusRequest {
            resource_name: name.to_owned(),
        };
        let mut client = self.bytes();
        let limit = self.shared.timeouts.call;
        let answer = retry::timely(limit, client.query_write_status(request));
        match answer.await {
            Ok(answer) => u64::try_from(answer.into_inner().committed_size)
                .unwrap_or(0)
                .min(digest.size()),
            Err(_) => 0,
        }
    }
}

/// Part of a content. Blocks for files.
fn piece(digest: &Digest, content: &Content, start: u64, end: u64) -> Result<Bytes, Error> {
    let short = |length: u64| {
        Error::Internal(format!(
            "the content to upload for blob {digest} has only {length} bytes"
        ))
    };
    match content {
        Content::Bytes(bytes) => {
            if (bytes.len() as u64) < end {
                return Err(short(bytes.len() as u64));
            }
            Ok(bytes.slice(start as usize..end as usize))
        }
        Content::File(file) => read_part(file, start, end).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                short(file.metadata().map_or(0, |metadata| metadata.len()))
            }
            _ => Error::Internal(format!(
                "could not read the content of blob {digest}: {error}"
            )),
        }),
    }
}

fn read_part(file: &Arc<std::fs::File>, start: u64, end: u64) -> std::io::Result<Bytes> {
    let mut data = vec![0; (end - start) as usize];
    file.read_exact_at(&mut data, start)?;
    Ok(data.into())
}
