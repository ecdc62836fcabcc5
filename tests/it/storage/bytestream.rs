//! ByteStream, call by call.

use bb_remote_execution::{
    daemon::Channel,
    digest::{Digest, DigestFunction},
    proto::bytestream::{
        QueryWriteStatusRequest, ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient,
    },
    resource::{ReadName, WriteName},
};
use futures::{StreamExt, stream};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{ANYWHERE, GIB, Server, StoreProcess, content, instance, sha256};

type Bytes = ByteStreamClient<Channel>;

async fn start() -> (tempfile::TempDir, Server, Bytes) {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let client = Bytes::new(server.channel());
    (directory, server, client)
}

#[track_caller]
fn refused<T>(answer: Result<T, Status>, code: Code, words: &str) {
    let status = answer.err().expect("an error");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(words), "{status}");
}

fn fresh_name(digest: &Digest) -> String {
    WriteName::format(&instance("some/where"), Uuid::new_v4(), digest)
}

fn part(name: &str, offset: usize, data: &[u8], finish_write: bool) -> WriteRequest {
    WriteRequest {
        resource_name: name.to_owned(),
        write_offset: offset as i64,
        finish_write,
        data: data.to_vec().into(),
    }
}

async fn write(client: &mut Bytes, parts: Vec<WriteRequest>) -> Result<i64, Status> {
    let answer = client.write(stream::iter(parts)).await?;
    Ok(answer.get_ref().committed_size)
}

async fn read(client: &mut Bytes, name: &str, offset: i64, limit: i64) -> Result<Vec<u8>, Status> {
    let request = ReadRequest {
        resource_name: name.to_owned(),
        read_offset: offset,
        read_limit: limit,
    };
    let mut pieces = client.read(request).await?.into_inner();
    let mut data = Vec::new();
    while let Some(piece) = pieces.message().await? {
        assert!(piece.data.len() <= 2 << 20);
        data.extend_from_slice(&piece.data);
    }
    Ok(data)
}

