//! A CAS that lies, counts, breaks off, or announces small batches, as it is told.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon,
    digest::Digest,
    proto::{
        bytestream::{
            QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse,
            WriteRequest, WriteResponse,
            byte_stream_server::{ByteStream, ByteStreamServer},
        },
        reapi::{
            self, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
            BatchUpdateBlobsResponse, FindMissingBlobsRequest, FindMissingBlobsResponse,
            GetCapabilitiesRequest, GetTreeRequest, GetTreeResponse, ServerCapabilities,
            SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse,
            batch_read_blobs_response, batch_update_blobs_response,
            capabilities_server::{Capabilities, CapabilitiesServer},
            content_addressable_storage_server::{
                ContentAddressableStorage, ContentAddressableStorageServer,
            },
        },
    },
    resource::{Compressor, ReadName},
    storage::grpc::{Client, Options},
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, async_trait, service::Routes};

use super::{ANYWHERE, sha256};

/// How a peer misbehaves.
#[derive(Default)]
pub struct PeerBehaviour {
    pub max_batch: i64,
    /// What it takes in one call without having announced it; 0 is everything.
    pub unannounced_limit: usize,
    /// Calls that it refused for their size.
    pub refused: AtomicUsize,
    /// It never says what it can.
    pub never_says_capabilities: bool,
    /// How often it was asked what it can.
    pub capability_calls: AtomicUsize,
    /// Streams that were opened, and so many of them say nothing.
    pub streams: AtomicUsize,
    pub silent_streams: AtomicUsize,
    /// After the first byte of a blob it sends messages without any.
    pub drips: bool,
    /// Between two pieces of a stream.
    pub pause: Duration,
    /// So many answers have a wrong content.
    pub corrupt: AtomicUsize,
    /// So many calls fail, or break off in the middle.
    pub fail: AtomicUsize,
    pub status: Option<tonic::Code>,
    pub delay: Duration,
    pub blobs: HashMap<Digest, Vec<u8>>,
    pub reads: AtomicUsize,
    pub largest_batch: AtomicUsize,
    /// A write is answered with this.
    pub committed: i64,
    /// It announces compression.
    pub zstd: bool,
    /// What it gives for blobs that are read compressed; nothing is INVALID_ARGUMENT.
    pub compressed: Option<Bytes>,
    pub compressed_reads: AtomicUsize,
}

#[derive(Clone)]
pub struct Peer(pub Arc<PeerBehaviour>);

impl Peer {
    pub async fn start(self) -> (Client, CancellationToken) {
        self.start_with(Options::default()).await
    }

    pub async fn start_with(self, options: Options) -> (Client, CancellationToken) {
        let (endpoint, stop) = self.start_at_endpoint().await;
        let client = Client::connect(&endpoint, &endpoint, options);
        (client, stop)
    }

    pub async fn start_at_endpoint(self) -> (Endpoint, CancellationToken) {
        let address = ListenAddress::Tcp(ANYWHERE);
        let listener = daemon::listen("", "listen", &address, None).unwrap();
        let endpoint = Endpoint::Tcp(listener.address());
        let cas = ContentAddressableStorageServer::new(self.clone());
        let routes = Routes::default()
            .add_service(cas.max_decoding_message_size(64 << 20))
            .add_service(ByteStreamServer::new(self.clone()))
            .add_service(CapabilitiesServer::new(self));
        let stop = CancellationToken::new();
        tokio::spawn(daemon::serve(
            listener,
            routes,
            stop.clone(),
            Duration::ZERO,
        ));
        (endpoint, stop)
    }

    /// As bb_storage does with its maximum_message_size_bytes.
    fn check_size(&self, size: usize) -> Result<(), Status> {
        let limit = self.0.unannounced_limit;
        if limit == 0 || size <= limit {
            return Ok(());
        }
        self.0.refused.fetch_add(1, Ordering::SeqCst);
        Err(Status::invalid_argument(format!(
            "Attempted to read a total of at least {size} bytes, while a maximum of {limit} bytes is permitted"
        )))
    }

    fn take(counter: &AtomicUsize) -> bool {
        let less = |n: usize| n.checked_sub(1);
        counter
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
    }

    fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let mut data = self.0.blobs.get(digest)?.clone();
        if Self::take(&self.0.corrupt) {
            data[0] ^= 1;
        }
        Some(data)
    }

    fn fail(&self) -> Result<(), Status> {
        if Self::take(&self.0.fail) {
            let code = self.0.status.unwrap_or(tonic::Code::Unavailable);
            return Err(Status::new(code, "not now"));
        }
        Ok(())
    }
}

