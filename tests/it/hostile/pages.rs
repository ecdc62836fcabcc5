//! Hostile browsers, and what they can have the pages read and write.

use bb_remote_execution::proto::reapi::{Directory, DirectoryNode, FileNode, Tree};

use super::*;
use crate::harness::Client;

/// What comes within a minute, however busy the host is.
async fn soon<T>(answer: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, answer)
        .await
        .expect("an answer within a minute")
}

/// A connection from an address of the loopback, on which a page was asked for.
async fn ask(from: u8, web: SocketAddr, path: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, from], 0).into()).unwrap();
    let mut stream = socket.connect(web).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The status of an answer, and all of it.
async fn read(mut stream: TcpStream) -> (u16, Vec<u8>) {
    let mut answer = Vec::new();
    // Whoever is cut off is told so by the end of the connection.
    let _ = stream.read_to_end(&mut answer).await;
    let head = String::from_utf8_lossy(answer.get(..100.min(answer.len())).unwrap());
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or_default(), answer)
}

async fn get(from: u8, web: SocketAddr, path: &str) -> (u16, String) {
    let (status, answer) = read(ask(from, web, path).await).await;
    (status, String::from_utf8_lossy(&answer).into_owned())
}

fn page_of(kind: &str, digest: &Digest, rest: &str) -> String {
    let (hash, size) = (&digest.hash, digest.size_bytes);
    format!("/blobs/sha256/{kind}/{hash}-{size}/{rest}")
}

fn archive(digest: &Digest) -> String {
    page_of("directory", digest, "?format=tar")
}

fn file(name: String, digest: &Digest) -> FileNode {
    FileNode {
        name,
        digest: Some(digest.clone()),
        ..Default::default()
    }
}

/// A directory that names a file so many times.
async fn directory_of(client: &Client, content: Vec<u8>, times: usize) -> Digest {
    let digest = client.upload(content).await;
    let files = (0..times).map(|number| file(format!("f{number}"), &digest));
    let directory = Directory {
        files: files.collect(),
        ..Default::default()
    };
    client.upload_message(&directory).await
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_would_never_end_are_refused_and_stalled_readers_harm_nobody() {
    let (attacked, web) = Attacked::start_with_pages().await;
    let client = attacked.scheduler.client();
    // A million millions of files in thirteen Directories.
    let mut endless = directory_of(&client, b"x".to_vec(), 1).await;
    for _ in 0..12 {
        let directories = (0..10).map(|number| DirectoryNode {
            name: format!("d{number}"),
            digest: Some(endless.clone()),
        });
        let directory = Directory {
            directories: directories.collect(),
            ..Default::default()
        };
        endless = client.upload_message(&directory).await;
    }
    let (status, answer) = soon(get(2, web, &archive(&endless))).await;
    assert_eq!(status, 422, "{answer}");
    assert!(answer.contains("more than 1000000 files"), "{answer}");

    // 120 MB each, of which nothing is read beyond what the kernel takes.
    let mut content = vec![0; 3_900_000];
    fastrand::Rng::with_seed(1).fill(&mut content);
    let large = archive(&directory_of(&client, content, 30).await);
    let small = archive(&directory_of(&client, b"y".to_vec(), 5).await);
    // One caller has no more than half of the turns.
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(ask(2, web, &large).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    let (status, _) = read(ask(1, web, &small).await).await;
    assert_eq!(status, 200);
    let alone = begun.elapsed();
    // A reader who takes nothing gives way after 15 s: this one waited for none.
    assert!(alone < Duration::from_secs(12), "{alone:?}");
    // Two of them have all, and give way to who waits.
    for _ in 0..8 {
        stalled.push(ask(3, web, &large).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    let (status, _) = read(ask(1, web, &small).await).await;
    assert_eq!(status, 200, "nobody gave way");
    let waited = begun.elapsed();
    println!("an archive came after {alone:?} with one stalled caller, after {waited:?} with two");
    // Who was cut off has no end of an archive. Which of a caller's eight had their turns first is anybody's guess.
    let mut was_cut_off = false;
    while let Some(reader) = stalled.pop()
        && !was_cut_off
    {
        let (_, archive) = soon(read(reader)).await;
        was_cut_off = !archive.ends_with(b"0\r\n\r\n");
    }
    assert!(
        was_cut_off,
        "all of sixteen stalled readers have whole archives"
    );
    drop(stalled);
    attacked.end("archives that nobody reads", 200 * MIB).await;
}

/// Uploads a blob in pieces.
async fn upload_large(client: &Client, data: &[u8]) -> Digest {
    const PIECE: usize = 2 << 20;
    let digest = digest_of(data);
    let name = format!("uploads/u/blobs/{}/{}", digest.hash, digest.size_bytes);
    let last = data.len().div_ceil(PIECE) - 1;
    let pieces = data.chunks(PIECE).enumerate();
    let pieces: Vec<WriteRequest> = pieces
        .map(|(number, piece)| WriteRequest {
            resource_name: name.clone(),
            write_offset: (number * PIECE) as i64,
            finish_write: number == last,
            data: piece.to_vec().into(),
        })
        .collect();
    let mut writer = ByteStreamClient::new(client.channel.clone());
    writer.write(futures::stream::iter(pieces)).await.unwrap();
    digest
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_of_a_million_entries_are_shown_in_part_and_leave_others_served() {
    let (attacked, web) = Attacked::start_with_pages().await;
    let client = attacked.scheduler.client();
    let digest = client.upload(b"x".to_vec()).await;
    let root = Directory {
        files: (0..1_000_000)
            .map(|number| file(format!("{number:07}"), &digest))
            .collect(),
        ..Default::default()
    };
    let tree = Tree {
        root: Some(root),
        ..Default::default()
    };
    let tree = upload_large(&client, &tree.encode_to_vec()).await;
    let mut visitors = JoinSet::new();
    for number in 0..12 {
        let path = page_of("tree", &tree, &format!("?from={}", number * 80_000));
        visitors.spawn(async move { get(2, web, &path).await });
    }
    let mut worst = Duration::ZERO;
    let mut seen = 0;
    while !visitors.is_empty() {
        let begun = Instant::now();
        assert_eq!(get(1, web, "/").await.0, 200);
        worst = worst.max(begun.elapsed());
        while let Some(answer) = visitors.try_join_next() {
            let (status, answer) = answer.unwrap();
            assert_eq!(status, 200, "{answer}");
            let count = "1\u{202f}000\u{202f}000 entries";
            assert!(answer.contains(count), "{answer}");
            assert!(answer.len() < 500_000, "{}", answer.len());
            seen += 1;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(seen, 12);
    println!("other pages took at most {worst:?}");
    assert!(worst < Duration::from_secs(5), "{worst:?}");
    // 90 MB each, two at a time.
    attacked.end("a Tree of a million entries", 500 * MIB).await;
}
