//! Every file of an input root is a file of its own, whatever else has its content, and whatever
//! roots came before.

use std::{fs, path::Path, sync::Arc};

use bb_remote_execution::{
    config::worker::Inputs,
    proto::{reapi, rpc::Code},
    worker::inputs::{InputRoot, PlannedRoot, WorkerBuildDirectory, file_cache::CacheLimits},
};

use super::{
    farm::{Farm, Settings, shell},
    inputs::{directory, file},
    results::{code, text},
    tamper::{Entries, Entry, change, compare_root, content, grow, key, tree_of},
};
use crate::harness::parts::{FileSystem, Random, keep, open_cache};

/// So few that each root has all of them several times.
const CONTENTS: usize = 3;

fn with_few_contents(entries: &Entries) -> Entries {
    let few = |entry: &Entry| match entry {
        Entry::File(number, executable) => Entry::File(number % CONTENTS, *executable),
        Entry::Directory(below) => Entry::Directory(with_few_contents(below)),
        link => link.clone(),
    };
    let entries = entries.iter();
    entries
        .map(|(name, entry)| (name.clone(), few(entry)))
        .collect()
}

/// Roots after one another, three of them at a time; what was dropped from one comes back in others.
fn run(place: &Path, inputs: Inputs, rounds: usize, seed: u64) {
    let cache = Arc::new(open_cache(place));
    for number in 0..CONTENTS {
        for executable in [false, true] {
            keep(&cache, place, key(number, executable), &content(number));
        }
    }
    let roots = WorkerBuildDirectory::open(&place.join("build"), cache.clone(), 2).unwrap();
    let mut random = Random(seed);
    let mut variants: Vec<Entries> = (0..3).map(|_| grow(&mut random, 3)).collect();
    let mut active: Vec<InputRoot> = Vec::new();
    for round in 0..rounds {
        let at = random.index(variants.len());
        match random.index(4) {
            // A subtree twice, or from one root to another.
            0 => {
                let from = variants[random.index(3)].clone();
                let name = format!("copy{}", random.index(4));
                variants[at].insert(name, Entry::Directory(from));
            }
            1 => {
                for i in 0..4 {
                    variants[at].remove(&format!("copy{i}"));
                }
            }
            _ => change(&mut random, &mut variants[at]),
        }
        let tree = tree_of(&with_few_contents(&variants[at]));
        if tree.entries > 3_000 {
            variants[at] = grow(&mut random, 3);
            continue;
        }
        let planned = PlannedRoot::new(&roots, &tree, inputs).unwrap();
        let pinned = planned.pin().unwrap();
        let root = planned.lay_out(pinned, &Default::default()).unwrap();
        let path = place.join("build").join(root.name()).join("root");
        let told = compare_root(&path, &tree, None);
        assert!(told.is_empty(), "seed {seed}, round {round}: {told:#?}");
        // As an action does.
        if let Some(entry) = fs::read_dir(&path).unwrap().next() {
            let _ = fs::remove_file(entry.unwrap().path());
        }
        active.push(root);
        if active.len() > 2 || random.index(3) == 0 {
            active.remove(random.index(active.len()));
        }
    }
}

