//! What a listener does with callers that are slow, silent or greedy: `daemon::serve`.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon::{self, Channel, ServerLimits, Services},
    proto::{
        bytestream::{
            QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse,
            WriteRequest, WriteResponse,
            byte_stream_client::ByteStreamClient,
            byte_stream_server::{ByteStream, ByteStreamServer},
        },
        reapi::{FindMissingBlobsRequest, content_addressable_storage_client},
    },
    storage::{Backend, embedded::Store, serve},
};
use futures::stream::{self, BoxStream, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status, Streaming,
    client::GrpcService,
    codec::CompressionEncoding,
    codegen::{Body, Bytes, StdError},
};

const MIB: usize = 1 << 20;

/// Answers as it is told by resource names, and counts what it has made.
#[derive(Clone, Default)]
struct Mock {
    made: Arc<AtomicUsize>,
    parked: Arc<AtomicUsize>,
    go_on: CancellationToken,
}

#[tonic::async_trait]
impl ByteStream for Mock {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    /// A stream of as many MiB as the offset says.
    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let made = self.made.clone();
        let pieces = stream::iter(0..request.get_ref().read_offset).map(move |_| {
            made.fetch_add(MIB, Ordering::Relaxed);
            Ok(ReadResponse {
                data: vec![0; MIB].into(),
            })
        });
        Ok(Response::new(pieces.boxed()))
    }

    /// Fails with the name of the first message, again and again in its text.
    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let first = request.into_inner().message().await?.unwrap_or_default();
        Err(Status::invalid_argument(
            first.resource_name.repeat(200_000),
        ))
    }

    /// Waits until it is told to go on.
    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        drop(request);
        self.parked.fetch_add(1, Ordering::Relaxed);
        self.go_on.cancelled().await;
        Ok(Response::new(QueryWriteStatusResponse::default()))
    }
}

struct Server {
    mock: Mock,
    address: SocketAddr,
    _stop: tokio_util::sync::DropGuard,
}

impl Server {
    fn start(limits: ServerLimits) -> Self {
        let mock = Mock::default();
        let services = Services::default().add(ByteStreamServer::new(mock.clone()));
        let (address, stop) = serve(services, limits);
        Server {
            mock,
            address,
            _stop: stop.drop_guard(),
        }
    }

    fn client(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(channel(self.address))
    }

    /// Calls of one client that wait.
    async fn parked<T>(&self, client: ByteStreamClient<T>, count: usize) -> Parked
    where
        T: GrpcService<tonic::body::Body> + Clone + Send + 'static,
        T::Future: Send,
        T::Error: Into<StdError>,
        T::ResponseBody: Body<Data = Bytes> + Send + 'static,
        <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    {
        let before = self.mock.parked.load(Ordering::Relaxed);
        let call = || {
            let mut client = client.clone();
            tokio::spawn(async move {
                let answer = client.query_write_status(QueryWriteStatusRequest::default());
                answer.await.map(drop)
            })
        };
        let calls = (0..count).map(|_| call()).collect();
        while self.mock.parked.load(Ordering::Relaxed) < before + count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Parked {
            calls,
            go_on: self.mock.go_on.clone(),
        }
    }

    /// A client of HTTP/2 that takes nothing of what it asks for.
    async fn greedy(&self, calls: u32, mebibytes: u8) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS_INITIAL_WINDOW_SIZE is 0.
        sent.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]));
        // ReadRequest.read_offset, behind a flag and its length.
        let message = [0, 0, 0, 0, 2, 0x10, mebibytes];
        for i in 0..calls {
            sent.extend(frame(1, 4, 1 + 2 * i, &headers()));
            sent.extend(frame(0, 1, 1 + 2 * i, &message));
        }
        stream.write_all(&sent).await.unwrap();
        stream
    }
}

struct Parked {
    calls: Vec<tokio::task::JoinHandle<Result<(), Status>>>,
    go_on: CancellationToken,
}

