//! A build over three shards, one of which is killed or stopped in its midst: whether it goes on, and how
//! long its slowest action takes. And what shards and mirrors cost.
//!
//! usage: cargo bench --bench farm -- shards [ACTIONS [PORT]]

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{
        Endpoint,
        object_storage::ObjectStores,
        storage::{Health, Places, Shard, StorageLocation},
    },
    digest::DigestFunction,
    instance::InstanceName,
    storage::{Backend, Content, grpc::Options},
};
use futures::{StreamExt, stream};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{Client, Farm, Task, is_ok, is_root, scheduler_process::SchedulerProcess};

/// How often a client tries again what it may (Bazel's default).
const RETRIES: u32 = 5;

pub fn run(arguments: &[String]) {
    let number = |i: usize, default: usize| {
        let given = arguments.get(i).and_then(|text| text.parse().ok());
        given.unwrap_or(default)
    };
    let (count, port) = (number(0, 400), number(1, 23100) as u16);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        throughput(port).await;
        if !is_root() {
            return;
        }
        for (what, signal) in [
            ("none", None),
            ("killed", Some(Signal::SIGKILL)),
            ("hangs", Some(Signal::SIGSTOP)),
        ] {
            build(what, signal, count, port).await;
        }
    });
}

fn start(port: u16) -> SchedulerProcess {
    let endpoint = Endpoint::Tcp(format!("127.0.0.1:{port}"));
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    SchedulerProcess::start_in(
        directory,
        endpoint,
        "storage.embedded.maximum_size = \"1GiB\"",
    )
}

async fn servers(port: u16, count: u16) -> Vec<SchedulerProcess> {
    let servers: Vec<_> = (0..count).map(|i| start(port + i)).collect();
    for server in &servers {
        server.says(0, "serving").await;
    }
    servers
}

fn shard(name: &str, servers: &[SchedulerProcess]) -> Shard {
    Shard {
        name: name.to_owned(),
        endpoints: servers
            .iter()
            .map(|server| server.clients.clone())
            .collect(),
        ..Shard::default()
    }
}

async fn throughput(port: u16) {
    let servers = servers(port, 3).await;
    let one = [shard("a", &servers[..1])];
    let three = ["a", "b", "c"].iter().enumerate();
    let three: Vec<Shard> = three
        .map(|(i, name)| shard(name, &servers[i..=i]))
        .collect();
    let mirrored = [shard("a", &servers[..2])];
    println!(
        "{:<26} {:>10} {:>10} {:>10} {:>10}",
        "MB/s", "1 KiB up", "1 KiB down", "4 MiB up", "4 MiB down"
    );
    for (seed, (what, shards)) in [
        ("one shard", &one[..]),
        ("three shards", &three[..]),
        ("two mirrors", &mirrored[..]),
    ]
    .into_iter()
    .enumerate()
    {
        let health = Health::default();
        let places = Places {
            cas: &StorageLocation::Shards,
            action_cache: &StorageLocation::Shards,
            shards,
            health: &health,
            objects: ObjectStores::default(),
        };
        let backend = Backend::connect_to(&places, None, &Options::default()).unwrap();
        let mut figures = Vec::new();
        for (size, count) in [(1 << 10, 5000), (4 << 20, 30)] {
            figures.extend(measure(&backend, seed as u8, size, count).await);
        }
        print!("{what:<26}");
        for figure in figures {
            print!(" {figure:>10.1}");
        }
        println!();
    }
}

/// Uploading and downloading, in MB/s.
async fn measure(backend: &Backend, seed: u8, size: usize, count: usize) -> [f64; 2] {
    let name = InstanceName::empty();
    let blob = |i: usize| {
        let mut data = vec![seed; size];
        data[..8].copy_from_slice(&i.to_le_bytes());
        let digest = DigestFunction::Sha256.digest_of(&data);
        (digest, Content::Bytes(data.into()))
    };
    let blobs: Vec<_> = (0..count).map(blob).collect();
    let digests: Vec<_> = blobs.iter().map(|(digest, _)| *digest).collect();
    let megabytes = (size * count) as f64 / 1e6;
    let begun = Instant::now();
    backend.upload(&name, blobs).await.unwrap();
    let up = megabytes / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    stream::iter(digests.chunks(1 + (4 << 20) / size))
        .for_each_concurrent(8, |digests| async {
            for read in backend.read_many(&name, digests, 1 << 30).await {
                read.unwrap();
            }
        })
        .await;
    [up, megabytes / begun.elapsed().as_secs_f64()]
}

async fn build(what: &str, signal: Option<Signal>, count: usize, port: u16) {
    let servers = servers(port, 3).await;
    let mut extra = "storage.cas = \"shards\"\nstorage.action_cache = \"shards\"\n".to_owned();
    for (name, server) in ["a", "b", "c"].iter().zip(&servers) {
        let endpoint = &server.clients;
        extra += &format!("[[storage.shards]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\n");
    }
    let farm = Farm::start(Path::new("/var/tmp"), 2, &extra).await;
    let client = farm.client();
    let (done, retries, failed) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let pid = Pid::from_raw(servers[1].pid() as i32);
    let times = stream::iter(0..count)
        .map(|i| {
            let (client, done, retries, failed) = (&client, &done, &retries, &failed);
            async move {
                let script = format!("echo {what} {i} >out; head -c 100000 /dev/urandom >large");
                let task = Task::shell(&script).outputs(&["out", "large"]);
                let begun = Instant::now();
                let mut tries = 0;
                while !attempt(client, &task).await {
                    tries += 1;
                    retries.fetch_add(1, Ordering::Relaxed);
                    if tries > RETRIES {
                        failed.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(200 << tries)).await;
                }
                if let (true, Some(signal)) =
                    (done.fetch_add(1, Ordering::Relaxed) == count / 3, signal)
                {
                    kill(pid, signal).unwrap();
                }
                begun.elapsed()
            }
        })
        .buffer_unordered(8);
    let begun = Instant::now();
    let mut times: Vec<Duration> = times.collect().await;
    times.sort_unstable();
    println!(
        "one of three shards {what:<7}: {count} actions in {:.1} s, {} failed, {} tried again; median {:.0} ms, slowest {:.2} s",
        begun.elapsed().as_secs_f64(),
        failed.load(Ordering::Relaxed),
        retries.load(Ordering::Relaxed),
        times[times.len() / 2].as_secs_f64() * 1e3,
        times[times.len() - 1].as_secs_f64(),
    );
    if signal == Some(Signal::SIGSTOP) {
        kill(pid, Signal::SIGCONT).unwrap();
    }
}

/// Uploads what the action needs, executes it, and reads its outputs, as a client does.
async fn attempt(client: &Client, task: &Task) -> bool {
    let Ok(response) = client.try_run(task).await else {
        return false;
    };
    if !is_ok(&response) {
        println!("    {:?}", response.status.unwrap_or_default().message);
        return false;
    }
    response
        .result
        .is_some_and(|result| result.output_files.len() == 2)
}