async fn status(client: &mut Bytes, name: &str) -> (i64, bool) {
    let request = QueryWriteStatusRequest {
        resource_name: name.to_owned(),
    };
    let answer = client.query_write_status(request).await.unwrap();
    (answer.get_ref().committed_size, answer.get_ref().complete)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_part_of_a_blob_can_be_read_under_any_instance_name() {
    let (_directory, _server, mut client) = start().await;
    for (size, function) in [
        (0, "sha256"),
        (100, "blake3"),
        (3_000_001, "sha256"),
        (3_000_001, "blake3"),
    ] {
        let data = content(9, size);
        let known = if function == "blake3" {
            DigestFunction::Blake3
        } else {
            DigestFunction::Sha256
        };
        let digest = known.digest_of(&data);
        let parts: Vec<_> = data
            .chunks(70_000)
            .enumerate()
            .map(|(i, chunk)| {
                let at = i * 70_000;
                part(&fresh_name(&digest), at, chunk, at + chunk.len() == size)
            })
            .enumerate()
            .map(|(i, part)| WriteRequest {
                // Only the first one needs it.
                resource_name: if i == 0 {
                    part.resource_name
                } else {
                    String::new()
                },
                ..part
            })
            .collect();
        if !parts.is_empty() {
            assert_eq!(write(&mut client, parts).await.unwrap(), size as i64);
        }
        let name = ReadName::format(&instance("other"), &digest);
        let long = format!("blobs/{function}/{digest}");
        for name in [&name, &long] {
            assert_eq!(read(&mut client, name, 0, 0).await.unwrap(), data);
        }
        for (offset, limit) in [
            (0, 1),
            (7, 0),
            (99, 1_000_000),
            (262_143, 2),
            (2_999_999, 500),
        ] {
            if offset > size {
                continue;
            }
            let end = if limit == 0 {
                size
            } else {
                (offset + limit).min(size)
            };
            let part = read(&mut client, &name, offset as i64, limit as i64).await;
            assert_eq!(part.unwrap(), data[offset..end]);
        }
        let end = read(&mut client, &name, size as i64, 0).await.unwrap();
        assert!(end.is_empty());
        let beyond = read(&mut client, &name, size as i64 + 1, 0).await;
        refused(beyond, Code::OutOfRange, "read_offset");
        refused(
            read(&mut client, &name, -1, 0).await,
            Code::OutOfRange,
            "read_offset",
        );
        let limit = read(&mut client, &name, 0, -1).await;
        refused(limit, Code::InvalidArgument, "read_limit");
    }
    let absent = ReadName::format(&instance(""), &sha256(b"absent"));
    refused(
        read(&mut client, &absent, 0, 0).await,
        Code::NotFound,
        "not in the Content",
    );
    for bad in ["", "blobs/x/1", "uploads/x", "compressed-blobs/zstd/x/1"] {
        refused(
            read(&mut client, bad, 0, 0).await,
            Code::InvalidArgument,
            "",
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_writes_are_refused_and_leave_nothing() {
    let (directory, server, mut client) = start().await;
    for size in [1000, 200_000] {
        let data = content(size as u64, size);
        let digest = sha256(&data);
        let other = content(77, size);
        let (half, rest) = data.split_at(size / 2);
        let name = || fresh_name(&digest);

        let n = name();
        let answer = write(&mut client, vec![part(&n, 0, half, true)]).await;
        refused(answer, Code::InvalidArgument, "only");
        let n = name();
        let long = [&data[..], b"more"].concat();
        let answer = write(&mut client, vec![part(&n, 0, &long, true)]).await;
        refused(answer, Code::InvalidArgument, "more than its digest says");
        let n = name();
        let parts = vec![part(&n, 0, half, false), part(&n, 1, rest, true)];
        let answer = write(&mut client, parts).await;
        refused(answer, Code::InvalidArgument, "write_offset is 1");
        let answer = write(&mut client, vec![part(&name(), 5, rest, false)]).await;
        refused(answer, Code::InvalidArgument, "write_offset is 5");
        let mut negative = part(&name(), 0, rest, false);
        negative.write_offset = -5;
        let answer = write(&mut client, vec![negative]).await;
        refused(answer, Code::InvalidArgument, "write_offset is -5");
        for parts in [
            vec![part(&name(), 0, &other, true)],
            vec![
                part(&name(), 0, &other[..9], false),
                part("", 9, &other[9..], true),
            ],
        ] {
            let answer = write(&mut client, parts).await;
            refused(answer, Code::InvalidArgument, &sha256(&other).hash_hex());
        }
        let answer = write(&mut client, vec![part(&name(), 0, half, false)]).await;
        refused(answer, Code::InvalidArgument, "QueryWriteStatus");
        let parts = vec![
            part(&name(), 0, half, false),
            part(&name(), size / 2, rest, true),
        ];
        refused(
            write(&mut client, parts).await,
            Code::InvalidArgument,
            "resource_name changed",
        );
        assert!(!server.store.contains(&digest));
    }
    refused(
        write(&mut client, Vec::new()).await,
        Code::InvalidArgument,
        "resource_name",
    );
    for bad in ["", "blobs/x/1", "uploads/u/compressed-blobs/brotli/x/1"] {
        let answer = write(&mut client, vec![part(bad, 0, b"", true)]).await;
        refused(answer, Code::InvalidArgument, "resource name");
    }
    // A size that cannot be true costs nothing.
    let mut digest = sha256(b"").to_proto();
    digest.size_bytes = i64::MAX;
    let name = format!("uploads/u/blobs/{}/{}", digest.hash, digest.size_bytes);
    let answer = write(&mut client, vec![part(&name, 0, b"x", false)]).await;
    refused(answer, Code::InvalidArgument, "limit");
    assert_eq!(server.store.count(), 0);
    // Those that could still be resumed.
    let uploads = std::fs::read_dir(directory.path().join("uploads")).unwrap();
    assert!(uploads.count() <= 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_write_goes_on_where_it_was() {
    let (_directory, _server, mut client) = start().await;
    for size in [1000, 500_000] {
        let data = content(size as u64, size);
        let digest = sha256(&data);
        let name = fresh_name(&digest);
        assert_eq!(status(&mut client, &name).await, (0, false));
        let (first, rest) = data.split_at(size / 3);
        let answer = write(&mut client, vec![part(&name, 0, first, false)]).await;
        refused(answer, Code::InvalidArgument, "finish_write");
        let committed = first.len() as i64;
        assert_eq!(status(&mut client, &name).await, (committed, false));
        let parts = vec![part(&name, first.len(), rest, true)];
        assert_eq!(write(&mut client, parts).await.unwrap(), size as i64);
        assert_eq!(status(&mut client, &name).await, (size as i64, true));
        let read_name = ReadName::format(&instance(""), &digest);
        assert_eq!(read(&mut client, &read_name, 0, 0).await.unwrap(), data);

        // From the start again is right, too.
        let data = content(size as u64 + 1, size);
        let digest = sha256(&data);
        let name = fresh_name(&digest);
        let _ = write(&mut client, vec![part(&name, 0, &data[..size / 2], false)]).await;
        let parts = vec![part(&name, 0, &data, true)];
        assert_eq!(write(&mut client, parts).await.unwrap(), size as i64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_comes_back_takes_over_from_a_call_that_hangs() {
    let (_directory, server, mut client) = start().await;
    let data = content(5, 300_000);
    let digest = sha256(&data);
    let name = fresh_name(&digest);
    let (hanging, parts) = tokio::sync::mpsc::channel(4);
    hanging
        .send(part(&name, 0, &data[..100_000], false))
        .await
        .unwrap();
    let mut other = client.clone();
    let old = tokio::spawn(async move {
        let parts = tokio_stream::wrappers::ReceiverStream::new(parts);
        other.write(parts).await
    });
    while status(&mut client, &name).await.0 != 100_000 {
        tokio::task::yield_now().await;
    }
    let parts = vec![part(&name, 100_000, &data[100_000..], false)];
    assert_eq!(write(&mut client, parts).await.unwrap(), 300_000);
    assert!(server.store.contains(&digest));
    hanging
        .send(part("", 100_000, b"late", false))
        .await
        .unwrap();
    refused(old.await.unwrap(), Code::Aborted, "another call");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_of_what_is_there_is_answered_before_all_of_it_is_sent() {
    let (_directory, server, mut client) = start().await;
    let data = content(6, 3 << 20);
    let digest = sha256(&data);
    server
        .store
        .put(&[(digest, data.clone().into())])
        .pop()
        .unwrap()
        .unwrap();
    // This stream never ends by itself.
    let first = part(&fresh_name(&digest), 0, &data[..1000], false);
    let parts = stream::iter([first]).chain(stream::pending());
    let answer = client.write(parts).await.unwrap();
    assert_eq!(answer.get_ref().committed_size, 3 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_holds_little_of_the_server_s_memory() {
    let directory = tempfile::tempdir().unwrap();
    let child = StoreProcess::start(directory.path(), ANYWHERE, 4 * GIB);
    let channel = bb_remote_execution::daemon::connect(&child.endpoint());
    let mut client = Bytes::new(channel);
    let data = content(7, 64 << 20);
    let digest = sha256(&data);
    let parts: Vec<_> = data
        .chunks(1 << 20)
        .enumerate()
        .map(|(i, chunk)| part(&fresh_name(&digest), i << 20, chunk, i == 63))
        .map(|part| WriteRequest {
            resource_name: if part.write_offset == 0 {
                part.resource_name
            } else {
                String::new()
            },
            ..part
        })
        .collect();
    write(&mut client, parts).await.unwrap();
    let before = child.anonymous_memory();
    let mut held = Vec::new();
    for _ in 0..32 {
        let request = ReadRequest {
            resource_name: ReadName::format(&instance(""), &digest),
            ..Default::default()
        };
        held.push(client.read(request).await.unwrap());
    }
    // 2 GiB were asked for, and nobody reads them.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let grown = child.anonymous_memory().saturating_sub(before);
    assert!(grown < 400 << 20, "{grown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_name_that_is_too_long_is_refused_before_it_is_remembered() {
    let (directory, _server, mut client) = start().await;
    let blob = ReadName::format(&instance(""), &sha256(&content(8, 100_000)));
    let name = format!("uploads/{}/{blob}", "u".repeat(15_000_000));
    let parts = vec![part(&name, 0, b"x", false)];
    let answer = write(&mut client, parts).await;
    refused(answer, Code::InvalidArgument, "use a UUID");
    let asked = QueryWriteStatusRequest {
        resource_name: name.clone(),
    };
    let answer = client.query_write_status(asked).await;
    refused(answer, Code::InvalidArgument, "use a UUID");
    let answer = read(&mut client, &name, 0, 0).await;
    refused(answer, Code::InvalidArgument, "bytes, more than");
    let uploads = std::fs::read_dir(directory.path().join("uploads")).unwrap();
    assert_eq!(uploads.count(), 0);
}

/// Leaves an upload after so many bytes.
async fn leave(client: &mut Bytes, data: &[u8], after: usize) -> Result<i64, Status> {
    let name = fresh_name(&sha256(data));
    let parts = data[..after].chunks(1 << 20).enumerate();
    let parts = parts.map(|(i, chunk)| part(&name, i << 20, chunk, false));
    write(client, parts.collect()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_were_left_evict_nothing_and_are_given_up_for_others() {
    const MIB: usize = 1 << 20;
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), 256 << 20).await;
    let mut client = Bytes::new(server.channel());
    // Most of the store is in use.
    let mut kept = Vec::new();
    for i in 0..20 {
        let data = content(100 + i, 6 * MIB);
        let digest = sha256(&data);
        server.store.put(&[(digest, data.into())])[0]
            .clone()
            .unwrap();
        kept.push(digest);
    }
    for i in 0..10 {
        let data = content(200 + i, 30 * MIB);
        let answer = leave(&mut client, &data, 28 * MIB).await;
        refused(answer, Code::InvalidArgument, "finish_write");
    }
    assert_eq!(server.store.find_missing(&kept), []);
    // All of this has room only if those were given up.
    for i in 0..2 {
        let data = content(300 + i, 50 * MIB);
        let digest = sha256(&data);
        let name = fresh_name(&digest);
        let parts = data.chunks(MIB).enumerate();
        let parts = parts.map(|(i, chunk)| part(&name, i * MIB, chunk, i == 49));
        write(&mut client, parts.collect()).await.unwrap();
        kept.push(digest);
    }
    assert_eq!(server.store.find_missing(&kept), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_was_given_up_says_so_and_can_be_started_again() {
    const MIB: usize = 1 << 20;
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), 64 << 20).await;
    let mut client = Bytes::new(server.channel());
    let data = content(400, 13 * MIB);
    let digest = sha256(&data);
    let name = fresh_name(&digest);
    let answer = write(&mut client, vec![part(&name, 0, &data[..12 * MIB], false)]).await;
    refused(answer, Code::InvalidArgument, "finish_write");
    assert_eq!(status(&mut client, &name).await, (12 << 20, false));
    let _ = leave(&mut client, &content(401, 13 * MIB), 12 * MIB).await;
    assert_eq!(status(&mut client, &name).await, (0, false));
    let rest = vec![part(&name, 12 * MIB, &data[12 * MIB..], true)];
    refused(
        write(&mut client, rest).await,
        Code::InvalidArgument,
        "start again at 0",
    );
    let whole = vec![part(&name, 0, &data, true)];
    assert_eq!(write(&mut client, whole).await.unwrap(), 13 << 20);
}
