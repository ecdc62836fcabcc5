//! Any farms, side by side by their clients' addresses: actions without inputs, input roots of which one file has
//! changed, and the Content Addressable Storage. What is measured takes turns, so that a noisy host is as noisy for each.
//!
//! usage: cargo bench --bench farm -- endpoint [rounds=5] [actions=400] [blobs=4000] [platform=OSFamily=linux]
//!        [in_flight=1,8,64] [skip=actions|roots|cas[,...]]
//!        NAME=HOST:PORT[/HOST:PORT of the CAS, if another server has it]...

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use bb_remote_execution::{
    digest::Digest,
    proto::reapi::{self, Directory, DirectoryNode, FileNode},
};
use futures::future::join_all;
use prost::Message;

use crate::{
    cas,
    harness::{Client, Task, digest_of, is_ok},
};

const PER_DIRECTORY: usize = 100;
const LARGE: usize = 4 << 20;

pub fn run(arguments: &[String]) {
    let mut settings = BTreeMap::from([
        ("rounds", "5"),
        ("actions", "400"),
        ("blobs", "4000"),
        ("platform", "OSFamily=linux"),
        ("skip", ""),
        ("in_flight", "1,8,64"),
    ]);
    let mut farms = Vec::new();
    for argument in arguments {
        let (key, value) = argument.split_once('=').unwrap_or((argument, ""));
        match settings.get_mut(key) {
            Some(setting) => *setting = value,
            None => farms.push((key, value)),
        }
    }
    if farms.is_empty() {
        println!("endpoint: no NAME=HOST:PORT to measure");
        return;
    }
    let number = |key: &str| settings[key].parse::<usize>().unwrap();
    let skipped: Vec<&str> = settings["skip"].split(',').collect();
    let in_flight = settings["in_flight"].split(',');
    let in_flight: Vec<usize> = in_flight.map(|text| text.parse().unwrap()).collect();
    let (property, value) = settings["platform"].split_once('=').unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let mut farms: Vec<Measured> = farms
            .into_iter()
            .map(|(name, address)| Measured {
                name,
                client: Client::connect(address.split('/').next().unwrap()),
                storage: Client::connect(address.split('/').next_back().unwrap()),
                platform: reapi::Platform {
                    properties: vec![reapi::platform::Property {
                        name: property.to_owned(),
                        value: value.to_owned(),
                    }],
                },
                figures: Vec::new(),
            })
            .collect();
        for round in 0..number("rounds") {
            for farm in &mut farms {
                let mut figures = Vec::new();
                if !skipped.contains(&"actions") {
                    let count = number("actions");
                    farm.actions(round, count, &in_flight, &mut figures).await;
                }
                if !skipped.contains(&"roots") {
                    farm.roots(round, &mut figures).await;
                }
                if !skipped.contains(&"cas") {
                    farm.cas(round, number("blobs"), &mut figures).await;
                }
                farm.figures.push(figures);
            }
        }
        tell(&farms);
    });
}

struct Measured<'a> {
    name: &'a str,
    client: Client,
    storage: Client,
    platform: reapi::Platform,
    /// Of each round.
    figures: Vec<Vec<Figure>>,
}

struct Figure {
    what: String,
    value: f64,
}

