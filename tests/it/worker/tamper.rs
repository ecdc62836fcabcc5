//! What an action did to its root is not seen by the next one, whatever it did.
//!
//! An adversary, with the credentials of another user, does random things to one root after the
//! other; each root is compared entry by entry with its Merkle tree before it is handed out, and no
//! two of its files may be one inode. On ext4, xfs and btrfs in files where root may mount them and
//! their tools are there, by reflinks and by hard links; else where temporary files are. BB_TAMPER_OPERATIONS sets how many things it does, BB_TAMPER_SEED which.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::CString,
    fs,
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use bb_remote_execution::{
    config::worker::Inputs,
    digest::Digest,
    path::{Component, RelativePath},
    worker::inputs::{
        InputRoot, PlannedRoot, WorkerBuildDirectory,
        directory_message::{Directory, FileEntry},
        file_cache::FileKey,
        merkle_tree::{self, Node, Tree},
    },
};

use super::farm::FUNCTION;
use crate::harness::parts::{FileSystem, Random, keep, open_cache};

const USER: u32 = 57_991;
const MTIME: i64 = 946_684_800;

#[derive(Clone, Debug)]
pub enum Entry {
    File(usize, bool),
    Link(String),
    Directory(Entries),
}

pub type Entries = BTreeMap<String, Entry>;

fn name(random: &mut Random) -> String {
    match random.index(40) {
        0 => format!("{:x<255}", random.index(3)),
        n => format!("n{}", n % 20),
    }
}

pub fn grow(random: &mut Random, depth: usize) -> Entries {
    let mut entries = Entries::new();
    for _ in 0..random.index(9) {
        let entry = match random.index(10) {
            0..=2 if depth > 0 => Entry::Directory(grow(random, depth - 1)),
            3 => Entry::Link(format!("../n{}", random.index(5))),
            _ => Entry::File(random.index(CONTENTS), random.index(4) == 0),
        };
        entries.insert(name(random), entry);
    }
    entries
}

/// Another tree that has most in common with this one.
pub fn change(random: &mut Random, entries: &mut Entries) {
    for _ in 0..1 + random.index(3) {
        let names: Vec<String> = entries.keys().cloned().collect();
        let some = names.get(random.index(names.len())).cloned();
        match (random.index(6), some) {
            (0, Some(name)) => drop(entries.remove(&name)),
            (1, Some(from)) => {
                let entry = entries.remove(&from).unwrap();
                entries.insert(name(random), entry);
            }
            (2, _) => drop(entries.insert(name(random), Entry::Directory(grow(random, 2)))),
            (3, _) => {
                let file = Entry::File(random.index(CONTENTS), random.index(2) == 0);
                entries.insert(name(random), file);
            }
            (_, Some(name)) => {
                if let Some(Entry::Directory(below)) = entries.get_mut(&name) {
                    change(random, below);
                }
            }
            _ => {}
        }
    }
}

pub const CONTENTS: usize = 40;

/// The first one is empty.
pub fn content(number: usize) -> String {
    if number == 0 {
        return String::new();
    }
    format!("content {number} {}", "x".repeat(number * 37))
}

pub fn key(number: usize, executable: bool) -> FileKey {
    FileKey {
        digest: FUNCTION.digest_of(content(number).as_bytes()),
        executable,
    }
}

pub fn tree_of(entries: &Entries) -> Tree {
    fn add(entries: &Entries, found: &mut HashMap<Digest, Arc<Directory>>) -> Digest {
        let mut directory = Directory::default();
        for (name, entry) in entries {
            let name = Component::parse(name).unwrap();
            match entry {
                Entry::File(number, executable) => directory.files.push(FileEntry {
                    name,
                    key: key(*number, *executable),
                }),
                Entry::Link(target) => directory.symlinks.push((name, target.as_str().into())),
                Entry::Directory(below) => directory.directories.push((name, add(below, found))),
            }
        }
        directory.sort();
        if entries.is_empty() {
            found.insert(FUNCTION.empty(), Arc::default());
            return FUNCTION.empty();
        }
        let digest = FUNCTION.digest_of(format!("{directory:?}").as_bytes());
        found.insert(digest, Arc::new(directory));
        digest
    }
    let mut found = HashMap::new();
    let root = add(entries, &mut found);
    merkle_tree::build(root, &found, &HashMap::new()).unwrap().0
}