#[test]
fn no_two_files_of_a_root_are_one_inode_whatever_roots_came_before() {
    for seed in 0..12 {
        let place = tempfile::tempdir().unwrap();
        run(place.path(), Inputs::Shared, 60, seed);
    }
    let memory = Path::new("/dev/shm");
    if !nix::unistd::geteuid().is_root() || !memory.is_dir() {
        crate::harness::skip("only root can mount file systems");
        return;
    }
    for (kind, options) in [("xfs", &["-m", "reflink=1"][..]), ("btrfs", &[])] {
        for inputs in [Inputs::Shared, Inputs::HardLinks] {
            let place = tempfile::tempdir_in(memory).unwrap();
            if let Some(mounted) = FileSystem::mount(kind, 400, place.path(), options) {
                run(&mounted.at, inputs, 60, 7);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_files_of_equal_content_are_as_many_files() {
    let farm = Farm::start().await;
    for (content, cached) in [("popular", 1), ("", 1)] {
        let blob = farm.upload(content).await;
        let many = reapi::Directory {
            files: (0..500)
                .map(|i| file(&i.to_string(), blob.clone()))
                .collect(),
            ..Default::default()
        };
        let many = farm.upload_message(&many).await;
        let root = reapi::Directory {
            directories: (0..20)
                .map(|i| directory(&i.to_string(), many.clone()))
                .collect(),
            ..Default::default()
        };
        let root = farm.upload_message(&root).await;
        for round in 1..3 {
            let script = format!(
                "find . -type f -printf '%i\\n' | sort -u | wc -l; cat 19/499; stat -c ' %a' 0/0 19/499 # {round}"
            );
            let response = farm
                .execute(farm.task(&shell(&script, &[]), root.clone()).await)
                .await;
            assert_eq!(response.status, None, "{}", text(&response));
            let out = farm.read(&response.result.unwrap().stdout_digest).await;
            let expected = format!("10000\n{content} 444\n 444\n");
            assert_eq!(String::from_utf8(out).unwrap(), expected);
            assert_eq!(farm.cache.usage().0, cached);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_does_with_inputs_of_equal_content_it_does_with_separate_files() {
    let farm = Farm::start().await;
    let files = [
        ("a", "same"),
        ("b", "same"),
        ("d/c", "same"),
        ("x", ""),
        ("y", ""),
        ("!e", "same"),
        ("!f", "same"),
    ];
    let script = "cp -f a b && mv -f a b && test ! -e a && mv -f x y && test ! -e x && mv -f e f \
        && test ! -e e && cat b d/c f && stat -c ' %h' y";
    for round in 1..4 {
        let response = farm
            .shell(&format!("{script} # {round}"), &files, &[])
            .await;
        assert_eq!(code(&response), Code::Ok);
        let result = response.result.unwrap();
        let out = farm.read(&result.stdout_digest).await;
        assert_eq!(String::from_utf8(out).unwrap(), "samesamesame 1\n");
        assert_eq!(result.exit_code, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_has_as_many_links_as_are_needed() {
    let farm = Farm::start().await;
    let files = [("a", "popular"), ("b", "popular")];
    assert_eq!(farm.shell("true", &files, &[]).await.status, None);
    // Each inode of it gets all the links that its file system allows, where that is not many more than
    // ext4's 65,000.
    let directory = farm.directory.path();
    fs::create_dir(directory.join("links")).unwrap();
    let cached = walkdir::WalkDir::new(directory.join("cache")).min_depth(2);
    for (i, entry) in cached.into_iter().enumerate() {
        let path = entry.unwrap().into_path();
        for n in 0..70_000 {
            let link = directory.join("links").join(format!("{i}-{n}"));
            if fs::hard_link(&path, link).is_err() {
                break;
            }
        }
    }
    let files = [("c/a", "popular"), ("c/b", "popular"), ("c/c", "popular")];
    let script = "find c -type f -printf '%i\\n' | sort -u | wc -l; cat c/*";
    let response = farm.shell(script, &files, &[]).await;
    assert_eq!(response.status, None, "{}", text(&response));
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(String::from_utf8(out).unwrap(), "3\npopularpopularpopular");
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_files_count_each_where_each_takes_room() {
    let limits = CacheLimits {
        bytes: 20_000,
        files: 200,
        minimum_free: 0,
    };
    let settings = Settings {
        limits,
        inputs: Inputs::HardLinks,
        ..Default::default()
    };
    let farm = Farm::start_with(settings).await;
    let large = "x".repeat(1_000);
    let root = |count: usize| -> Vec<(String, &str)> {
        (0..count)
            .map(|i| (format!("{count}/{i}"), &*large))
            .collect()
    };
    for (count, expected) in [(19, Code::Ok), (30, Code::ResourceExhausted), (5, Code::Ok)] {
        let files = root(count);
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (&**path, *text)).collect();
        let response = farm.shell("true", &files, &[]).await;
        assert_eq!(code(&response), expected, "{}", text(&response));
    }
    // What no root has any more goes before other files do.
    let others: Vec<String> = (0..12).map(|i| format!("{i}{large}")).collect();
    for other in &others {
        let response = farm.shell("true", &[("a", other)], &[]).await;
        assert_eq!(code(&response), Code::Ok);
    }
    let (files, bytes) = farm.cache.usage();
    assert!(files >= 12 && bytes <= limits.bytes, "{files} {bytes}");
}
