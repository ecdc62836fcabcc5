//! ContentAddressableStorage.

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Status, async_trait};

use super::{
    chunks,
    coder_budget::{self, CoderCaller},
    request::{digest, function, instance},
    response_size::{
        MAXIMUM_BATCH_SIZE, MAXIMUM_RESPONSE_SIZE, answer_weight, encoded_size, reserve,
    },
    status::{status_of, status_of_read},
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
    resource::Compressor,
    storage::{Backend, Error, compression, computing},
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
        let parse = move |request: &batch_update_blobs_request::Request| {
            let digest = Digest::parse_required(function, request.digest.as_ref())
                .map_err(|error| Error::Invalid(error.to_string()))?;
            let content = match Compressor::from_proto(request.compressor) {
                Some(Compressor::Identity) => request.data.clone(),
                Some(Compressor::Zstd) => {
                    compression::decode_whole(request.data.clone(), digest.size())
                        .map_err(|error| Error::Invalid(error.to_string()))?
                }
                None => {
                    return Err(Error::Invalid(format!(
                        "compressor {} is not in supported_batch_update_compressors",
                        request.compressor
                    )));
                }
            };
            Ok((digest, content))
        };
        let is_whole = |request: &batch_update_blobs_request::Request| {
            request.compressor == Compressor::Identity.to_proto()
        };
        let sent = match requests.iter().all(is_whole) {
            true => requests
                .iter()
                .map(|request| request.data.len() as u64)
                .sum(),
            false => u64::MAX,
        };
        let parse_all = move || -> Vec<_> {
            let parsed = requests.iter().map(parse).collect::<Vec<_>>();
            let digests = requests.into_iter().map(|request| request.digest);
            digests.zip(parsed).collect()
        };
        // Decompressing takes a processor for a while.
        for (digest, parsed) in computing(sent, parse_all).await? {
            let status = match parsed {
                Ok(blob) => {
                    blobs.push(blob);
                    None
                }
                Err(error) => Some(status_of(Err(error))),
            };
            responses.push(batch_update_blobs_response::Response { digest, status });
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
        let (access, caller) = (Access::of(&request), CoderCaller::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let function = function(request.digest_function)?;
        let total = request.requests.iter().map(size_in_batch);
        check_batch(total.fold(0, u64::saturating_add))?;
        let is_compressed = |blob: &batch_update_blobs_request::Request| blob.compressor != 0;
        let _memory = match request.requests.iter().any(is_compressed) {
            true => Some(coder_budget::reserve(&caller, MAXIMUM_BATCH_SIZE).await?),
            false => None,
        };
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
        let (access, caller) = (Access::of(&request), CoderCaller::of(&request));
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
        let accepted = &request.acceptable_compressors;
        let read = match accepted.contains(&Compressor::Zstd.to_proto()) {
            true => {
                let _memory = coder_budget::reserve(&caller, MAXIMUM_BATCH_SIZE).await?;
                let bytes = read
                    .iter()
                    .flatten()
                    .map(|content| content.len() as u64)
                    .sum();
                let compress = |read: Result<Bytes, Error>| compression::compressed(read?);
                let compress_all = move || -> Vec<_> { read.into_iter().map(compress).collect() };
                computing(bytes, compress_all).await?
            }
            false => {
                let as_it_is = |data| (data, Compressor::Identity);
                read.into_iter().map(|read| read.map(as_it_is)).collect()
            }
        };
        let response = |(sent, read): (reapi::Digest, Result<(Bytes, Compressor), Error>)| {
            let (data, compressor, result) = match read {
                Ok((data, compressor)) => (data, compressor, Ok(())),
                Err(error) => (Bytes::new(), Compressor::Identity, Err(error)),
            };
            batch_read_blobs_response::Response {
                digest: Some(sent),
                data,
                status: Some(status_of_read(result)),
                compressor: compressor.to_proto(),
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
        request: Request<SplitBlobRequest>,
    ) -> Result<Response<SplitBlobResponse>, Status> {
        let (answers, access) = (ResponseBudget::of(&request), Access::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let answer = chunks::split(&self.backend, &instance, &request).await?;
        let reservation = reserve(answers, encoded_size(&answer)).await?;
        Ok(with_reservation(Response::new(answer), reservation))
    }

    async fn splice_blob(
        &self,
        request: Request<SpliceBlobRequest>,
    ) -> Result<Response<SpliceBlobResponse>, Status> {
        let (access, _received) = (Access::of(&request), RequestReservation::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let answer = chunks::splice(&self.backend, &instance, request).await?;
        Ok(Response::new(answer))
    }
}

/// Bytes that a blob has in memory, as it comes or decompressed.
fn size_in_batch(request: &batch_update_blobs_request::Request) -> u64 {
    let sent = request.data.len() as u64;
    match (request.compressor, &request.digest) {
        (1.., Some(digest)) => sent.max(u64::try_from(digest.size_bytes).unwrap_or(0)),
        _ => sent,
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