/// Differences of a root from its tree, in words. A directory in it may be beside the tree.
pub fn compare_root(path: &Path, tree: &Tree, extra: Option<&str>) -> Vec<String> {
    let owner = nix::unistd::geteuid().as_raw();
    let (mut told, mut inodes) = (Vec::new(), BTreeSet::new());
    compare(path, tree, owner, extra, &mut inodes, &mut told);
    told
}

fn compare(
    path: &Path,
    node: &Node,
    owner: u32,
    extra: Option<&str>,
    inodes: &mut BTreeSet<u64>,
    told: &mut Vec<String>,
) {
    let mut tell = |text: String| told.push(format!("{}: {text}", path.display()));
    let metadata = fs::symlink_metadata(path).unwrap();
    if (metadata.uid(), metadata.mode() & 0o7777, metadata.mtime()) != (owner, 0o777, MTIME) {
        tell(format!("owner, mode or mtime: {metadata:?}"));
    }
    let mut names: BTreeSet<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    if let Some(extra) = extra {
        names.remove(extra);
    }
    for file in &node.directory.files {
        if !names.remove(file.name.as_str()) {
            tell(format!("no file {}", file.name));
            continue;
        }
        let at = path.join(file.name.as_str());
        let metadata = fs::symlink_metadata(&at).unwrap();
        let mode = if file.key.executable { 0o555 } else { 0o444 };
        if !metadata.is_file()
            || (metadata.uid(), metadata.mode() & 0o7777, metadata.mtime()) != (owner, mode, MTIME)
            || FUNCTION.digest_of(&fs::read(&at).unwrap()) != file.key.digest
        {
            tell(format!("another file {}: {metadata:?}", file.name));
        }
        if !inodes.insert(metadata.ino()) {
            tell(format!("another name of a file: {}", file.name));
        }
    }
    for (name, target) in &node.directory.symlinks {
        let there = fs::read_link(path.join(name.as_str()));
        let owned = fs::symlink_metadata(path.join(name.as_str()));
        if !names.remove(name.as_str())
            || there.is_ok_and(|there| there.as_os_str() != &**target)
            || owned.is_ok_and(|metadata| metadata.uid() != owner)
        {
            tell(format!("no symbolic link {name}"));
        }
    }
    for ((name, _), child) in node.directory.directories.iter().zip(&node.children) {
        if !names.remove(name.as_str()) {
            told.push(format!("{}: no directory {name}", path.display()));
            continue;
        }
        compare(&path.join(name.as_str()), child, owner, None, inodes, told);
    }
    if !names.is_empty() {
        told.push(format!("{}: foreign {names:?}", path.display()));
    }
}

/// The credentials of this thread alone become another user's.
fn become_another_user() {
    // SAFETY: these system calls take numbers, and a pointer that goes with the number 0.
    unsafe {
        assert_eq!(
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()),
            0
        );
        assert_eq!(libc::syscall(libc::SYS_setresgid, USER, USER, USER), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, USER, USER, USER), 0);
    }
}

/// Some directory in the root, and the names in it.
fn wander(random: &mut Random, root: &Path) -> (PathBuf, Vec<PathBuf>) {
    let mut at = root.to_owned();
    loop {
        let names: Vec<PathBuf> = fs::read_dir(&at)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        let below: Vec<&PathBuf> = names
            .iter()
            .filter(|path| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()))
            .collect();
        if below.is_empty() || random.index(3) == 0 {
            return (at, names);
        }
        at = below[random.index(below.len())].clone();
    }
}