#[async_trait]
impl ContentAddressableStorage for Peer {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        self.fail()?;
        self.check_size(prost::Message::encoded_len(request.get_ref()))?;
        Ok(Response::new(FindMissingBlobsResponse {
            missing_blob_digests: request.into_inner().blob_digests,
        }))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        self.fail()?;
        let size = prost::Message::encoded_len(request.get_ref());
        self.check_size(size)?;
        self.0.largest_batch.fetch_max(size, Ordering::SeqCst);
        let responses = request.into_inner().requests.into_iter();
        Ok(Response::new(BatchUpdateBlobsResponse {
            responses: responses
                .map(|blob| batch_update_blobs_response::Response {
                    digest: blob.digest,
                    status: None,
                })
                .collect(),
        }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        self.0.reads.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(self.0.delay).await;
        self.fail()?;
        let total: i64 = request.get_ref().digests.iter().map(|d| d.size_bytes).sum();
        self.check_size(total as usize)?;
        let digests = request.into_inner().digests.into_iter();
        let mut responses: Vec<_> = digests
            .map(|digest| {
                let parsed = Digest::parse(None, &digest).unwrap();
                let data = self.blob(&parsed);
                let code = if data.is_some() { 0 } else { 5 };
                batch_read_blobs_response::Response {
                    digest: Some(digest),
                    data: data.unwrap_or_default().into(),
                    status: Some(bb_remote_execution::proto::rpc::Status {
                        code,
                        ..Default::default()
                    }),
                    compressor: 0,
                }
            })
            .collect();
        // In an order of its own.
        responses.reverse();
        let response = BatchReadBlobsResponse { responses };
        let size = prost::Message::encoded_len(&response);
        self.0.largest_batch.fetch_max(size, Ordering::SeqCst);
        Ok(Response::new(response))
    }

    type GetTreeStream = BoxStream<'static, Result<GetTreeResponse, Status>>;

    async fn get_tree(
        &self,
        _: Request<GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn split_blob(
        &self,
        _: Request<SplitBlobRequest>,
    ) -> Result<Response<SplitBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn splice_blob(
        &self,
        _: Request<SpliceBlobRequest>,
    ) -> Result<Response<SpliceBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[async_trait]
impl ByteStream for Peer {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        self.0.reads.fetch_add(1, Ordering::SeqCst);
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        if Self::take(&self.0.silent_streams) {
            return Ok(Response::new(stream::pending().boxed()));
        }
        let request = request.into_inner();
        let name = ReadName::parse(&request.resource_name).unwrap();
        if name.compressor == Compressor::Zstd {
            self.0.compressed_reads.fetch_add(1, Ordering::SeqCst);
            let data = self.0.compressed.clone();
            let data = data.ok_or_else(|| Status::invalid_argument("it does not compress"))?;
            let one = stream::once(async { Ok(ReadResponse { data }) });
            return Ok(Response::new(one.boxed()));
        }
        let digest = name.digest;
        let data = self.blob(&digest).ok_or_else(|| Status::not_found(""))?;
        let rest = data[request.read_offset as usize..].to_vec();
        if self.0.drips {
            let nothing = stream::unfold((), |()| async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Vec::new(), ()))
            });
            let drops = stream::iter([rest[..1].to_vec()]).chain(nothing);
            let drops = drops.map(|data| Ok(ReadResponse { data: data.into() }));
            return Ok(Response::new(drops.boxed()));
        }
        let broken = self.fail();
        let sent = if broken.is_err() {
            rest.len() / 2
        } else {
            rest.len()
        };
        let pieces: Vec<_> = rest[..sent]
            .chunks(300_000)
            .map(|piece| {
                Ok(ReadResponse {
                    data: piece.to_vec().into(),
                })
            })
            .chain(broken.err().map(Err))
            .collect();
        let pause = self.0.pause;
        let slowly = stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            piece
        });
        Ok(Response::new(slowly.boxed()))
    }

    async fn write(
        &self,
        _: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        self.fail()?;
        Ok(Response::new(WriteResponse {
            committed_size: self.0.committed,
        }))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[async_trait]
impl Capabilities for Peer {
    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        self.0.capability_calls.fetch_add(1, Ordering::SeqCst);
        if self.0.never_says_capabilities {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(reapi::CacheCapabilities {
                max_batch_total_size_bytes: self.0.max_batch,
                supported_compressors: vec![Compressor::Zstd.to_proto(); usize::from(self.0.zstd)],
                ..Default::default()
            }),
            ..Default::default()
        }))
    }
}

pub fn with_blobs(blobs: &[Vec<u8>], behaviour: PeerBehaviour) -> Peer {
    let blobs = blobs
        .iter()
        .map(|data| (sha256(data), data.clone()))
        .collect();
    Peer(Arc::new(PeerBehaviour { blobs, ..behaviour }))
}
