//! ByteStream's Write of a blob that comes compressed.
//!
//! 1. The first message's offset is one of the blob, each further one's is the first one's with the
//!    compressed bytes since then added (REAPI: ContentAddressableStorage).
//! 2. The upload is the same as without compression, so that it goes on at the bytes of the blob that
//!    were received, with a frame of its own.

use tonic::{Status, Streaming};

use super::coder_budget::{self, CoderCaller};
use crate::{
    proto::bytestream::WriteRequest,
    resource::WriteName,
    storage::{
        Backend,
        compression::{self, Decoder},
    },
};

/// REAPI: what a Write is answered with when its blob is there already, and comes compressed.
pub(super) const ALREADY_THERE: i64 = -1;

/// Takes all messages of a blob that is not there; what `committed_size` is answered.
pub(super) async fn run(
    backend: &Backend,
    name: &WriteName,
    caller: &CoderCaller,
    owner: &str,
    first: WriteRequest,
    mut stream: Streaming<WriteRequest>,
) -> Result<i64, Status> {
    let digest = name.digest;
    let begin = u64::try_from(first.write_offset).ok();
    let Some((begin, left)) = begin.and_then(|at| Some((at, digest.size().checked_sub(at)?)))
    else {
        return Err(Status::invalid_argument(format!(
            "write_offset {} is not within the blob's {} bytes",
            first.write_offset,
            digest.size()
        )));
    };
    let _memory = coder_budget::reserve(caller, left).await?;
    let mut upload = backend
        .resume_upload(
            &name.instance,
            &name.uncompressed(),
            owner,
            digest,
            first.write_offset,
        )
        .await?;
    let mut decoder = Decoder::new(left)?;
    // Where the next bytes of the blob go, and which offset the next message has.
    let (mut at, mut expected) = (begin as i64, first.write_offset);
    let resource_name = first.resource_name.clone();
    let mut next = Some(first);
    let mut finish = false;
    while let Some(message) = next.take() {
        if !message.resource_name.is_empty() && message.resource_name != resource_name {
            return Err(Status::invalid_argument(
                "resource_name changed in the midst of a stream; use one call per blob",
            ));
        }
        if message.write_offset != expected {
            return Err(Status::invalid_argument(format!(
                "write_offset is {}, where {expected} is next: the first message's, and the compressed bytes since then",
                message.write_offset
            )));
        }
        expected = expected.saturating_add(message.data.len() as i64);
        finish = message.finish_write;
        let mut input = message.data;
        loop {
            let decoded;
            (decoder, input, decoded) = compression::decode(decoder, input).await?;
            let Some(chunk) = decoded? else {
                break;
            };
            let length = chunk.len() as i64;
            upload.write(vec![(at, chunk)]).await?;
            at += length;
        }
        if finish {
            break;
        }
        next = stream.message().await?;
    }
    decoder.finish()?;
    upload.finish(digest, finish).await?;
    Ok(expected)
}
