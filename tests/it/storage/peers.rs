//! The client against peers that restart, lie, count, or announce small batches.

use std::{sync::atomic::Ordering, time::Duration};

use bb_remote_execution::{
    config::Endpoint,
    digest::Digest,
    resource::{Compressor, WriteName},
    storage::{
        Content, Error, UploadError, compression,
        grpc::{Client, Options, When},
    },
};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{
    ANYWHERE, GIB, StoreProcess, content, instance,
    misbehaving_peer::{PeerBehaviour, with_blobs},
    sha256,
};

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
