//! Storage of several servers, some of which are down, hang, lie, or have lost what they had.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{
        Endpoint,
        object_storage::ObjectStores,
        storage::{Health, Places, Shard, StorageLocation},
    },
    digest::Digest,
    proto::reapi::{ActionResult, OutputFile},
    storage::{Backend, Content, Error, grpc::Options},
};
use futures::TryStreamExt;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::{
    ANYWHERE, GIB, Server, Serving, content, instance,
    misbehaving_peer::{PeerBehaviour, with_blobs},
    sha256,
};

/// What becomes of connections to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Open,
    /// They stay, and nothing passes.
    Hanging,
    Closed,
}

/// Stands before a server.
pub struct Proxy {
    pub address: SocketAddr,
    route: watch::Sender<Route>,
}

impl Proxy {
    pub async fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(ANYWHERE).await.unwrap();
        let address = listener.local_addr().unwrap();
        let route = watch::Sender::new(Route::Open);
        let routes = route.subscribe();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(pass(near, server, routes.clone()));
            }
        });
        Proxy { address, route }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address.to_string())
    }

    pub fn set(&self, route: Route) {
        self.route.send_replace(route);
    }
}

async fn pass(mut near: TcpStream, server: SocketAddr, mut routes: watch::Receiver<Route>) {
    let mut far = TcpStream::connect(server).await.ok();
    loop {
        let route = *routes.borrow_and_update();
        match (route, &mut far) {
            (Route::Closed, _) | (Route::Open, None) => {
                let _ = near.shutdown().await;
                return;
            }
            (Route::Hanging, _) => {
                if routes.changed().await.is_err() {
                    return;
                }
                // What was cut in the middle cannot go on.
                return;
            }
            (Route::Open, Some(far)) => tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, far) => return,
                changed = routes.changed() => if changed.is_err() { return },
            },
        }
    }
}

fn shard(name: &str, endpoints: Vec<Endpoint>) -> Shard {
    Shard {
        name: name.to_owned(),
        endpoints,
        ..Shard::default()
    }
}

fn backend(shards: &[Shard]) -> Backend {
    let health = Health {
        faults: 3,
        interval: "100ms".parse().unwrap(),
        timeout: "400ms".parse().unwrap(),
    };
    let places = Places {
        cas: &StorageLocation::Shards,
        action_cache: &StorageLocation::Shards,
        shards,
        health: &health,
        objects: ObjectStores::default(),
    };
    Backend::connect_to(&places, None, &Options::default()).unwrap()
}

/// Three shards behind proxies.
struct Three {
    servers: Vec<Server>,
    proxies: Vec<Proxy>,
    backend: Backend,
}

impl Three {
    async fn start(directory: &Path) -> Self {
        let mut three = Three {
            servers: Vec::new(),
            proxies: Vec::new(),
            backend: Backend::connect(&nowhere(), &nowhere(), Options::default()),
        };
        let mut shards = Vec::new();
        for name in ["a", "b", "c"] {
            let server = Server::start(&directory.join(name), 256 << 20).await;
            let proxy = Proxy::start(server.address).await;
            shards.push(shard(name, vec![proxy.endpoint()]));
            three.servers.push(server);
            three.proxies.push(proxy);
        }
        three.backend = backend(&shards);
        three
    }
}

fn nowhere() -> Endpoint {
    Endpoint::Tcp("127.0.0.1:1".to_owned())
}

/// Of many sizes, some of which need a stream.
fn blobs() -> Vec<Vec<u8>> {
    let small = (0..200).map(|i| content(i, 100 + i as usize * 50));
    small
        .chain((0..6).map(|i| content(900 + i, (2 << 20) + i as usize)))
        .collect()
}

fn digests(blobs: &[Vec<u8>]) -> Vec<Digest> {
    blobs.iter().map(|blob| sha256(blob)).collect()
}

