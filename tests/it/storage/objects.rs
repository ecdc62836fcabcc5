//! Storage in an object store and in Redis: real servers, and what becomes of blobs when these are down,
//! hang, lie, are full, or have lost what they had.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{
        object_storage::{Azure, Gcs, ObjectService, ObjectStores, Redis, S3},
        storage::{Health, Places, StorageLocation},
    },
    daemon::Credentials,
    digest::Digest,
    proto::reapi::{ActionResult, OutputFile},
    storage::{
        Backend, Content, Error, RetryPolicy,
        embedded::Store,
        grpc::{Options, Timeouts},
    },
};
use futures::TryStreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

use super::{
    ANYWHERE, GIB, content, instance, sha256,
    shards::{Proxy, Route},
};
use crate::harness::{
    scheduler_process::SchedulerProcess,
    services::{self, BUCKET, Service},
};

/// What leads to a service.
#[derive(Clone, Default)]
pub struct Sections {
    pub s3: S3,
    pub redis: Redis,
    pub password: Option<std::path::PathBuf>,
}

impl Sections {
    fn at(address: std::net::SocketAddr) -> Self {
        Sections {
            s3: S3 {
                bucket: BUCKET.to_owned(),
                prefix: "some/prefix".to_owned(),
                endpoint: format!("http://{address}").parse().unwrap(),
                ..S3::default()
            },
            redis: Redis {
                endpoint: format!("redis://{address}").parse().unwrap(),
                prefix: "some/prefix".to_owned(),
                ..Redis::default()
            },
            password: None,
        }
    }

    /// All in one place; blobs that pass are kept in `cache`.
    fn backend(&self, service: ObjectService, cache: Option<Arc<Store>>) -> Backend {
        // What moto takes is anything.
        let key = tempfile::NamedTempFile::new().unwrap();
        let text = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n";
        std::fs::write(key.path(), text).unwrap();
        let file: &Path = match (&self.password, service) {
            (Some(file), _) => file,
            (None, _) => key.path(),
        };
        let s3 = S3 {
            credentials_file: file.to_owned(),
            ..self.s3.clone()
        };
        let redis = Redis {
            password_file: self.password.clone().unwrap_or_default(),
            ..self.redis.clone()
        };
        let place = StorageLocation::Objects(service);
        let places = Places {
            cas: &place,
            action_cache: &place,
            shards: &[],
            health: &Health::default(),
            objects: ObjectStores {
                s3: &s3,
                gcs: &Gcs::default(),
                azure: &Azure::default(),
                redis: &redis,
            },
        };
        let credentials = Credentials::default();
        let options = Options {
            credentials: credentials
                .with_secrets(places.secret_files(), None)
                .unwrap(),
            timeouts: Timeouts {
                idle: Duration::from_secs(2),
                ..Timeouts::default()
            },
            retry: RetryPolicy::budgeted(Duration::from_secs(2)),
            ..Options::default()
        };
        Backend::connect_to(&places, cache, &options).unwrap()
    }
}

/// A real server, and how its values are changed behind our back.
struct Real {
    service: ObjectService,
    server: Service,
    sections: Sections,
}

impl Real {
    fn of(service: ObjectService, server: Service) -> Self {
        let sections = Sections::at(server.address);
        Real {
            service,
            server,
            sections,
        }
    }

    fn backend(&self) -> Backend {
        self.sections.backend(self.service, None)
    }

    fn name(digest: &Digest) -> String {
        let (hash, size) = (digest.hash_hex(), digest.size());
        format!("some/prefix/cas/sha256/{hash}-{size}")
    }

    fn set(&self, name: &str, value: &[u8]) {
        let answer = match self.service {
            ObjectService::Redis => self.server.command(&[b"SET", name.as_bytes(), value]),
            _ => self.server.http("PUT", &format!("/{BUCKET}/{name}"), value),
        };
        assert!(answer.contains("OK"), "{answer}");
    }

    fn remove(&self, name: &str) {
        let answer = match self.service {
            ObjectService::Redis => self.server.command(&[b"DEL", name.as_bytes()]),
            _ => self
                .server
                .http("DELETE", &format!("/{BUCKET}/{name}"), b""),
        };
        assert!(
            answer.starts_with(":1") || answer.contains(" 204 "),
            "{answer}"
        );
    }
}