/// One thing; tells whether it worked. Many fail for some reason, which is as well.
fn tamper(random: &mut Random, root: &Path, held: &mut Vec<fs::File>) -> bool {
    let (directory, names) = wander(random, root);
    let (other, others) = wander(random, root);
    let new = directory.join(format!("evil{}", random.index(30)));
    let some = match names.get(random.index(names.len())) {
        Some(path) => path.clone(),
        None => new.clone(),
    };
    let target = match others.get(random.index(others.len() + 1)) {
        Some(path) => path.clone(),
        None => other.join(format!("moved{}", random.index(9))),
    };
    // A FIFO without a reader would wait.
    let open = |path: &Path, truncate: bool| {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(truncate).truncate(truncate);
        options.custom_flags(libc::O_NONBLOCK).open(path)
    };
    let write =
        |path: &Path| open(path, true).is_ok_and(|mut file| file.write_all(b"evil").is_ok());
    let c_path = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    match random.index(26) {
        0..=2 => write(&new),
        3 => write(&some),
        4..=5 => fs::remove_file(&some).is_ok(),
        6 => fs::remove_file(&some).is_ok() && write(&some),
        7..=9 => fs::rename(&some, &target).is_ok(),
        10 => {
            let away = root.join("away");
            fs::rename(&some, &away).is_ok() && fs::rename(&away, &some).is_ok()
        }
        11 => fs::remove_dir_all(&some).is_ok(),
        12 => {
            let mode = random.index(0o10000) as u32;
            fs::set_permissions(&some, fs::Permissions::from_mode(mode)).is_ok()
        }
        13 => fs::hard_link(&some, &target).is_ok(),
        14 => symlink("/etc/passwd", &new).is_ok(),
        15 => fs::remove_file(&some).is_ok() && symlink(&target, &some).is_ok(),
        16 => open(&some, true).is_ok(),
        17 => open(&some, false).is_ok_and(|mut file| file.write_all(b"evil").is_ok()),
        18 => {
            let (path, name) = (c_path(&directory), c"user.evil");
            // SAFETY: both strings end, and the value is none.
            unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), std::ptr::null(), 0, 0) == 0 }
        }
        19 => {
            fs::create_dir(&new).is_ok()
                && write(&new.join("inner"))
                && fs::set_permissions(&new, fs::Permissions::from_mode(0o000)).is_ok()
        }
        20 => {
            let path = c_path(&new);
            // SAFETY: the string ends.
            unsafe { libc::mkfifo(path.as_ptr(), 0o666) == 0 }
        }
        21 => std::os::unix::net::UnixListener::bind(&new).is_ok(),
        22 => {
            let mut at = new.clone();
            for _ in 0..random.index(12) {
                at.push("d");
            }
            fs::create_dir_all(&at).is_ok() && write(&at.join("f"))
        }
        23 => fs::File::open(&directory)
            .map(|file| held.push(file))
            .is_ok(),
        24 => {
            let file = fs::File::open(&directory);
            let now = std::fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
            file.is_ok_and(|file| file.set_times(now).is_ok())
        }
        _ => {
            let name = std::ffi::OsStr::from_bytes(b"\xff\xfe not text");
            write(&directory.join(name)) | write(&directory.join("y".repeat(255)))
        }
    }
}

/// 100,000 entries in one directory, of few inodes.
fn fill(root: &Path) {
    let (directory, _) = wander(&mut Random(1), root);
    for file in 0..4 {
        let first = directory.join(format!("crowd{file}"));
        fs::write(&first, "evil").unwrap();
        for i in 0..25_000 {
            fs::hard_link(&first, directory.join(format!("crowd{file}-{i}"))).unwrap();
        }
    }
}

