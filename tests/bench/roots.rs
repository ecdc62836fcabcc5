//! Input roots whose files are all cached: how long it takes from knowing the root's Directories to
//! the root's being ready, by what is there already; on ext4 and xfs in memory, mounted by loop,
//! where root may mount them.
//!
//! usage: cargo bench --bench farm -- roots [FILES...]

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    path::Component,
    worker::{
        cache::{Cache, Key},
        directories::{Directory, File},
        input_root::{InputRoot, Roots},
        tree::{self, Tree},
    },
};

use crate::harness::parts::{FileSystem, keep, open_cache};

const FUNCTION: DigestFunction = DigestFunction::Sha256;
const FILES_PER_DIRECTORY: usize = 50;
const DIRECTORIES_PER_DIRECTORY: usize = 10;
const ROUNDS: usize = 9;
pub fn run(arguments: &[String]) {
    let sizes: Vec<usize> = match arguments {
        [] => vec![10_000, 50_000],
        given => given
            .iter()
            .map(|n| n.parse().expect("a number of files"))
            .collect(),
    };
    println!("input roots, everything cached: medians of {ROUNDS} rounds");
    println!(
        "{:<6} {:>6} {:>5}  {:<22} {:>9} {:>11} {:>9} {:>12}",
        "where", "files", "dirs", "root", "ready ms", "cpu us/file", "after ms", "fresh/this"
    );
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut places = Vec::new();
    for (kind, options) in [("ext4", &[][..]), ("xfs", &["-m", "reflink=1"])] {
        if let Some(mounted) = FileSystem::mount(kind, 4 << 10, memory.path(), options) {
            places.push((kind, mounted));
        }
    }
    for (kind, place) in &places {
        for &size in &sizes {
            measure(kind, &place.at, size);
        }
    }
    if places.is_empty() {
        for &size in &sizes {
            measure("disk", Path::new("/var/tmp"), size);
        }
    }
    for (kind, place) in &places {
        restart(kind, &place.at);
    }
}

struct Bench {
    runtime: tokio::runtime::Runtime,
    cache: Arc<Cache>,
    roots: Roots,
}

impl Bench {
    /// Ready, and cleaned up afterwards.
    fn root(&self, tree: &Tree) -> (Clock2, InputRoot) {
        let start = Clock::start();
        let planned = self.roots.plan(tree).unwrap();
        let wanted = planned.links().to_vec();
        let instance = InstanceName::empty();
        let obtained = self.cache.obtain(&instance, wanted);
        let pins = self.runtime.block_on(obtained).unwrap();
        let root = self.roots.prepare(planned, &BTreeSet::new()).unwrap();
        drop(pins);
        (start.elapsed(), root)
    }

    fn rounds<'t>(&self, trees: impl Iterator<Item = &'t Tree>) -> (Vec<Clock2>, Vec<Clock2>) {
        let mut ready = Vec::new();
        let mut after = Vec::new();
        for tree in trees {
            let (time, root) = self.root(tree);
            ready.push(time);
            let start = Clock::start();
            // Outside of a runtime it is verified at once.
            drop(root);
            after.push(start.elapsed());
        }
        (ready, after)
    }
}

type Clock2 = (Duration, Duration);

