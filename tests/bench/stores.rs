//! The embedded store, Redis and an S3 server side by side, each behind a scheduler: uploading, downloading what the
//! scheduler's disk has, and what only the service has.
//!
//! usage: cargo bench --bench farm -- stores [rounds=5] [small=2000] [large=20] [NAME=FILE...]
//!
//! FILE is a part of a scheduler's configuration with the keys of `storage`, for a service of one's own: its figures
//! are in the row NAME. Without one, Redis and moto are started: moto is made for tests, so that its row tells what
//! works rather than what S3 can do.

use std::{fs, time::Instant};

use bb_remote_execution::{
    config::Endpoint,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    storage::{
        Content,
        grpc::{Client, Options},
    },
};
use futures::{StreamExt, stream};

use crate::harness::{
    free_address,
    scheduler_process::SchedulerProcess,
    services::{self, BUCKET},
};

const SMALL: usize = 1 << 10;
const LARGE: usize = 4 << 20;
const IN_FLIGHT: usize = 8;

pub fn run(arguments: &[String]) {
    let number = |key: &str, default: usize| crate::number(arguments, key, default);
    let (rounds, small) = (number("rounds", 5), number("small", 2000));
    let large = number("large", 20);
    let mut services = Vec::new();
    let mut stores = vec![Store::new("embedded", String::new())];
    for argument in arguments {
        let (name, value) = argument.split_once('=').unwrap_or((argument, ""));
        if !["rounds", "small", "large"].contains(&name) {
            stores.push(Store::new(name, fs::read_to_string(value).unwrap()));
        }
    }
    let credentials = tempfile::NamedTempFile::new().unwrap();
    if stores.len() == 1 {
        if let Some(redis) = services::redis(&[]) {
            let text = format!("storage.redis.endpoint = \"redis://{}\"", redis.address);
            stores.push(Store::new("redis", both("redis", &text)));
            services.push(redis);
        }
        if let Some(s3) = services::s3() {
            let key = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n";
            fs::write(&credentials, key).unwrap();
            let text = format!(
                "storage.s3 = {{ bucket = \"{BUCKET}\", endpoint = \"http://{}\", credentials_file = \"{}\" }}",
                s3.address,
                credentials.path().display()
            );
            stores.push(Store::new("s3 (moto)", both("s3", &text)));
            services.push(s3);
        }
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        for round in 0..rounds {
            for (number, store) in stores.iter_mut().enumerate() {
                let seed = (round * 100 + number) as u64;
                store.measure(seed, small, large).await;
            }
        }
    });
    println!("medians of {rounds} rounds in turns, {small} blobs of 1 KiB and {large} of 4 MiB");
    println!(
        "{:<12} {:>13} {:>13} {:>13} {:>13} {:>13} {:>13}",
        "",
        "1 KiB up/s",
        "down, disk",
        "down, service",
        "4 MiB up MB/s",
        "down, disk",
        "down, service"
    );
    for store in &mut stores {
        print!("{:<12}", store.name);
        for figures in &mut store.figures {
            figures.sort_by(f64::total_cmp);
            match figures.get(figures.len() / 2) {
                Some(figure) => print!(" {figure:>13.0}"),
                None => print!(" {:>13}", "-"),
            }
        }
        println!();
    }
}

fn both(name: &str, text: &str) -> String {
    format!("storage.cas = \"{name}\"\nstorage.action_cache = \"{name}\"\n{text}\n")
}

struct Store {
    name: String,
    /// Of `storage`; empty for the embedded store.
    configuration: String,
    /// Of each round, in the order of the columns.
    figures: [Vec<f64>; 6],
}

impl Store {
    fn new(name: &str, configuration: String) -> Self {
        Store {
            name: name.to_owned(),
            configuration,
            figures: Default::default(),
        }
    }

    async fn measure(&mut self, seed: u64, small: usize, large: usize) {
        let scheduler = start(&self.configuration).await;
        // Whose disk has nothing yet.
        let other = match self.configuration.is_empty() {
            true => None,
            false => Some(start(&self.configuration).await),
        };
        for (at, size, count, unit) in [
            (0, SMALL, small, 1.0),
            (3, LARGE, large, LARGE as f64 / 1e6),
        ] {
            let amount = count as f64 * unit;
            let blobs = blobs(seed, size, count);
            let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
            let up = upload(&scheduler, blobs).await;
            self.figures[at].push(amount / up);
            let down = download(&scheduler, &digests).await;
            self.figures[at + 1].push(amount / down);
            if let Some(other) = &other {
                let down = download(other, &digests).await;
                self.figures[at + 2].push(amount / down);
            }
        }
    }
}

async fn start(configuration: &str) -> SchedulerProcess {
    let clients = Endpoint::Tcp(free_address().to_string());
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let configuration = format!("storage.embedded.maximum_size = \"2GiB\"\n{configuration}");
    let scheduler = SchedulerProcess::start_in(directory, clients, &configuration);
    scheduler.says(0, "ready").await;
    scheduler
}

/// Blobs that no other seed makes.
fn blobs(seed: u64, size: usize, count: usize) -> Vec<(Digest, Content)> {
    let mut random = fastrand::Rng::with_seed(seed);
    let blob = |_| {
        let mut data = vec![0; size];
        random.fill(&mut data);
        let digest = DigestFunction::Sha256.digest_of(&data);
        (digest, Content::Bytes(data.into()))
    };
    (0..count).map(blob).collect()
}

fn client(scheduler: &SchedulerProcess) -> Client {
    Client::connect(&scheduler.clients, &scheduler.clients, Options::default())
}

/// In seconds.
async fn upload(scheduler: &SchedulerProcess, blobs: Vec<(Digest, Content)>) -> f64 {
    let client = client(scheduler);
    let begun = Instant::now();
    client.upload(&InstanceName::empty(), blobs).await.unwrap();
    begun.elapsed().as_secs_f64()
}

/// In seconds.
async fn download(scheduler: &SchedulerProcess, digests: &[Digest]) -> f64 {
    let (client, instance) = (client(scheduler), InstanceName::empty());
    let begun = Instant::now();
    if digests[0].size() as usize == SMALL {
        for blob in client.read_many(&instance, digests, 1 << 30).await {
            blob.unwrap();
        }
    } else {
        stream::iter(digests)
            .for_each_concurrent(IN_FLIGHT, |digest| async {
                client.read(&instance, digest, 1 << 30).await.unwrap();
            })
            .await;
    }
    begun.elapsed().as_secs_f64()
}
