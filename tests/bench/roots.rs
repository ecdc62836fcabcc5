//! Input roots whose files are all cached: how long it takes from the action's arrival to the root's
//! being ready, by what is there already; on ext4, xfs and btrfs in memory, mounted by loop, where root
//! may mount them: by hard links, and by reflinks where the file system has them.
//!
//! "walk" is the look-up of the root's Directories, with the round trips to a store on the same host
//! in it; "net" is how long these reads take alone, one level after the other. "ready" is what comes
//! after the walk: plan, pin, lay out.
//!
//! usage: cargo bench --bench farm -- roots [FILES...]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, worker::Inputs},
    daemon::Services,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi,
    storage::{Backend, Content, embedded::Store, serve},
    worker::inputs::{
        InputRoot, PlannedRoot, WorkerBuildDirectory,
        directory_cache::DirectoryCache,
        file_cache::{FileCache, FileKey},
        merkle_tree::Tree,
    },
};
use prost::Message;
use tonic::transport::server::TcpIncoming;

use crate::harness::parts::{FileSystem, keep, open_cache, open_cache_of};

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
        "{:<15} {:>6} {:>5}  {:<18} {:>8} {:>8} {:>9} {:>11} {:>9} {:>11}",
        "where",
        "files",
        "dirs",
        "root",
        "walk ms",
        "net ms",
        "ready ms",
        "cpu us/file",
        "after ms",
        "fresh/this"
    );
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut places = Vec::new();
    let kinds = [
        ("ext4", &[][..]),
        ("xfs", &["-m", "reflink=1"]),
        ("btrfs", &[]),
    ];
    for (kind, options) in kinds {
        if let Some(mounted) = FileSystem::mount(kind, 4 << 10, memory.path(), options) {
            places.push((kind, mounted));
        }
    }
    for (kind, place) in &places {
        for &size in &sizes {
            measure(kind, &place.at, size, Inputs::HardLinks);
            if *kind != "ext4" {
                measure(
                    &format!("{kind}, reflinks"),
                    &place.at,
                    size,
                    Inputs::Shared,
                );
            }
        }
    }
    if places.is_empty() {
        for &size in &sizes {
            measure("disk", Path::new("/var/tmp"), size, Inputs::Shared);
        }
    }
    for (kind, place) in &places {
        restart(kind, &place.at);
    }
}

struct Bench {
    runtime: tokio::runtime::Runtime,
    client: Backend,
    directories: DirectoryCache,
    roots: Arc<WorkerBuildDirectory>,
    inputs: Inputs,
}

/// One action's root.
struct Measured {
    walk: Duration,
    net: Duration,
    ready: Clock2,
    after: Duration,
}

impl Bench {
    fn new(
        runtime: tokio::runtime::Runtime,
        client: &Backend,
        roots: Arc<WorkerBuildDirectory>,
        inputs: Inputs,
    ) -> Self {
        Bench {
            runtime,
            client: client.clone(),
            directories: DirectoryCache::new(client.clone(), 16 << 20, 1 << 30),
            roots,
            inputs,
        }
    }

    fn walk(&self, root: Digest) -> (Duration, Tree) {
        let start = Instant::now();
        let instance = InstanceName::empty();
        let walk = self.directories.walk(&instance, root, FUNCTION.empty());
        let tree = self.runtime.block_on(walk).unwrap().tree.unwrap();
        (start.elapsed(), tree)
    }

    fn lay_out(&self, tree: &Tree) -> (Clock2, InputRoot) {
        let start = Clock::start();
        let planned = PlannedRoot::new(&self.roots, tree, self.inputs).unwrap();
        let pinned = planned.pin().unwrap();
        assert!(pinned.is_complete());
        let root = planned.lay_out(pinned, &BTreeSet::new()).unwrap();
        (start.elapsed(), root)
    }

    /// Reads what `new` has and `old` lacks, as a walk does.
    fn read(&self, old: Option<&Tree>, new: &Tree) -> Duration {
        let mut levels: Vec<Vec<Digest>> = Vec::new();
        let mut pairs = vec![(old, new)];
        while !pairs.is_empty() {
            pairs.retain(|(old, new)| old.is_none_or(|old| old.digest != new.digest));
            levels.push(pairs.iter().map(|(_, new)| new.digest).collect());
            let below = pairs.iter().flat_map(|(old, new)| {
                let old = |i: usize| old.and_then(|old| old.children.get(i));
                new.children
                    .iter()
                    .enumerate()
                    .map(move |(i, new)| (old(i), new))
            });
            pairs = below.collect();
        }
        levels.retain(|level| !level.is_empty());
        let start = Instant::now();
        self.runtime.block_on(async {
            for level in &levels {
                let instance = InstanceName::empty();
                let read = self.client.read_many(&instance, level, 16 << 20);
                assert!(read.await.iter().all(Result::is_ok));
            }
        });
        start.elapsed()
    }

