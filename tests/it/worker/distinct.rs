//! Every file of an input root is a file of its own, whatever else has its content, and whatever
//! roots came before.

use std::{fs, path::Path, sync::Arc};

use bb_remote_execution::{
    config::worker::Inputs,
    worker::input_root::{InputRoot, Roots},
};

use super::tamper::{Entries, Entry, change, compare_root, content, grow, key, tree_of};
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
    let roots = Roots::open(&place.join("build"), cache.clone(), 2).unwrap();
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
        let planned = roots.plan(&tree, inputs).unwrap();
        let root = roots.prepare(planned, &Default::default()).unwrap();
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
        eprintln!("skipped: only root can mount file systems");
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
