//! Roots that are kept from one action to the next, and what ends that.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bb_remote_execution::{
    config::worker::Inputs,
    path::Component,
    proto::rpc::Code,
    worker::inputs::{
        InputRoot, PlannedRoot, PlannedRootError, WorkerBuildDirectory,
        directory_message::{Directory, FileEntry},
        file_cache::{FileCache, FileKey},
        merkle_tree::{self, Tree},
    },
};

use super::{
    farm::{FUNCTION, Farm},
    results::code,
};
use crate::harness::parts::{FileSystem, keep, open_cache};

fn links(farm: &Farm) -> u64 {
    farm.executor
        .inputs
        .build_directory
        .lay_out_counts()
        .created_files
        .load(Ordering::Relaxed)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changed_is_linked() {
    let farm = Farm::start().await;
    let names: Vec<String> = (0..60).map(|i| format!("d{}/f{i}", i % 7)).collect();
    let mut files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x")).collect();
    let count = "find . -type f | wc -l";
    let mut before = 0;
    for (content, expected) in [("x", 60), ("x", 0), ("y", 1), ("z", 1)] {
        files[17].1 = content;
        let response = farm
            .shell(&format!("{count}; cat d3/f17 # {before}"), &files, &[])
            .await;
        let out = farm.read(&response.result.unwrap().stdout_digest).await;
        assert_eq!(String::from_utf8(out).unwrap(), format!("60\n{content}"));
        let now = links(&farm);
        assert_eq!(now - before, expected, "{content}");
        before = now;
        // It is cleaned in the background.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_once_actions_run_as_the_worker() {
    let farm = Farm::start().await;
    let files = [("a/b", "one"), ("a/c", "two")];
    for round in 1..4 {
        let script = format!("echo > out # {round}");
        assert_eq!(farm.shell(&script, &files, &["out"]).await.status, None);
        assert_eq!(links(&farm), round * 2);
    }
}

fn key(content: &str) -> FileKey {
    FileKey {
        digest: FUNCTION.digest_of(content.as_bytes()),
        executable: false,
    }
}

fn root_of(directories: usize, content: &str) -> Tree {
    let mut found = HashMap::new();
    let inner = Directory {
        files: vec![FileEntry {
            name: Component::parse("f").unwrap(),
            key: key(content),
        }],
        ..Default::default()
    };
    let digest = FUNCTION.digest_of(format!("{inner:?}").as_bytes());
    found.insert(digest, Arc::new(inner));
    let name = |i: usize| Component::parse(&i.to_string()).unwrap();
    let mut root = Directory {
        directories: (0..directories).map(|i| (name(i), digest)).collect(),
        ..Default::default()
    };
    root.sort();
    let digest = FUNCTION.digest_of(format!("{root:?}").as_bytes());
    found.insert(digest, Arc::new(root));
    merkle_tree::build(digest, &found, &HashMap::new())
        .unwrap()
        .0
}

fn lay_out(planned: PlannedRoot) -> Result<InputRoot, PlannedRootError> {
    let pinned = planned.pin()?;
    planned.lay_out(pinned, &BTreeSet::new())
}

fn prepare(roots: &Arc<WorkerBuildDirectory>, tree: &Tree) -> Result<InputRoot, PlannedRootError> {
    lay_out(PlannedRoot::new(roots, tree, Inputs::Shared).unwrap())
}

fn cache_with(place: &Path, content: &str) -> Arc<FileCache> {
    let cache = open_cache(place);
    keep(&cache, place, key(content), content);
    Arc::new(cache)
}

#[test]
fn a_full_disk_costs_one_action_and_no_other() {
    let memory = Path::new("/dev/shm");
    if !nix::unistd::geteuid().is_root() || !memory.is_dir() {
        crate::harness::skip("only root can mount a small file system");
        return;
    }
    let place = tempfile::tempdir_in(memory).unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // So few inodes that they are used up first.
    for options in [&["-m", "0"][..], &["-N", "600"]] {
        let inner = place.path().join(options[0]);
        fs::create_dir(&inner).unwrap();
        let Some(mounted) = FileSystem::mount("ext4", 16, &inner, options) else {
            return;
        };
        let at = &mounted.at;
        let cache = cache_with(at, "content");
        let roots = WorkerBuildDirectory::open(&at.join("build"), cache, 2).unwrap();
        let small = root_of(10, "content");
        drop(prepare(&roots, &small).unwrap());
        let large = root_of(20_000, "content");
        match prepare(&roots, &large) {
            Err(PlannedRootError::Fault(fault)) => {
                assert_eq!(fault.status().code, Code::Unavailable as i32, "{fault}");
            }
            Err(PlannedRootError::MissingFiles(keys)) => panic!("{keys:?}"),
            Ok(_) => panic!("there is no room for it"),
        }
        // What was made is removed in the background.
        for attempt in 0.. {
            let planned = PlannedRoot::new(&roots, &small, Inputs::Shared);
            match planned.map(lay_out) {
                Ok(Ok(root)) => {
                    let path = at.join("build").join(root.name()).join("root/3/f");
                    assert_eq!(fs::read(path).unwrap(), b"content");
                    break;
                }
                _ if attempt < 200 => std::thread::sleep(Duration::from_millis(50)),
                _ => panic!("it does not recover"),
            }
        }
    }
}

#[test]
fn a_root_in_which_something_stirs_is_given_to_nobody() {
    let place = tempfile::tempdir().unwrap();
    let roots = WorkerBuildDirectory::open(
        &place.path().join("build"),
        cache_with(place.path(), "x"),
        1,
    )
    .unwrap();
    let prepare = || prepare(&roots, &root_of(3, "x")).unwrap();
    let first = prepare();
    let path = place.path().join("build").join(first.name());
    let action_directory = fs::File::open(&path).unwrap();
    let inode = action_directory.metadata().unwrap().ino();
    // As the runner does for as long as a process of the action lives.
    action_directory.lock().unwrap();
    std::thread::scope(|scope| {
        // It waits for the lock.
        let cleaning = scope.spawn(move || drop(first));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!cleaning.is_finished());
        // A call that comes late finds nothing under the old name, and another action another root.
        assert!(!path.exists());
        let second = prepare();
        let at = |root: &InputRoot| {
            let path = place.path().join("build").join(root.name());
            fs::metadata(path).unwrap().ino()
        };
        assert_ne!(at(&second), inode);
        // What is left behind meanwhile is foreign.
        let name = fs::read_dir(place.path().join("build"))
            .unwrap()
            .find_map(|entry| {
                let entry = entry.unwrap();
                (entry.metadata().unwrap().ino() == inode).then(|| entry.path())
            });
        fs::write(name.unwrap().join("root/0/evil"), "evil").unwrap();
        action_directory.unlock().unwrap();
        cleaning.join().unwrap();
        let third = prepare();
        assert_eq!(at(&third), inode);
        let root = place.path().join("build").join(third.name()).join("root");
        assert!(!root.join("0/evil").exists());
        assert_eq!(fs::read(root.join("0/f")).unwrap(), b"x");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_file_that_vanishes_ends_trust_in_what_is_kept() {
    let farm = Farm::start().await;
    let files = [("a/b", "one"), ("a/c", "two")];
    assert_eq!(farm.shell("true", &files, &[]).await.status, None);
    for entry in walkdir::WalkDir::new(farm.directory.path().join("cache")).min_depth(2) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    // Another root, so that the files are linked again.
    let files = [("x/b", "one"), ("x/c", "two"), ("x/d", "")];
    let response = farm.shell("cat x/b x/c", &files, &[]).await;
    assert_eq!(code(&response), Code::Ok);
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(out, b"onetwo");
}

fn directory_of(names: usize) -> Tree {
    let mut inner = Directory {
        files: (0..names)
            .map(|i| FileEntry {
                name: Component::parse(&format!("{i:0>120}")).unwrap(),
                key: key("x"),
            })
            .collect(),
        ..Default::default()
    };
    inner.sort();
    let digest = FUNCTION.digest_of(format!("{inner:?}").as_bytes());
    let root = Directory {
        directories: vec![(Component::parse("d").unwrap(), digest)],
        ..Default::default()
    };
    let root_digest = FUNCTION.digest_of(format!("{root:?}").as_bytes());
    let found = HashMap::from([(digest, Arc::new(inner)), (root_digest, Arc::new(root))]);
    merkle_tree::build(root_digest, &found, &HashMap::new())
        .unwrap()
        .0
}

#[test]
fn a_directory_may_be_as_large_as_its_message_says_and_not_much_larger() {
    let place = tempfile::tempdir().unwrap();
    let cache = cache_with(place.path(), "x");
    let roots = WorkerBuildDirectory::open(&place.path().join("build"), cache, 1).unwrap();
    let prepare_with = |names: usize| {
        let root = prepare(&roots, &directory_of(names)).unwrap();
        let path = place.path().join("build").join(root.name()).join("root/d");
        (root, path)
    };
    let links = || roots.lay_out_counts().created_files.load(Ordering::Relaxed);
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let (root, path) = prepare_with(5_000);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 5_000);
    let (large, linked) = (inode(&path), links());
    // The action writes to it, so that it is read afterwards; it stays what it is.
    fs::write(path.join("new"), "").unwrap();
    drop(root);
    let (root, path) = prepare_with(5_000);
    assert_eq!((inode(&path), links()), (large, linked));
    drop(root);
    // As few as that in a directory as large as that, or in one that an action blew up, are made anew.
    let (root, path) = prepare_with(3);
    for i in 0..9_000 {
        fs::write(path.join(format!("{i:0>200}")), "").unwrap();
    }
    for i in 0..9_000 {
        fs::remove_file(path.join(format!("{i:0>200}"))).unwrap();
    }
    drop(root);
    let (_root, path) = prepare_with(3);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 3);
    assert!(fs::metadata(&path).unwrap().len() <= 256 << 10);
}

#[test]
fn what_is_taken_out_of_a_root_that_is_to_go_goes_too() {
    let place = tempfile::tempdir().unwrap();
    let build = place.path().join("build");
    let roots = WorkerBuildDirectory::open(&build, cache_with(place.path(), "x"), 1).unwrap();
    for invalidated in [false, true] {
        drop(prepare(&roots, &root_of(3, "x")).unwrap());
        let planned = PlannedRoot::new(&roots, &root_of(1, "x"), Inputs::Shared).unwrap();
        // As while its files are fetched.
        if invalidated {
            roots.invalidate_all();
        }
        drop(lay_out(planned).unwrap());
        assert_eq!(roots.idle_counts().1 > 0, !invalidated);
    }
}
