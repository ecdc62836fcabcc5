//! Laws that every back end keeps: the embedded store, a client of one, a client of services whose own
//! back end is such a client, one that compresses what it sends, and Redis and S3 with a cache.

use std::{os::unix::fs::FileExt, sync::Arc};

use bb_remote_execution::{
    digest::{Digest, DigestFunction},
    proto::reapi::{ActionResult, OutputFile},
    storage::{
        Backend, Content, Error, UploadError,
        grpc::{Options, When},
    },
};
use futures::TryStreamExt;

use super::{ANYWHERE, GIB, Server, Serving, content, instance, objects, sha256};
use crate::harness::services::Service;

struct Backends {
    all: Vec<Backend>,
    _servers: (Server, Serving),
    _services: Vec<Service>,
    _directory: tempfile::TempDir,
}

async fn backends() -> Backends {
    let directory = tempfile::tempdir().unwrap();
    let near = Server::start(directory.path(), GIB).await;
    let client = Backend::Grpc(near.client());
    let far = Serving::start(client.clone(), ANYWHERE).await;
    let behind = Backend::Grpc(far.client());
    let embedded = Backend::Embedded(near.store.clone());
    let compressing = Backend::Grpc(far.client_with(Options {
        compression: When::Always,
        ..Options::default()
    }));
    let (mut all, services) = objects::backends(&directory.path().join("caches"));
    all.extend([embedded, client, behind, compressing]);
    Backends {
        all,
        _services: services,
        _servers: (near, far),
        _directory: directory,
    }
}

async fn streamed(
    backend: &Backend,
    digest: &Digest,
    start: u64,
    end: u64,
) -> Result<Vec<u8>, Error> {
    let pieces = backend.stream(&instance("a"), digest, start, end).await?;
    let pieces: Vec<_> = pieces.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_of_all_sizes_and_functions_come_back_as_they_were_sent() {
    for (round, backend) in backends().await.all.iter().enumerate() {
        let name = instance("some/instance");
        let sizes = [0, 1, 1000, 65_536, 65_537, 262_144, 1 << 20, 5_000_001];
        let mut blobs = Vec::new();
        for function in DigestFunction::ALL {
            for (seed, size) in sizes.into_iter().enumerate() {
                let bytes = content((100 * round + seed) as u64 + 1, size);
                blobs.push((function.digest_of(&bytes), bytes));
            }
        }
        let digests: Vec<_> = blobs.iter().map(|(digest, _)| *digest).collect();
        let missing = backend.find_missing(&name, &digests).await.unwrap();
        // One byte is the same for more than one seed.
        assert!(missing.len() >= digests.len() - 2 * DigestFunction::ALL.len());

        let files = tempfile::tempdir().unwrap();
        let contents = blobs.iter().enumerate().map(|(i, (digest, bytes))| {
            if i % 2 == 0 {
                return (*digest, Content::Bytes(bytes.clone().into()));
            }
            let path = files.path().join(i.to_string());
            std::fs::write(&path, bytes).unwrap();
            let file = std::fs::File::open(path).unwrap();
            (*digest, Content::File(Arc::new(file)))
        });
        backend.upload(&name, contents.collect()).await.unwrap();
        assert_eq!(backend.find_missing(&name, &digests).await.unwrap(), []);

        let read = backend.read_many(&name, &digests, 1 << 30).await;
        for ((digest, bytes), read) in blobs.iter().zip(read) {
            assert_eq!(&read.unwrap(), bytes, "{digest}");
            let file = Arc::new(tempfile::tempfile().unwrap());
            backend
                .read_to_file(&name, digest, file.clone())
                .await
                .unwrap();
            let mut written = vec![0; bytes.len()];
            file.read_exact_at(&mut written, 0).unwrap();
            assert_eq!(&written, bytes);
            assert_eq!(file.metadata().unwrap().len(), digest.size());
            let whole = streamed(backend, digest, 0, digest.size()).await;
            assert_eq!(&whole.unwrap(), bytes);
            let (start, end) = (digest.size() / 3, digest.size() / 2);
            if start < end {
                let part = streamed(backend, digest, start, end).await;
                assert_eq!(part.unwrap(), bytes[start as usize..end as usize]);
            }
        }
        let absent = sha256(b"absent");
        let error = backend.read(&name, &absent, 100).await.unwrap_err();
        assert!(matches!(error, Error::Missing(missing) if missing == [absent]));
        let error = streamed(backend, &absent, 0, 6).await.unwrap_err();
        assert!(matches!(error, Error::Missing(missing) if missing == [absent]));
        let error = backend.read(&name, &digests[3], 100).await.unwrap_err();
        assert!(matches!(error, Error::TooLarge { limit: 100, .. }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_contents_are_refused_one_by_one() {
    for backend in backends().await.all {
        let (right, wrong) = (content(1, 1000), sha256(b"something else"));
        let blobs = vec![
            (sha256(&right), right.clone().into()),
            (wrong, right.into()),
        ];
        let results = backend.put_many(&instance(""), blobs).await.unwrap();
        assert!(results[0].is_ok());
        assert!(matches!(&results[1], Err(Error::Corrupt { expected, .. }) if *expected == wrong));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_it_was_interrupted() {
    for (round, backend) in backends().await.all.iter().enumerate() {
        let data = content(round as u64 + 7, 3_000_000);
        let digest = sha256(&data);
        let name = format!("uploads/{round}/blobs/{digest}");
        let part = |start: usize, end: usize| {
            vec![(
                start as i64,
                bytes::Bytes::copy_from_slice(&data[start..end]),
            )]
        };
        let mut upload = backend
            .resume_upload(&instance(""), &name, "somebody", digest, 0)
            .await
            .unwrap();
        upload.write(part(0, 1_000_000)).await.unwrap();
        upload.write(part(1_000_000, 2_000_000)).await.unwrap();
        let unfinished = upload.finish(digest, false).await;
        let unfinished = unfinished.unwrap_err();
        assert!(
            matches!(
                unfinished,
                UploadError::Unfinished { .. } | UploadError::Storage(_)
            ),
            "{unfinished}"
        );
        let received = backend.upload_progress(&name, &digest).await.unwrap();
        assert_eq!(received, 2_000_000);
        let mut upload = backend
            .resume_upload(&instance(""), &name, "somebody", digest, 2_000_000)
            .await
            .unwrap();
        upload.write(part(2_000_000, 3_000_000)).await.unwrap();
        upload.finish(digest, true).await.unwrap();
        let read = backend.read(&instance(""), &digest, GIB).await;
        assert_eq!(read.unwrap(), data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_result_is_found_again() {
    for (round, backend) in backends().await.all.iter().enumerate() {
        let name = instance("x");
        let action = sha256(&[round as u8]);
        let found = backend.action_result(&name, &action).await.unwrap();
        assert_eq!(found, None);
        let result = ActionResult {
            output_files: vec![OutputFile {
                path: "out".to_owned(),
                digest: Some(sha256(b"").to_proto()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let update = backend.update_action_result(&name, &action, result.clone());
        update.await.unwrap();
        let found = backend.action_result(&name, &action).await.unwrap();
        assert_eq!(found, Some(result));
    }
}
