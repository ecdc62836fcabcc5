//! ContentAddressableStorage.

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use prost::Message;
use tonic::{Request, Response, Status, async_trait};

use super::{
    MAXIMUM_BATCH_SIZE, MAXIMUM_RESPONSE_SIZE, digest, encoded_size, function, instance, reserve,
    status_of,
    tree::{MAXIMUM_PAGE_LENGTH, MAXIMUM_PAGE_SIZE, TreeWalk},
};
use crate::{
    daemon::{Access, BudgetReservation, RequestReservation, ResponseBudget, with_reservation},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{
        reapi::{
            self, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
            BatchUpdateBlobsResponse, FindMissingBlobsRequest, FindMissingBlobsResponse,
            GetTreeRequest, GetTreeResponse, SpliceBlobRequest, SpliceBlobResponse,
            SplitBlobRequest, SplitBlobResponse, batch_read_blobs_response,
            batch_update_blobs_request, batch_update_blobs_response,
            content_addressable_storage_server::ContentAddressableStorage,
        },
        rpc,
    },
    storage::{Backend, Error},
};

pub(super) struct CasService {
    pub backend: Backend,
}

impl CasService {
    async fn update(
        &self,
        instance: &InstanceName,
        function: Option<DigestFunction>,
        requests: Vec<batch_update_blobs_request::Request>,
    ) -> Result<Vec<batch_update_blobs_response::Response>, Status> {
        let mut blobs = Vec::with_capacity(requests.len());
        let mut responses = Vec::with_capacity(requests.len());
        for request in requests {
            let parsed = if request.compressor != 0 {
                Err(Error::Invalid(format!(
                    "compressor {} is not in supported_batch_update_compressors",
                    request.compressor
                )))
            } else {
                Digest::parse_required(function, request.digest.as_ref())
                    .map_err(|error| Error::Invalid(error.to_string()))
            };
            let status = match parsed {
                Ok(digest) => {
                    blobs.push((digest, request.data));
                    None
                }
                Err(error) => Some(status_of(Err(error))),
            };
            responses.push(batch_update_blobs_response::Response {
                digest: request.digest,
                status,
            });
        }
        let mut results = self.backend.put_many(instance, blobs).await?.into_iter();
        for response in &mut responses {
            if response.status.is_none() {
                response.status = results.next().map(status_of);
            }
        }
        Ok(responses)
    }
}

