//! SplitBlob and SpliceBlob (REAPI: ContentAddressableStorage).
//!
//! 1. Both read and hash all of a blob, so that no more of them are under way than there are processors; who
//!    comes then waits for a while.
//! 2. Whatever is in a list is checked before anything is read: its length, its digests, and that the sizes
//!    add up.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Status;

use super::{
    request::{digest, function},
    response_size::{MAXIMUM_RESPONSE_SIZE, answer_weight},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::{SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse},
    storage::{Backend, blocking, chunking::ChunkingFunction, embedded},
};

/// Chunks of one blob that is spliced; with FastCDC's recommended parameters, some 50 GiB.
const MAXIMUM_CHUNKS: usize = 100_000;

const TURN_TIMEOUT: Duration = Duration::from_secs(30);

static UNDER_WAY: LazyLock<Semaphore> = LazyLock::new(|| {
    let count = std::thread::available_parallelism().map_or(1, |count| count.get());
    Semaphore::new(count)
});

/// Whether SplitBlob and SpliceBlob are served with this back end.
pub fn serves_chunks(backend: &Backend) -> bool {
    backend.embedded_cas().is_some()
}

fn store(backend: &Backend) -> Result<Arc<embedded::Store>, Status> {
    backend.embedded_cas().cloned().ok_or_else(|| {
        Status::unimplemented("the storage behind this server is not asked for chunks")
    })
}

async fn turn() -> Result<SemaphorePermit<'static>, Status> {
    match tokio::time::timeout(TURN_TIMEOUT, UNDER_WAY.acquire()).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(Status::resource_exhausted(
            "too many blobs are being split or spliced; try again later, or send them as a whole",
        )),
    }
}

pub(super) async fn split(
    backend: &Backend,
    instance: &InstanceName,
    request: &SplitBlobRequest,
) -> Result<SplitBlobResponse, Status> {
    let store = store(backend)?;
    let digest = digest(request.digest_function, request.blob_digest.as_ref())?;
    let function = ChunkingFunction::requested(request.chunking_function);
    let weight = answer_weight(Some(&digest.to_proto()), 0) + 8;
    let most = (MAXIMUM_RESPONSE_SIZE / weight) as usize;
    let limit = store.limit_of(instance);
    let turn = turn().await?;
    let list = blocking(move || {
        let _turn = turn;
        store.split(&digest, function, most, limit)
    });
    match list.await?? {
        Some(list) => Ok(SplitBlobResponse {
            chunk_digests: list.iter().map(Digest::to_proto).collect(),
            chunking_function: function.to_proto() as i32,
        }),
        None => Err(Status::not_found(format!(
            "blob {digest} has more than {most} chunks, whose list is too long for an answer; read it as a whole"
        ))),
    }
}

pub(super) async fn splice(
    backend: &Backend,
    instance: &InstanceName,
    request: SpliceBlobRequest,
) -> Result<SpliceBlobResponse, Status> {
    let store = store(backend)?;
    let function = function(request.digest_function)?;
    let blob = Digest::parse_required(function, request.blob_digest.as_ref())?;
    let count = request.chunk_digests.len();
    if count > MAXIMUM_CHUNKS {
        return Err(Status::invalid_argument(format!(
            "{count} chunks are more than {MAXIMUM_CHUNKS}, which one blob may have; send it as a whole"
        )));
    }
    let chunks = request.chunk_digests.iter();
    let chunks = chunks
        .map(|chunk| Digest::parse(Some(blob.function()), chunk))
        .collect::<Result<Vec<_>, _>>()?;
    let limit = store.limit_of(instance);
    let turn = turn().await?;
    blocking(move || {
        let _turn = turn;
        store.splice(blob, &chunks, limit)
    })
    .await??;
    Ok(SpliceBlobResponse {
        blob_digest: Some(blob.to_proto()),
    })
}