fn run(place: &Path, what: &str, inputs: Inputs, operations: usize, seed: u64) {
    fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
    let cache = Arc::new(open_cache(place));
    for number in 0..CONTENTS {
        for executable in [false, true] {
            keep(&cache, place, key(number, executable), &content(number));
        }
    }
    let roots = WorkerBuildDirectory::open(&place.join("build"), cache.clone(), 2).unwrap();
    let mut random = Random(seed);
    let mut variants: Vec<Entries> = (0..4).map(|_| grow(&mut random, 4)).collect();
    let mut done = 0;
    let mut round = 0;
    let mut worked = 0;
    let mut active: Vec<InputRoot> = Vec::new();
    while done < operations {
        round += 1;
        let at = random.index(variants.len());
        if random.index(3) > 0 {
            change(&mut random, &mut variants[at]);
        }
        if random.index(50) == 0 {
            variants[at] = grow(&mut random, 4);
        }
        let tree = tree_of(&variants[at]);
        let planned = PlannedRoot::new(&roots, &tree, inputs).unwrap();
        let parents: BTreeSet<RelativePath> = match random.index(2) {
            0 => BTreeSet::new(),
            _ => [RelativePath::resolve(&RelativePath::root(), "out put/below", "root").unwrap()]
                .into(),
        };
        let pinned = planned.pin().unwrap();
        let root = planned.lay_out(pinned, &parents).unwrap();
        let action_directory = place.join("build").join(root.name());
        let extra = (!parents.is_empty()).then_some("out put");
        let told = compare_root(&action_directory.join("root"), &tree, extra);
        assert!(
            told.is_empty(),
            "{what}, seed {seed}, round {round}: {told:#?}"
        );
        for part in ["tmp", "server_logs", "home"] {
            assert_eq!(
                fs::read_dir(action_directory.join(part)).unwrap().count(),
                0
            );
        }
        // As the runner opens it.
        fs::set_permissions(&action_directory, fs::Permissions::from_mode(0o711)).unwrap();
        let count = 1 + random.index(12);
        let (path, seed) = (action_directory.join("root"), random.next());
        let crowd = round == 20;
        let adversary = move || {
            if nix::unistd::geteuid().is_root() {
                become_another_user();
            }
            let mut random = Random(seed);
            let mut held = Vec::new();
            if crowd {
                fill(&path);
            }
            let done = (0..count).filter(|_| tamper(&mut random, &path, &mut held));
            done.count()
        };
        worked += std::thread::spawn(adversary).join().unwrap();
        done += count;
        fs::set_permissions(&action_directory, fs::Permissions::from_mode(0o700)).unwrap();
        // Sometimes two actions have roots at a time.
        active.push(root);
        if active.len() > 1 || random.index(2) == 0 {
            active.remove(0);
        }
    }
    drop(active);
    let mut altered = 0;
    for entry in walkdir::WalkDir::new(place.join("cache")).min_depth(2) {
        let entry = entry.unwrap();
        let digest = FUNCTION.digest_of(&fs::read(entry.path()).unwrap());
        let name = entry.file_name().to_string_lossy().into_owned();
        altered += usize::from(!name.contains(&digest.hash_hex()));
    }
    assert_eq!(altered, 0, "{what}: altered files in the cache");
    let counts = roots.lay_out_counts();
    let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    let (entries, links) = (count(&counts.entries), count(&counts.created_files));
    println!(
        "{what}: {done} operations, of which {worked} worked, {round} roots, {entries} entries, {links} files linked, {} directories made, {} stashed subtrees used, 0 differences",
        count(&counts.new_directories),
        count(&counts.unstashed),
    );
    assert!(links < entries / 2, "roots are used again");
    assert!(worked > done / 4, "the adversary can do something");
}

#[test]
fn nothing_that_an_action_did_is_seen_by_the_next() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let operations = number("BB_TAMPER_OPERATIONS", 2_000) as usize;
    let seed = number("BB_TAMPER_SEED", 1);
    let memory = Path::new("/dev/shm");
    let place = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut mounted = 0;
    if nix::unistd::geteuid().is_root() {
        for (kind, options) in [
            ("ext4", &[][..]),
            ("xfs", &["-m", "reflink=1"]),
            ("btrfs", &[]),
        ] {
            if let Some(mount) = FileSystem::mount(kind, 600, place.path(), options) {
                mounted += 1;
                run(&mount.at, kind, Inputs::Shared, operations, seed);
                if kind != "ext4" {
                    for left in ["cache", "build"] {
                        fs::remove_dir_all(mount.at.join(left)).unwrap();
                    }
                    let what = format!("{kind} with hard links");
                    run(&mount.at, &what, Inputs::HardLinks, operations, seed);
                }
            }
        }
    }
    if mounted < 3 {
        let plain = tempfile::tempdir().unwrap();
        let what = "temporary directory";
        run(plain.path(), what, Inputs::Shared, operations, seed);
    }
}