#[async_trait]
impl ContentAddressableStorage for CasService {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let access = Access::of(&request);
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let function = function(request.digest_function)?;
        let digests = request.blob_digests.iter();
        let digests = digests.map(|digest| Digest::parse(function, digest));
        let digests = digests.collect::<Result<Vec<_>, _>>()?;
        let missing = self.backend.find_missing(&instance, &digests).await?;
        let missing = FindMissingBlobsResponse {
            missing_blob_digests: missing.iter().map(Digest::to_proto).collect(),
        };
        let reservation = reserve(answers, encoded_size(&missing)).await?;
        Ok(with_reservation(Response::new(missing), reservation))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let access = Access::of(&request);
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let function = function(request.digest_function)?;
        let total = request.requests.iter().map(|blob| blob.data.len() as u64);
        check_batch(total.sum())?;
        let answered = request
            .requests
            .iter()
            .map(|blob| answer_weight(blob.digest.as_ref(), 0));
        let reservation = reserve(answers, check_answer(answered.sum())?).await?;
        let responses = self.update(&instance, function, request.requests).await?;
        let mut answer = BatchUpdateBlobsResponse { responses };
        if encoded_size(&answer) > MAXIMUM_RESPONSE_SIZE {
            let statuses = answer.responses.iter_mut().map(|blob| &mut blob.status);
            statuses.flatten().for_each(leave_out_the_reason);
        }
        Ok(with_reservation(Response::new(answer), reservation))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let access = Access::of(&request);
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let function = function(request.digest_function)?;
        let digests = request
            .digests
            .iter()
            .map(|digest| Digest::parse(function, digest))
            .collect::<Result<Vec<_>, _>>()?;
        let total = digests.iter().map(Digest::size);
        check_batch(total.fold(0, u64::saturating_add))?;
        let answered = request.digests.iter().zip(&digests);
        let answered = answered.map(|(sent, digest)| answer_weight(Some(sent), digest.size()));
        let reservation = reserve(answers, check_answer(answered.sum())?).await?;
        let read = self
            .backend
            .read_many(&instance, &digests, MAXIMUM_BATCH_SIZE)
            .await;
        let response = |(sent, read): (reapi::Digest, Result<Bytes, Error>)| {
            let (data, result) = match read {
                Ok(data) => (data, Ok(())),
                Err(error) => (Default::default(), Err(error)),
            };
            batch_read_blobs_response::Response {
                digest: Some(sent),
                data,
                status: Some(status_of(result)),
                compressor: 0,
            }
        };
        let responses = request
            .digests
            .into_iter()
            .zip(read)
            .map(response)
            .collect();
        let mut answer = BatchReadBlobsResponse { responses };
        if encoded_size(&answer) > MAXIMUM_RESPONSE_SIZE {
            let statuses = answer.responses.iter_mut().map(|blob| &mut blob.status);
            statuses.flatten().for_each(leave_out_the_reason);
        }
        Ok(with_reservation(Response::new(answer), reservation))
    }

    type GetTreeStream = BoxStream<'static, Result<GetTreeResponse, Status>>;

    async fn get_tree(
        &self,
        request: Request<GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        let (answers, access) = (ResponseBudget::of(&request), Access::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let root = digest(request.digest_function, request.root_digest.as_ref())?;
        let page_size = match usize::try_from(request.page_size) {
            Ok(0) => MAXIMUM_PAGE_LENGTH,
            Ok(size) => size.min(MAXIMUM_PAGE_LENGTH),
            Err(_) => {
                return Err(Status::invalid_argument(format!(
                    "page_size {} is negative",
                    request.page_size
                )));
            }
        };
        let skipped = match request.page_token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| {
                Status::invalid_argument("page_token is none that this server returned")
            })?,
        };
        let mut walk = TreeWalk::start(self.backend.clone(), instance, root, page_size);
        let first_reservation = reserve(answers.clone(), MAXIMUM_PAGE_SIZE).await?;
        // The first page is made before anything is answered, so that its errors are the call's.
        walk.skip(skipped).await?;
        let first = walk.page().await?;
        // A page's room is held until the next one is asked for.
        let state = (walk, answers, None::<BudgetReservation>);
        let rest = stream::try_unfold(state, |(mut walk, answers, before)| async move {
            drop(before);
            if walk.is_done() {
                return Ok(None);
            }
            let held = reserve(answers.clone(), MAXIMUM_PAGE_SIZE).await?;
            let page = walk.page().await?;
            Ok(Some((page, (walk, answers, held))))
        });
        let pages = stream::once(async { Ok(first) }).chain(rest);
        Ok(with_reservation(
            Response::new(pages.boxed()),
            first_reservation,
        ))
    }

    async fn split_blob(
        &self,
        _: Request<SplitBlobRequest>,
    ) -> Result<Response<SplitBlobResponse>, Status> {
        Err(Status::unimplemented(
            "this server does not split blobs, and does not announce split_blob_support",
        ))
    }

    async fn splice_blob(
        &self,
        _: Request<SpliceBlobRequest>,
    ) -> Result<Response<SpliceBlobResponse>, Status> {
        Err(Status::unimplemented(
            "this server does not splice blobs, and does not announce splice_blob_support",
        ))
    }
}

fn check_batch(total: u64) -> Result<(), Status> {
    if total > MAXIMUM_BATCH_SIZE {
        return Err(Status::invalid_argument(format!(
            "a batch of {total} bytes is larger than max_batch_total_size_bytes, which is {MAXIMUM_BATCH_SIZE}; make smaller batches, or use ByteStream"
        )));
    }
    Ok(())
}

/// Bytes of one blob's part of an answer: its digest, its content, and a status that has a code.
fn answer_weight(sent: Option<&reapi::Digest>, size: u64) -> u64 {
    const STATUS: u64 = 4;
    let field = |length: u64| 1 + prost::length_delimiter_len(length as usize) as u64 + length;
    let digest = sent.map_or(0, |digest| field(digest.encoded_len() as u64));
    let content = if size > 0 { field(size) } else { 0 };
    field(digest + content + STATUS)
}

/// The code says enough when there are so many.
fn leave_out_the_reason(status: &mut rpc::Status) {
    status.message.clear();
}

fn check_answer(weight: u64) -> Result<u64, Status> {
    if weight > MAXIMUM_RESPONSE_SIZE {
        return Err(Status::invalid_argument(format!(
            "the answer for a batch of so many blobs would have {weight} bytes with their digests, and gRPC clients take {MAXIMUM_RESPONSE_SIZE}; make smaller batches"
        )));
    }
    Ok(weight)
}
