//! Input roots whose files are all cached: how long a fresh one takes, and how much processor time
//! per file; on the disk's file system and in memory.
//!
//! usage: cargo bench --bench farm -- roots [FILES...]

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    path::Component,
    storage::remote,
    worker::{
        cache::{Cache, Key, Limits},
        directories::{Directory, File},
        input_root::Roots,
        tree::{self, Tree},
    },
};

const FUNCTION: DigestFunction = DigestFunction::Sha256;
const FILES_PER_DIRECTORY: usize = 50;
const DIRECTORIES_PER_DIRECTORY: usize = 10;
const ROUNDS: usize = 7;

pub fn run(arguments: &[String]) {
    let sizes: Vec<usize> = match arguments {
        [] => vec![0, 1_000, 10_000],
        given => given
            .iter()
            .map(|n| n.parse().expect("a number of files"))
            .collect(),
    };
    println!("input roots, everything cached: median of {ROUNDS} rounds");
    println!(
        "{:<9} {:>6} {:>5} {:<16} {:>8} {:>11} {:>11} {:>11}",
        "where", "files", "dirs", "root", "wall ms", "cpu us/file", "clean ms", "cpu us/file"
    );
    for place in ["/var/tmp", "/dev/shm"] {
        for &size in &sizes {
            measure(Path::new(place), size);
        }
    }
}

fn measure(place: &Path, size: usize) {
    let directory = tempfile::Builder::new()
        .prefix("bb-bench-roots.")
        .tempdir_in(place)
        .unwrap();
    let nowhere = Endpoint::Unix("/nonexistent/storage.sock".into());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = {
        let _guard = runtime.enter();
        remote::Client::connect(&nowhere, &nowhere, Default::default())
    };
    let limits = Limits {
        bytes: 1 << 40,
        files: 1 << 24,
        minimum_free: 0,
    };
    let cache = Arc::new(Cache::open(&directory.path().join("cache"), limits, client).unwrap());
    let roots = Roots::open(&directory.path().join("build"), cache.clone(), 2).unwrap();
    let keys: Vec<Key> = (0..size + ROUNDS)
        .map(|i| insert(&cache, directory.path(), &format!("file {i}")))
        .collect();
    let first = tree(&keys[..size], None);
    // Each round another file differs from the round before.
    let changed: Vec<Tree> = (0..ROUNDS)
        .map(|round| tree(&keys[..size], Some(keys[size + round])))
        .collect();
    let same: Vec<&Tree> = std::iter::repeat_n(&first, ROUNDS).collect();
    for (what, trees) in [
        ("the same", same),
        ("one file changed", changed.iter().collect()),
    ] {
        if size == 0 && what != "the same" {
            continue;
        }
        let mut made = Vec::new();
        let mut cleaned = Vec::new();
        for tree in trees {
            let start = Clock::start();
            let planned = roots.plan(tree).unwrap();
            let pins = runtime
                .block_on(cache.obtain(&InstanceName::empty(), planned.links().to_vec()))
                .unwrap();
            let root = roots.prepare(planned, &BTreeSet::new()).unwrap();
            drop(pins);
            made.push(start.elapsed());
            // Outside of a runtime it is cleaned at once.
            let start = Clock::start();
            drop(root);
            cleaned.push(start.elapsed());
        }
        let (wall, cpu) = (median(&made, |m| m.0), median(&made, |m| m.1));
        let (clean_wall, clean_cpu) = (median(&cleaned, |m| m.0), median(&cleaned, |m| m.1));
        let per_file = |time: Duration| time.as_secs_f64() * 1e6 / size.max(1) as f64;
        println!(
            "{:<9} {:>6} {:>5} {:<16} {:>8.2} {:>11.2} {:>11.2} {:>11.2}",
            place.display(),
            size,
            first.entries as usize - size,
            what,
            wall.as_secs_f64() * 1e3,
            per_file(cpu),
            clean_wall.as_secs_f64() * 1e3,
            per_file(clean_cpu),
        );
    }
}

fn insert(cache: &Cache, directory: &Path, content: &str) -> Key {
    let path = directory.join("content");
    fs::write(&path, content).unwrap();
    let key = Key {
        digest: FUNCTION.digest_of(content.as_bytes()),
        executable: false,
    };
    let parent = fs::File::open(directory).unwrap();
    let file = fs::File::open(&path).unwrap();
    cache.keep_output(key, &file, false, parent.as_fd(), "content");
    key
}

/// Directories of 50 files, ten of them in a directory, and so on. The last file may be another.
fn tree(keys: &[Key], last: Option<Key>) -> Tree {
    let mut keys = keys.to_vec();
    if let (Some(other), Some(key)) = (last, keys.last_mut()) {
        *key = other;
    }
    let mut found: HashMap<Digest, Arc<Directory>> = HashMap::new();
    let mut level: Vec<Digest> = Vec::new();
    let mut add = |mut directory: Directory| {
        directory.sort();
        // Not the digest of its encoding, but as distinct.
        let digest = FUNCTION.digest_of(format!("{directory:?}").as_bytes());
        found.insert(digest, Arc::new(directory));
        digest
    };
    for files in keys.chunks(FILES_PER_DIRECTORY) {
        let files = files.iter().enumerate().map(|(i, key)| File {
            name: Component::parse(&format!("source_file_{i}.cc")).unwrap(),
            key: *key,
        });
        level.push(add(Directory {
            files: files.collect(),
            ..Default::default()
        }));
    }
    while level.len() != 1 {
        let above = level.chunks(DIRECTORIES_PER_DIRECTORY).map(|children| {
            let named = children
                .iter()
                .enumerate()
                .map(|(i, child)| (Component::parse(&format!("package_{i}")).unwrap(), *child));
            add(Directory {
                directories: named.collect(),
                ..Default::default()
            })
        });
        level = above.collect();
        if level.is_empty() {
            level.push(add(Directory::default()));
        }
    }
    tree::build(level[0], &found, &HashMap::new()).unwrap().0
}

struct Clock(Instant, Duration);

impl Clock {
    fn start() -> Self {
        Clock(Instant::now(), processor_time())
    }

    fn elapsed(&self) -> (Duration, Duration) {
        (self.0.elapsed(), processor_time() - self.1)
    }
}

/// Of this process, in user and kernel mode.
fn processor_time() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
    let time = |t: nix::sys::time::TimeVal| {
        Duration::from_secs(t.tv_sec() as u64) + Duration::from_micros(t.tv_usec() as u64)
    };
    time(usage.user_time()) + time(usage.system_time())
}

fn median<T>(measured: &[T], value: impl Fn(&T) -> Duration) -> Duration {
    let mut values: Vec<Duration> = measured.iter().map(value).collect();
    values.sort();
    values[values.len() / 2]
}
