//! What travels over a link of a given rate, and how long it takes: data that can be compressed, with and
//! without Zstandard; and a file of which one percent has changed, as a whole and by its chunks.
//!
//! usage: cargo bench --bench farm -- wire [DIRECTORY [MIB [MBIT]]]
//!
//! Server and client are in network namespaces of their own, between which there is a link of MBIT Mbit/s;
//! 0 does not shape it. Root is needed. Bytes are those of the link's interface, with all headers.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress},
    daemon,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    storage::{
        Backend, Content,
        embedded::Store,
        grpc::{Client, Options, When},
        serve,
    },
};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;

pub fn run(arguments: &[String]) {
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match texts[..] {
        ["serve", directory, address] => runtime.block_on(serve(directory, address)),
        ["ask", address, mib] => runtime.block_on(ask(address, mib.parse().unwrap())),
        _ => {
            let place = texts.first().copied().unwrap_or("/var/tmp");
            let mib = texts.get(1).map_or(256, |text| text.parse().unwrap());
            let rate = texts.get(2).map_or(100, |text| text.parse().unwrap());
            measure(Path::new(place), mib, rate);
        }
    }
}

/// Two namespaces with a link between them, which are gone when it is dropped.
struct Link([String; 2]);

const ADDRESSES: [&str; 2] = ["10.213.77.1", "10.213.77.2"];
const INTERFACE: &str = "wire0";

