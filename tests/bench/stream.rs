//! A recorded stream of input roots, laid out again in its order: with roots that are kept, and with
//! each made anew. All files are cached before; two roots are in use at a time, as by two slots.
//!
//! usage: cargo bench --bench farm -- stream ENDPOINT FILE
//!
//! ENDPOINT is a storage that has everything (grpc://127.0.0.1:8980), FILE a worker's log of level
//! `debug`, or anything else with `input_root=HASH/SIZE` in its lines.

use std::{
    collections::{BTreeSet, VecDeque},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    config::worker::Inputs,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    storage::Backend,
    worker::inputs::{
        InputRoot, PlannedRoot, WorkerBuildDirectory, directory_cache::DirectoryCache,
        file_cache::FileCache,
    },
};

use crate::harness::parts::{FileSystem, open_cache_of};

const FUNCTION: DigestFunction = DigestFunction::Sha256;
const SLOTS: usize = 2;
const ROUNDS: usize = 3;

pub fn run(arguments: &[String]) {
    let [endpoint, file] = arguments else {
        println!("stream: not without a storage and a file, see tests/bench/stream.rs");
        return;
    };
    let endpoint: Endpoint = endpoint.parse().unwrap();
    let roots = parse(&std::fs::read_to_string(file).unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = {
        let _guard = runtime.enter();
        Backend::connect(&endpoint, &endpoint, Default::default())
    };
    println!("{} input roots, medians of {ROUNDS} rounds", roots.len());
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    for (kind, options) in [("ext4", &[][..]), ("xfs", &["-m", "reflink=1"])] {
        if let Some(mounted) = FileSystem::mount(kind, 4 << 10, memory.path(), options) {
            measure(kind, &mounted.at, &roots, &client, &runtime);
        }
    }
}

fn parse(text: &str) -> Vec<Digest> {
    let found = text.split("input_root=").skip(1).filter_map(|rest| {
        let rest = rest.split([' ', '"', '\n']).next()?;
        let (hash, size) = rest.split_once('/')?;
        Digest::parse_parts(Some(FUNCTION), hash, size.parse().ok()?).ok()
    });
    found.collect()
}

#[derive(Clone, Copy)]
struct Total {
    /// Looking up Directories, round trips to the storage included.
    walk: Duration,
    ready: Duration,
    after: Duration,
}

fn measure(
    kind: &str,
    place: &Path,
    stream: &[Digest],
    client: &Backend,
    runtime: &tokio::runtime::Runtime,
) {
    let cache = Arc::new(open_cache_of(place, client.clone()));
    let mut totals = [Vec::new(), Vec::new()];
    let mut told = String::new();
    // The first round fetches what the cache lacks, and is not counted.
    for round in 0..=ROUNDS {
        for (keep, totals) in [true, false].into_iter().zip(&mut totals) {
            let roots =
                WorkerBuildDirectory::open(&place.join("build"), cache.clone(), SLOTS).unwrap();
            if !keep {
                InputRoot::empty(&roots)
                    .unwrap()
                    .discard_all_after_privileged_action();
            }
            while std::fs::read_dir(place.join("build/deleted")).is_ok_and(|left| left.count() > 0)
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            let total = lay_out(stream, &roots, &cache, client, runtime);
            if keep {
                told = reuse(&roots);
            }
            if round > 0 {
                totals.push(total);
            }
        }
    }
    let [kept, fresh] = totals.map(|totals| Total {
        walk: median(totals.iter().map(|total| total.walk)),
        ready: median(totals.iter().map(|total| total.ready)),
        after: median(totals.iter().map(|total| total.after)),
    });
    for (what, total) in [("kept", kept), ("fresh", fresh)] {
        println!(
            "{kind:<5} {what:<6} walk {:>8.1} ms, ready {:>8.1} ms, after {:>8.1} ms; per root ready {:.3} ms",
            milliseconds(total.walk),
            milliseconds(total.ready),
            milliseconds(total.after),
            milliseconds(total.ready) / stream.len() as f64,
        );
    }
    println!(
        "{kind:<5} fresh/kept: ready {:.2}, ready and after {:.2}; {told}",
        fresh.ready.as_secs_f64() / kept.ready.as_secs_f64(),
        (fresh.ready + fresh.after).as_secs_f64() / (kept.ready + kept.after).as_secs_f64(),
    );
}

fn lay_out(
    stream: &[Digest],
    roots: &Arc<WorkerBuildDirectory>,
    cache: &Arc<FileCache>,
    client: &Backend,
    runtime: &tokio::runtime::Runtime,
) -> Total {
    let directories = DirectoryCache::new(client.clone(), 16 << 20, 1 << 30);
    let instance = InstanceName::empty();
    let mut active: VecDeque<InputRoot> = VecDeque::new();
    let mut total = Total {
        walk: Duration::ZERO,
        ready: Duration::ZERO,
        after: Duration::ZERO,
    };
    for root in stream {
        let start = Instant::now();
        let walk = directories.walk(&instance, *root, FUNCTION.empty());
        let tree = runtime.block_on(walk).unwrap().tree;
        let tree = tree.expect("the storage has all Directories");
        total.walk += start.elapsed();
        let start = Instant::now();
        let planned = PlannedRoot::new(roots, &tree, Inputs::Shared).unwrap();
        let mut pinned = planned.pin().unwrap();
        let fetched = cache.fetch(&instance, &mut pinned);
        runtime.block_on(fetched).unwrap();
        active.push_back(planned.lay_out(pinned, &BTreeSet::new()).unwrap());
        total.ready += start.elapsed();
        let start = Instant::now();
        while active.len() >= SLOTS {
            active.pop_front();
        }
        total.after += start.elapsed();
    }
    total
}

/// How much of what was wanted was there.
fn reuse(roots: &Arc<WorkerBuildDirectory>) -> String {
    let counts = roots.lay_out_counts();
    let of = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    let (made, unparked) = (of(&counts.new_directories), of(&counts.unstashed));
    format!(
        "{} entries, of which {} files linked; subtrees that were not there: {unparked} of {} came out of the pool",
        of(&counts.entries),
        of(&counts.created_files),
        made + unparked,
    )
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    let mut values: Vec<Duration> = values.collect();
    values.sort();
    values[values.len() / 2]
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
