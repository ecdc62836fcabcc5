//! ByteStream: blobs piece by piece, resumable.
//!
//! 1. A piece of a blob is read when there is room for it among all answers (`daemon::serve`).
//! 2. An upload has a name of its client's choice, by which it goes on after an interruption
//!    (`storage::Upload`).

use futures::{
    FutureExt,
    stream::{BoxStream, StreamExt},
};
use tonic::{Request, Response, Status, Streaming, async_trait};

use crate::{
    daemon::{self, Access},
    digest::Digest,
    instance::InstanceName,
    proto::bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse, byte_stream_server::ByteStream,
    },
    resource::{Compressor, ReadName, WriteName},
    storage::{Backend, compression},
};

use super::{
    coder_budget::{self, CoderCaller},
    compressed_write, status,
};

/// Blobs of a back end.
pub struct ByteStreamService {
    /// Where they are.
    pub backend: Backend,
}

impl ByteStreamService {
    async fn contains(&self, instance: &InstanceName, digest: Digest) -> Result<bool, Status> {
        let missing = self.backend.find_missing(instance, &[digest]).await?;
        Ok(missing.is_empty())
    }
}

/// What is written together at most.
const WRITE_SIZE: u64 = 1 << 20;

/// Messages that are written together; they may be as small as a client likes.
const MAXIMUM_PARTS: usize = 256;

#[async_trait]
impl ByteStream for ByteStreamService {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let (access, caller) = (Access::of(&request), CoderCaller::of(&request));
        let request = request.into_inner();
        let ReadName {
            instance,
            digest,
            compressor,
        } = ReadName::parse(&request.resource_name)?;
        access.require(&instance)?;
        let (start, end) = range(&request, &digest)?;
        let pieces = self.backend.stream(&instance, &digest, start, end).await;
        let pieces = pieces.map_err(status::of_read)?;
        let (pieces, reservation) = match compressor {
            Compressor::Identity => (pieces, None),
            // REAPI: what a limit would count is not said.
            Compressor::Zstd if request.read_limit != 0 => {
                return Err(Status::invalid_argument(
                    "read_limit must be 0 for a blob that is read compressed",
                ));
            }
            Compressor::Zstd => {
                let reservation = coder_budget::reserve(&caller, end - start).await?;
                let pieces = compression::encoded(pieces, end - start)?;
                (pieces, Some(reservation))
            }
        };
        let answers = pieces.map(move |piece| {
            // Held until the stream ends.
            let _held = &reservation;
            let data = piece.map_err(status::of_read)?;
            Ok(ReadResponse { data })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let (access, caller) = (Access::of(&request), CoderCaller::of(&request));
        let owner = daemon::client_name(&request);
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Err(Status::invalid_argument(
                "the stream ended before a first message with resource_name",
            ));
        };
        let name = WriteName::parse(&first.resource_name)?;
        access.require(&name.instance)?;
        let digest = name.digest;
        let size = digest.size() as i64;
        let is_there = self.contains(&name.instance, digest).await?;
        if name.compressor == Compressor::Zstd {
            let committed_size = match is_there {
                true => compressed_write::ALREADY_THERE,
                false => {
                    let backend = &self.backend;
                    compressed_write::run(backend, &name, &caller, &owner, first, stream).await?
                }
            };
            return Ok(Response::new(WriteResponse { committed_size }));
        }
        if is_there {
            // REAPI: no need to send the rest of what is already here.
            return Ok(Response::new(WriteResponse {
                committed_size: size,
            }));
        }
        if first.finish_write && first.write_offset == 0 && first.data.len() as u64 == digest.size()
        {
            let blobs = vec![(digest, first.data)];
            let stored = self.backend.put_many(&name.instance, blobs);
            for result in stored.await? {
                result?;
            }
            return Ok(Response::new(WriteResponse {
                committed_size: size,
            }));
        }
        let resource_name = first.resource_name.clone();
        let mut upload = self
            .backend
            .resume_upload(
                &name.instance,
                &resource_name,
                &owner,
                digest,
                first.write_offset,
            )
            .await?;
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
                if finish || length >= WRITE_SIZE || parts.len() >= MAXIMUM_PARTS {
                    break;
                }
                match stream.message().now_or_never() {
                    Some(Ok(Some(part))) => parts.push(part),
                    Some(Ok(None)) | None => break,
                    Some(Err(error)) => return Err(error),
                }
            }
            let parts = parts.into_iter().map(|part| (part.write_offset, part.data));
            upload.write(parts.collect()).await?;
            if finish {
                break;
            }
            next = stream.message().await?;
        }
        // Lenient without finish_write, when all of it has arrived.
        upload.finish(digest, finish).await?;
        Ok(Response::new(WriteResponse {
            committed_size: size,
        }))
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        let access = Access::of(&request);
        let resource_name = request.into_inner().resource_name;
        let name = WriteName::parse(&resource_name)?;
        access.require(&name.instance)?;
        let key = match name.compressor {
            Compressor::Identity => resource_name,
            Compressor::Zstd => name.uncompressed(),
        };
        let (committed, complete) = match self.contains(&name.instance, name.digest).await? {
            true => (name.digest.size(), true),
            false => (
                self.backend.upload_progress(&key, &name.digest).await?,
                false,
            ),
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