    /// Ready, and cleaned up afterwards: outside of a runtime that is done at once.
    fn round(&self, old: Option<&Tree>, root: Digest) -> (Measured, Tree) {
        let (walk, tree) = self.walk(root);
        let net = self.read(old, &tree);
        let (ready, root) = self.lay_out(&tree);
        let start = Instant::now();
        drop(root);
        let after = start.elapsed();
        let measured = Measured {
            walk,
            net,
            ready,
            after,
        };
        (measured, tree)
    }
}

/// An embedded store in `place` on a loopback port, served by threads of its own until the process
/// ends.
fn start_storage(place: &Path) -> Endpoint {
    let store = place.join("store");
    fs::create_dir(&store).unwrap();
    let store = Arc::new(Store::open(&store, 4 << 30).unwrap());
    let services = Services::default().add(serve::capabilities(serve::Announcement::default()));
    let routes = serve::add_to(services, &Backend::Embedded(store.clone())).into_routes();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            // As the daemons do.
            let connections = TcpIncoming::from(listener).with_nodelay(Some(true));
            tonic::transport::Server::builder()
                .add_routes(routes)
                .serve_with_incoming(connections)
                .await
                .unwrap();
        });
    });
    endpoint
}

type Clock2 = (Duration, Duration);

fn measure(kind: &str, place: &Path, size: usize, inputs: Inputs) {
    let directory = tempfile::Builder::new()
        .prefix("bb-bench-roots.")
        .tempdir_in(place)
        .unwrap();
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let storage = tempfile::tempdir().unwrap();
    let endpoint = start_storage(storage.path());
    let first_runtime = runtime();
    let client = {
        let _guard = first_runtime.enter();
        Backend::connect(&endpoint, &endpoint, Default::default())
    };
    let cache = Arc::new(open_cache_of(directory.path(), client.clone()));
    let many = 100;
    let keys: Vec<FileKey> = (0..size + ROUNDS * many)
        .map(|i| insert(&cache, directory.path(), &format!("file {i}")))
        .collect();
    let tree = |others: &[FileKey]| {
        let (root, blobs) = tree(&keys[..size], others);
        let instance = InstanceName::empty();
        let upload = client.upload(&instance, blobs);
        first_runtime.block_on(upload).unwrap();
        root
    };
    let first = tree(&[]);
    let one: Vec<Digest> = (0..ROUNDS)
        .map(|round| tree(&keys[size + round..][..1]))
        .collect();
    let hundred: Vec<Digest> = (0..ROUNDS)
        .map(|round| tree(&keys[size + round * many..][..many]))
        .collect();
    let build = directory.path().join("build");
    // Cold: one thread, then two, each time in new directories.
    let mut fresh = [Duration::ZERO; 2];
    for threads in [1, 2] {
        let mut rounds = Vec::new();
        let mut grown = 0;
        let mut known = None;
        for _ in 0..ROUNDS.min(5) {
            let roots = WorkerBuildDirectory::open(&build, cache.clone(), 1).unwrap();
            // The last round's root, whose removal would be measured too.
            wait_for_deletion(&build);
            roots.set_threads(threads);
            let bench = Bench::new(runtime(), &client, roots, inputs);
            let (walk, tree) = bench.walk(first);
            let net = bench.read(None, &tree);
            let before = memory();
            let (ready, root) = bench.lay_out(&tree);
            // Later ones get the memory that the first one left.
            grown = grown.max(memory().saturating_sub(before));
            let start = Instant::now();
            drop(root);
            let after = start.elapsed();
            rounds.push(Measured {
                walk,
                net,
                ready,
                after,
            });
            known = Some(tree);
            drop(bench);
            wait_for_deletion(&build);
        }
        let known = known.unwrap();
        fresh[threads - 1] = median(&rounds, |m| m.ready.0);
        let what = match threads {
            1 => "cold, 1 thread",
            _ => "cold, 2 threads",
        };
        print(kind, size, &known, what, &rounds, None);
        if threads == 1 {
            println!(
                "       memory of the kept root: {} bytes per entry",
                grown / known.entries
            );
        } else {
            println!(
                "       two threads are {:.2} times as fast",
                fresh[0].as_secs_f64() / fresh[1].as_secs_f64()
            );
        }
    }
    let roots = WorkerBuildDirectory::open(&build, cache.clone(), 1).unwrap();
    wait_for_deletion(&build);
    let bench = Bench::new(runtime(), &client, roots, inputs);
    let (_, known) = bench.round(None, first);
    let same = vec![first; ROUNDS];
    // From and to the same: as many are changed each time.
    for (what, roots) in [
        ("unchanged", &same),
        ("1 file changed", &one),
        ("100 files changed", &hundred),
    ] {
        let mut before = known.clone();
        let mut rounds = Vec::new();
        for root in roots {
            let (measured, tree) = bench.round(Some(&before), *root);
            rounds.push(measured);
            before = tree;
        }
        print(kind, size, &known, what, &rounds, Some(fresh[0]));
    }
    drop(bench);
    wait_for_deletion(&build);
}