fn uploads(blobs: &[Vec<u8>]) -> Vec<(Digest, Content)> {
    let content = |blob: &Vec<u8>| (sha256(blob), Content::Bytes(blob.clone().into()));
    blobs.iter().map(content).collect()
}

async fn assert_all_read(backend: &Backend, blobs: &[Vec<u8>]) {
    let name = instance("");
    for (read, blob) in backend
        .read_many(&name, &digests(blobs), GIB)
        .await
        .into_iter()
        .zip(blobs)
    {
        assert_eq!(&read.unwrap(), blob);
    }
    let large = blobs.last().unwrap();
    let file = tempfile::tempfile().unwrap();
    let shared = Arc::new(file.try_clone().unwrap());
    let written = backend.read_to_file(&name, &sha256(large), shared).await;
    written.unwrap();
    assert_eq!(file.metadata().unwrap().len(), large.len() as u64);
}

async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !check().await {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_shard_had_is_missing_and_goes_to_the_next_one() {
    for loss in [Route::Closed, Route::Hanging] {
        let directory = tempfile::tempdir().unwrap();
        let three = Three::start(directory.path()).await;
        let (name, blobs) = (instance("some/name"), blobs());
        three.backend.upload(&name, uploads(&blobs)).await.unwrap();
        assert_all_read(&three.backend, &blobs).await;
        // Each is in one place.
        let held = |i: usize| -> Vec<Digest> {
            let missing = three.servers[i].store.find_missing(&digests(&blobs));
            let has = |digest: &Digest| !missing.contains(digest);
            digests(&blobs).into_iter().filter(has).collect()
        };
        let held: Vec<Vec<Digest>> = (0..3).map(held).collect();
        assert_eq!(held.iter().map(Vec::len).sum::<usize>(), blobs.len());
        assert!(held.iter().all(|held| held.len() > blobs.len() / 6));

        three.proxies[1].set(loss);
        let start = Instant::now();
        let missing = three.backend.find_missing(&name, &digests(&blobs)).await;
        assert_eq!(missing.unwrap(), held[1], "{loss:?}");
        three.backend.upload(&name, uploads(&blobs)).await.unwrap();
        assert_all_read(&three.backend, &blobs).await;
        let time = start.elapsed();
        assert!(time < Duration::from_secs(20), "{loss:?}: {time:?}");

        // When it is back, nothing is missing, wherever it went meanwhile.
        three.proxies[1].set(Route::Open);
        let new: Vec<_> = (5000..5100).map(|i| content(i, 700)).collect();
        three.backend.upload(&name, uploads(&new)).await.unwrap();
        eventually("the shard is used again", async || {
            let fresh = [content(fastrand::u64(..), 300)];
            three.backend.upload(&name, uploads(&fresh)).await.unwrap();
            three.servers[1]
                .store
                .find_missing(&digests(&fresh))
                .is_empty()
        })
        .await;
        let all = [digests(&blobs), digests(&new)].concat();
        let missing = three.backend.find_missing(&name, &all).await.unwrap();
        assert_eq!(missing, []);
        assert_all_read(&three.backend, &new).await;
        assert_all_read(&three.backend, &blobs).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_hangs_holds_no_call_for_long() {
    let directory = tempfile::tempdir().unwrap();
    let three = Three::start(directory.path()).await;
    let (name, blobs) = (instance(""), blobs());
    three.backend.upload(&name, uploads(&blobs)).await.unwrap();
    three.proxies[2].set(Route::Hanging);
    let start = Instant::now();
    let reads = blobs.iter().map(|blob| {
        let (backend, name, digest) = (&three.backend, &name, sha256(blob));
        async move { backend.read(name, &digest, GIB).await }
    });
    let reads = futures::future::join_all(reads).await;
    let lost = reads.iter().filter(|read| read.is_err()).count();
    assert!(lost > 0 && lost < blobs.len() / 2);
    for read in reads {
        assert!(matches!(read, Ok(_) | Err(Error::Missing(_))), "{read:?}");
    }
    assert!(
        start.elapsed() < Duration::from_secs(15),
        "{:?}",
        start.elapsed()
    );
    // From now on nobody waits.
    let start = Instant::now();
    three.backend.upload(&name, uploads(&blobs)).await.unwrap();
    assert_all_read(&three.backend, &blobs).await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_shard_and_where_all_are_lost_say_so() {
    let refusing = PeerBehaviour {
        fail: 1_000_000.into(),
        status: Some(tonic::Code::ResourceExhausted),
        ..Default::default()
    };
    let (peer, blob) = (with_blobs(&[], refusing), [content(1, 100)]);
    let (endpoint, _stop) = peer.start_at_endpoint().await;
    let full = backend(&[shard("first", vec![endpoint])]);
    let error = full.upload(&instance(""), uploads(&blob)).await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Full(_)), "{error:?}");
    assert!(
        error.to_string().starts_with("shard first at grpc://"),
        "{error}"
    );

    let lost = backend(&[
        shard("x", vec![nowhere()]),
        shard("y", vec![Endpoint::Tcp("127.0.0.1:2".to_owned())]),
    ]);
    let start = Instant::now();
    let error = lost.upload(&instance(""), uploads(&blob)).await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("no shard of the storage answers, of x, y"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(45));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_was_down_or_lost_its_disk_is_repaired_by_what_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let near = Server::start(&path("near"), 256 << 20).await;
    let far = Server::start(&path("far"), 256 << 20).await;
    let proxy = Proxy::start(far.address).await;
    let mirrored = backend(&[shard("a", vec![near.endpoint(), proxy.endpoint()])]);
    let (name, blobs) = (instance(""), blobs());
    mirrored.upload(&name, uploads(&blobs[..50])).await.unwrap();
    for server in [&near, &far] {
        assert!(server.store.find_missing(&digests(&blobs[..50])).is_empty());
    }
    // Nobody notices that one is down, but that it lacks what came meanwhile.
    proxy.set(Route::Hanging);
    mirrored.upload(&name, uploads(&blobs)).await.unwrap();
    assert_all_read(&mirrored, &blobs).await;
    let (action, result) = (sha256(b"action"), ActionResult::default());
    let update = mirrored.update_action_result(&name, &action, result);
    update.await.unwrap();
    assert!(!far.store.find_missing(&digests(&blobs)).is_empty());
    proxy.set(Route::Open);
    eventually("all blobs and results are in both", async || {
        // An odd number of calls, so that each kind of them begins at either in turn.
        for blob in &blobs[..5] {
            mirrored.read(&name, &sha256(blob), GIB).await.unwrap();
        }
        let found = mirrored
            .find_missing(&name, &digests(&blobs))
            .await
            .unwrap();
        assert_eq!(found, []);
        assert!(
            mirrored
                .action_result(&name, &action)
                .await
                .unwrap()
                .is_some()
        );
        far.store.find_missing(&digests(&blobs)).is_empty()
            && far.store.action_result(&name, &action).unwrap().is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_those_of_the_blob_are_never_given() {
    let blobs: Vec<_> = vec![content(1, 3000), content(2, 2 << 20)];
    let lying = PeerBehaviour {
        corrupt: 1_000_000.into(),
        ..Default::default()
    };
    let (liar, _stop) = with_blobs(&blobs, lying).start_at_endpoint().await;
    let alone = backend(&[shard("a", vec![liar.clone()])]);
    for blob in &blobs {
        let read = alone.read(&instance(""), &sha256(blob), GIB).await;
        assert!(matches!(read, Err(Error::Corrupt { .. })), "{read:?}");
    }
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), 64 << 20).await;
    server
        .client()
        .upload(&instance(""), uploads(&blobs))
        .await
        .unwrap();
    let mirrored = backend(&[shard("a", vec![liar, server.endpoint()])]);
    for _ in 0..4 {
        assert_all_read(&mirrored, &blobs).await;
    }
}

/// By the stream that clients are served.
async fn streamed(backend: &Backend, blob: &[u8]) -> Result<Vec<u8>, Error> {
    let (digest, size) = (sha256(blob), blob.len() as u64);
    let pieces = backend.stream(&instance(""), &digest, 0, size).await?;
    let pieces: Vec<_> = pieces.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_mirror_refuses_or_breaks_off_comes_from_the_other_one() {
    use tonic::Code::{Internal, InvalidArgument, OutOfRange, ResourceExhausted, Unavailable};
    let blobs: Vec<_> = vec![content(1, 3000), content(2, 900_000), content(3, 3 << 20)];
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), 64 << 20).await;
    let client = server.client();
    client.upload(&instance(""), uploads(&blobs)).await.unwrap();
    for code in [
        Internal,
        InvalidArgument,
        OutOfRange,
        ResourceExhausted,
        Unavailable,
    ] {
        let failing = PeerBehaviour {
            fail: 1_000_000.into(),
            status: Some(code),
            ..Default::default()
        };
        let (peer, _stop) = with_blobs(&blobs, failing).start_at_endpoint().await;
        let mirrored = backend(&[shard("a", vec![peer, server.endpoint()])]);
        // Each is read from first in its turn.
        for _ in 0..2 {
            for blob in &blobs {
                let read = streamed(&mirrored, blob).await;
                assert!(
                    read.as_ref().is_ok_and(|read| read == blob),
                    "{code:?}: {:?}",
                    read.err()
                );
            }
            assert_all_read(&mirrored, &blobs).await;
        }
    }
    let lying = PeerBehaviour {
        corrupt: 1_000_000.into(),
        ..Default::default()
    };
    let (liar, _stop) = with_blobs(&blobs, lying).start_at_endpoint().await;
    let mirrored = backend(&[shard("a", vec![liar, server.endpoint()])]);
    for blob in blobs[..2].iter().cycle().take(6) {
        assert_eq!(&streamed(&mirrored, blob).await.unwrap(), blob);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_sends_messages_without_bytes_is_given_up_like_a_silent_one() {
    let blob = content(1, 3 << 20);
    let dripping = PeerBehaviour {
        drips: true,
        ..Default::default()
    };
    let blobs = [blob];
    let (peer, _stop) = with_blobs(&blobs, dripping).start_at_endpoint().await;
    let alone = backend(&[shard("a", vec![peer])]);
    let read = tokio::time::timeout(Duration::from_secs(40), streamed(&alone, &blobs[0])).await;
    let error = read.expect("it waits for ever").unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_whose_output_was_lost_after_it_was_seen_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let server = Server::start(&path("first"), 64 << 20).await;
    let address = server.address;
    let backend = backend(&[shard("a", vec![server.endpoint()])]);
    let (name, blob, action) = (instance("x"), content(1, 1000), sha256(b"action"));
    backend
        .upload(&name, uploads(std::slice::from_ref(&blob)))
        .await
        .unwrap();
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "out".to_owned(),
            digest: Some(sha256(&blob).to_proto()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let update = backend.update_action_result(&name, &action, result.clone());
    update.await.unwrap();
    let found = backend.complete_action_result(&name, &action).await;
    assert_eq!(found.unwrap(), Some(result.clone()));
    server.stop().await;
    let server = Server::start_at(&path("second"), 64 << 20, address).await;
    server
        .store
        .update_action_result(&name, &action, &result)
        .unwrap();
    eventually("the blob is missing", async || {
        let read = backend.read(&name, &sha256(&blob), GIB).await;
        matches!(read, Err(Error::Missing(_)))
    })
    .await;
    let found = backend.complete_action_result(&name, &action).await;
    assert_eq!(found.unwrap(), None);
    // Whoever makes it again is believed at once.
    backend.upload(&name, uploads(&[blob])).await.unwrap();
    let found = backend.complete_action_result(&name, &action).await;
    assert_eq!(found.unwrap(), Some(result));
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_names_have_their_prefix_there() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), 64 << 20).await;
    let prefixed = backend(&[Shard {
        instance_name_prefix: "farm/one".to_owned(),
        ..shard("a", vec![server.endpoint()])
    }]);
    let (action, result) = (sha256(b"action"), ActionResult::default());
    for (here, there) in [("", "farm/one"), ("x/y", "farm/one/x/y")] {
        let (here, kept) = (instance(here), result.clone());
        let update = prefixed.update_action_result(&here, &action, kept);
        update.await.unwrap();
        let found = server.store.action_result(&instance(there), &action);
        assert_eq!(found.unwrap(), Some(result.clone()));
    }
    let blobs = blobs();
    prefixed
        .upload(&instance("x"), uploads(&blobs))
        .await
        .unwrap();
    assert_all_read(&prefixed, &blobs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_served_all_shards_and_upload_to_mirrors_one_of_which_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let near = Server::start(&path("near"), 256 << 20).await;
    let far = Server::start(&path("far"), 256 << 20).await;
    let other = Server::start(&path("other"), 256 << 20).await;
    let proxy = Proxy::start(far.address).await;
    let shards = [
        shard("a", vec![near.endpoint(), proxy.endpoint()]),
        shard("b", vec![other.endpoint()]),
    ];
    let serving = Serving::start(backend(&shards), ANYWHERE).await;
    let (client, name) = (serving.client(), instance(""));
    let blobs = blobs();
    client.upload(&name, uploads(&blobs)).await.unwrap();
    for blob in &blobs {
        let near = near.store.find_missing(&[sha256(blob)]).is_empty();
        assert_eq!(near, far.store.find_missing(&[sha256(blob)]).is_empty());
        assert_ne!(near, other.store.find_missing(&[sha256(blob)]).is_empty());
    }
    proxy.set(Route::Hanging);
    let more: Vec<_> = (0..8).map(|i| content(3000 + i, 3 << 20)).collect();
    client.upload(&name, uploads(&more)).await.unwrap();
    let all = [blobs, more].concat();
    let read = client.read_many(&name, &digests(&all), GIB).await;
    for (read, blob) in read.into_iter().zip(&all) {
        assert_eq!(&read.unwrap(), blob);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_and_results_may_be_in_different_places() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let server = Server::start(&path("there"), 64 << 20).await;
    let store = bb_remote_execution::storage::embedded::Store::open(&path("here"), 64 << 20);
    let store = Arc::new(store.unwrap());
    let places = Places {
        cas: &StorageLocation::Endpoint(server.endpoint()),
        action_cache: &StorageLocation::Embedded,
        shards: &[],
        health: &Health::default(),
        objects: ObjectStores::default(),
    };
    let separate = Backend::connect_to(&places, Some(store.clone()), &Options::default());
    let separate = separate.unwrap();
    let (name, blob, action) = (instance("x"), content(1, 1000), sha256(b"action"));
    let result = ActionResult {
        stdout_digest: Some(sha256(&blob).to_proto()),
        ..Default::default()
    };
    let update = separate.update_action_result(&name, &action, result.clone());
    update.await.unwrap();
    assert_eq!(
        separate
            .complete_action_result(&name, &action)
            .await
            .unwrap(),
        None
    );
    separate
        .upload(&name, uploads(std::slice::from_ref(&blob)))
        .await
        .unwrap();
    assert!(store.find_missing(&[sha256(&blob)]).len() == 1);
    let found = separate.complete_action_result(&name, &action).await;
    assert_eq!(found.unwrap(), Some(result.clone()));

    let serving = Serving::start(separate, ANYWHERE).await;
    let client = serving.client();
    let found = client.action_result(&name, &action).await;
    assert_eq!(found.unwrap(), Some(result));
    assert_eq!(client.read(&name, &sha256(&blob), GIB).await.unwrap(), blob);
}
