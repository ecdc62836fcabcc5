//! ByteStream for clients: the streams of running actions, and blobs where the storage is here.
//!
//! A stream is called `INSTANCE/logstreams/OPERATION/stdout` or `/stderr`; ExecuteOperationMetadata carries
//! the name. It has what is printed as it is printed, and ends when all of it was read. Of an action whose
//! worker cannot be asked, it comes when the action has ended.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{
    live_output::{LARGEST_PIECE, LiveOutput, Wanted},
    queue::{OperationRow, Stage},
    shared_queue::SharedQueue,
    status,
};
use crate::{
    daemon::Access,
    digest::Digest,
    instance::InstanceName,
    proto::{
        bytestream::{
            QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse,
            WriteRequest, WriteResponse, byte_stream_server::ByteStream,
        },
        live_output::Output,
        reapi,
    },
    storage::{Backend, serve::ByteStreamService},
};

/// Between two looks at an output that has nothing new.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
const KEYWORD: &str = "logstreams";

/// Streams of actions, beside those of blobs.
pub(super) struct OutputStreams {
    pub queue: Arc<SharedQueue>,
    pub live: Arc<LiveOutput>,
    pub storage: Backend,
    /// `None` where clients have another server for them.
    pub blobs: Option<ByteStreamService>,
    pub stopping: CancellationToken,
}

/// Which output of which operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StreamName {
    pub instance: InstanceName,
    pub operation: Uuid,
    pub output: Output,
}

impl StreamName {
    /// `None` when it is a name of something else.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (rest, output) = name.rsplit_once('/')?;
        let output = match output {
            "stdout" => Output::Stdout,
            "stderr" => Output::Stderr,
            _ => return None,
        };
        let (rest, operation) = rest.rsplit_once('/')?;
        let instance = match rest.rsplit_once('/') {
            Some((instance, KEYWORD)) => instance,
            None if rest == KEYWORD => "",
            _ => return None,
        };
        Some(StreamName {
            instance: InstanceName::parse(instance).ok()?,
            operation: operation.parse().ok()?,
            output,
        })
    }
}

impl std::fmt::Display for StreamName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.instance.is_empty() {
            write!(f, "{}/", self.instance)?;
        }
        let output = match self.output {
            Output::Stderr => "stderr",
            Output::Stdout | Output::Unspecified => "stdout",
        };
        write!(f, "{KEYWORD}/{}/{output}", self.operation)
    }
}

/// Somebody who reads a stream.
struct Reader {
    queue: Arc<SharedQueue>,
    live: Arc<LiveOutput>,
    storage: Backend,
    name: StreamName,
    offset: u64,
    /// Bytes that are still wanted.
    left: u64,
    /// What is left of the output of an action that has ended.
    rest: Option<BoxStream<'static, Result<Bytes, Status>>>,
    stopping: CancellationToken,
}

fn unknown() -> Status {
    Status::not_found(
        "There is no such stream, or no longer: it goes with its operation; what the action has printed is in its result",
    )
}

