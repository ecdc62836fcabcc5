//! Blobs as chunks: lists that lie, and how much travels.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use bb_remote_execution::{
    daemon::Channel,
    digest::{Digest, DigestFunction},
    proto::reapi::{
        self, SpliceBlobRequest, SplitBlobRequest, chunking_function::Value,
        content_addressable_storage_client::ContentAddressableStorageClient,
    },
    storage::{
        Content, Error,
        grpc::{Client, Options, When},
    },
};
use tonic::Code;

use super::{GIB, Server, compression::counting, content, instance, sha256};

const MIB: usize = 1 << 20;

fn cas(server: &Server) -> ContentAddressableStorageClient<Channel> {
    ContentAddressableStorageClient::new(server.channel())
}

/// One percent of it is other bytes, a few of them more.
fn changed(data: &[u8]) -> Vec<u8> {
    let mut changed = data.to_vec();
    let (at, length) = (data.len() / 3, data.len() / 100);
    changed.splice(at..at + length, content(99, length + 17));
    changed
}

fn splice(blob: Digest, chunks: &[Digest]) -> SpliceBlobRequest {
    SpliceBlobRequest {
        blob_digest: Some(blob.to_proto()),
        chunk_digests: chunks.iter().map(Digest::to_proto).collect(),
        digest_function: blob.function().to_proto() as i32,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_split_by_either_function_and_spliced_again() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    for (function, small) in [(DigestFunction::Sha256, 1), (DigestFunction::GitSha1, 0)] {
        let data = content(1, 7 * MIB + 1);
        let digest = function.digest_of(&data);
        let put = |data: &[u8]| {
            let blob = (function.digest_of(data), data.to_vec().into());
            server.store.put(&[blob]).remove(0).unwrap();
        };
        put(&data);
        for wanted in [Value::Unknown, Value::FastCdc2020, Value::RepMaxCdc] {
            let request = SplitBlobRequest {
                blob_digest: Some(digest.to_proto()),
                digest_function: function.to_proto() as i32,
                chunking_function: wanted as i32,
                ..Default::default()
            };
            let answer = cas(&server).split_blob(request.clone()).await;
            let answer = answer.unwrap().into_inner();
            let again = cas(&server).split_blob(request).await.unwrap();
            assert_eq!(again.into_inner(), answer);
            match wanted {
                Value::RepMaxCdc => assert_eq!(answer.chunking_function(), wanted),
                _ => assert_eq!(answer.chunking_function(), Value::FastCdc2020),
            }
            let chunks = answer.chunk_digests.iter();
            let chunks: Vec<_> = chunks
                .map(|chunk| Digest::parse(Some(function), chunk).unwrap())
                .collect();
            assert!(chunks.len() > 3);
            let whole: Vec<_> = chunks
                .iter()
                .flat_map(|chunk| server.store.read(chunk, GIB).unwrap())
                .collect();
            assert!(whole == data);
            // A blob of chunks of which one is taken twice, and one that is a chunk itself.
            let twice = [&data[..], &data[..]].concat();
            let twice = function.digest_of(&twice);
            let spliced = cas(&server)
                .splice_blob(splice(twice, &[digest, digest]))
                .await;
            let spliced = spliced.unwrap().into_inner().blob_digest.unwrap();
            assert_eq!(spliced, twice.to_proto());
            assert!(server.store.contains(&twice));
        }
        let small = content(small, 1000);
        put(&small);
        let small = function.digest_of(&small);
        let request = SplitBlobRequest {
            blob_digest: Some(small.to_proto()),
            digest_function: function.to_proto() as i32,
            ..Default::default()
        };
        let answer = cas(&server).split_blob(request).await.unwrap();
        assert_eq!(answer.into_inner().chunk_digests, [small.to_proto()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_do_not_make_up_their_blob_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let parts = [content(1, 300_000), content(2, 300_000)];
    let blobs = parts
        .iter()
        .map(|part| (sha256(part), part.clone().into()))
        .collect::<Vec<_>>();
    for result in server.store.put(&blobs) {
        result.unwrap();
    }
    let [one, other] = [sha256(&parts[0]), sha256(&parts[1])];
    let whole = sha256(&parts.concat());
    let absent = sha256(&content(3, 300_000));
    let sized = |digest: &Digest, size: i64| reapi::Digest {
        size_bytes: size,
        ..digest.to_proto()
    };
    let with = |chunks: Vec<reapi::Digest>| SpliceBlobRequest {
        chunk_digests: chunks,
        ..splice(whole, &[])
    };
    let empty = sha256(b"").to_proto();
    for (what, request, code) in [
        (
            "the other order",
            splice(whole, &[other, one]),
            Code::InvalidArgument,
        ),
        ("too few", splice(whole, &[one]), Code::InvalidArgument),
        (
            "too many",
            splice(whole, &[one, other, one]),
            Code::InvalidArgument,
        ),
        ("none", splice(whole, &[]), Code::InvalidArgument),
        (
            "one that is not there",
            splice(whole, &[one, absent]),
            Code::NotFound,
        ),
        ("itself", splice(whole, &[whole]), Code::NotFound),
        (
            "sizes that lie",
            with(vec![sized(&one, 1), sized(&other, 599_999)]),
            Code::NotFound,
        ),
        (
            "sizes beyond all",
            with(vec![sized(&one, i64::MAX); 3]),
            Code::InvalidArgument,
        ),
        (
            "a negative size",
            with(vec![sized(&one, -1)]),
            Code::InvalidArgument,
        ),
        (
            "empty ones without end",
            with(vec![empty; 100_001]),
            Code::InvalidArgument,
        ),
        (
            "another function's",
            with(vec![DigestFunction::Md5.digest_of(b"x").to_proto()]),
            Code::InvalidArgument,
        ),
        (
            "no blob",
            SpliceBlobRequest::default(),
            Code::InvalidArgument,
        ),
        (
            "what is too large for the store",
            splice(
                Digest::new(DigestFunction::Sha256, whole.hash_bytes(), GIB),
                &[one; 3],
            ),
            Code::InvalidArgument,
        ),
    ] {
        let refused = cas(&server).splice_blob(request).await.unwrap_err();
        assert_eq!(refused.code(), code, "{what}: {refused}");
        assert!(!refused.message().is_empty() && refused.message().len() < 2000);
        assert!(!server.store.contains(&whole), "{what}");
    }
    cas(&server)
        .splice_blob(splice(whole, &[one, other]))
        .await
        .unwrap();
    // What is there stays what it is, whatever a list says.
    cas(&server)
        .splice_blob(splice(whole, &[one, absent]))
        .await
        .unwrap();
    assert!(server.store.read(&whole, GIB).unwrap() == parts.concat());
    for digest in [
        absent,
        Digest::new(DigestFunction::Sha256, one.hash_bytes(), 3),
    ] {
        let request = SplitBlobRequest {
            blob_digest: Some(digest.to_proto()),
            ..Default::default()
        };
        let refused = cas(&server).split_blob(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
    }
}

/// Bytes that passed, once both ends have closed.
async fn passed(count: &Arc<std::sync::atomic::AtomicU64>) -> u64 {
    let mut before = 0;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = count.load(Ordering::SeqCst);
        if now > 0 && now == before {
            break;
        }
        before = now;
    }
    before
}

async fn read(client: &Client, digest: &Digest) -> Result<Vec<u8>, Error> {
    let file = Arc::new(tempfile::tempfile().unwrap());
    client
        .read_to_file(&instance("a"), digest, file.clone())
        .await?;
    let mut data = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut data, 0).unwrap();
    Ok(data)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_blob_that_changed_a_little_little_travels() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let old = content(5, 24 * MIB);
    let new = changed(&old);
    let size = new.len() as u64;
    let options = Options {
        chunks: When::Always,
        ..Options::default()
    };
    let upload = |client: Client, data: Vec<u8>| async move {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&data, 0).unwrap();
        let blobs = vec![(sha256(&data), Content::File(Arc::new(file)))];
        client.upload(&instance("a"), blobs).await.unwrap();
    };
    let (endpoint, count) = counting(&server).await;
    upload(
        Client::connect(&endpoint, &endpoint, options.clone()),
        old.clone(),
    )
    .await;
    assert!(passed(&count).await > size);
    assert!(server.store.read(&sha256(&old), GIB).unwrap() == old);
    let (endpoint, count) = counting(&server).await;
    upload(
        Client::connect(&endpoint, &endpoint, options.clone()),
        new.clone(),
    )
    .await;
    let sent = passed(&count).await;
    assert!(sent < size / 6, "{sent}");
    assert!(server.store.read(&sha256(&new), GIB).unwrap() == new);

    // The other way, on a host that has the old one in a file, which is right or not.
    for damaged in [false, true] {
        let (endpoint, count) = counting(&server).await;
        let client = Client::connect(&endpoint, &endpoint, options.clone());
        let file = tempfile::NamedTempFile::new().unwrap();
        let known = Arc::new(Mutex::new(None));
        let (path, has) = (file.path().to_owned(), known.clone());
        client.set_local_files(Arc::new(move |digest| {
            let known: Option<Digest> = *has.lock().unwrap();
            (known == Some(*digest)).then(|| File::open(&path).unwrap())
        }));
        assert!(read(&client, &sha256(&old)).await.unwrap() == old);
        let mut here = old.clone();
        if damaged {
            here[0] ^= 1;
        }
        file.as_file().write_all_at(&here, 0).unwrap();
        *known.lock().unwrap() = Some(sha256(&old));
        assert!(read(&client, &sha256(&new)).await.unwrap() == new);
        drop(client);
        let received = passed(&count).await - size;
        assert!(received < size / 5, "{received}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_are_gone_from_the_disk_cost_only_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let client = server.client();
    let old = content(6, 6 * MIB);
    let new = changed(&old);
    for data in [&old, &new] {
        let blob = vec![(sha256(data), data.clone().into())];
        for result in client.put_many(&instance("a"), blob).await.unwrap() {
            result.unwrap();
        }
    }
    let options = Options {
        chunks: When::Always,
        ..Options::default()
    };
    let endpoint = server.endpoint();
    let client = Client::connect(&endpoint, &endpoint, options);
    // A host that claims to have files, and has none any more.
    client.set_local_files(Arc::new(|_| None));
    for data in [&old, &new, &old] {
        assert!(read(&client, &sha256(data)).await.unwrap() == *data);
    }
    let absent = sha256(b"absent, but large enough");
    let absent = Digest::new(DigestFunction::Sha256, absent.hash_bytes(), 5_000_000);
    let error = read(&client, &absent).await.unwrap_err();
    assert!(matches!(error, Error::Missing(_)), "{error}");
}
