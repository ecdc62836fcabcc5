//! ByteStream: blobs piece by piece, resumable.
//!
//! 1. An upload has a name of its client's choice. At most one call writes to it: a newer one takes
//!    over from an older one, whose client may be gone without our knowing.
//! 2. An upload that nobody writes to is kept for a while, so that its client can come back.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{
    FutureExt,
    stream::{self, BoxStream, StreamExt},
};
use parking_lot::{Mutex, MutexGuard};
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
        local::{Blob, PIECE, Store, Upload},
    },
};

pub struct Bytes {
    store: Arc<Store>,
    uploads: Arc<Uploads>,
}

impl Bytes {
    pub fn new(store: Arc<Store>) -> Self {
        Bytes {
            store,
            uploads: Arc::default(),
        }
    }
}

/// What one message carries at most.
const CHUNK: u64 = 4 * PIECE;

#[async_trait]
impl ByteStream for Bytes {
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
        // A piece is read when the client has room for it.
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
        let turn = Arc::new(self.uploads.take_over(&resource_name));
        let store = self.store.clone();
        let (own, offset) = (turn.clone(), first.write_offset);
        blocking(move || own.begin(&store, digest, offset)).await??;
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
                if finish || length >= CHUNK {
                    break;
                }
                match stream.message().now_or_never() {
                    Some(Ok(Some(part))) => parts.push(part),
                    Some(Ok(None)) | None => break,
                    Some(Err(error)) => return Err(error),
                }
            }
            let own = turn.clone();
            blocking(move || own.write(&parts)).await??;
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
            let uploads = self.uploads.clone();
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

/// Uploads under way, by resource name.
#[derive(Default)]
struct Uploads {
    next_turn: AtomicU64,
    slots: Mutex<HashMap<String, Slot>>,
}

/// How long an upload waits for its client to come back.
const PATIENCE: Duration = Duration::from_secs(300);

/// Uploads that nobody writes to, at most.
const MOST_WAITING: usize = 1024;

type Slot = Arc<Mutex<State>>;

/// Locked while its upload writes to the disk, so only by threads that may block.
#[derive(Default)]
struct State {
    /// Which call may write; older ones find theirs passed.
    turn: u64,
    upload: Option<Upload>,
    /// When the last call that wrote ended.
    waiting_since: Option<Instant>,
}

/// A call's turn to write to an upload.
struct Turn {
    uploads: Arc<Uploads>,
    name: String,
    slot: Slot,
    number: u64,
}

impl Uploads {
    /// Gives a new call the turn to write.
    fn take_over(self: &Arc<Self>, name: &str) -> Turn {
        let number = self.next_turn.fetch_add(1, Ordering::Relaxed);
        let mut slots = self.slots.lock();
        expire(&mut slots, Instant::now());
        let slot = slots.entry(name.to_owned()).or_default().clone();
        Turn {
            uploads: self.clone(),
            name: name.to_owned(),
            slot,
            number,
        }
    }

    fn received(&self, name: &str) -> u64 {
        let slot = self.slots.lock().get(name).cloned();
        slot.and_then(|slot| Some(slot.lock().upload.as_ref()?.received()))
            .unwrap_or(0)
    }
}

/// Drops uploads whose clients have not come back.
fn expire(slots: &mut HashMap<String, Slot>, now: Instant) {
    // One that is locked is being written to.
    let waited = |slot: &Slot| Some(now - slot.try_lock()?.waiting_since?);
    slots.retain(|_, slot| waited(slot).is_none_or(|waited| waited < PATIENCE));
    if slots.len() > MOST_WAITING {
        let oldest = slots
            .iter()
            .filter_map(|(name, slot)| Some((waited(slot)?, name.clone())))
            .max();
        if let Some((_, name)) = oldest {
            slots.remove(&name);
        }
    }
}

impl Turn {
    fn lock(&self) -> Result<MutexGuard<'_, State>, Status> {
        let state = self.slot.lock();
        if state.turn != self.number {
            return Err(Status::aborted(
                "another call writes to this upload now; use a UUID for each upload",
            ));
        }
        Ok(state)
    }

    /// Takes up the upload where it was left, or starts it.
    fn begin(&self, store: &Store, digest: Digest, offset: i64) -> Result<(), Status> {
        let mut state = self.slot.lock();
        if state.turn > self.number {
            drop(state);
            return self.lock().map(drop);
        }
        state.turn = self.number;
        state.waiting_since = None;
        if offset == 0 || state.upload.is_none() {
            state.upload = None;
            state.upload = Some(store.upload(digest)?);
        }
        Ok(())
    }

    fn write(&self, parts: &[WriteRequest]) -> Result<(), Status> {
        let mut state = self.lock()?;
        let Some(upload) = &mut state.upload else {
            return Err(Status::aborted("this upload has failed; start it again"));
        };
        for part in parts {
            if u64::try_from(part.write_offset) != Ok(upload.received()) {
                return Err(Status::invalid_argument(format!(
                    "write_offset is {}, but {} bytes of this upload have been received; go on there, or start again at 0",
                    part.write_offset,
                    upload.received()
                )));
            }
            upload.write(&part.data)?;
        }
        Ok(())
    }

    fn finish(&self, digest: &Digest, asked: bool) -> Result<(), Status> {
        let mut state = self.lock()?;
        let Some(upload) = state.upload.take() else {
            return Err(Status::aborted("this upload has failed; start it again"));
        };
        if upload.received() < digest.size() && !asked {
            let received = upload.received();
            state.upload = Some(upload);
            return Err(Status::invalid_argument(format!(
                "the stream ended after {received} of {} bytes, without finish_write; go on at the committed_size that QueryWriteStatus tells",
                digest.size()
            )));
        }
        Ok(upload.finish()?)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut slots = self.uploads.slots.lock();
        // A state that is locked has been taken over.
        let Some(mut state) = self.slot.try_lock() else {
            return;
        };
        if state.turn != self.number {
            return;
        }
        if state.upload.is_some() {
            state.waiting_since = Some(Instant::now());
        } else {
            slots.remove(&self.name);
        }
    }
}
