//! The client against the embedded store.

use std::{os::unix::fs::FileExt, sync::Arc};

use bb_remote_execution::{
    digest::DigestFunction,
    storage::{Content, Error},
};

use super::{GIB, Server, content, instance, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn blobs_of_all_sizes_and_functions_come_back_as_they_were_sent() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), GIB).await;
    let client = server.client();
    let name = instance("some/instance");
    let sizes = [0, 1, 1000, 65_536, 65_537, 262_144, 1 << 20, 5_000_001];
    let mut blobs = Vec::new();
    for function in DigestFunction::ALL {
        for (seed, size) in sizes.into_iter().enumerate() {
            let bytes = content(seed as u64 + 1, size);
            blobs.push((function.digest_of(&bytes), bytes));
        }
    }
    let digests: Vec<_> = blobs.iter().map(|(digest, _)| *digest).collect();
    let missing = client.find_missing(&name, &digests).await.unwrap();
    assert_eq!(missing.len(), digests.len() - DigestFunction::ALL.len());

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
    client.upload(&name, contents.collect()).await.unwrap();
    assert_eq!(client.find_missing(&name, &digests).await.unwrap(), []);

    let read = client.read_many(&name, &digests, 1 << 30).await;
    for ((digest, bytes), read) in blobs.iter().zip(read) {
        assert_eq!(&read.unwrap(), bytes, "{digest}");
        let file = Arc::new(tempfile::tempfile().unwrap());
        client
            .read_to_file(&name, digest, file.clone())
            .await
            .unwrap();
        let mut written = vec![0; bytes.len()];
        file.read_exact_at(&mut written, 0).unwrap();
        assert_eq!(&written, bytes);
        assert_eq!(file.metadata().unwrap().len(), digest.size());
    }
    let absent = sha256(b"absent");
    let error = client.read(&name, &absent, 100).await.unwrap_err();
    assert!(matches!(error, Error::Missing(missing) if missing == [absent]));
    let error = client.read(&name, &digests[3], 100).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: 100, .. }));
}
