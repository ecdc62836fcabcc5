//! The client against peers that take less than they say, or say nothing.

use std::{sync::atomic::Ordering, time::Duration};

use bb_remote_execution::storage::{
    Content, Error,
    grpc::{Options, Timeouts},
};

use super::{
    GIB, content, instance,
    misbehaving_peer::{PeerBehaviour, with_blobs},
    sha256,
};

fn contents(blobs: &[Vec<u8>]) -> Vec<(bb_remote_execution::digest::Digest, Content)> {
    let content = |data: &Vec<u8>| (sha256(data), Content::Bytes(data.clone().into()));
    blobs.iter().map(content).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_was_not_announced_is_found_and_remembered() {
    // Some 18 MB.
    let blobs: Vec<_> = (0..300).map(|i| content(i, i as usize * 400)).collect();
    let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
    let name = instance("some/name");
    for unannounced_limit in [2 << 20, 300_000] {
        let behaviour = PeerBehaviour {
            unannounced_limit,
            committed: -1,
            ..Default::default()
        };
        let peer = with_blobs(&blobs, behaviour);
        let (client, _stop) = peer.clone().start().await;
        client.upload(&name, contents(&blobs)).await.unwrap();
        assert!(peer.0.refused.swap(0, Ordering::SeqCst) > 0);
        // What was learnt by writing holds for reading, and for all that follows.
        for _ in 0..2 {
            let read = client.read_many(&name, &digests, GIB).await;
            for (data, read) in blobs.iter().zip(read) {
                assert_eq!(&read.unwrap(), data);
            }
            client.upload(&name, contents(&blobs)).await.unwrap();
        }
        assert_eq!(peer.0.refused.load(Ordering::SeqCst), 0);
        assert_eq!(peer.0.streams.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_finds_a_limit_that_was_not_announced_too() {
    let blobs: Vec<_> = (0..300).map(|i| content(i, i as usize * 400)).collect();
    let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
    let behaviour = PeerBehaviour {
        unannounced_limit: 2 << 20,
        ..Default::default()
    };
    let peer = with_blobs(&blobs, behaviour);
    let (client, _stop) = peer.clone().start().await;
    for again in [false, true] {
        let read = client.read_many(&instance(""), &digests, GIB).await;
        for (data, read) in blobs.iter().zip(read) {
            assert_eq!(&read.unwrap(), data);
        }
        let refused = peer.0.refused.swap(0, Ordering::SeqCst);
        assert_eq!(refused == 0, again, "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_no_batch_takes_goes_by_a_stream() {
    let blobs = [content(1, 5000), content(2, 5000), content(3, 5000)];
    let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
    let behaviour = PeerBehaviour {
        unannounced_limit: 4000,
        committed: -1,
        ..Default::default()
    };
    let peer = with_blobs(&blobs, behaviour);
    let (client, _stop) = peer.clone().start().await;
    let name = instance("");
    client.upload(&name, contents(&blobs)).await.unwrap();
    assert_eq!(peer.0.streams.swap(0, Ordering::SeqCst), 3);
    let read = client.read_many(&name, &digests, GIB).await;
    for (data, read) in blobs.iter().zip(read) {
        assert_eq!(&read.unwrap(), data);
    }
    assert_eq!(peer.0.streams.load(Ordering::SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_digests_than_a_peer_takes_are_asked_for_in_parts() {
    let digests: Vec<_> = (0..5000u32).map(|i| sha256(&i.to_le_bytes())).collect();
    let behaviour = PeerBehaviour {
        unannounced_limit: 100_000,
        ..Default::default()
    };
    let peer = with_blobs(&[], behaviour);
    let (client, _stop) = peer.clone().start().await;
    for again in [false, true] {
        let missing = client.find_missing(&instance(""), &digests).await;
        assert_eq!(missing.unwrap(), digests);
        let refused = peer.0.refused.swap(0, Ordering::SeqCst);
        assert_eq!(refused == 0, again, "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_another_reason_than_its_size_is_not_taken_apart_for_long() {
    let blobs: Vec<_> = (0..300).map(|i| content(i, 1000)).collect();
    let digests: Vec<_> = blobs.iter().map(|data| sha256(data)).collect();
    let behaviour = PeerBehaviour {
        fail: 1_000_000.into(),
        status: Some(tonic::Code::InvalidArgument),
        ..Default::default()
    };
    let peer = with_blobs(&blobs, behaviour);
    let (client, _stop) = peer.clone().start().await;
    let name = instance("");
    let error = client.upload(&name, contents(&blobs)).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    for read in client.read_many(&name, &digests, GIB).await {
        assert!(matches!(read, Err(Error::Invalid(_))), "{read:?}");
    }
    let calls = peer.0.reads.load(Ordering::SeqCst);
    assert!(calls < 20, "{calls} calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_say_what_it_can_is_asked_once_and_used() {
    let data = content(1, 1000);
    let behaviour = PeerBehaviour {
        never_says_capabilities: true,
        committed: -1,
        ..Default::default()
    };
    let peer = with_blobs(std::slice::from_ref(&data), behaviour);
    let options = Options {
        timeouts: Timeouts {
            capabilities: Duration::from_millis(100),
            ..Default::default()
        },
        ..Default::default()
    };
    let (client, _stop) = peer.clone().start_with(options).await;
    let name = instance("");
    let slots = (0..64).map(|_| {
        let (client, name, data) = (client.clone(), name.clone(), data.clone());
        tokio::spawn(async move {
            let read = client.read(&name, &sha256(&data), GIB).await.unwrap();
            assert_eq!(read, data);
            let upload = contents(std::slice::from_ref(&data));
            client.upload(&name, upload).await.unwrap();
        })
    });
    for slot in slots.collect::<Vec<_>>() {
        slot.await.unwrap();
    }
    assert_eq!(peer.0.capability_calls.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_cut_when_it_stands_still_and_not_when_it_is_slow() {
    let data = content(1, 3_000_000);
    let digest = sha256(&data);
    let options = Options {
        timeouts: Timeouts {
            idle: Duration::from_secs(1),
            ..Default::default()
        },
        ..Default::default()
    };
    // Ten pieces, which together take longer than any pause may.
    let behaviour = PeerBehaviour {
        pause: Duration::from_millis(150),
        silent_streams: 1.into(),
        ..Default::default()
    };
    let peer = with_blobs(std::slice::from_ref(&data), behaviour);
    let (client, _stop) = peer.clone().start_with(options).await;
    let read = client.read(&instance(""), &digest, GIB).await;
    assert_eq!(read.unwrap(), data);
    // The silent one, and the one that was slow.
    assert_eq!(peer.0.streams.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_are_given_twice_are_uploaded_once_whether_or_not_it_is_asked_what_is_missing() {
    for size in [100, 100_000] {
        let (twice, other) = (content(1, size), content(2, size));
        let peer = with_blobs(&[], PeerBehaviour::default());
        let (client, _stop) = peer.clone().start().await;
        let blobs = contents(&[twice.clone(), other, twice]);
        client.upload(&instance(""), blobs).await.unwrap();
    }
}
