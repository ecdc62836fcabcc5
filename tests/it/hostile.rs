//! Hostile peers: each drives something that it can make a scheduler keep to its bound. The scheduler's memory
//! stays within bounds, and somebody else is served meanwhile.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon,
    proto::{
        bytestream::{WriteRequest, byte_stream_client::ByteStreamClient},
        reapi::{BatchReadBlobsRequest, Digest, FindMissingBlobsRequest},
    },
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::harness::{
    digest_of, free_address,
    pki::{Authority, Leaf},
    scheduler_process::SchedulerProcess,
};

mod pages;
mod queue;

const MIB: u64 = 1 << 20;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A scheduler, and somebody honest who calls it all the time, from another address than the hostile ones.
struct Attacked {
    scheduler: SchedulerProcess,
    address: SocketAddr,
    memory: u64,
    stop: CancellationToken,
    honest: JoinHandle<Duration>,
}

impl Attacked {
    async fn start(text: &str) -> Self {
        daemon::raise_file_limit();
        let address = free_address();
        let directory = tempfile::tempdir().unwrap();
        let clients = Endpoint::Tcp(address.to_string());
        let scheduler = SchedulerProcess::start_in(directory, clients, text);
        scheduler.says(0, "ready").await;
        let client = scheduler.client();
        client.upload(b"honest".to_vec()).await;
        let stop = CancellationToken::new();
        let (stopping, endpoint) = (stop.clone(), scheduler.clients.clone());
        let honest = tokio::spawn(async move {
            let mut client = client;
            let mut worst = Duration::ZERO;
            for number in 0.. {
                if stopping.is_cancelled() {
                    break;
                }
                if number % 10 == 9 {
                    client.channel = daemon::connect(&endpoint);
                }
                let begun = Instant::now();
                let request = FindMissingBlobsRequest {
                    blob_digests: vec![digest_of(b"honest")],
                    ..Default::default()
                };
                client.cas().find_missing_blobs(request).await.unwrap();
                assert_eq!(client.read(&digest_of(b"honest")).await, b"honest");
                worst = worst.max(begun.elapsed());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            worst
        });
        Attacked {
            memory: scheduler.peak_memory(),
            scheduler,
            address,
            stop,
            honest,
        }
    }

    /// A scheduler whose pages are at a port.
    async fn start_with_pages() -> (Self, SocketAddr) {
        let web = free_address();
        let attacked = Self::start(&format!("web.listen = \"{web}\"\n")).await;
        (attacked, web)
    }

    /// The attack is over: how much memory it took at most, and how long the honest one waited.
    async fn end(self, what: &str, most: u64) {
        self.stop.cancel();
        let worst = self.honest.await.unwrap();
        let taken = self.scheduler.peak_memory().saturating_sub(self.memory);
        println!(
            "{what}: {} MiB more, honest calls took at most {worst:?}",
            taken / MIB
        );
        assert!(taken < most, "{what}: {} MiB", taken / MIB);
        assert!(worst < Duration::from_secs(5), "{what}: {worst:?}");
    }

    /// A connection from the hostile address.
    async fn connect(&self) -> TcpStream {
        connect(self.address).await.unwrap()
    }

    /// One that has begun to speak HTTP/2, with these settings.
    async fn speak(&self, settings: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        let begin = [PREFACE, &frame(4, 0, 0, settings)].concat();
        stream.write_all(&begin).await.unwrap();
        stream
    }
}

async fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(([127, 0, 0, 2], 0).into())?;
    socket.connect(to).await
}

