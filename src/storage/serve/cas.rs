//! ContentAddressableStorage.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use futures::stream::{self, BoxStream, StreamExt};
use prost::Message;
use tonic::{Request, Response, Status, async_trait};

use super::{
    LARGEST_ANSWER, MAX_BATCH_TOTAL_SIZE, digest, function, instance, room, status_of, weight,
};
use crate::{
    daemon::{BudgetReservation, RequestReservation, ResponseBudget, with_reservation},
    digest::{Digest, DigestFunction},
    proto::{
        self,
        reapi::{
            self, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
            BatchUpdateBlobsResponse, Directory, FindMissingBlobsRequest, FindMissingBlobsResponse,
            GetTreeRequest, GetTreeResponse, SpliceBlobRequest, SpliceBlobResponse,
            SplitBlobRequest, SplitBlobResponse, batch_read_blobs_response,
            batch_update_blobs_response,
            content_addressable_storage_server::ContentAddressableStorage,
        },
    },
    storage::{Error, blocking, embedded::Store},
};

pub struct CasService {
    pub store: Arc<Store>,
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
        let request = request.into_inner();
        instance(&request.instance_name)?;
        let function = function(request.digest_function)?;
        let mut missing_blob_digests = Vec::new();
        for blob in request.blob_digests {
            let digest = Digest::parse(function, &blob)?;
            if !self.store.contains(&digest) {
                missing_blob_digests.push(blob);
            }
        }
        let missing = FindMissingBlobsResponse {
            missing_blob_digests,
        };
        let room = room(answers, weight(&missing)).await?;
        Ok(with_reservation(Response::new(missing), room))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let request = request.into_inner();
        instance(&request.instance_name)?;
        let function = function(request.digest_function)?;
        let total = request.requests.iter().map(|blob| blob.data.len() as u64);
        check_batch(total.sum())?;
        let answered = request
            .requests
            .iter()
            .map(|blob| answer_weight(blob.digest.as_ref(), 0));
        let room = room(answers, check_answer(answered.sum())?).await?;
        let store = self.store.clone();
        let responses = blocking(move || update(&store, function, request.requests)).await?;
        let mut answer = BatchUpdateBlobsResponse { responses };
        if weight(&answer) > LARGEST_ANSWER {
            let statuses = answer.responses.iter_mut().map(|blob| &mut blob.status);
            statuses.flatten().for_each(leave_out_the_reason);
        }
        Ok(with_reservation(Response::new(answer), room))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let request = request.into_inner();
        instance(&request.instance_name)?;
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
        let room = room(answers, check_answer(answered.sum())?).await?;
        let store = self.store.clone();
        let responses = blocking(move || {
            let read = |(digest, sent): (&Digest, reapi::Digest)| {
                let (data, result) = match store.read(digest, MAX_BATCH_TOTAL_SIZE) {
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
            digests.iter().zip(request.digests).map(read).collect()
        });
        let responses = responses.await?;
        let mut answer = BatchReadBlobsResponse { responses };
        if weight(&answer) > LARGEST_ANSWER {
            let statuses = answer.responses.iter_mut().map(|blob| &mut blob.status);
            statuses.flatten().for_each(leave_out_the_reason);
        }
        Ok(with_reservation(Response::new(answer), room))
    }

    type GetTreeStream = BoxStream<'static, Result<GetTreeResponse, Status>>;

    async fn get_tree(
        &self,
        request: Request<GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        let answers = ResponseBudget::of(&request);
        let request = request.into_inner();
        instance(&request.instance_name)?;
        let root = digest(request.digest_function, request.root_digest.as_ref())?;
        let page_size = match usize::try_from(request.page_size) {
            Ok(0) => MOST_PER_PAGE,
            Ok(size) => size.min(MOST_PER_PAGE),
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
        let mut walk = Walk::start(self.store.clone(), root, page_size);
        let first_room = room(answers.clone(), LARGEST_PAGE).await?;
        // The first page is made before anything is answered, so that its errors are the call's.
        let (first, walk) = blocking(move || {
            walk.skip(skipped)?;
            let page = walk.page()?;
            Ok::<_, Status>((page, walk))
        })
        .await??;
        // A page's room is held until the next one is asked for.
        let state = (walk, answers, None::<BudgetReservation>);
        let rest = stream::try_unfold(state, |(mut walk, answers, before)| async move {
            drop(before);
            if walk.is_done() {
                return Ok(None);
            }
            let held = room(answers.clone(), LARGEST_PAGE).await?;
            let page = blocking(move || walk.page().map(|page| (page, walk)));
            let (page, walk) = page.await??;
            Ok(Some((page, (walk, answers, held))))
        });
        let pages = stream::once(async { Ok(first) }).chain(rest);
        Ok(with_reservation(Response::new(pages.boxed()), first_room))
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
    if total > MAX_BATCH_TOTAL_SIZE {
        return Err(Status::invalid_argument(format!(
            "a batch of {total} bytes is larger than max_batch_total_size_bytes, which is {MAX_BATCH_TOTAL_SIZE}; make smaller batches, or use ByteStream"
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
fn leave_out_the_reason(status: &mut proto::rpc::Status) {
    status.message.clear();
}

fn check_answer(weight: u64) -> Result<u64, Status> {
    if weight > LARGEST_ANSWER {
        return Err(Status::invalid_argument(format!(
            "the answer for a batch of so many blobs would have {weight} bytes with their digests, and gRPC clients take {LARGEST_ANSWER}; make smaller batches"
        )));
    }
    Ok(weight)
}

fn update(
    store: &Store,
    function: Option<DigestFunction>,
    requests: Vec<reapi::batch_update_blobs_request::Request>,
) -> Vec<batch_update_blobs_response::Response> {
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
    let mut results = store.put(&blobs).into_iter();
    for response in &mut responses {
        if response.status.is_none() {
            response.status = results.next().map(status_of);
        }
    }
    responses
}

const MOST_PER_PAGE: usize = 10_000;

/// A page is ended before its directories are this large together, unless it has only one.
const PAGE_SIZE: u64 = 2 << 20;

/// Larger messages are no Directories that a client could read.
const LARGEST_DIRECTORY: u64 = 4 << 20;
const LARGEST_PAGE: u64 = LARGEST_DIRECTORY;

/// Distinct directories of one tree; a walk keeps 80 bytes for each.
const MOST_DIRECTORIES: usize = 1 << 20;

/// A walk over a tree, breadth first, each distinct directory once: a directory that occurs in many
/// places costs no more than one that occurs in one.
struct Walk {
    store: Arc<Store>,
    function: DigestFunction,
    seen: HashSet<Digest>,
    queue: VecDeque<Digest>,
    page_size: usize,
    returned: usize,
    root: Option<Digest>,
}

impl Walk {
    fn start(store: Arc<Store>, root: Digest, page_size: usize) -> Self {
        Walk {
            store,
            function: root.function(),
            seen: HashSet::from([root]),
            queue: VecDeque::from([root]),
            page_size,
            returned: 0,
            root: Some(root),
        }
    }

    fn is_done(&self) -> bool {
        self.queue.is_empty()
    }

    /// Passes over what earlier pages had.
    fn skip(&mut self, count: usize) -> Result<(), Status> {
        while self.returned < count && !self.is_done() {
            self.step()?;
        }
        Ok(())
    }

    fn page(&mut self) -> Result<GetTreeResponse, Status> {
        let mut directories = Vec::new();
        let mut size = 0;
        while let Some(next) = self.queue.front() {
            let full = size + next.size() > PAGE_SIZE && !directories.is_empty();
            if full || directories.len() >= self.page_size {
                break;
            }
            if let Some((directory, length)) = self.step()? {
                size += length as u64;
                directories.push(directory);
            }
        }
        let next_page_token = if self.is_done() {
            String::new()
        } else {
            self.returned.to_string()
        };
        Ok(GetTreeResponse {
            directories,
            next_page_token,
        })
    }

    /// The next directory with its length. REAPI: what is missing is left out, except the root.
    fn step(&mut self) -> Result<Option<(Directory, usize)>, Status> {
        let Some(digest) = self.queue.pop_front() else {
            return Ok(None);
        };
        let root = self.root.take();
        let content = match self.store.read(&digest, LARGEST_DIRECTORY) {
            Ok(content) => content,
            Err(Error::Missing(_)) if root.is_none() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let length = content.len();
        let directory = Directory::decode(content).map_err(|error| {
            Status::invalid_argument(format!("blob {digest} is no Directory: {error}"))
        })?;
        for child in &directory.directories {
            let child = Digest::parse_required(Some(self.function), child.digest.as_ref())
                .map_err(|error| {
                    Status::invalid_argument(format!("Directory {digest} is ill-formed: {error}"))
                })?;
            if self.seen.insert(child) {
                self.queue.push_back(child);
            }
        }
        if self.seen.len() > MOST_DIRECTORIES {
            return Err(Status::invalid_argument(format!(
                "the tree has more than {MOST_DIRECTORIES} distinct directories"
            )));
        }
        self.returned += 1;
        Ok(Some((directory, length)))
    }
}
