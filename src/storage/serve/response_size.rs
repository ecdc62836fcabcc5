//! How large answers may be, and room for them.

use prost::Message;
use tonic::Status;

use crate::{
    daemon::{BudgetReservation, ResponseBudget},
    proto::reapi,
};

/// REAPI: CacheCapabilities.max_batch_total_size_bytes. With its digests a batch stays below 4 MiB,
/// which many clients take as the largest message.
pub const MAXIMUM_BATCH_SIZE: u64 = (4 << 20) - (256 << 10);

/// gRPC's default for the largest message that a client takes. Of many small blobs it is their digests
/// that weigh.
pub(super) const MAXIMUM_RESPONSE_SIZE: u64 = 4 << 20;

/// Room for an answer; `None` outside of a server of ours.
pub(super) async fn reserve(
    answers: Option<ResponseBudget>,
    bytes: u64,
) -> Result<Option<BudgetReservation>, Status> {
    match answers {
        Some(answers) => answers.reserve(bytes).await.map(Some),
        None => Ok(None),
    }
}

/// Bytes of an answer that is there.
pub(super) fn encoded_size(message: &impl Message) -> u64 {
    message.encoded_len() as u64
}

/// Bytes of one blob's part of an answer: its digest, its content, and a status that has a code.
pub(super) fn answer_weight(sent: Option<&reapi::Digest>, size: u64) -> u64 {
    const STATUS: u64 = 4;
    let field = |length: u64| 1 + prost::length_delimiter_len(length as usize) as u64 + length;
    let digest = sent.map_or(0, |digest| field(digest.encoded_len() as u64));
    let content = if size > 0 { field(size) } else { 0 };
    field(digest + content + STATUS)
}
