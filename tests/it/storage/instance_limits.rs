//! What uploads with some instance names may take of the embedded store.

use std::{path::Path, sync::Arc};

use bb_remote_execution::{
    config::{Endpoint, Size, scheduler::Embedded, storage::InstanceLimit},
    daemon,
    digest::Digest,
    proto::{
        bytestream::{WriteRequest, byte_stream_client::ByteStreamClient},
        reapi::{ActionResult, OutputFile},
    },
    storage::{Backend, Content, Error, embedded::Store},
};
use tonic::Code;

use super::{ANYWHERE, Serving, content, instance, sha256};

const MIB: u64 = 1 << 20;
const KIB: usize = 1 << 10;

fn open(directory: &Path, limits: &[(&str, u64)]) -> Arc<Store> {
    let limits = limits.iter().map(|(prefix, mib)| InstanceLimit {
        instance_name_prefix: (*prefix).to_owned(),
        maximum_size: Size::mib(*mib),
    });
    let store = Store::open_configured(&Embedded {
        directory: directory.to_owned(),
        maximum_size: Size::gib(1),
        minimum_free: Size(0),
        instance_limits: limits.collect(),
    });
    Arc::new(store.unwrap())
}

/// Bytes that count towards the limit of a prefix.
fn used(store: &Store, prefix: &str) -> u64 {
    let instances = store.usage().instances;
    let of = instances.iter().find(|of| of.prefix == instance(prefix));
    of.unwrap().used
}

async fn upload(backend: &Backend, name: &str, seed: u64, size: usize) -> Digest {
    let data = content(seed, size);
    let digest = sha256(&data);
    let blobs = vec![(digest, Content::Bytes(data.into()))];
    backend.upload(&instance(name), blobs).await.unwrap();
    digest
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_beyond_a_limit_evict_their_own_and_leave_others_alone() {
    let directory = tempfile::tempdir().unwrap();
    let limits = [("team", 32), ("team/ci", 16)];
    let store = open(directory.path(), &limits);
    let backend = Backend::Embedded(store.clone());
    let others = upload(&backend, "", 1, 5 << 20).await;
    let of_ci = upload(&backend, "team/ci", 2, 5 << 20).await;
    let shared = upload(&backend, "other", 3, 50 * KIB).await;
    // It counts where it came first.
    upload(&backend, "team", 3, 50 * KIB).await;
    assert_eq!(used(&store, "team"), 0);
    let mut own = Vec::new();
    for round in 0..100 {
        own.push(upload(&backend, "team/a", 100 + round, 900 * KIB).await);
        own.push(upload(&backend, "team/b", 300 + round, 60 * KIB).await);
        assert!(used(&store, "team") <= 32 * MIB, "{}", used(&store, "team"));
        // What is used stays.
        assert!(store.contains(&own[0]), "{round}");
    }
    let kept = own.iter().filter(|digest| store.contains(digest)).count();
    assert!((40..80).contains(&kept), "{kept}");
    assert!(store.contains(&own[199]) && !store.contains(&own[2]));
    assert!(
        [others, of_ci, shared]
            .iter()
            .all(|digest| store.contains(digest))
    );
    assert!(store.used() < 80 * MIB, "{}", store.used());
    // A result counts, too.
    let before = used(&store, "team/ci");
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "x".repeat(100_000),
            digest: Some(of_ci.to_proto()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let name = instance("team/ci");
    for _ in 0..3 {
        // In place of the one before.
        let update = backend.update_action_result(&name, &others, result.clone());
        update.await.unwrap();
    }
    let grown = used(&store, "team/ci") - before;
    assert!((100_000..101_000).contains(&grown), "{grown}");
    assert!(store.remove_action_result(&name, &others));
    assert_eq!(used(&store, "team/ci"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_counts_towards_a_limit_is_known_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), &[("a", 64), ("b", 64)]);
    let backend = Backend::Embedded(store.clone());
    let mut digests = Vec::new();
    for round in 0..20 {
        digests.push(upload(&backend, "a/x", round, 700 * KIB).await);
        digests.push(upload(&backend, "a", 100 + round, 20 * KIB).await);
    }
    upload(&backend, "b", 1000, 3 << 20).await;
    let (of_a, of_b) = (used(&store, "a"), used(&store, "b"));
    assert!(of_a > 14 * MIB && of_b > 3 * MIB);
    drop((backend, store));
    let store = open(directory.path(), &[("b", 64), ("c", 16), ("a", 64)]);
    assert_eq!((used(&store, "a"), used(&store, "b")), (of_a, of_b));
    assert_eq!(used(&store, "c"), 0);
    assert!(digests.iter().all(|digest| store.contains(digest)));
    drop(store);
    // A lower limit holds from the start on.
    let store = open(directory.path(), &[("a", 16), ("b", 64)]);
    assert_eq!(used(&store, "a"), of_a);
    let backend = Backend::Embedded(store.clone());
    for round in 0..20 {
        upload(&backend, "a", 200 + round, 500 * KIB).await;
    }
    assert!(used(&store, "a") <= 16 * MIB);
    drop((backend, store));
    let store = open(directory.path(), &[("a", 16)]);
    assert!(used(&store, "a") <= 16 * MIB);
    drop(store);
    // Nobody's any more.
    let store = open(directory.path(), &[]);
    assert_eq!(store.usage().instances, []);
    assert!(store.count() > 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_a_limit_has_no_room_for_is_refused_before_it_is_sent() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), &[("small", 16)]);
    let backend = Backend::Embedded(store.clone());
    let data = content(1, 13 << 20);
    let digest = sha256(&data);
    let blobs = vec![(digest, Content::Bytes(data.clone().into()))];
    let refused = backend.upload(&instance("small"), blobs).await.unwrap_err();
    assert!(matches!(refused, Error::Full(_)), "{refused}");
    let serving = Serving::start(backend.clone(), ANYWHERE).await;
    let endpoint = Endpoint::Tcp(serving.address.to_string());
    let mut client = ByteStreamClient::new(daemon::connect(&endpoint));
    let request = WriteRequest {
        resource_name: format!(
            "small/uploads/u/blobs/{}/{}",
            digest.hash_hex(),
            digest.size()
        ),
        data: data[..1000].to_vec().into(),
        ..Default::default()
    };
    let status = client
        .write(futures::stream::iter([request]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    for part in ["storage.embedded.instance_limits", "\"small\"", "16MiB"] {
        assert!(status.message().contains(part), "{part}: {status}");
    }
    // Elsewhere there is room.
    upload(&backend, "smaller", 1, 13 << 20).await;
    assert!(store.contains(&digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_instance_is_told_how_large_its_blobs_may_be() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), &[("team", 32), ("team/ci", 16)]);
    let everybodys = store.maximum_blob_size();
    let server = Serving::start(Backend::Embedded(store), ANYWHERE).await;
    let client = server.client();
    for (name, expected) in [
        ("team/ci", 12 * MIB),
        ("", everybodys),
        ("team/a", 24 * MIB),
        ("other", everybodys),
        ("team/ci", 12 * MIB),
    ] {
        let told = client.maximum_blob_size(&instance(name)).await;
        assert_eq!(told, expected, "{name:?}");
    }
}
