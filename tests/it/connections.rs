//! One connection carries the calls of many. What one call does must not end the others.

use std::time::Duration;

use bb_remote_execution::{
    proto::bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
    resource::{ReadName, WriteName},
    storage::Content,
};
use futures::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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
