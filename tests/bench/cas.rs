//! The embedded store over loopback TCP, served by a process of its own.
//!
//! usage: cargo bench --bench farm -- cas [DIRECTORY [ROUNDS [small|large|store]]]
//!
//! Each round has blobs of its own. A figure is the median of the rounds. The first column is a bare
//! gRPC client's, the second that of `storage::grpc::Client`, which workers use and which verifies
//! what it reads and asks before it writes.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon::{self, Channel},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{
        bytestream::{ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
        reapi::{
            BatchReadBlobsRequest, BatchUpdateBlobsRequest, FindMissingBlobsRequest,
            batch_update_blobs_request,
            content_addressable_storage_client::ContentAddressableStorageClient,
        },
    },
    resource::{ReadName, WriteName},
    storage::{
        Backend, Content,
        embedded::Store,
        grpc::{Client, Options},
        serve,
    },
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

pub const SMALL: usize = 1 << 10;
const SMALL_COUNT: usize = 10_000;
const LARGE: usize = 4 << 20;
/// Of the served store. It is soon full and evicts, as one in use does: in a virtual machine, memory
/// that files have had before takes new ones two or three times faster than memory that its host
/// must provide first.
const SIZE: u64 = 3 << 30;
const LARGE_COUNT: usize = 200;
const PER_BATCH: usize = 1000;
const STREAMED: usize = 5_000;
/// Digests of one FindMissingBlobs.
const ASKED: usize = 10_000;
const IN_FLIGHT: usize = 16;
const CONNECTIONS: usize = 4;

/// The first argument of the process that serves.
const SERVER: &str = "serve";

pub fn run(arguments: &[String]) {
    if let [first, directory] = arguments
        && first == SERVER
    {
        return serve(Path::new(directory));
    }
    let place = arguments.first().map_or("/var/tmp", String::as_str);
    let rounds = arguments.get(1).and_then(|text| text.parse().ok());
    let which = arguments.get(2).map_or("all", String::as_str);
    if which == "all" || which == "store" {
        measure_store(Path::new(place));
    }
    if which == "store" {
        return;
    }
    let work = measure(Path::new(place), rounds.unwrap_or(5), which);
    tokio::runtime::Runtime::new().unwrap().block_on(work);
}

/// The store alone, without a network, with a million blobs of 1 KiB.
fn measure_store(place: &Path) {
    const COUNT: u64 = 1_000_000;
    let blob = |i: u64| {
        let mut bytes = vec![0; SMALL];
        bytes[..8].copy_from_slice(&i.to_le_bytes());
        (DigestFunction::Sha256.digest_of(&bytes), Bytes::from(bytes))
    };
    let directory = tempfile::tempdir_in(place).unwrap();
    let before = memory();
    let store = Store::open(directory.path(), SIZE).unwrap();
    let mut time = 0.0;
    for first in (0..COUNT).step_by(PER_BATCH) {
        let blobs: Vec<_> = (first..first + PER_BATCH as u64).map(blob).collect();
        let began = Instant::now();
        assert!(store.put(&blobs).iter().all(Result::is_ok));
        time += began.elapsed().as_secs_f64();
    }
    println!(
        "the store alone in {}, 1,000,000 blobs of 1 KiB",
        place.display()
    );
    println!(
        "{:<32} {:>12.0} blobs/s",
        "put, batches of 1,000",
        COUNT as f64 / time
    );
    let digests: Vec<Digest> = (0..COUNT).map(|i| blob(i * 7919 % COUNT).0).collect();
    let began = Instant::now();
    for digest in &digests {
        assert_eq!(store.read(digest, 1 << 20).unwrap().len(), SMALL);
    }
    let time = began.elapsed().as_secs_f64();
    println!(
        "{:<32} {:>12.0} blobs/s",
        "read",
        digests.len() as f64 / time
    );
    let began = Instant::now();
    assert!(store.find_missing(&digests).is_empty());
    let time = began.elapsed().as_secs_f64();
    println!(
        "{:<32} {:>12.0} digests/s",
        "find",
        digests.len() as f64 / time
    );
    let began = Instant::now();
    for digests in digests.chunks(PER_BATCH) {
        let read = store.read_many(digests, 1 << 20);
        assert!(
            read.iter()
                .all(|blob| blob.as_ref().is_ok_and(|it| it.len() == SMALL))
        );
    }
    let time = began.elapsed().as_secs_f64();
    println!(
        "{:<32} {:>12.0} blobs/s",
        "read, scattered batches",
        digests.len() as f64 / time
    );
    drop(digests);
    println!("{:<32} {:>12} MB on disk", "", store.used() / 1_000_000);
    drop(store);
    let began = Instant::now();
    let store = Store::open(directory.path(), SIZE).unwrap();
    println!("{:<32} {:>12.2} s", "open", began.elapsed().as_secs_f64());
    assert_eq!(store.count() as u64, COUNT);
    println!(
        "{:<32} {:>12} MB of memory",
        "",
        (memory() - before) / 1_000_000
    );
}

