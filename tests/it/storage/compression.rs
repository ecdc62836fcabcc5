//! Compressed blobs, beyond what the API's rules say of any server: uploads that go on, and what travels.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon::Channel,
    proto::bytestream::{
        QueryWriteStatusRequest, WriteRequest, byte_stream_client::ByteStreamClient,
    },
    resource::{Compressor, WriteName},
    storage::{
        Content, compression,
        grpc::{Client, Options, When},
    },
};
use bytes::Bytes;
use futures::stream;
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use super::{GIB, Server, content, instance, sha256};

fn text(seed: u64, size: usize) -> Bytes {
    let line: Vec<u8> = content(seed, 100)
        .iter()
        .map(|byte| b'a' + byte % 26)
        .collect();
    line.into_iter().cycle().take(size).collect()
}

/// Counts the bytes that pass in either direction.
pub async fn counting(server: &Server) -> (Endpoint, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    let (count, target) = (Arc::new(AtomicU64::new(0)), server.address);
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(target).await.unwrap();
            let ((mut a, mut b), (mut c, mut d)) = (client.into_split(), server.into_split());
            for copying in [
                tokio::spawn(async move { tokio::io::copy(&mut a, &mut d).await }),
                tokio::spawn(async move { tokio::io::copy(&mut c, &mut b).await }),
            ] {
                let counted = counted.clone();
                tokio::spawn(async move {
                    let copied = copying.await.unwrap().unwrap_or(0);
                    counted.fetch_add(copied, Ordering::SeqCst);
                });
            }
        }
    });
    (endpoint, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn between_hosts_what_can_be_compressed_is_and_a_loopback_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let blobs: Vec<Bytes> = [2_000, 60_000, 3_000_000]
        .into_iter()
        .enumerate()
        .map(|(seed, size)| text(seed as u64, size))
        .collect();
    let total: u64 = blobs.iter().map(|blob| blob.len() as u64).sum();
    for (round, compression) in [When::Always, When::BetweenHosts, When::Never]
        .into_iter()
        .enumerate()
    {
        let (endpoint, count) = counting(&server).await;
        let options = Options {
            compression,
            ..Options::default()
        };
        let client = Client::connect(&endpoint, &endpoint, options);
        let name = instance("");
        let fresh = blobs.iter().map(|blob| {
            let mut blob = blob.to_vec();
            blob[0] = round as u8;
            Bytes::from(blob)
        });
        let fresh: Vec<_> = fresh.map(|blob| (sha256(&blob), blob)).collect();
        let uploads = fresh
            .iter()
            .map(|(digest, blob)| (*digest, Content::Bytes(blob.clone())));
        client.upload(&name, uploads.collect()).await.unwrap();
        let digests: Vec<_> = fresh.iter().map(|(digest, _)| *digest).collect();
        let read = client.read_many(&name, &digests, GIB).await;
        for ((_, blob), read) in fresh.iter().zip(read) {
            assert_eq!(read.unwrap(), *blob);
        }
        drop(client);
        // Counted when the connections have ended.
        let mut passed = 0;
        for _ in 0..1_000 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            passed = count.load(Ordering::SeqCst);
            if passed > 0 && (compression == When::Always || passed > 2 * total) {
                break;
            }
        }
        match compression {
            When::Always => assert!(0 < passed && passed < total / 4, "{passed}"),
            _ => assert!(passed > 2 * total, "{passed}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_upload_goes_on_at_a_byte_of_the_blob_with_a_new_frame() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let mut client = ByteStreamClient::<Channel>::new(server.channel());
    let blob = text(1, 1_000_000);
    let digest = sha256(&blob);
    let name = WriteName::format_as(&instance("a"), Uuid::new_v4(), &digest, Compressor::Zstd);
    let message = |offset: i64, data: Bytes, finish_write| WriteRequest {
        resource_name: name.clone(),
        write_offset: offset,
        finish_write,
        data,
    };
    // One frame of the first 400,000 bytes, and then the connection is lost.
    let first = compression::encode_whole(&blob[..400_000]).unwrap();
    let cut = client.write(stream::iter([message(0, first, false)])).await;
    assert_eq!(cut.unwrap_err().code(), tonic::Code::InvalidArgument);
    let status = client.query_write_status(QueryWriteStatusRequest {
        resource_name: name.clone(),
    });
    let status = status.await.unwrap().into_inner();
    assert_eq!((status.committed_size, status.complete), (400_000, false));
    // Offsets of further messages count compressed bytes.
    let rest = compression::encode_whole(&blob[400_000..]).unwrap();
    let (one, other) = (rest.slice(..rest.len() / 2), rest.slice(rest.len() / 2..));
    let after = 400_000 + one.len() as i64;
    let parts = [
        message(400_000, one.clone(), false),
        message(after + 1, other.clone(), true),
    ];
    let refused = client.write(stream::iter(parts)).await.unwrap_err();
    assert!(refused.message().contains("write_offset"), "{refused}");
    // What was decompressed until then was received.
    let status = client.query_write_status(QueryWriteStatusRequest {
        resource_name: name.clone(),
    });
    let received = status.await.unwrap().into_inner().committed_size;
    assert!((400_000..1_000_000).contains(&received), "{received}");
    let rest = compression::encode_whole(&blob[received as usize..]).unwrap();
    let length = rest.len() as i64;
    let answer = client
        .write(stream::iter([message(received, rest, true)]))
        .await;
    assert_eq!(
        answer.unwrap().into_inner().committed_size,
        received + length
    );
    assert_eq!(server.store.read(&digest, GIB).unwrap(), blob);
}
