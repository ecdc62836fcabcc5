//! One connection carries the calls of many. What one call does must not end the others.

use bb_remote_execution::{
    proto::bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
    resource::{ReadName, WriteName},
    storage::Content,
};
use futures::{StreamExt, stream};
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