impl Parked {
    /// They were not disturbed.
    async fn succeed(self) {
        self.go_on.cancel();
        for call in self.calls {
            call.await.unwrap().unwrap();
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, data: &[u8]) -> Vec<u8> {
    let mut frame = (data.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(data);
    frame
}

/// HPACK: literals that are not indexed.
fn headers() -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/google.bytestream.ByteStream/Read"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

fn serve(services: Services, limits: ServerLimits) -> (SocketAddr, CancellationToken) {
    let anywhere = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
    let listener = daemon::listen("", "listen", &anywhere, None).unwrap();
    let address = listener.address().parse().unwrap();
    let stop = CancellationToken::new();
    let routes = services.observable(&stop).unwrap();
    let serving = daemon::serve_within(listener, routes, limits, stop.clone(), Duration::ZERO);
    tokio::spawn(async move { serving.await.unwrap() });
    (address, stop)
}

fn channel(address: SocketAddr) -> Channel {
    daemon::connect(&Endpoint::Tcp(address.to_string()))
}

async fn read(client: &mut ByteStreamClient<Channel>, mebibytes: i64) -> usize {
    let request = ReadRequest {
        read_offset: mebibytes,
        ..Default::default()
    };
    let mut pieces = client.read(request).await.unwrap().into_inner();
    let mut length = 0;
    while let Some(piece) = pieces.message().await.unwrap() {
        length += piece.data.len();
    }
    length
}

/// Reads until the server closes the connection.
async fn until_closed(stream: &mut TcpStream) {
    // A reset is as good.
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_message_fails_its_own_call_and_no_other_on_its_connection() {
    let server = Server::start(ServerLimits::default());
    // As clients come: with hyper's limit of headers, not with ours.
    let plain =
        tonic::transport::Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let mut client = ByteStreamClient::new(plain.connect().await.unwrap());
    let parked = server.parked(client.clone(), 1).await;
    for text in ["x", "\n", "ä", "🦀 "] {
        let request = WriteRequest {
            resource_name: text.to_owned(),
            ..Default::default()
        };
        let status = client.write(stream::iter([request])).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let (kept, _) = status.message().split_once("... (shortened)").unwrap();
        assert!(text.repeat(4000).starts_with(kept) && kept.len() > 500);
    }
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_too_large_fail_their_own_call_and_are_named() {
    const METADATA: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";
    let server = Server::start(ServerLimits::default());
    let client = server.client();
    let parked = server.parked(client.clone(), 1).await;
    let read = |length: usize| {
        let mut client = client.clone();
        async move {
            let mut request = Request::new(ReadRequest::default());
            let value = tonic::metadata::MetadataValue::from_bytes(&vec![7; length]);
            request.metadata_mut().insert_bin(METADATA, value);
            let mut pieces = client.read(request).await?.into_inner();
            pieces.message().await.map(drop)
        }
    };
    read(10_000).await.unwrap();
    let status = read(20_000).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    for words in ["of the 16384", METADATA, "alone has 26667"] {
        assert!(status.message().contains(words), "{status}");
    }
    // What h2 answers by itself is no status, but one call's.
    let status = read(150_000).await.unwrap_err();
    assert!(status.message().contains("431"), "{status}");
    read(10_000).await.unwrap();
    // On the same connection.
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_are_not_made_and_others_get_theirs() {
    let limits = ServerLimits {
        answers: 64 << 20,
        response_bytes_per_connection: 16 << 20,
        ..ServerLimits::default()
    };
    let server = Server::start(limits);
    let mut greedy = Vec::new();
    for _ in 0..3 {
        // 1.2 GiB in all.
        greedy.push(server.greedy(400, 1).await);
    }
    let made = || server.mock.made.load(Ordering::Relaxed);
    // Of one caller, who leaves half.
    while made() < 24 * MIB {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut client = server.client();
    for _ in 0..10 {
        assert_eq!(read(&mut client, 4).await, 4 * MIB);
    }
    // A message can be made on each thread before it is counted.
    let threads = tokio::runtime::Handle::current().metrics().num_workers();
    assert!(made() <= (3 * 16 + 40 + 3 * threads) * MIB, "{}", made());
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_take_nothing_from_what_answers_may_take() {
    let server = Server::start(ServerLimits {
        answers: 8 << 20,
        response_bytes_per_connection: 8 << 20,
        received: 8 << 20,
        ..ServerLimits::default()
    });
    let mut client = server.client();
    let parked = server.parked(client.clone(), 2000).await;
    assert_eq!(read(&mut client, 20).await, 20 * MIB);
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_peer_reads_nothing_of_what_it_asked_for_is_closed() {
    let server = Server::start(ServerLimits {
        stalled: Duration::from_millis(50),
        stalled_when_short: Duration::from_millis(50),
        ..ServerLimits::default()
    });
    let parked = server.parked(server.client(), 1).await;
    let mut greedy = server.greedy(1, 1).await;
    until_closed(&mut greedy).await;
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_peer_is_gone_is_closed_and_others_are_not() {
    let server = Server::start(ServerLimits {
        ping_interval: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(200),
        ..ServerLimits::default()
    });
    let parked = server.parked(server.client(), 1).await;
    // It has a call under way, and answers no PING.
    let mut gone = server.greedy(1, 1).await;
    let closed = until_closed(&mut gone);
    tokio::time::timeout(Duration::from_secs(20), closed)
        .await
        .unwrap();
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_says_nothing_or_calls_nothing_is_closed() {
    let server = Server::start(ServerLimits {
        handshake: Duration::from_millis(20),
        first_call: Duration::from_millis(60),
        ..ServerLimits::default()
    });
    let parked = server.parked(server.client(), 1).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = frame(4, 0, 0, &[]);
    // HEADERS without END_HEADERS.
    let unended = frame(1, 0, 1, &headers());
    for said in [
        Vec::new(),
        preface[..10].to_vec(),
        [&preface[..], &settings].concat(),
        [&preface[..], &settings, &unended].concat(),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(&said).await.unwrap();
        until_closed(&mut stream).await;
    }
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_idle_connection_was_closed_does_not_notice() {
    let server = Server::start(ServerLimits {
        idle: Duration::from_millis(20),
        ..ServerLimits::default()
    });
    let mut client = server.client();
    for _ in 0..5 {
        assert_eq!(read(&mut client, 1).await, MIB);
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_give_way_to_those_that_call() {
    let server = Server::start(ServerLimits {
        connections: 4,
        ..ServerLimits::default()
    });
    let parked = server.parked(server.client(), 1).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    assert_eq!(read(&mut server.client(), 1).await, MIB);
    for stream in silent.iter_mut().take(10) {
        until_closed(stream).await;
    }
    parked.succeed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_beyond_what_a_connection_may_have_are_refused_and_the_others_go_on() {
    let server = Server::start(ServerLimits {
        // Two for a caller, so that as many remain.
        calls: 4,
        ..ServerLimits::default()
    });
    let parked = server.parked(server.client(), 1).await;
    let others = server.parked(server.client(), 1).await;
    let refused = server.client().read(ReadRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::ResourceExhausted);
    parked.succeed().await;
    others.succeed().await;
    assert_eq!(read(&mut server.client(), 1).await, MIB);
}

type Cas = content_addressable_storage_client::ContentAddressableStorageClient<Channel>;

fn store() -> (tempfile::TempDir, Cas, CancellationToken) {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(directory.path(), 1 << 30).unwrap());
    let services = serve::add_to(Services::default(), &Backend::Embedded(store.clone()));
    let (address, stop) = serve(services, ServerLimits::default());
    (directory, Cas::new(channel(address)), stop)
}

fn digests(count: usize) -> FindMissingBlobsRequest {
    let digest = bb_remote_execution::digest::DigestFunction::Sha256
        .digest_of(b"absent")
        .to_proto();
    FindMissingBlobsRequest {
        blob_digests: vec![digest; count],
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_messages_are_taken_within_the_same_limits_and_answers_are_plain() {
    let (_directory, client, _stop) = store();
    let mut client = client.send_compressed(CompressionEncoding::Gzip);
    let answer = client.find_missing_blobs(digests(1000)).await.unwrap();
    assert!(answer.metadata().get("grpc-encoding").is_none());
    assert_eq!(answer.get_ref().missing_blob_digests.len(), 1000);
    // 19 MB that are compressed to some 100 kB.
    let status = client
        .find_missing_blobs(digests(260_000))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(client.find_missing_blobs(digests(1)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_refused_with_what_to_do() {
    let (_directory, mut client, _stop) = store();
    let status = client
        .find_missing_blobs(digests(260_000))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    for words in ["larger than the 16777216", "fewer digests in one call"] {
        assert!(status.message().contains(words), "{status}");
    }
    assert!(client.find_missing_blobs(digests(1)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_does_not_end_and_a_stream_that_does_not_go_on_are_given_up() {
    let server = Server::start(ServerLimits {
        message: Duration::from_millis(50),
        pause: Duration::from_millis(200),
        ..ServerLimits::default()
    });
    // The head of a message of nine bytes, and its first one; and nothing at all.
    for sent in [&[0, 0, 0, 0, 9, 1][..], &[]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        begin.extend(frame(4, 0, 0, &[]));
        begin.extend(frame(1, 4, 1, &headers()));
        begin.extend(frame(0, 0, 1, sent));
        stream.write_all(&begin).await.unwrap();
        let answered = async {
            loop {
                let mut head = [0; 9];
                stream.read_exact(&mut head).await.unwrap();
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                let mut data = vec![0; length as usize];
                stream.read_exact(&mut data).await.unwrap();
                // HEADERS that end the stream.
                if head[3] == 1 && head[4] & 1 == 1 {
                    return;
                }
            }
        };
        let answered = tokio::time::timeout(Duration::from_secs(10), answered).await;
        assert!(answered.is_ok(), "{sent:?}");
    }
}