impl Reader {
    fn row(&self) -> Option<OperationRow> {
        let row = self
            .queue
            .look(|queue| queue.operation(self.name.operation))?;
        (row.action.instance == self.name.instance).then_some(row)
    }

    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if self.left == 0 {
                return Ok(None);
            }
            if let Some(rest) = &mut self.rest {
                return rest.next().await.transpose();
            }
            let row = self.row().ok_or_else(unknown)?;
            match &row.stage {
                Stage::Completed(outcome) => {
                    let response = reapi::ExecuteResponse::decode(&*outcome.response);
                    let result = response.unwrap_or_default().result.unwrap_or_default();
                    self.rest = Some(self.rest_of(&row, result).await?);
                    continue;
                }
                Stage::Executing => {
                    if let Some(data) = self.ask(&row).await {
                        return Ok(Some(data));
                    }
                }
                Stage::Queued => {}
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = self.stopping.cancelled() => return Err(status::stopping()),
            }
        }
    }

    async fn ask(&mut self, row: &OperationRow) -> Option<Bytes> {
        let worker = row.live_slot()?;
        let wanted = Wanted {
            output: self.name.output,
            offset: i64::try_from(self.offset).ok()?,
            size: u32::try_from(self.left).unwrap_or(LARGEST_PIECE),
        };
        let answer = self.live.ask(&worker, &row.action.digest, wanted).await?;
        (answer.offset == self.offset && !answer.data.is_empty()).then_some(answer.data)
    }

    // What is left is no Sync: nothing here is shared between threads.
    async fn rest_of(
        &mut self,
        row: &OperationRow,
        result: reapi::ActionResult,
    ) -> Result<BoxStream<'static, Result<Bytes, Status>>, Status> {
        let (raw, digest) = match self.name.output {
            Output::Stderr => (result.stderr_raw, result.stderr_digest),
            Output::Stdout | Output::Unspecified => (result.stdout_raw, result.stdout_digest),
        };
        let function = row.action.digest.function();
        let digest = digest.and_then(|digest| Digest::parse(Some(function), &digest).ok());
        let size = match &digest {
            Some(digest) if raw.is_empty() => digest.size(),
            _ => raw.len() as u64,
        };
        if self.offset > size {
            return Err(Status::aborted(
                "The action was executed again, and has printed less; read its stream from the beginning",
            ));
        }
        let end = size.min(self.offset.saturating_add(self.left));
        match digest {
            Some(digest) if raw.is_empty() && end > self.offset => {
                let instance = &row.action.instance;
                let pieces = self
                    .storage
                    .stream(instance, &digest, self.offset, end)
                    .await?;
                Ok(pieces.map(|piece| piece.map_err(Status::from)).boxed())
            }
            _ => {
                let range = usize::try_from(self.offset)
                    .ok()
                    .zip(usize::try_from(end).ok());
                let data = range.and_then(|(start, end)| raw.get(start..end).map(<[u8]>::to_vec));
                let data = data
                    .filter(|data| !data.is_empty())
                    .map(|data| Ok(data.into()));
                Ok(stream::iter(data).boxed())
            }
        }
    }
}

#[tonic::async_trait]
impl ByteStream for OutputStreams {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let Some(name) = StreamName::parse(&request.get_ref().resource_name) else {
            return match &self.blobs {
                Some(blobs) => blobs.read(request).await,
                None => Err(Status::not_found(
                    "This scheduler has streams of its operations alone; blobs are where its storage is",
                )),
            };
        };
        Access::of(&request).require(&name.instance)?;
        let range = (
            u64::try_from(request.get_ref().read_offset),
            u64::try_from(request.get_ref().read_limit),
        );
        let (Ok(offset), Ok(limit)) = range else {
            return Err(Status::out_of_range(
                "read_offset and read_limit are not negative",
            ));
        };
        let reader = Reader {
            queue: self.queue.clone(),
            live: self.live.clone(),
            storage: self.storage.clone(),
            name,
            offset,
            left: if limit == 0 { u64::MAX } else { limit },
            rest: None,
            stopping: self.stopping.clone(),
        };
        reader.row().ok_or_else(unknown)?;
        let answers = stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(None) => None,
                Ok(Some(data)) => {
                    reader.offset += data.len() as u64;
                    reader.left = reader.left.saturating_sub(data.len() as u64);
                    Some((Ok(ReadResponse { data }), Some(reader)))
                }
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        match &self.blobs {
            Some(blobs) => blobs.write(request).await,
            None => Err(Status::unimplemented(
                "Blobs are written where the storage is",
            )),
        }
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        match &self.blobs {
            Some(blobs) => blobs.query_write_status(request).await,
            None => Err(Status::unimplemented(
                "Blobs are written where the storage is",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_streams_survive_and_those_of_blobs_are_none() {
        let operation = Uuid::from_u128(7);
        for instance in ["", "a/b"] {
            for output in [Output::Stdout, Output::Stderr] {
                let name = StreamName {
                    instance: InstanceName::parse(instance).unwrap(),
                    operation,
                    output,
                };
                assert_eq!(StreamName::parse(&name.to_string()), Some(name));
            }
        }
        for other in [
            "",
            "blobs/0000/12",
            "logstreams/x/stdout",
            "a/blobs/00000000-0000-0000-0000-000000000007/stdout",
            "logstreams/00000000-0000-0000-0000-000000000007/stdin",
        ] {
            assert_eq!(StreamName::parse(other), None, "{other}");
        }
    }
}