fn frame(kind: u8, flags: u8, stream: u32, data: &[u8]) -> Vec<u8> {
    let mut frame = (data.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(data);
    frame
}

/// HPACK: literals that are not indexed.
fn headers(path: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

fn message(message: &impl Message) -> Vec<u8> {
    let data = message.encode_to_vec();
    [&[0][..], &(data.len() as u32).to_be_bytes(), &data].concat()
}

/// Writes all of it again and again, until the other end takes no more, or so much was written.
async fn flood(stream: &mut TcpStream, data: &[u8], times: usize) {
    for _ in 0..times {
        let writing = stream.write_all(data);
        match tokio::time::timeout(Duration::from_secs(2), writing).await {
            Ok(Ok(())) => {}
            // It is not read any more, or the connection was closed.
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// How much a server takes of a new connection before any of it was read (RFC 9113, section 6.9).
async fn window(stream: &mut TcpStream) -> usize {
    let mut window = 65_535;
    let reading = async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data).await.unwrap();
            if head[3] == 8 {
                window += u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(300), reading).await;
    window
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_cost_little_and_leave_others_served() {
    let attacked = Attacked::start("").await;
    let connecting = futures::stream::iter(0..8000).map(|_| connect(attacked.address));
    use futures::StreamExt;
    let open: Vec<_> = connecting.buffer_unordered(200).collect().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(open.iter().filter(|stream| stream.is_ok()).count() > 7000);
    attacked.end("8,000 half-open connections", 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_cost_little_and_leave_others_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let authority = Authority::new(path, "ca");
    let pair = authority.issue(path, "server", &Leaf::default());
    // Honest clients come over another port; here it is about the memory of handshakes.
    let text = format!(
        "workers.tls = {{ certificate = \"{}\", key = \"{}\" }}\n",
        pair.certificate.display(),
        pair.key.display()
    );
    let workers = free_address();
    let attacked = Attacked::start(&format!("workers.listen = \"{workers}\"\n{text}")).await;
    use futures::StreamExt;
    // The head of a handshake that says that 16 KiB come.
    let connecting = futures::stream::iter(0..4000).map(|_| async {
        let mut stream = connect(workers).await?;
        stream.write_all(&[22, 3, 1, 64, 0, 1, 0, 63, 252]).await?;
        stream.write_all(&[0; 8 << 10]).await?;
        Ok::<_, std::io::Error>(stream)
    });
    let open: Vec<_> = connecting.buffer_unordered(200).collect().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    drop(open);
    attacked.end("4,000 half-open handshakes", 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_cost_little_and_leave_others_served() {
    let attacked = Attacked::start("").await;
    let find =
        headers("/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs");
    let resets: Vec<u8> = (0..500u32)
        .flat_map(|i| {
            [
                frame(1, 4, 1 + 2 * i, &find),
                frame(3, 0, 1 + 2 * i, &[0, 0, 0, 8]),
            ]
            .concat()
        })
        .collect();
    let mut attacks = JoinSet::new();
    for (data, times) in [
        // Headers that never end.
        (
            [
                frame(1, 0, 1, &find),
                frame(9, 0, 1, &[0; 16 << 10]).repeat(64),
            ]
            .concat(),
            1,
        ),
        (frame(1, 0, 1, &find), 1),
        // SETTINGS and PING, which must be answered; answers are not read.
        (frame(4, 0, 0, &[]).repeat(5000), 400),
        (frame(6, 0, 0, &[7; 8]).repeat(5000), 400),
        (resets, 1),
        // Priorities and windows of nothing.
        (frame(2, 0, 1, &[0, 0, 0, 0, 1]).repeat(5000), 400),
        (frame(8, 0, 0, &[0, 0, 0, 1]).repeat(5000), 400),
        (frame(0, 0, 1, &[]).repeat(5000), 100),
    ] {
        for _ in 0..4 {
            let mut stream = attacked.speak(&[]).await;
            let data = data.clone();
            attacks.spawn(async move { flood(&mut stream, &data, times).await });
        }
    }
    while let Some(attack) = attacks.join_next().await {
        attack.unwrap();
    }
    attacked.end("floods of frames", 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_stay_within_their_budget() {
    let attacked = Attacked::start("").await;
    let mut blob = vec![0; 3_900_000];
    fastrand::Rng::with_seed(1).fill(&mut blob);
    let digest = attacked.scheduler.client().upload(blob).await;
    let request = message(&BatchReadBlobsRequest {
        digests: vec![digest],
        ..Default::default()
    });
    let path = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
    let mut streams = Vec::new();
    for _ in 0..20 {
        // SETTINGS_INITIAL_WINDOW_SIZE is 0.
        let mut stream = attacked.speak(&[0, 4, 0, 0, 0, 0]).await;
        let calls: Vec<u8> = (0..100u32)
            .flat_map(|i| {
                let number = 1 + 2 * i;
                [
                    frame(1, 4, number, &headers(path)),
                    frame(0, 1, number, &request),
                ]
                .concat()
            })
            .collect();
        stream.write_all(&calls).await.unwrap();
        streams.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    // 7.8 GB were asked for.
    attacked.end("answers that nobody reads", 500 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_never_end_stay_within_windows_and_budget() {
    let attacked = Attacked::start("").await;
    let path =
        headers("/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs");
    let mut attacks = JoinSet::new();
    for _ in 0..200 {
        let mut stream = attacked.speak(&[]).await;
        let path = path.clone();
        attacks.spawn(async move {
            let mut left = window(&mut stream).await;
            for id in [1, 3, 5, 7] {
                // 15 MiB are to come, and never do.
                let head = [0, 0, 240, 0, 0];
                let sent = [frame(1, 4, id, &path), frame(0, 0, id, &head)].concat();
                flood(&mut stream, &sent, 1).await;
                let pieces = (left.min(4 << 20) - 64) / (16 << 10);
                flood(&mut stream, &frame(0, 0, id, &[0; 16 << 10]), pieces).await;
                left -= pieces * (16 << 10) + 5;
                if left < 16 << 10 {
                    break;
                }
            }
            stream
        });
    }
    let mut open = Vec::new();
    while let Some(attack) = attacks.join_next().await {
        open.push(attack.unwrap());
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    attacked.end("messages that never end", 1024 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_are_left_stay_within_their_number() {
    let attacked = Attacked::start("").await;
    let mut client = ByteStreamClient::new(attacked.scheduler.channel());
    let mut refused = 0;
    for number in 0..3000 {
        let Digest { hash, .. } = digest_of(format!("{number}").as_bytes());
        let request = WriteRequest {
            resource_name: format!("uploads/{number}{}/blobs/{hash}/1000", "u".repeat(1000)),
            data: vec![0; 500].into(),
            ..Default::default()
        };
        let status = client
            .write(futures::stream::iter([request]))
            .await
            .unwrap_err();
        refused += usize::from(status.code() == Code::ResourceExhausted);
    }
    // Those that nobody goes on with give way.
    assert_eq!(refused, 0);
    let long = WriteRequest {
        resource_name: format!(
            "uploads/{}/blobs/{}/1000",
            "u".repeat(1 << 20),
            digest_of(b"x").hash
        ),
        ..Default::default()
    };
    let status = client
        .write(futures::stream::iter([long]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    attacked.end("uploads that are left", 200 * MIB).await;
}

/// A caller has a share of the connections and the calls, on however many connections it comes.
#[tokio::test(flavor = "multi_thread")]
async fn one_caller_has_no_more_than_its_share_of_connections_and_calls() {
    let attacked = Attacked::start("callers.maximum_calls = 50000").await;
    let wait = headers("/grpc.health.v1.Health/Watch");
    let mut open = Vec::new();
    for _ in 0..40 {
        let mut stream = attacked.speak(&[]).await;
        let calls: Vec<u8> = (0..3000u32)
            .flat_map(|i| {
                let number = 1 + 2 * i;
                [frame(1, 4, number, &wait), frame(0, 1, number, &[0; 5])].concat()
            })
            .collect();
        flood(&mut stream, &calls, 1).await;
        open.push(stream);
    }
    // 120,000 calls, of which it may have 25,000.
    tokio::time::sleep(Duration::from_secs(2)).await;
    attacked.end("calls that never end", 700 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_ask_faster_than_they_may_are_slowed_down_and_nobody_else_is() {
    let attacked =
        Attacked::start("callers = { requests_per_second = 500, bytes_per_second = \"4MiB\" }\n")
            .await;
    let mut stream = attacked.speak(&[]).await;
    let check = headers("/grpc.health.v1.Health/Check");
    let begun = Instant::now();
    let calls: Vec<u8> = (0..2000u32)
        .flat_map(|i| {
            let number = 1 + 2 * i;
            [frame(1, 4, number, &check), frame(0, 1, number, &[0; 5])].concat()
        })
        .collect();
    stream.write_all(&calls).await.unwrap();
    let mut received = 0;
    let mut buffer = vec![0; 64 << 10];
    // Each answer has headers, a message and trailers; the last ones come after three seconds.
    while begun.elapsed() < Duration::from_secs(6) {
        let reading = stream.read(&mut buffer);
        match tokio::time::timeout(Duration::from_secs(1), reading).await {
            Ok(Ok(length)) if length > 0 => received += length,
            _ => break,
        }
    }
    let took = begun.elapsed();
    assert!(
        took > Duration::from_secs(2),
        "{received} bytes in {took:?}"
    );
    // 12 MiB, of which 4 come at once.
    let client = attacked.scheduler.client();
    let digest = client.upload(vec![1; 2 << 20]).await;
    let begun = Instant::now();
    for _ in 0..6 {
        client.read(&digest).await;
    }
    assert!(
        begun.elapsed() > Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    attacked.stop.cancel();
}

/// The head of an answer to a page, as far as it came at once.
async fn head_of_page(stream: &mut TcpStream, request: &[u8]) -> std::io::Result<String> {
    stream.write_all(request).await?;
    let mut head = vec![0; 64];
    let length = stream.read(&mut head).await?;
    Ok(String::from_utf8_lossy(&head[..length]).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_served_while_one_caller_holds_all_the_connections_it_can() {
    let (attacked, web) = Attacked::start_with_pages().await;
    use futures::StreamExt;
    let page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    // Half of them say nothing, and half ask for something that they never say the end of.
    let connecting = futures::stream::iter(0..3000).map(|number| async move {
        let mut stream = connect(web).await?;
        if number % 2 == 0 {
            stream.write_all(&page[..page.len() - 2]).await?;
        }
        Ok::<_, std::io::Error>(stream)
    });
    let open: Vec<_> = connecting.buffer_unordered(200).collect().await;
    for _ in 0..20 {
        let begun = Instant::now();
        let mut honest = TcpStream::connect(web).await.unwrap();
        let head = head_of_page(&mut honest, page).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    drop(open);
    attacked.end("connections for pages", 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_is_too_large_is_refused() {
    let (attacked, web) = Attacked::start_with_pages().await;
    // A byte more than it may have, so that all of it is read.
    let form = "x=".to_owned() + &"y".repeat((64 << 10) - 1);
    let mut codes = Vec::new();
    for form in ["x=y", &form] {
        let request = format!(
            "POST /workers/drain HTTP/1.1\r\nHost: {web}\r\nOrigin: http://{web}\r\nSec-Fetch-Site: same-origin\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
            form.len()
        );
        let mut stream = TcpStream::connect(web).await.unwrap();
        let head = head_of_page(&mut stream, request.as_bytes()).await.unwrap();
        codes.push(head.split(' ').nth(1).unwrap_or_default().to_owned());
    }
    assert_ne!(codes[0], "413");
    assert_eq!(codes[1], "413");
    attacked.end("forms", 50 * MIB).await;
}