impl Link {
    fn make(rate: u32) -> Self {
        let names = ["server", "client"].map(|end| format!("bb-wire-{}-{end}", std::process::id()));
        let link = Link(names);
        for name in &link.0 {
            ip(&["netns", "add", name]);
        }
        let [server, client] = &link.0;
        ip(&[
            "-n", server, "link", "add", "name", INTERFACE, "type", "veth", "peer", "name",
            INTERFACE, "netns", client,
        ]);
        for (name, address) in link.0.iter().zip(ADDRESSES) {
            ip(&[
                "-n",
                name,
                "address",
                "add",
                &format!("{address}/30"),
                "dev",
                INTERFACE,
            ]);
            ip(&["-n", name, "link", "set", INTERFACE, "up"]);
            if rate > 0 {
                let rate = format!("{rate}mbit");
                let shaping = [
                    "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", &rate,
                    "burst", "256kb", "latency", "50ms",
                ];
                assert!(Command::new("tc").args(shaping).status().unwrap().success());
            }
        }
        link
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.0 {
            ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) {
    assert!(
        Command::new("ip")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

fn measure(place: &Path, mib: usize, rate: u32) {
    let directory = tempfile::tempdir_in(place).unwrap();
    let link = Link::make(rate);
    let inside = |name: &str, arguments: &[&str]| {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", name])
            .arg(std::env::current_exe().unwrap())
            .arg("wire")
            .args(arguments);
        command
    };
    let address = format!("{}:24100", ADDRESSES[0]);
    let path = directory.path().to_str().unwrap();
    let mut server = inside(&link.0[0], &["serve", path, &address])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    println!("{mib} MiB over a link of {rate} Mbit/s (0: not shaped)");
    let asked = inside(&link.0[1], &["ask", &address, &mib.to_string()]).status();
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(asked.unwrap().success());
}

async fn serve(directory: &str, address: &str) {
    let store = Arc::new(Store::open(Path::new(directory), 16 << 30).unwrap());
    let backend = Backend::Embedded(store.clone());
    let listen = ListenAddress::Tcp(address.parse().unwrap());
    let listener = daemon::listen("", "clients.listen", &listen, None).unwrap();
    let announcement = serve::Announcement {
        exec_enabled: false,
        storage: Some(backend.clone()),
        chunks: serve::serves_chunks(&backend),
    };
    let services = daemon::Services::default().add(serve::capabilities(announcement));
    let routes = serve::add_to(services, &backend).into_routes();
    println!("ready");
    let serving = daemon::serve(listener, routes, CancellationToken::new(), Duration::ZERO);
    serving.await.unwrap();
}

/// Bytes that went over the link in both directions.
fn passed() -> u64 {
    let count = |name: &str| {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/{name}");
        let text = std::fs::read_to_string(path).unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    count("rx_bytes") + count("tx_bytes")
}

fn sha256(data: &[u8]) -> Digest {
    DigestFunction::Sha256.digest_of(data)
}

/// Words of a small vocabulary, which become about a quarter.
fn text(seed: u64, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| {
            (0..random.usize(2..12))
                .map(|_| random.u8(b'a'..=b'z'))
                .collect()
        })
        .collect();
    let mut data = Vec::with_capacity(size + 16);
    while data.len() < size {
        data.extend_from_slice(&words[random.usize(..words.len())]);
        data.push(b' ');
    }
    data.truncate(size);
    data
}

fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    fastrand::Rng::with_seed(seed).fill(&mut data);
    data
}

async fn upload(client: &Client, data: &Bytes) {
    let blobs = vec![(sha256(data), Content::Bytes(data.clone()))];
    client.upload(&InstanceName::empty(), blobs).await.unwrap();
}

async fn download(client: &Client, data: &Bytes) {
    let file = Arc::new(tempfile::tempfile_in("/var/tmp").unwrap());
    let digest = sha256(data);
    let instance = InstanceName::empty();
    let read = client.read_to_file(&instance, &digest, file);
    read.await.unwrap();
}

async fn row(what: &str, size: usize, work: impl Future<Output = ()>) {
    let (before, began) = (passed(), Instant::now());
    work.await;
    let (bytes, time) = (passed() - before, began.elapsed().as_secs_f64());
    println!(
        "{what:<44} {:>9.1} MiB on the wire {time:>8.2} s {:>8.1} MiB/s",
        bytes as f64 / MIB as f64,
        size as f64 / MIB as f64 / time
    );
}

async fn ask(address: &str, mib: usize) {
    let endpoint = Endpoint::Tcp(address.to_owned());
    let size = mib * MIB;
    let client = |compression, chunks| {
        let options = Options {
            compression,
            chunks,
            ..Options::default()
        };
        Client::connect(&endpoint, &endpoint, options)
    };
    for (seed, name, compression) in [(1, "as it is", When::Never), (2, "with zstd", When::Always)]
    {
        let data = Bytes::from(text(seed, size));
        let client = client(compression, When::Never);
        row(&format!("text up, {name}"), size, upload(&client, &data)).await;
        row(
            &format!("text down, {name}"),
            size,
            download(&client, &data),
        )
        .await;
    }
    for (seed, name, chunks) in [
        (3, "as a whole", When::Never),
        (4, "by chunks", When::Always),
    ] {
        let old = noise(seed, size);
        let mut new = old.clone();
        // In a tenth of the places a tenth of the change, some of it longer than what it replaces.
        for place in 0..10 {
            let (at, length) = (place * size / 10 + size / 50, size / 1000);
            new.splice(
                at..at + length,
                noise(100 * seed + place as u64, length + place),
            );
        }
        let (old, new) = (Bytes::from(old), Bytes::from(new));
        let here = client(When::Never, chunks);
        row(&format!("file up, {name}"), size, upload(&here, &old)).await;
        row(
            &format!("1 % changed up, {name}"),
            size,
            upload(&here, &new),
        )
        .await;
        // A host that has the old one, since it was fetched.
        let there = client(When::Never, chunks);
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().write_all_at(&old, 0).unwrap();
        let (digest, path) = (sha256(&old), file.path().to_owned());
        there.set_local_files(Arc::new(move |wanted| {
            (*wanted == digest).then(|| File::open(&path).unwrap())
        }));
        row(&format!("file down, {name}"), size, download(&there, &old)).await;
        row(
            &format!("1 % changed down, {name}"),
            size,
            download(&there, &new),
        )
        .await;
    }
}