fn wait_for_deletion(build: &Path) {
    let deleted = build.join("deleted");
    let count = || fs::read_dir(&deleted).map_or(0, |entries| entries.count());
    while count() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn print(
    kind: &str,
    size: usize,
    tree: &Tree,
    what: &str,
    rounds: &[Measured],
    fresh: Option<Duration>,
) {
    let (walk, net) = (median(rounds, |m| m.walk), median(rounds, |m| m.net));
    let (wall, cpu) = (median(rounds, |m| m.ready.0), median(rounds, |m| m.ready.1));
    let after = median(rounds, |m| m.after);
    let ratio = fresh.map_or(String::new(), |fresh| {
        format!("{:.0}", fresh.as_secs_f64() / wall.as_secs_f64())
    });
    println!(
        "{:<15} {:>6} {:>5}  {:<18} {:>8.3} {:>8.3} {:>9.3} {:>11.2} {:>9.3} {:>11}",
        kind,
        size,
        tree.directories,
        what,
        walk.as_secs_f64() * 1e3,
        net.as_secs_f64() * 1e3,
        wall.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e6 / size.max(1) as f64,
        after.as_secs_f64() * 1e3,
        ratio,
    );
}

/// A worker that starts with 200,000 cached files, and reads some of them before their first use.
fn restart(kind: &str, place: &Path) {
    const FILES: usize = 200_000;
    let directory = tempfile::tempdir_in(place).unwrap();
    let cache = open_cache(directory.path());
    for i in 0..FILES {
        insert(&cache, directory.path(), &format!("file {i}"));
    }
    let large = |text: &str, size: usize| text.repeat(size / text.len());
    let small: Vec<FileKey> = (0..10_000)
        .map(|i| {
            insert(
                &cache,
                directory.path(),
                &large(&format!("{i:08}"), 8 << 10),
            )
        })
        .collect();
    let large = [insert(
        &cache,
        directory.path(),
        &large("large   ", 512 << 20),
    )];
    drop(cache);
    let before = memory();
    let start = Instant::now();
    let cache = Arc::new(open_cache(directory.path()));
    let opened = start.elapsed();
    let files = cache.usage().0;
    println!(
        "{kind}: a cache of {files} files opened in {:.2} s; {} bytes of memory per file",
        opened.as_secs_f64(),
        memory().saturating_sub(before) / files.max(1),
    );
    for (what, keys) in [("10000 of 8 KiB", &small[..]), ("one of 512 MiB", &large)] {
        for use_ in ["first", "second"] {
            let start = Clock::start();
            drop(cache.pin(keys));
            let (wall, cpu) = start.elapsed();
            println!(
                "{kind}: {what}, {use_} use after a start: {:.1} ms, cpu {:.1} ms",
                wall.as_secs_f64() * 1e3,
                cpu.as_secs_f64() * 1e3,
            );
        }
    }
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

fn insert(cache: &FileCache, directory: &Path, content: &str) -> FileKey {
    let key = FileKey {
        digest: FUNCTION.digest_of(content.as_bytes()),
        executable: false,
    };
    keep(cache, directory, key, content);
    key
}

/// Directories of 50 files, ten of them in a directory, and so on. So many files, spread evenly, are
/// others.
fn tree(keys: &[FileKey], others: &[FileKey]) -> (Digest, Vec<(Digest, Content)>) {
    let mut keys = keys.to_vec();
    for (i, key) in others.iter().enumerate() {
        let at = i * keys.len() / others.len();
        keys[at] = *key;
    }
    let mut blobs = Vec::new();
    let mut level: Vec<Digest> = Vec::new();
    let mut add = |directory: reapi::Directory| {
        let data = directory.encode_to_vec();
        let digest = FUNCTION.digest_of(&data);
        blobs.push((digest, Content::Bytes(data.into())));
        digest
    };
    for files in keys.chunks(FILES_PER_DIRECTORY) {
        let files = files.iter().enumerate().map(|(i, key)| reapi::FileNode {
            name: format!("source_file_{i:02}.cc"),
            digest: Some(key.digest.to_proto()),
            ..Default::default()
        });
        level.push(add(reapi::Directory {
            files: files.collect(),
            ..Default::default()
        }));
    }
    while level.len() > 1 {
        let above = level.chunks(DIRECTORIES_PER_DIRECTORY).map(|children| {
            let named = children
                .iter()
                .enumerate()
                .map(|(i, child)| reapi::DirectoryNode {
                    name: format!("package_{i}"),
                    digest: Some(child.to_proto()),
                });
            add(reapi::Directory {
                directories: named.collect(),
                ..Default::default()
            })
        });
        level = above.collect();
    }
    (level[0], blobs)
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