fn measure(kind: &str, place: &Path, size: usize) {
    let directory = tempfile::Builder::new()
        .prefix("bb-bench-roots.")
        .tempdir_in(place)
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let cache = Arc::new(open_cache(directory.path()));
    let many = 100;
    let keys: Vec<Key> = (0..size + ROUNDS * many)
        .map(|i| insert(&cache, directory.path(), &format!("file {i}")))
        .collect();
    let first = tree(&keys[..size], &[]);
    let one: Vec<Tree> = (0..ROUNDS)
        .map(|round| tree(&keys[..size], &keys[size + round..][..1]))
        .collect();
    let hundred: Vec<Tree> = (0..ROUNDS)
        .map(|round| tree(&keys[..size], &keys[size + round * many..][..many]))
        .collect();
    let build = directory.path().join("build");
    // Cold: one thread, then two, each time in new directories.
    let mut fresh = [Duration::ZERO; 2];
    for threads in [1, 2] {
        let mut ready = Vec::new();
        let mut after = Vec::new();
        let mut grown = 0;
        for _ in 0..ROUNDS.min(5) {
            let roots = Roots::open(&build, cache.clone(), 1).unwrap();
            // The last round's root, whose removal would be measured too.
            wait_for_trash(&build);
            roots.set_threads(threads);
            let bench = Bench {
                runtime: tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap(),
                cache: cache.clone(),
                roots,
            };
            let before = memory();
            let (time, root) = bench.root(&first);
            // Later ones get the memory that the first one left.
            grown = grown.max(memory().saturating_sub(before));
            ready.push(time);
            let start = Clock::start();
            drop(root);
            let removed = bench.roots;
            after.push(start.elapsed());
            drop(removed);
            wait_for_trash(&build);
        }
        fresh[threads - 1] = median(&ready, |m| m.0);
        let what = format!(
            "cold, {threads} thread{}",
            if threads > 1 { "s" } else { "" }
        );
        print(kind, size, &first, &what, &ready, &after, None);
        if threads == 1 {
            println!(
                "       memory of the kept root: {} bytes per entry",
                grown / first.entries
            );
        } else {
            println!(
                "       two threads are {:.2} times as fast",
                fresh[0].as_secs_f64() / fresh[1].as_secs_f64()
            );
        }
    }
    let roots = Roots::open(&build, cache.clone(), 1).unwrap();
    wait_for_trash(&build);
    let bench = Bench {
        runtime,
        cache,
        roots,
    };
    drop(bench.root(&first));
    let same: Vec<&Tree> = std::iter::repeat_n(&first, ROUNDS).collect();
    let fresh = Some(fresh[0]);
    let (ready, after) = bench.rounds(same.into_iter());
    print(kind, size, &first, "unchanged", &ready, &after, fresh);
    let (ready, after) = bench.rounds(one.iter());
    print(kind, size, &first, "1 file changed", &ready, &after, fresh);
    // From and to the same: a hundred are changed each time.
    let (ready, after) = bench.rounds(hundred.iter());
    print(
        kind,
        size,
        &first,
        "100 files changed",
        &ready,
        &after,
        fresh,
    );
    drop(bench);
    wait_for_trash(&build);
}

fn wait_for_trash(build: &Path) {
    let trash = build.join("trash");
    let count = || fs::read_dir(&trash).map_or(0, |entries| entries.count());
    while count() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn print(
    kind: &str,
    size: usize,
    tree: &Tree,
    what: &str,
    ready: &[Clock2],
    after: &[Clock2],
    fresh: Option<Duration>,
) {
    let (wall, cpu) = (median(ready, |m| m.0), median(ready, |m| m.1));
    let after = median(after, |m| m.0);
    let ratio = fresh.map_or(String::new(), |fresh| {
        format!("{:.0}", fresh.as_secs_f64() / wall.as_secs_f64())
    });
    println!(
        "{:<6} {:>6} {:>5}  {:<22} {:>9.3} {:>11.2} {:>9.3} {:>12}",
        kind,
        size,
        tree.entries as usize - size,
        what,
        wall.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e6 / size.max(1) as f64,
        after.as_secs_f64() * 1e3,
        ratio,
    );
}

/// A worker that starts with 200,000 cached files.
fn restart(kind: &str, place: &Path) {
    const FILES: usize = 200_000;
    let directory = tempfile::tempdir_in(place).unwrap();
    let cache = open_cache(directory.path());
    for i in 0..FILES {
        insert(&cache, directory.path(), &format!("file {i}"));
    }
    drop(cache);
    let before = memory();
    let start = Instant::now();
    let cache = open_cache(directory.path());
    let opened = start.elapsed();
    let files = cache.usage().0;
    println!(
        "{kind}: a cache of {files} files opened in {:.2} s; {} bytes of memory per file",
        opened.as_secs_f64(),
        memory().saturating_sub(before) / files.max(1),
    );
}

/// Resident bytes of this process.
fn memory() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages = pages
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

fn insert(cache: &Cache, directory: &Path, content: &str) -> Key {
    let key = Key {
        digest: FUNCTION.digest_of(content.as_bytes()),
        executable: false,
    };
    keep(cache, directory, key, content);
    key
}

/// Directories of 50 files, ten of them in a directory, and so on. So many files, spread evenly, are
/// others.
fn tree(keys: &[Key], others: &[Key]) -> Tree {
    let mut keys = keys.to_vec();
    for (i, key) in others.iter().enumerate() {
        let at = i * keys.len() / others.len();
        keys[at] = *key;
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

    fn elapsed(&self) -> Clock2 {
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
