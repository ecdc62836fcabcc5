//! One connection carries the calls of many. What one call does must not end the others.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bb_remote_execution::{
    config::Endpoint,
    daemon,
    digest::{Digest, DigestFunction},
    proto::bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse,
        byte_stream_client::ByteStreamClient,
        byte_stream_server::{ByteStream, ByteStreamServer},
    },
    resource::{ReadName, WriteName},
    storage::{
        Content,
        grpc::{Client, Options},
    },
};
use futures::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use crate::storage::{GIB, Server, content, instance, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_many_streams_early_keeps_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let name = instance("");
    let large = content(1, 4 << 20);
    let digest = sha256(&large);
    let upload = vec![(digest, Content::Bytes(large.into()))];
    server.client().upload(&name, upload).await.unwrap();

    let channel = server.channel();
    // A call that is under way all the time.
    let blob = content(2, 1000);
    let part = |data: &[u8], offset: usize, finish_write| WriteRequest {
        resource_name: WriteName::format(&name, Uuid::from_u128(1), &sha256(&blob)),
        write_offset: offset as i64,
        finish_write,
        data: data.to_vec().into(),
    };
    let (sender, parts) = tokio::sync::mpsc::channel(1);
    sender.send(part(&blob[..500], 0, false)).await.unwrap();
    let mut client = ByteStreamClient::new(channel.clone());
    let writing = tokio::spawn(async move {
        let parts = tokio_stream::wrappers::ReceiverStream::new(parts);
        client.write(parts).await
    });
    // Each leaves behind pieces that are on their way to it.
    stream::iter(0..400)
        .for_each_concurrent(100, |_| {
            let mut client = ByteStreamClient::new(channel.clone());
            let resource_name = ReadName::format(&name, &digest);
            async move {
                let request = ReadRequest {
                    resource_name,
                    ..Default::default()
                };
                let mut pieces = client.read(request).await.unwrap().into_inner();
                assert!(pieces.message().await.unwrap().is_some());
            }
        })
        .await;
    sender.send(part(&blob[500..], 500, true)).await.unwrap();
    let written = writing.await.unwrap().unwrap().into_inner();
    assert_eq!(written.committed_size, 1000);
}

/// One frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_cancels_what_he_has_just_asked_keeps_the_connection() {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let mut peer = tokio::net::TcpStream::connect(server.address)
        .await
        .unwrap();
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(SETTINGS, 0, 0, &[]));
    // :method POST, :scheme http, :path /x (RFC 7541, Appendix A and 6.2.2); no body follows.
    let headers = [0x83, 0x86, 0x04, 2, b'/', b'x'];
    for call in 0..500 {
        let stream = 2 * call + 1;
        sent.extend(frame(HEADERS, 0x4, stream, &headers));
        sent.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
    }
    sent.extend(frame(PING, 0, 0, b"12345678"));
    // In one piece, so that the server reads calls and cancellations together.
    peer.write_all(&sent).await.unwrap();
    let answered = async {
        loop {
            let mut head = [0; 9];
            peer.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            peer.read_exact(&mut payload).await.unwrap();
            match head[3] {
                GOAWAY => panic!("{}", String::from_utf8_lossy(&payload)),
                PING if payload == b"12345678" => return,
                _ => {}
            }
        }
    };
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, answered).await.unwrap();
}

/// Answers with more than anybody needs to hear.
#[derive(Clone, Default)]
struct Excessive;

#[tonic::async_trait]
impl ByteStream for Excessive {
    type ReadStream = stream::BoxStream<'static, Result<ReadResponse, Status>>;

    /// A message of 65 MiB.
    async fn read(&self, _: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let data = vec![7; 65 << 20].into();
        let one = stream::once(async { Ok(ReadResponse { data }) });
        Ok(Response::new(one.boxed()))
    }

    /// Headers of 2 MiB.
    async fn write(
        &self,
        _: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        Err(Status::internal("x".repeat(2 << 20)))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        Ok(Response::new(QueryWriteStatusResponse::default()))
    }
}

/// A peer that bounds nothing itself, and how many connections it has had.
async fn excessive() -> (Endpoint, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    let accepted = Arc::new(AtomicUsize::new(0));
    let counted = accepted.clone();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let incoming = incoming.inspect(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let service = ByteStreamServer::new(Excessive);
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    (endpoint, accepted)
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_beyond_their_limit_end_their_connection_and_another_one_is_made() {
    let (endpoint, accepted) = excessive().await;
    let mut client = ByteStreamClient::new(daemon::connect(&endpoint));
    for round in 0..3 {
        let written = client.write(stream::iter([WriteRequest::default()])).await;
        let status = written.unwrap_err();
        assert!(
            status.message().len() < 10_000,
            "{}",
            status.message().len()
        );
        // Whoever calls at once may meet the end of the old one.
        let mut attempts = 0;
        while let Err(status) = client
            .query_write_status(QueryWriteStatusRequest::default())
            .await
        {
            attempts += 1;
            assert!(attempts < 20, "{round}: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(accepted.load(Ordering::Relaxed) <= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_its_limit_fails_its_call_before_it_is_taken() {
    let (endpoint, _) = excessive().await;
    let client = Client::connect(&endpoint, &endpoint, Options::default());
    let digest = DigestFunction::Sha256.digest_of(b"x");
    let digest = Digest::new(DigestFunction::Sha256, digest.hash_bytes(), 65 << 20);
    let mut pieces = client.stream(&instance(""), &digest, 0, digest.size());
    let error = pieces.next().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("67108864"), "{error}");
}