/// Medians, and the ratio of each farm's to the first one's.
fn tell(farms: &[Measured<'_>]) {
    print!("{:<52}", "medians");
    for farm in farms {
        print!(" {:>12}", farm.name);
    }
    println!("  ratio to the first");
    let rows = farms.first().map_or(0, |farm| farm.figures[0].len());
    for row in 0..rows {
        print!("{:<52}", farms[0].figures[0][row].what);
        let medians = farms.iter().map(|farm| {
            let mut values: Vec<f64> = farm.figures.iter().map(|all| all[row].value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        });
        let medians: Vec<f64> = medians.collect();
        for median in &medians {
            print!(" {median:>12.2}");
        }
        for median in &medians[1..] {
            print!("  {:>6.2}", median / medians[0]);
        }
        println!();
    }
}

fn figure(what: impl Into<String>, value: f64) -> Figure {
    let what = what.into();
    Figure { what, value }
}

impl Measured<'_> {
    fn task(&self, name: &str) -> Task {
        let mut task = Task::new(&["/bin/true"]);
        task.command.environment_variables[0].value = name.to_owned();
        task.action.platform = Some(self.platform.clone());
        task
    }

    async fn execute(&self, action: reapi::Digest) -> f64 {
        let begun = Instant::now();
        let response = self.client.execute(action).await;
        let response = response.unwrap_or_else(|status| panic!("{}: {status}", self.name));
        assert!(is_ok(&response), "{}: {response:?}", self.name);
        begun.elapsed().as_secs_f64()
    }

    async fn actions(
        &self,
        round: usize,
        count: usize,
        in_flight: &[usize],
        figures: &mut Vec<Figure>,
    ) {
        for &in_flight in in_flight {
            let mut actions = Vec::new();
            for number in 0..count {
                let task = self.task(&format!("{round}-{in_flight}-{number}"));
                actions.push(self.storage.prepare(&task).await.unwrap());
            }
            let next = AtomicUsize::new(0);
            let begun = Instant::now();
            let times = join_all((0..in_flight).map(|_| async {
                let mut times = Vec::new();
                while let Some(action) = actions.get(next.fetch_add(1, Ordering::Relaxed)) {
                    times.push(self.execute(action.clone()).await);
                }
                times
            }));
            let mut times = times.await.concat();
            let rate = count as f64 / begun.elapsed().as_secs_f64();
            times.sort_by(f64::total_cmp);
            let what = format!("no-input actions, {in_flight} in flight");
            figures.push(figure(format!("{what}, actions/s"), rate));
            let median = times[times.len() / 2] * 1e3;
            figures.push(figure(format!("{what}, median ms"), median));
        }
    }

    async fn roots(&self, round: usize, figures: &mut Vec<Figure>) {
        for files in [1_000, 10_000] {
            let mut times = Vec::new();
            for change in 0..6 {
                let root = self.upload_root(files, &format!("{round}-{change}")).await;
                let mut task = self.task(&format!("{round}-{change}-{files}"));
                task.action.input_root_digest = Some(root);
                let action = self.storage.prepare(&task).await.unwrap();
                let time = self.execute(action).await;
                // The first one may find none before it.
                if change > 0 {
                    times.push(time * 1e3);
                }
            }
            times.sort_by(f64::total_cmp);
            figures.push(figure(
                format!("root of {files} files, 1 changed, median ms"),
                times[times.len() / 2],
            ));
        }
    }

    /// All files are the same from one root to the next, but for one.
    async fn upload_root(&self, files: usize, changed: &str) -> reapi::Digest {
        let (mut root, mut blobs) = (Directory::default(), Vec::new());
        for first in (0..files).step_by(PER_DIRECTORY) {
            let mut directory = Directory::default();
            for number in first..first + PER_DIRECTORY {
                let content = match number {
                    0 => format!("{files} files, {changed}"),
                    _ => format!("{files} files, {number}"),
                };
                directory.files.push(FileNode {
                    name: format!("file{number:06}"),
                    digest: Some(digest_of(content.as_bytes())),
                    ..FileNode::default()
                });
                blobs.push(content.into_bytes());
            }
            let directory = directory.encode_to_vec();
            root.directories.push(DirectoryNode {
                name: format!("directory{first:06}"),
                digest: Some(digest_of(&directory)),
            });
            blobs.push(directory);
        }
        let root = root.encode_to_vec();
        let digest = digest_of(&root);
        blobs.push(root);
        // Those that were there are uploaded again, which makes them recent.
        self.storage.upload_many(blobs).await;
        digest
    }

    async fn cas(&self, round: usize, count: usize, figures: &mut Vec<Figure>) {
        let channels = [self.storage.channel.clone()];
        let seed = self.name.bytes().map(u64::from).sum::<u64>() * 1000 + round as u64;
        let small = cas::blobs(seed, count, cas::SMALL);
        let digests: Vec<Digest> = small.iter().map(|(digest, _)| *digest).collect();
        let rate = |time: f64| count as f64 / time;
        let time = cas::timed(cas::batch_update(&channels, &small)).await;
        figures.push(figure("CAS: 1 KiB up, batches, blobs/s", rate(time)));
        let time = cas::timed(cas::batch_read(&channels, &digests)).await;
        figures.push(figure("CAS: 1 KiB down, batches, blobs/s", rate(time)));
        let time = cas::timed(cas::find_missing(&channels, &digests)).await;
        figures.push(figure("CAS: FindMissing, digests/s", rate(time)));
        let large = cas::blobs(seed, 1 + count / 200, LARGE);
        let digests: Vec<Digest> = large.iter().map(|(digest, _)| *digest).collect();
        let rate = |time: f64| (large.len() * LARGE) as f64 / 1e6 / time;
        let time = cas::timed(cas::stream_write(&channels, &large)).await;
        figures.push(figure("CAS: 4 MiB up, ByteStream, MB/s", rate(time)));
        let time = cas::timed(cas::stream_read(&channels, &digests, LARGE)).await;
        figures.push(figure("CAS: 4 MiB down, ByteStream, MB/s", rate(time)));
    }
}
