//! ByteStream: blobs piece by piece, resumable.
//!
//! 1. A piece of a blob is read when there is room for it among all answers (`daemon::serve`).
//! 2. An upload has a name of its client's choice, by which it goes on after an interruption
//!    (`storage::embedded::Uploads`).

use std::{sync::Arc, time::Instant};

use futures::{
    FutureExt,
    stream::{self, BoxStream, StreamExt},
};
use tonic::{Request, Response, Status, Streaming, async_trait};

use crate::{
    digest::Digest,
    proto::bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse, byte_stream_server::ByteStream,
    },
    resource::{ReadName, WriteName},
    storage::{
        blocking,
        embedded::{Blob, PIECE, Store},
    },
};

pub struct ByteStreamService {
    pub store: Arc<Store>,
}

/// What one message carries at most.
const CHUNK: u64 = 4 * PIECE;

/// Messages that are written together; they may be as small as a client likes.
const MOST_TOGETHER: usize = 256;

#[async_trait]
impl ByteStream for ByteStreamService {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let digest = ReadName::parse(&request.resource_name)?.digest;
        let (start, end) = range(&request, &digest)?;
        let store = self.store.clone();
        let blob = blocking(move || store.blob(&digest)).await??;
        if let Blob::Small(_) = blob {
            let data = blob.read(start, end)?;
            let only = stream::once(async { Ok(ReadResponse { data }) });
            return Ok(Response::new(only.boxed()));
        }
        let store = self.store.clone();
        let blob = Arc::new(blob);
        // A piece is a part of a mapped file, and copied when there is room for it.
        let pieces = stream::try_unfold(start, move |at| {
            let (blob, store) = (blob.clone(), store.clone());
            async move {
                if at >= end {
                    return Ok(None);
                }
                let next = (at + CHUNK - at % CHUNK).min(end);
                let piece = blocking(move || {
                    blob.read(at, next).inspect_err(|_| {
                        store.forget_damaged(&digest);
                    })
                });
                let data = piece.await??;
                Ok(Some((ReadResponse { data }, next)))
            }
        });
        Ok(Response::new(pieces.boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Err(Status::invalid_argument(
                "the stream ended before a first message with resource_name",
            ));
        };
        let name = WriteName::parse(&first.resource_name)?;
        let digest = name.digest;
        let size = digest.size() as i64;
        if self.store.contains(&digest) {
            // REAPI: no need to send the rest of what is already here.
            return Ok(Response::new(WriteResponse {
                committed_size: size,
            }));
        }
        if first.finish_write && first.write_offset == 0 && first.data.len() as u64 == digest.size()
        {
            let store = self.store.clone();
            let stored = blocking(move || store.put(&[(digest, first.data)]));
            for result in stored.await? {
                result?;
            }
            return Ok(Response::new(WriteResponse {
                committed_size: size,
            }));
        }
        let resource_name = first.resource_name.clone();
        let turn = self
            .store
            .uploads()
            .take_over(&resource_name, Instant::now())?;
        let turn = Arc::new(turn);
        let store = self.store.clone();
        let (own, offset) = (turn.clone(), first.write_offset);
        blocking(move || own.begin(&store, digest, offset, Instant::now())).await??;
        let mut next = Some(first);
        let mut finish = false;
        while let Some(first) = next.take() {
            // What has arrived already is written together.
            let mut parts = vec![first];
            let mut length = 0;
            while let Some(last) = parts.last() {
                if !last.resource_name.is_empty() && last.resource_name != resource_name {
                    return Err(Status::invalid_argument(
                        "resource_name changed in the midst of a stream; use one call per blob",
                    ));
                }
                length += last.data.len() as u64;
                finish = last.finish_write;
                if finish || length >= CHUNK || parts.len() >= MOST_TOGETHER {
                    break;
                }
                match stream.message().now_or_never() {
                    Some(Ok(Some(part))) => parts.push(part),
                    Some(Ok(None)) | None => break,
                    Some(Err(error)) => return Err(error),
                }
            }
            let (own, store) = (turn.clone(), self.store.clone());
            let write = move || {
                let now = Instant::now();
                let mut parts = parts.iter();
                parts.try_for_each(|part| own.write(&store, part.write_offset, &part.data, now))
            };
            blocking(write).await??;
            if finish {
                break;
            }
            next = stream.message().await?;
        }
        // Lenient without finish_write, when all of it has arrived.
        blocking(move || turn.finish(&digest, finish)).await??;
        Ok(Response::new(WriteResponse {
            committed_size: size,
        }))
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        let name = request.into_inner().resource_name;
        let digest = WriteName::parse(&name)?.digest;
        let (committed, complete) = if self.store.contains(&digest) {
            (digest.size(), true)
        } else {
            let uploads = self.store.uploads().clone();
            (blocking(move || uploads.received(&name)).await?, false)
        };
        Ok(Response::new(QueryWriteStatusResponse {
            committed_size: committed as i64,
            complete,
        }))
    }
}

fn range(request: &ReadRequest, digest: &Digest) -> Result<(u64, u64), Status> {
    let size = digest.size();
    let Ok(start) = u64::try_from(request.read_offset) else {
        return Err(Status::out_of_range(format!(
            "read_offset {} is negative",
            request.read_offset
        )));
    };
    if start > size {
        return Err(Status::out_of_range(format!(
            "read_offset {start} is beyond the blob's {size} bytes"
        )));
    }
    match u64::try_from(request.read_limit) {
        Ok(0) => Ok((start, size)),
        Ok(limit) => Ok((start, start.saturating_add(limit).min(size))),
        Err(_) => Err(Status::invalid_argument(format!(
            "read_limit {} is negative",
            request.read_limit
        ))),
    }
}