/// Bytes of this process that no file backs.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn serve(directory: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("server")
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let store = Arc::new(Store::open(directory, SIZE).unwrap());
        let anywhere = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = daemon::listen("", "listen", &anywhere, None).unwrap();
        println!("{}", listener.address());
        let capabilities = serve::capabilities(serve::Announcement {
            storage: Some(Backend::Embedded(store.clone())),
            ..Default::default()
        });
        let services = daemon::Services::default().add(capabilities);
        let routes = serve::add_to(services, &Backend::Embedded(store.clone())).into_routes();
        let forever = CancellationToken::new();
        daemon::serve(listener, routes, forever, Duration::ZERO)
            .await
            .unwrap();
    });
}

struct Server {
    process: Child,
    endpoint: Endpoint,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start(place: &Path) -> Self {
        let directory = tempfile::tempdir_in(place).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["cas", SERVER])
            .arg(directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        Server {
            process,
            endpoint: Endpoint::Tcp(address.trim().to_owned()),
            _directory: directory,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What one kind of call did in each round: its rate, by a bare client and by ours.
struct Row {
    name: &'static str,
    unit: &'static str,
    bare: Vec<f64>,
    ours: Vec<f64>,
}

fn row(name: &'static str, unit: &'static str) -> Row {
    Row {
        name,
        unit,
        bare: Vec::new(),
        ours: Vec::new(),
    }
}

struct Clients {
    channels: Vec<Channel>,
    ours: Client,
}

async fn measure(place: &Path, rounds: u64, which: &str) {
    let server = Server::start(place);
    let clients = Clients {
        channels: (0..CONNECTIONS)
            .map(|_| daemon::connect(&server.endpoint))
            .collect(),
        ours: Client::connect(&server.endpoint, &server.endpoint, Options::default()),
    };
    println!(
        "embedded store in {}, {rounds} rounds\n{:<32} {:>12} {:>12}",
        place.display(),
        "",
        "bare",
        "our client"
    );
    let mut rows = Vec::new();
    if which != "large" {
        rows.extend(measure_small(&clients, rounds).await);
    }
    if which != "small" {
        rows.extend(measure_large(&clients, rounds).await);
    }
    for row in rows {
        let (bare, ours) = (median(row.bare), median(row.ours));
        println!("{:<32} {bare:>12.0} {ours:>12.0} {}", row.name, row.unit);
    }
}

async fn measure_small(clients: &Clients, rounds: u64) -> [Row; 4] {
    let (channels, client) = (&clients.channels, &clients.ours);
    let none = InstanceName::empty();
    let mut up = row("1 KiB up, batches", "blobs/s");
    let mut down = row("1 KiB down, batches", "blobs/s");
    let mut single = row("1 KiB down, ByteStream each", "blobs/s");
    let mut find = row("FindMissing, 10,000 at a time", "digests/s");
    for round in 0..rounds {
        let small = blobs(2 * round, SMALL_COUNT, SMALL);
        let digests: Vec<Digest> = small.iter().map(|(digest, _)| *digest).collect();
        let time = timed(batch_update(channels, &small)).await;
        up.bare.push(SMALL_COUNT as f64 / time);
        let time = timed(batch_read(channels, &digests)).await;
        down.bare.push(SMALL_COUNT as f64 / time);
        let time = timed(stream_read(channels, &digests[..STREAMED], SMALL)).await;
        single.bare.push(STREAMED as f64 / time);
        let repeated: Vec<Digest> = digests.iter().copied().cycle().take(40 * ASKED).collect();
        let time = timed(find_missing(channels, &repeated)).await;
        find.bare.push(repeated.len() as f64 / time);

        let small = blobs(2 * round + 1, SMALL_COUNT, SMALL);
        let digests: Vec<Digest> = small.iter().map(|(digest, _)| *digest).collect();
        let contents = contents(&small);
        let time = timed(async { client.upload(&none, contents).await.unwrap() }).await;
        up.ours.push(SMALL_COUNT as f64 / time);
        let read_many = async {
            for blob in client.read_many(&none, &digests, 1 << 20).await {
                assert_eq!(blob.unwrap().len(), SMALL);
            }
        };
        down.ours.push(SMALL_COUNT as f64 / timed(read_many).await);
        let time = timed(read_each(client, &digests[..STREAMED])).await;
        single.ours.push(STREAMED as f64 / time);
        let find_missing = async {
            assert_eq!(client.find_missing(&none, &digests).await.unwrap(), []);
        };
        find.ours
            .push(SMALL_COUNT as f64 / timed(find_missing).await);
    }
    [find, up, down, single]
}

async fn measure_large(clients: &Clients, rounds: u64) -> [Row; 2] {
    let (channels, client) = (&clients.channels, &clients.ours);
    let none = InstanceName::empty();
    let megabytes = (LARGE_COUNT * LARGE) as f64 / 1e6;
    let mut up = row("4 MiB up, ByteStream", "MB/s");
    let mut down = row("4 MiB down, ByteStream", "MB/s");
    for round in 0..rounds {
        let large = blobs(2 * round, LARGE_COUNT, LARGE);
        let digests: Vec<Digest> = large.iter().map(|(digest, _)| *digest).collect();
        up.bare
            .push(megabytes / timed(stream_write(channels, &large)).await);
        down.bare
            .push(megabytes / timed(stream_read(channels, &digests, LARGE)).await);
        drop(large);

        let large = blobs(2 * round + 1, LARGE_COUNT, LARGE);
        let digests: Vec<Digest> = large.iter().map(|(digest, _)| *digest).collect();
        let contents = contents(&large);
        let upload = async { client.upload(&none, contents).await.unwrap() };
        up.ours.push(megabytes / timed(upload).await);
        down.ours
            .push(megabytes / timed(read_each(client, &digests)).await);
    }
    [up, down]
}

async fn read_each(client: &Client, digests: &[Digest]) {
    stream::iter(digests)
        .for_each_concurrent(IN_FLIGHT, |digest| async {
            let blob = client.read(&InstanceName::empty(), digest, 1 << 30).await;
            assert_eq!(blob.unwrap().len() as u64, digest.size());
        })
        .await;
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub async fn timed(work: impl Future<Output = ()>) -> f64 {
    let began = Instant::now();
    work.await;
    began.elapsed().as_secs_f64()
}

/// Blobs that no other seed makes.
pub fn blobs(seed: u64, count: usize, size: usize) -> Vec<(Digest, Bytes)> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ size as u64;
    let mut blob = || {
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(size);
        (DigestFunction::Sha256.digest_of(&bytes), Bytes::from(bytes))
    };
    (0..count).map(|_| blob()).collect()
}

fn contents(blobs: &[(Digest, Bytes)]) -> Vec<(Digest, Content)> {
    let content = |(digest, bytes): &(Digest, Bytes)| (*digest, Content::Bytes(bytes.clone()));
    blobs.iter().map(content).collect()
}

pub async fn find_missing(channels: &[Channel], digests: &[Digest]) {
    stream::iter(digests.chunks(ASKED).enumerate())
        .for_each_concurrent(IN_FLIGHT, |(i, digests)| async move {
            let request = FindMissingBlobsRequest {
                blob_digests: digests.iter().map(Digest::to_proto).collect(),
                ..Default::default()
            };
            let answer = cas(channels, i).find_missing_blobs(request).await.unwrap();
            assert!(answer.get_ref().missing_blob_digests.is_empty());
        })
        .await;
}

pub async fn batch_update(channels: &[Channel], blobs: &[(Digest, Bytes)]) {
    stream::iter(blobs.chunks(PER_BATCH).enumerate())
        .for_each_concurrent(IN_FLIGHT, |(i, blobs)| async move {
            let request = |(digest, data): &(Digest, Bytes)| batch_update_blobs_request::Request {
                digest: Some(digest.to_proto()),
                data: data.clone(),
                compressor: 0,
            };
            let request = BatchUpdateBlobsRequest {
                requests: blobs.iter().map(request).collect(),
                ..Default::default()
            };
            let answer = cas(channels, i).batch_update_blobs(request).await.unwrap();
            for response in &answer.get_ref().responses {
                assert_eq!(response.status.clone().unwrap_or_default().code, 0);
            }
        })
        .await;
}

pub async fn batch_read(channels: &[Channel], digests: &[Digest]) {
    stream::iter(digests.chunks(PER_BATCH).enumerate())
        .for_each_concurrent(IN_FLIGHT, |(i, digests)| async move {
            let request = BatchReadBlobsRequest {
                digests: digests.iter().map(Digest::to_proto).collect(),
                ..Default::default()
            };
            let answer = cas(channels, i).batch_read_blobs(request).await.unwrap();
            for response in &answer.get_ref().responses {
                assert_eq!(response.data.len(), SMALL);
            }
        })
        .await;
}

pub async fn stream_read(channels: &[Channel], digests: &[Digest], size: usize) {
    stream::iter(digests.iter().enumerate())
        .for_each_concurrent(IN_FLIGHT, |(i, digest)| async move {
            let request = ReadRequest {
                resource_name: ReadName::format(&InstanceName::empty(), digest),
                ..Default::default()
            };
            let mut pieces = bytes(channels, i).read(request).await.unwrap().into_inner();
            let mut length = 0;
            while let Some(piece) = pieces.message().await.unwrap() {
                length += piece.data.len();
            }
            assert_eq!(length, size);
        })
        .await;
}

pub async fn stream_write(channels: &[Channel], blobs: &[(Digest, Bytes)]) {
    const CHUNK: usize = 1 << 20;
    stream::iter(blobs.iter().enumerate())
        .for_each_concurrent(IN_FLIGHT, |(i, (digest, data))| async move {
            let upload = uuid::Uuid::new_v4();
            let name = WriteName::format(&InstanceName::empty(), upload, digest);
            let data = data.clone();
            let parts = (0..data.len()).step_by(CHUNK).map(move |at| {
                let end = (at + CHUNK).min(data.len());
                WriteRequest {
                    resource_name: if at == 0 { name.clone() } else { String::new() },
                    write_offset: at as i64,
                    finish_write: end == data.len(),
                    data: data.slice(at..end),
                }
            });
            let answer = bytes(channels, i).write(stream::iter(parts)).await.unwrap();
            assert_eq!(answer.get_ref().committed_size as u64, digest.size());
        })
        .await;
}

fn cas(channels: &[Channel], i: usize) -> ContentAddressableStorageClient<Channel> {
    ContentAddressableStorageClient::new(channels[i % channels.len()].clone())
        .max_decoding_message_size(64 << 20)
}

fn bytes(channels: &[Channel], i: usize) -> ByteStreamClient<Channel> {
    ByteStreamClient::new(channels[i % channels.len()].clone())
}
