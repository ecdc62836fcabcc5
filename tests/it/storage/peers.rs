//! The client against peers that restart, lie, count, or announce small batches.

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
    resource::{Compressor, ReadName, WriteName},
    storage::{
        Content, Error, UploadError, compression,
        grpc::{Client, Options, When},
    },
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, async_trait, service::Routes};

use super::{ANYWHERE, GIB, StoreProcess, content, instance, sha256};

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

#[tokio::test(flavor = "multi_thread")]
async fn identical_reads_at_once_are_one_call() {
    let small = content(1, 1000);
    let peer = with_blobs(
        std::slice::from_ref(&small),
        PeerBehaviour {
            delay: Duration::from_millis(300),
            ..Default::default()
        },
    );
    let (client, _stop) = peer.clone().start().await;
    let digest = sha256(&small);
    let reads = (0..50).map(|_| {
        let client = client.clone();
        tokio::spawn(async move { client.read(&instance(""), &digest, 1000).await.unwrap() })
    });
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap(), small);
    }
    assert_eq!(peer.0.reads.load(Ordering::SeqCst), 1);
    // The one who fetches gives up; the others get it nevertheless.
    let first = {
        let client = client.clone();
        tokio::spawn(async move { client.read(&instance(""), &digest, 1000).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = {
        let client = client.clone();
        tokio::spawn(async move { client.read(&instance(""), &digest, 1000).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    first.abort();
    assert_eq!(second.await.unwrap().unwrap(), small);
    // Twice in one call is one read.
    let before = peer.0.reads.load(Ordering::SeqCst);
    let both = client
        .read_many(&instance(""), &[digest, digest], 1000)
        .await;
    assert!(both.into_iter().all(|read| read.unwrap() == small));
    assert_eq!(peer.0.reads.load(Ordering::SeqCst), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_upload_of_which_a_server_says_that_it_has_a_wrong_part_is_no_fault_of_the_client()
 {
    let data = content(3, 300_000);
    let digest = sha256(&data);
    for (committed, finish_write) in [(0, true), (7, true), (1 << 40, true), (100_000, false)] {
        let peer = with_blobs(
            &[],
            PeerBehaviour {
                committed,
                ..Default::default()
            },
        );
        let (endpoint, _stop) = peer.start_at_endpoint().await;
        let client = Client::connect(&endpoint, &endpoint, Options::default());
        let name = WriteName::format_as(
            &instance(""),
            uuid::Uuid::from_u128(1),
            &digest,
            Compressor::Identity,
        );
        let mut upload = client.forward_upload(&name, digest);
        let sent = if finish_write { data.len() } else { 200_000 };
        let part = Bytes::copy_from_slice(&data[..sent]);
        upload.write(0, part).await.unwrap();
        match upload.finish(finish_write).await.unwrap_err() {
            UploadError::Storage(Error::Internal(text)) if finish_write => {
                for part in [endpoint.to_string(), format!("committed_size {committed},")] {
                    assert!(text.contains(&part), "{text}");
                }
            }
            UploadError::Unfinished { received, size } if !finish_write => {
                assert_eq!((received, size), (100_000, 300_000));
            }
            error => panic!("{committed}: {error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_content_is_asked_for_once_more_and_never_returned() {
    for size in [1000, 2_000_000] {
        let data = content(2, size);
        let digest = sha256(&data);
        for (corrupt, good) in [(1, true), (5, false)] {
            let peer = with_blobs(
                std::slice::from_ref(&data),
                PeerBehaviour {
                    corrupt: corrupt.into(),
                    ..Default::default()
                },
            );
            let (client, _stop) = peer.start().await;
            let read = client.read(&instance(""), &digest, GIB).await;
            match read {
                Ok(read) => assert!(good && read == data),
                Err(error) => assert!(
                    !good && matches!(error, Error::Corrupt { expected, .. } if expected == digest),
                    "{error}"
                ),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_compresses_wrongly_is_read_as_it_is() {
    let data = content(7, 3_000_000);
    let digest = sha256(&data);
    let right = compression::encode_whole(&data).unwrap();
    let bomb = compression::encode_whole(&vec![0; 40_000_000]).unwrap();
    let other = compression::encode_whole(&content(8, 3_000_000)).unwrap();
    for (what, compressed) in [
        ("right", Some(right.clone())),
        ("refused", None),
        ("no Zstandard", Some(data.clone().into())),
        ("a bomb", Some(bomb)),
        ("another content", Some(other)),
        ("cut", Some(right.slice(..right.len() / 2))),
    ] {
        let behaviour = PeerBehaviour {
            zstd: true,
            compressed,
            ..Default::default()
        };
        let peer = with_blobs(std::slice::from_ref(&data), behaviour);
        let options = Options {
            compression: When::Always,
            ..Options::default()
        };
        let (client, _stop) = peer.clone().start_with(options).await;
        let name = instance("");
        let read = client.read(&name, &digest, GIB);
        let read = tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .unwrap();
        assert!(read.unwrap() == data, "{what}");
        assert!(peer.0.compressed_reads.load(Ordering::SeqCst) > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_pass_is_tried_again_and_what_will_not_is_not() {
    let blobs = [content(3, 1000), content(4, 3_000_000)];
    for data in &blobs {
        let peer = with_blobs(
            &blobs,
            PeerBehaviour {
                fail: 2.into(),
                committed: data.len() as i64,
                ..Default::default()
            },
        );
        let (client, _stop) = peer.clone().start().await;
        let name = instance("");
        let digest = sha256(data);
        assert_eq!(&client.read(&name, &digest, GIB).await.unwrap(), data);
        peer.0.fail.store(3, Ordering::SeqCst);
        let upload = vec![(digest, Content::Bytes(data.clone().into()))];
        client.upload(&name, upload).await.unwrap();

        let peer = with_blobs(
            &blobs,
            PeerBehaviour {
                fail: 1000.into(),
                status: Some(tonic::Code::PermissionDenied),
                ..Default::default()
            },
        );
        let (client, _stop) = peer.clone().start().await;
        let error = client.read(&name, &digest, GIB).await.unwrap_err();
        assert!(error.to_string().contains("not now"), "{error}");
        assert_eq!(peer.0.reads.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_stay_below_what_the_server_announces() {
    let blobs: Vec<_> = (0..300).map(|i| content(i, i as usize * 400)).collect();
    for (max_batch, largest) in [(0, 4 << 20), (64 << 10, 64 << 10), (1 << 30, 4 << 20)] {
        let peer = with_blobs(
            &blobs,
            PeerBehaviour {
                max_batch,
                // As some servers answer always.
                committed: -1,
                ..Default::default()
            },
        );
        let (client, _stop) = peer.clone().start().await;
        let name = instance("some/name");
        let upload = blobs
            .iter()
            .map(|data| (sha256(data), Content::Bytes(data.clone().into())));
        client.upload(&name, upload.collect()).await.unwrap();
        let sent = peer.0.largest_batch.swap(0, Ordering::SeqCst);
        assert!(sent <= largest && sent > largest / 2, "{sent}");
        let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
        let read = client.read_many(&name, &digests, GIB).await;
        for (data, read) in blobs.iter().zip(read) {
            assert_eq!(&read.unwrap(), data);
        }
        let received = peer.0.largest_batch.load(Ordering::SeqCst);
        assert!(received <= largest && received > largest / 2, "{received}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_missing_blob_is_told_on_its_own() {
    let there = content(1, 100);
    let peer = with_blobs(std::slice::from_ref(&there), PeerBehaviour::default());
    let (client, _stop) = peer.start().await;
    let digests = [
        sha256(b"x"),
        sha256(&there),
        sha256(&content(9, 2_000_000)),
        sha256(b""),
    ];
    let read = client.read_many(&instance(""), &digests, GIB).await;
    let missing: Vec<Digest> = read
        .iter()
        .filter_map(|read| match read {
            Err(Error::Missing(missing)) => Some(missing.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(missing, [digests[0], digests[2]]);
    assert_eq!(read[1].as_ref().unwrap(), &there);
    assert_eq!(read[3].as_ref().unwrap(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_killed_and_started_again_is_not_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = StoreProcess::start(directory.path(), ANYWHERE, GIB);
    let address = child.address;
    let client = Client::connect(&child.endpoint(), &child.endpoint(), Options::default());
    let stop = CancellationToken::new();
    let workers: Vec<_> = (0..8u64)
        .map(|worker| {
            let (client, stop) = (client.clone(), stop.clone());
            tokio::spawn(async move {
                let name = instance("");
                let mut rounds = 0;
                for i in 0.. {
                    let blobs: Vec<_> = [10, 1000, 90_000, 2_000_000]
                        .map(|size| content(worker << 32 | i, size))
                        .into();
                    let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
                    let upload = blobs
                        .iter()
                        .map(|data| (sha256(data), Content::Bytes(data.clone().into())));
                    client.upload(&name, upload.collect()).await.unwrap();
                    for (data, read) in blobs
                        .iter()
                        .zip(client.read_many(&name, &digests, GIB).await)
                    {
                        assert_eq!(&read.unwrap(), data);
                    }
                    rounds += 1;
                    if stop.is_cancelled() {
                        break;
                    }
                }
                rounds
            })
        })
        .collect();
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(child);
        tokio::time::sleep(Duration::from_millis(300)).await;
        child = StoreProcess::start(directory.path(), address, GIB);
    }
    stop.cancel();
    for worker in workers {
        assert!(worker.await.unwrap() > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_no_cas_is_told_apart() {
    let nowhere = Endpoint::Unix("/nonexistent/socket".into());
    let client = Client::connect(&nowhere, &nowhere, Options::default());
    let error = client.probe().await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    let (client, _stop) = with_blobs(&[], PeerBehaviour::default()).start().await;
    client.probe().await.unwrap();
}