fn real() -> Vec<Real> {
    let redis = services::redis(&[]).map(|server| Real::of(ObjectService::Redis, server));
    let s3 = services::s3().map(|server| Real::of(ObjectService::S3, server));
    redis.into_iter().chain(s3).collect()
}

/// Back ends of real servers, without a cache and with one, where clients are served; what they need is to
/// be kept.
pub fn backends(directory: &Path) -> (Vec<Backend>, Vec<Service>) {
    let (mut all, mut servers) = (Vec::new(), Vec::new());
    for (number, real) in real().into_iter().enumerate() {
        let store = Store::open(&directory.join(number.to_string()), GIB).unwrap();
        all.push(real.sections.backend(real.service, Some(Arc::new(store))));
        servers.push(real.server);
    }
    (all, servers)
}

fn uploads(blobs: &[Vec<u8>]) -> Vec<(Digest, Content)> {
    let content = |blob: &Vec<u8>| (sha256(blob), Content::Bytes(blob.clone().into()));
    blobs.iter().map(content).collect()
}

async fn streamed(backend: &Backend, digest: &Digest) -> Result<Vec<u8>, Error> {
    let pieces = backend
        .stream(&instance(""), digest, 0, digest.size())
        .await?;
    let pieces: Vec<_> = pieces.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_kept_on_this_host_and_who_has_no_cache_reads_it_too() {
    for real in real() {
        let (name, directory) = (instance(""), tempfile::tempdir().unwrap());
        let store = Arc::new(Store::open(directory.path(), GIB).unwrap());
        let (near, far) = (
            real.sections.backend(real.service, Some(store.clone())),
            real.backend(),
        );
        let blobs: Vec<Vec<u8>> = [100, 70_000, 2_000_000, 20_000_001]
            .into_iter()
            .map(|size| content(size, size as usize))
            .collect();
        let digests: Vec<Digest> = blobs.iter().map(|blob| sha256(blob)).collect();
        assert_eq!(near.find_missing(&name, &digests).await.unwrap(), digests);
        far.upload(&name, uploads(&blobs)).await.unwrap();
        assert_eq!(near.find_missing(&name, &digests).await.unwrap(), []);
        assert_eq!(store.find_missing(&digests), digests);
        // Many ask at once; the service is asked once for each.
        let reads = (0..8).map(|_| async {
            for (digest, blob) in digests.iter().zip(&blobs) {
                assert_eq!(&streamed(&near, digest).await.unwrap(), blob);
            }
        });
        futures::future::join_all(reads).await;
        assert_eq!(store.find_missing(&digests), []);
        // What the service has lost can be read here, but is missing.
        for digest in &digests {
            real.remove(&Real::name(digest));
        }
        let fresh = real.sections.backend(real.service, Some(store.clone()));
        assert_eq!(fresh.find_missing(&name, &digests).await.unwrap(), digests);
        assert_eq!(fresh.read(&name, &digests[2], GIB).await.unwrap(), blobs[2]);
        let written: Vec<Vec<u8>> = (0..50).map(|i| content(900 + i, 3000)).collect();
        let many = written
            .iter()
            .map(|blob| (sha256(blob), blob.clone().into()));
        let results = fresh.put_many(&name, many.collect()).await.unwrap();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let digests: Vec<Digest> = written.iter().map(|blob| sha256(blob)).collect();
        assert_eq!(store.find_missing(&digests), []);
        for read in far.read_many(&name, &digests, GIB).await {
            read.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_was_lost_since_it_was_found_is_missing_and_can_be_uploaded_again() {
    for real in real() {
        let (name, backend) = (instance(""), real.backend());
        for blob in [content(1, 1000), content(2, 3_000_000)] {
            let digest = sha256(&blob);
            let upload = || uploads(std::slice::from_ref(&blob));
            backend.upload(&name, upload()).await.unwrap();
            assert_eq!(backend.find_missing(&name, &[digest]).await.unwrap(), []);
            real.remove(&Real::name(&digest));
            let error = streamed(&backend, &digest).await.unwrap_err();
            assert!(matches!(error, Error::Missing(_)), "{error:?}");
            let missing = backend.find_missing(&name, &[digest]).await.unwrap();
            assert_eq!(missing, [digest]);
            backend.upload(&name, upload()).await.unwrap();
            assert_eq!(streamed(&backend, &digest).await.unwrap(), blob);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_those_asked_for_are_kept_nowhere_and_replaced_by_the_next_upload() {
    for real in real() {
        let (name, directory) = (instance(""), tempfile::tempdir().unwrap());
        for (number, size) in [5000, 2_000_000].into_iter().enumerate() {
            for (round, length) in [size, size - 1, size + 1].into_iter().enumerate() {
                let store = directory.path().join(format!("{number}-{round}"));
                let store = Arc::new(Store::open(&store, GIB).unwrap());
                let near = real.sections.backend(real.service, Some(store.clone()));
                let far = real.backend();
                let blob = content(size as u64 + round as u64, size);
                let digest = sha256(&blob);
                let upload = || uploads(std::slice::from_ref(&blob));
                far.upload(&name, upload()).await.unwrap();
                real.set(&Real::name(&digest), &content(7, length));
                for backend in [&near, &far] {
                    let read = backend.read(&name, &digest, GIB).await;
                    assert!(read.is_err(), "{length} of {size}");
                    assert!(streamed(backend, &digest).await.is_err());
                    let file = Arc::new(tempfile::tempfile().unwrap());
                    let read = backend.read_to_file(&name, &digest, file).await;
                    assert!(read.is_err());
                    assert_eq!(store.find_missing(&[digest]), [digest]);
                    let missing = backend.find_missing(&name, &[digest]).await.unwrap();
                    assert_eq!(missing, [digest], "{length} of {size}");
                }
                far.upload(&name, upload()).await.unwrap();
                for backend in [&near, &far] {
                    assert_eq!(streamed(backend, &digest).await.unwrap(), blob);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_what_the_service_says_now_and_a_damaged_one_is_none() {
    for real in real() {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(directory.path(), GIB).unwrap());
        let near = real.sections.backend(real.service, Some(store));
        let (far, name, action) = (real.backend(), instance("a/b"), sha256(b"action"));
        let output = content(3, 500);
        let result = |exit_code| ActionResult {
            exit_code,
            output_files: vec![OutputFile {
                path: "out".to_owned(),
                digest: Some(sha256(&output).to_proto()),
                ..OutputFile::default()
            }],
            ..ActionResult::default()
        };
        for exit_code in [1, 2] {
            let update = far.update_action_result(&name, &action, result(exit_code));
            update.await.unwrap();
            let found = near.action_result(&name, &action).await.unwrap();
            assert_eq!(found, Some(result(exit_code)));
        }
        // Without its output it is none for clients.
        let complete = near.complete_action_result(&name, &action).await;
        assert_eq!(complete.unwrap(), None);
        let output = uploads(std::slice::from_ref(&output));
        near.upload(&name, output).await.unwrap();
        let complete = near.complete_action_result(&name, &action).await;
        assert_eq!(complete.unwrap(), Some(result(2)));
        let other = instance("a");
        assert_eq!(near.action_result(&other, &action).await.unwrap(), None);
        let (hash, size) = (action.hash_hex(), action.size());
        let place = format!("some/prefix/ac/a/b/sha256/{hash}-{size}");
        real.set(&place, b"something else");
        assert_eq!(near.action_result(&name, &action).await.unwrap(), None);
        real.remove(&place);
        assert_eq!(near.action_result(&name, &action).await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_without_memory_says_so_and_is_used_again_when_it_has_some() {
    let Some(server) = services::redis(&["--maxmemory", "8mb"]) else {
        return;
    };
    let real = Real::of(ObjectService::Redis, server);
    let (name, backend) = (instance(""), real.backend());
    let blobs: Vec<Vec<u8>> = (0..100).map(|i| content(i, 200_000)).collect();
    let error = backend.upload(&name, uploads(&blobs)).await.unwrap_err();
    assert!(matches!(error, Error::Full(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("redis://127.0.0.1:"), "{text}");
    assert!(text.contains("raise its maxmemory"), "{text}");
    let large = [content(5, 20_000_000)];
    let error = backend.upload(&name, uploads(&large)).await.unwrap_err();
    assert!(matches!(error, Error::Full(_)), "{error:?}");
    // Nothing is left of what was not finished.
    let keys = real.server.command(&[b"KEYS", b"*-20000000*"]);
    assert_eq!(keys, "*0\r\n");
    real.server
        .command(&[b"CONFIG", b"SET", b"maxmemory", b"0"]);
    backend.upload(&name, uploads(&blobs)).await.unwrap();
    backend.upload(&name, uploads(&large)).await.unwrap();
    let digest = sha256(&large[0]);
    assert_eq!(streamed(&backend, &digest).await.unwrap(), large[0]);
    // It does not go by itself.
    let left = real
        .server
        .command(&[b"TTL", Real::name(&digest).as_bytes()]);
    assert_eq!(left, ":-1\r\n");
    let too_large = Digest::new(digest.function(), digest.hash_bytes(), 600 << 20);
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(600 << 20).unwrap();
    let blob = vec![(too_large, Content::File(Arc::new(sparse)))];
    let error = backend.upload(&name, blob).await.unwrap_err().to_string();
    assert!(error.contains("larger than the 512 MiB"), "{error}");
    assert_eq!(backend.maximum_blob_size(&name).await, 512 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_down_or_hang_hold_no_call_for_long_and_are_used_again() {
    let mut each = JoinSet::new();
    for real in real() {
        each.spawn(is_lost_and_found(real));
    }
    each.join_all().await;
}

async fn is_lost_and_found(real: Real) {
    let proxy = Proxy::start(real.server.address).await;
    let (name, directory) = (instance(""), tempfile::tempdir().unwrap());
    let store = Arc::new(Store::open(directory.path(), GIB).unwrap());
    let sections = Sections::at(proxy.address);
    let backend = sections.backend(real.service, None);
    let cached = sections.backend(real.service, Some(store));
    let blobs = [content(1, 100), content(2, 9_000_000)];
    let digests: Vec<Digest> = blobs.iter().map(|blob| sha256(blob)).collect();
    cached.upload(&name, uploads(&blobs)).await.unwrap();
    for route in [Route::Closed, Route::Hanging] {
        proxy.set(route);
        let begun = Instant::now();
        let fresh = content(begun.elapsed().as_nanos() as u64, 300);
        let error = backend.upload(&name, uploads(&[fresh])).await.unwrap_err();
        assert!(
            matches!(error, Error::Unavailable(_)),
            "{route:?}: {error:?}"
        );
        let address = proxy.address.to_string();
        assert!(error.to_string().contains(&address), "{error}");
        for digest in &digests {
            let error = backend.read(&name, digest, GIB).await.unwrap_err();
            assert!(
                matches!(error, Error::Unavailable(_)),
                "{route:?}: {error:?}"
            );
        }
        let action = backend.action_result(&name, &digests[0]).await;
        assert!(matches!(action, Err(Error::Unavailable(_))), "{action:?}");
        let time = begun.elapsed();
        assert!(time < Duration::from_secs(40), "{route:?}: {time:?}");
        // What has failed often enough is refused at once, until it answers.
        until_refused_at_once(&backend).await;
        until_refused_at_once(&cached).await;
        for (digest, blob) in digests.iter().zip(&blobs) {
            assert_eq!(&streamed(&cached, digest).await.unwrap(), blob);
            let file = Arc::new(tempfile::tempfile().unwrap());
            cached.read_to_file(&name, digest, file).await.unwrap();
        }
        let begun = Instant::now();
        let absent = sha256(b"absent");
        let large = content(begun.elapsed().as_nanos() as u64, 9_000_000);
        for error in [
            cached.upload(&name, uploads(&[large])).await.unwrap_err(),
            cached.read(&name, &absent, GIB).await.unwrap_err(),
            streamed(&cached, &absent).await.unwrap_err(),
            cached.action_result(&name, &absent).await.unwrap_err(),
            cached.find_missing(&name, &[absent]).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(&address), "{text}");
            assert!(text.contains("asked again in about"), "{text}");
        }
        let resumed = cached.resume_upload(&name, "uploads/x", "o", absent, 0);
        assert!(resumed.await.is_err());
        let time = begun.elapsed();
        assert!(time < Duration::from_secs(1), "{route:?}: {time:?}");

        proxy.set(Route::Open);
        until_used(&backend).await;
        until_used(&cached).await;
        for (digest, blob) in digests.iter().zip(&blobs) {
            assert_eq!(&streamed(&backend, digest).await.unwrap(), blob);
        }
    }
}

/// While calls fail in their own time.
async fn until_refused_at_once(backend: &Backend) {
    let deadline = Instant::now() + Duration::from_secs(40);
    let absent = sha256(b"absent");
    loop {
        let begun = Instant::now();
        let error = backend.read(&instance(""), &absent, GIB).await.unwrap_err();
        if begun.elapsed() < Duration::from_millis(100)
            && error.to_string().contains("out of use until it answers")
        {
            return;
        }
        assert!(Instant::now() < deadline, "{error}");
    }
}

/// While nobody starts anything again.
async fn until_used(backend: &Backend) {
    let deadline = Instant::now() + Duration::from_secs(40);
    let absent = sha256(b"absent");
    while let Err(error @ Error::Unavailable(_)) = backend.read(&instance(""), &absent, GIB).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// An HTTP server that has one answer.
async fn answering(answer: &'static str) -> std::net::SocketAddr {
    let listener = TcpListener::bind(ANYWHERE).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    address
}

const DENIED: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 81\r\nConnection: close\r\n\r\n<Error><Code>InvalidAccessKeyId</Code><Message>no such key here</Message></Error>";

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_an_object_store_refuses_says_so_when_it_starts_and_serves_all_the_same() {
    let mut refusing = vec![(
        answering(DENIED).await,
        BUCKET,
        "storage.s3.credentials_file",
    )];
    let real = services::s3();
    if let Some(server) = &real {
        refusing.push((server.address, "another", "make the bucket another"));
    }
    for (address, bucket, remedy) in refusing {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        let key = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n";
        std::fs::write(&file, key).unwrap();
        let scheduler = SchedulerProcess::start(&format!(
            "storage.cas = \"s3\"\nstorage.action_cache = \"s3\"\n\
             storage.s3 = {{ bucket = \"{bucket}\", endpoint = \"http://{address}\", credentials_file = \"{}\" }}\n",
            file.display()
        ));
        for words in ["whoever needs it is refused", "ready: "] {
            scheduler.says(0, words).await;
        }
        let log = scheduler.log();
        let place = format!("s3 bucket {bucket} at http://{address}");
        let is_warning = |line: &&str| line.contains("whoever needs it is refused");
        let warnings: Vec<&str> = log.lines().filter(is_warning).collect();
        assert_eq!(warnings.len(), 1, "{log}");
        for words in [&place, remedy] {
            assert!(warnings[0].contains(words), "{}", warnings[0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_told_with_what_to_do() {
    const BUSY: &str = "HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let (name, blob) = (instance(""), [content(1, 100)]);
    let denied = Sections::at(answering(DENIED).await).backend(ObjectService::S3, None);
    let error = denied.upload(&name, uploads(&blob)).await.unwrap_err();
    assert!(matches!(error, Error::Internal(_)), "{error:?}");
    let probed = denied.answers().await.unwrap_err().to_string();
    for words in [
        "403",
        "InvalidAccessKeyId: no such key here",
        "storage.s3.credentials_file",
    ] {
        assert!(probed.contains(words), "{probed}");
    }
    let busy = Sections::at(answering(BUSY).await).backend(ObjectService::S3, None);
    let error = busy.upload(&name, uploads(&blob)).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");

    if let Some(server) = services::s3() {
        let mut sections = Sections::at(server.address);
        sections.s3.bucket = "another".to_owned();
        let absent = sections.backend(ObjectService::S3, None);
        let uploaded = absent.upload(&name, uploads(&blob)).await;
        for error in [uploaded.unwrap_err(), absent.answers().await.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("NoSuchBucket"), "{text}");
            assert!(
                text.contains("make the bucket another, or correct storage.s3"),
                "{text}"
            );
        }
    }
    if let Some(server) = services::redis(&["--requirepass", "secret"]) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        let mut sections = Sections::at(server.address);
        for (password, is_right) in [
            (None, false),
            (Some("wrong"), false),
            (Some("secret\n"), true),
        ] {
            if let Some(password) = password {
                std::fs::write(&file, password).unwrap();
                sections.password = Some(file.clone());
            }
            let backend = sections.backend(ObjectService::Redis, None);
            match backend.upload(&name, uploads(&blob)).await {
                Ok(()) => assert!(is_right),
                Err(error) => {
                    assert!(!is_right, "{error}");
                    let text = error.to_string();
                    assert!(text.contains("storage.redis.password_file"), "{text}");
                }
            }
        }
    }
}
