//! Uploading whole blobs: what the CAS lacks, small ones in batches.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tonic::{Code, Status};

use super::{Client, LARGEST_BATCHED, OVERHEAD, sent_size, status::may_pass};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::{BatchUpdateBlobsRequest, batch_update_blobs_request::Request},
    resource::Compressor,
    storage::{Content, Error, batch, compression::compressed, computing, content},
};

/// So few bytes are sent without asking what is missing: one call less.
const UNASKED: u64 = 2 << 10;

impl Client {
    /// Uploads what the CAS lacks. The content must match its digest: it is the server that checks.
    pub async fn upload(
        &self,
        instance: &InstanceName,
        mut blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        // An answer may tell of each once.
        let mut seen = HashSet::with_capacity(blobs.len());
        blobs.retain(|(digest, _)| seen.insert(*digest));
        let sizes = blobs.iter().map(|(digest, _)| digest.size() + OVERHEAD);
        if sizes.sum::<u64>() <= UNASKED {
            return self.write(instance, blobs).await;
        }
        let digests = blobs.iter().map(|(digest, _)| *digest);
        let digests: Vec<Digest> = digests.filter(|digest| !digest.is_empty_blob()).collect();
        let mut missing: HashSet<Digest> = self
            .find_missing_of_distinct(instance, &digests)
            .await?
            .into_iter()
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let (mut whole, mut chunked) = (Vec::new(), Vec::new());
        let splice = self.chunks(instance).await.splice;
        for blob in blobs
            .into_iter()
            .filter(|(digest, _)| missing.remove(digest))
        {
            match splice.filter(|function| blob.0.size() >= function.smallest_blob()) {
                Some(function) => chunked.push((function, blob)),
                None => whole.push(blob),
            }
        }
        self.write(instance, whole).await?;
        // One after another: the chunks of one are many uploads.
        for (function, (digest, content)) in chunked {
            if !self
                .write_chunks(instance, digest, &content, function)
                .await?
            {
                self.write(instance, vec![(digest, content)]).await?;
            }
        }
        Ok(())
    }

    /// Uploads what the CAS is known to lack, each blob as a whole.
    pub(super) async fn write(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        let batch_size = self.batch_size(instance).await;
        let most = LARGEST_BATCHED.min(batch_size.saturating_sub(OVERHEAD));
        let (small, large): (Vec<_>, Vec<_>) = blobs
            .into_iter()
            .partition(|(digest, _)| digest.size() <= most);
        let size = |(digest, _): &(Digest, Content)| digest.size() + OVERHEAD;
        let batches = batch::by_function(small, |(digest, _)| digest)
            .into_iter()
            .flat_map(|group| batch::split(group, batch_size, usize::MAX, size))
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
                0 => accepted = accepted.max(sent_size(count, total)),
                1 => {
                    refused = true;
                    for (digest, content) in left.drain(..) {
                        self.write_stream(instance, digest, content).await?;
                    }
                }
                _ => {
                    refused = true;
                    let [first, later] = batch::halve(left, |blob| size(blob) + OVERHEAD);
                    open.extend([later, first]);
                }
            }
        }
        if refused && accepted > 0 {
            self.0.limits.learn_batch_size(accepted);
        }
        Ok(())
    }

    /// Blobs of one digest function. What is left when the server refuses a call as a whole.
    async fn write_batch_once(
        &self,
        instance: &InstanceName,
        mut blobs: Vec<(Digest, Content)>,
    ) -> Result<Vec<(Digest, Content)>, Error> {
        let mut attempts = self.0.cas_server.attempts();
        while let Some((first, _)) = blobs.first() {
            let function = first.function();
            let permit = self.0.uploads.acquire().await;
            let compresses = self.compresses_batches(instance).await;
            let bytes = blobs.iter().map(|(_, content)| content.in_memory());
            let work = match bytes.sum::<Option<u64>>() {
                // Nothing is read, nor compressed.
                Some(_) if !compresses => 0,
                bytes => bytes.unwrap_or(u64::MAX),
            };
            let (sent, contents) = computing(work, move || {
                let content = |(digest, content): &(Digest, Content)| {
                    let content = content.part(digest, 0, digest.size())?;
                    match compresses {
                        true => compressed(content),
                        false => Ok((content, Compressor::Identity)),
                    }
                };
                let contents = blobs.iter().map(content).collect::<Result<Vec<_>, Error>>();
                (blobs, contents)
            })
            .await?;
            let contents = contents?;
            let request = || {
                let requests =
                    sent.iter()
                        .zip(&contents)
                        .map(|((digest, _), (data, by))| Request {
                            digest: Some(digest.to_proto()),
                            data: data.clone(),
                            compressor: by.to_proto(),
                        });
                BatchUpdateBlobsRequest {
                    instance_name: self.name_there(instance).to_string(),
                    requests: requests.collect(),
                    digest_function: function.to_proto() as i32,
                }
            };
            let answer = self.0.cas_server.divisible(|| {
                let (mut client, request) = (self.cas(), request());
                async move { client.batch_update_blobs(request).await }
            });
            let answer = answer.await?;
            drop(permit);
            let Ok(answer) = answer else {
                return Ok(sent);
            };
            let mut statuses: HashMap<_, _> = answer
                .responses
                .into_iter()
                .filter_map(|response| Some((response.digest?.hash, response.status)))
                .collect();
            let mut again = Vec::new();
            let mut trouble = None;
            for (digest, content) in sent {
                let Some(status) = statuses.remove(&digest.hash_hex()) else {
                    return Err(Error::Internal(format!(
                        "the CAS answered a BatchUpdateBlobs without blob {digest}"
                    )));
                };
                let status = status.unwrap_or_default();
                let status = Status::new(Code::from_i32(status.code), status.message);
                match status.code() {
                    Code::Ok | Code::AlreadyExists => {}
                    _ if may_pass(&status) => {
                        trouble = Some(status);
                        again.push((digest, content));
                    }
                    _ => return Err(self.0.cas_server.error(&status, None)),
                }
            }
            if let Some(status) = trouble {
                self.0.cas_server.wait(&mut attempts, &status, None).await?;
            }
            blobs = again;
        }
        Ok(Vec::new())
    }

    /// Uploads whole blobs that somebody else sent, once they have proved right.
    pub async fn put_many(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        content::put_verified(blobs, |right| self.upload(instance, right)).await
    }
}
