//! PURE: how a directory tree becomes another one: what is unlinked, stashed, unstashed, moved and made.
//!
//! 1. Equal digests are equal subtrees: nothing below them is looked at.
//! 2. A plan is exact: it leaves nothing that is not wanted, and makes what is there only where a directory is
//!    cheaper made anew as a whole than turned into the wanted one.
//! 3. All removals come before the first addition, so that a name is free when it is needed, and a
//!    subtree that goes from one place can come to another.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use super::{
    file_cache::FileKey,
    merkle_tree::{Node, Tree},
};
use crate::{digest::Digest, path::Component};

// What each costs, in units of about 4 microseconds.
const CREATE_FILE: u64 = 2;
const UNLINK: u64 = 1;
const CREATE_SYMLINK: u64 = 3;
const MAKE_DIRECTORY: u64 = 6;
const MOVE: u64 = 3;

/// Where a file or symbolic link of the wanted directory comes from: it is there, at this index, or it is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntrySource {
    Unchanged(u32),
    New,
}

/// Where a subdirectory of the wanted directory comes from.
#[derive(Debug)]
pub enum DirectorySource {
    Unchanged(u32),
    Rewritten(u32, Box<Rewrite>),
    New(SubtreeSource),
}

/// Where a whole subtree comes from that was not in this place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubtreeSource {
    /// From the stash: an index of `LayOutPlan::unstashed`.
    Stashed(u32),
    /// From elsewhere in the root: a `DroppedSubtree::dropped_index`.
    Moved(u32),
    /// Made from empty: an index of `LayOutPlan::new_directories`.
    NewDirectory(u32),
}

/// What becomes of a directory that stays, and is to have other entries.
#[derive(Debug)]
pub struct Rewrite {
    pub node: Tree,
    /// One for each file of `node`; likewise for symbolic links and directories.
    pub files: Vec<EntrySource>,
    pub symlinks: Vec<EntrySource>,
    pub children: Vec<DirectorySource>,
    /// The indices of files that are there and not wanted; likewise for symbolic links and directories.
    pub dropped_files: Vec<u32>,
    pub dropped_symlinks: Vec<u32>,
    pub dropped_children: Vec<DroppedSubtree>,
    /// The index in `LayOutPlan::files_to_create` of the first file that is new in this directory.
    pub first_file: usize,
    cost: u64,
}

/// A subdirectory that is there and not wanted.
#[derive(Debug)]
pub struct DroppedSubtree {
    /// Which child of its directory it is.
    pub child: u32,
    /// Which of all the subtrees that the plan drops it is.
    pub dropped_index: u32,
}

/// A directory that is to be made.
#[derive(Debug)]
pub struct NewDirectory {
    pub node: Tree,
    /// The index in `LayOutPlan::files_to_create` of the first file in this directory.
    pub first_file: usize,
    /// One for each child of `node`.
    pub children: Vec<SubtreeSource>,
}

/// All that must be done to a directory tree so that it becomes another one.
#[derive(Debug)]
pub struct LayOutPlan<P> {
    /// What becomes of the root directory; `None` when the whole tree is as wanted.
    pub rewrite: Option<Rewrite>,
    pub new_directories: Vec<NewDirectory>,
    /// Subtrees that were taken out of the stash for this plan.
    pub unstashed: Vec<P>,
    /// How many subtrees are dropped.
    pub dropped_count: u32,
    /// The `DroppedSubtree::dropped_index` of each that comes to another place in the tree.
    pub moved: Vec<u32>,
    /// The files that are created from cached ones, with repetitions; empty ones are made of nothing.
    pub files_to_create: Vec<FileKey>,
}

/// How `old` becomes `new`; `None` when they are equal. `is_stashed` tells whether the stash has a subtree.
pub(super) fn compare(
    old: &Tree,
    new: &Tree,
    is_stashed: &dyn Fn(&Digest) -> bool,
) -> Option<Rewrite> {
    (old.digest != new.digest).then(|| diff(old, new, is_stashed))
}

/// Settles where everything comes from that `rewrite` wants; `take_stashed` takes a subtree out of the stash.
pub(super) fn resolve<P>(
    old: &Tree,
    mut rewrite: Option<Rewrite>,
    take_stashed: &mut dyn FnMut(&Digest) -> Option<P>,
) -> LayOutPlan<P> {
    let mut resolver = Resolver::new(take_stashed);
    if let Some(rewrite) = &mut rewrite {
        resolver.assign_dropped_indices(old, rewrite);
        resolver.resolve(rewrite);
    }
    let mut plan = resolver.plan;
    plan.rewrite = rewrite;
    plan
}

/// Walks two lists that are in the order of their names; calls `each` with the indices of entries of the same name.
fn merge<T>(
    old: &[T],
    new: &[T],
    name: impl Fn(&T) -> &Component,
    mut each: impl FnMut(Option<usize>, Option<usize>),
) {
    let (mut i, mut j) = (0, 0);
    loop {
        match (old.get(i), new.get(j)) {
            (None, None) => return,
            (Some(_), None) => {
                each(Some(i), None);
                i += 1;
            }
            (None, Some(_)) => {
                each(None, Some(j));
                j += 1;
            }
            (Some(a), Some(b)) => {
                let order = name(a).cmp(name(b));
                each(
                    (order != Ordering::Greater).then_some(i),
                    (order != Ordering::Less).then_some(j),
                );
                i += usize::from(order != Ordering::Greater);
                j += usize::from(order != Ordering::Less);
            }
        }
    }
}

/// Where each entry of `new` comes from, and which of `old` are dropped; `same` compares two of one name.
fn entry_sources<T>(
    old: &[T],
    new: &[T],
    name: impl Fn(&T) -> &Component,
    same: impl Fn(&T, &T) -> bool,
) -> (Vec<EntrySource>, Vec<u32>) {
    let mut sources = Vec::with_capacity(new.len());
    let mut dropped = Vec::new();
    merge(old, new, name, |i, j| match (i, j) {
        (Some(i), Some(j)) if same(&old[i], &new[j]) => {
            sources.push(EntrySource::Unchanged(i as u32))
        }
        (i, j) => {
            dropped.extend(i.map(|i| i as u32));
            sources.extend(j.map(|_| EntrySource::New));
        }
    });
    (sources, dropped)
}

fn new_entries(sources: &[EntrySource]) -> u64 {
    sources
        .iter()
        .filter(|source| **source == EntrySource::New)
        .count() as u64
}

fn cost_from_empty(node: &Node) -> u64 {
    node.entries
        .saturating_mul(CREATE_FILE)
        .saturating_add(node.directories.saturating_mul(MAKE_DIRECTORY))
}

fn diff(old: &Node, new: &Tree, is_stashed: &dyn Fn(&Digest) -> bool) -> Rewrite {
    let (a, b) = (&old.directory, &new.directory);
    let (files, dropped_files) =
        entry_sources(&a.files, &b.files, |file| &file.name, |a, b| a.key == b.key);
    let (symlinks, dropped_symlinks) =
        entry_sources(&a.symlinks, &b.symlinks, |link| &link.0, |a, b| a.1 == b.1);
    let mut cost = new_entries(&files) * CREATE_FILE
        + new_entries(&symlinks) * CREATE_SYMLINK
        + (dropped_files.len() + dropped_symlinks.len()) as u64 * UNLINK;
    let mut children = Vec::with_capacity(b.directories.len());
    let mut dropped_children = Vec::new();
    let mut drop_child = |i: usize| {
        dropped_children.push(DroppedSubtree {
            child: i as u32,
            dropped_index: 0,
        });
    };
    // Settled later, when it is known what is dropped elsewhere.
    let undecided = || DirectorySource::New(SubtreeSource::NewDirectory(u32::MAX));
    merge(
        &a.directories,
        &b.directories,
        |entry| &entry.0,
        |i, j| {
            let (i, j) = match (i, j) {
                (Some(i), Some(j)) => (i, j),
                (Some(i), None) => {
                    cost += MOVE;
                    return drop_child(i);
                }
                (None, Some(j)) => {
                    cost = cost.saturating_add(match is_stashed(&new.children[j].digest) {
                        true => MOVE,
                        false => cost_from_empty(&new.children[j]),
                    });
                    return children.push(undecided());
                }
                (None, None) => return,
            };
            let (before, after) = (&old.children[i], &new.children[j]);
            if before.digest == after.digest {
                return children.push(DirectorySource::Unchanged(i as u32));
            }
            let replaced = MOVE.saturating_add(match is_stashed(&after.digest) {
                true => MOVE,
                false => cost_from_empty(after),
            });
            let rewrite = diff(before, after, is_stashed);
            if rewrite.cost < replaced {
                cost = cost.saturating_add(rewrite.cost);
                children.push(DirectorySource::Rewritten(i as u32, Box::new(rewrite)));
            } else {
                cost = cost.saturating_add(replaced);
                drop_child(i);
                children.push(undecided());
            }
        },
    );
    Rewrite {
        node: new.clone(),
        files,
        symlinks,
        children,
        dropped_files,
        dropped_symlinks,
        dropped_children,
        first_file: 0,
        cost,
    }
}

struct Resolver<'a, P> {
    take_stashed: &'a mut dyn FnMut(&Digest) -> Option<P>,
    /// The `dropped_index` of each dropped subtree that has no new place yet.
    movable: BTreeMap<Digest, Vec<u32>>,
    plan: LayOutPlan<P>,
}

impl<'a, P> Resolver<'a, P> {
    fn new(take_stashed: &'a mut dyn FnMut(&Digest) -> Option<P>) -> Self {
        Resolver {
            take_stashed,
            movable: BTreeMap::new(),
            plan: LayOutPlan {
                rewrite: None,
                new_directories: Vec::new(),
                unstashed: Vec::new(),
                dropped_count: 0,
                moved: Vec::new(),
                files_to_create: Vec::new(),
            },
        }
    }

    fn assign_dropped_indices(&mut self, old: &Node, rewrite: &mut Rewrite) {
        for dropped in &mut rewrite.dropped_children {
            dropped.dropped_index = self.plan.dropped_count;
            self.plan.dropped_count += 1;
            let node = &old.children[dropped.child as usize];
            if node.entries > 0 {
                self.movable
                    .entry(node.digest)
                    .or_default()
                    .push(dropped.dropped_index);
            }
        }
        for child in &mut rewrite.children {
            if let DirectorySource::Rewritten(i, rewrite) = child {
                self.assign_dropped_indices(&old.children[*i as usize], rewrite);
            }
        }
    }

    fn resolve(&mut self, rewrite: &mut Rewrite) {
        let files = rewrite.node.directory.files.iter().zip(&rewrite.files);
        let new = files.filter(|(_, source)| **source == EntrySource::New);
        rewrite.first_file = self.plan.files_to_create.len();
        self.add_files(new.map(|(file, _)| file.key));
        let node = rewrite.node.clone();
        for (child, node) in rewrite.children.iter_mut().zip(&node.children) {
            match child {
                DirectorySource::Unchanged(_) => {}
                DirectorySource::Rewritten(_, rewrite) => self.resolve(rewrite),
                DirectorySource::New(source) => *source = self.subtree_source(node),
            }
        }
    }

    fn add_files(&mut self, files: impl Iterator<Item = FileKey>) {
        let files_to_create = &mut self.plan.files_to_create;
        files_to_create.extend(files.filter(|key| key.digest.size() > 0));
    }

    fn subtree_source(&mut self, node: &Tree) -> SubtreeSource {
        if node.entries > 0 {
            if let Some(dropped_index) = self.movable.get_mut(&node.digest).and_then(Vec::pop) {
                self.plan.moved.push(dropped_index);
                return SubtreeSource::Moved(dropped_index);
            }
            if let Some(stashed) = (self.take_stashed)(&node.digest) {
                self.plan.unstashed.push(stashed);
                return SubtreeSource::Stashed(self.plan.unstashed.len() as u32 - 1);
            }
        }
        let directory_index = self.plan.new_directories.len();
        self.plan.new_directories.push(NewDirectory {
            node: node.clone(),
            first_file: self.plan.files_to_create.len(),
            children: Vec::new(),
        });
        self.add_files(node.directory.files.iter().map(|file| file.key));
        let children = node
            .children
            .iter()
            .map(|child| self.subtree_source(child))
            .collect();
        self.plan.new_directories[directory_index].children = children;
        SubtreeSource::NewDirectory(directory_index as u32)
    }
}

/// A plan to make all of `node` where nothing is: the first of `new_directories` is its directory.
pub(super) fn plan_from_empty<P>(node: &Tree) -> LayOutPlan<P> {
    let mut nothing = |_: &Digest| None;
    let mut resolver = Resolver::new(&mut nothing);
    resolver.subtree_source(node);
    resolver.plan
}

/// How many entries two trees have in common in the same places, as far as a look at `budget` directories tells.
pub(super) fn shared_entries(old: &Tree, new: &Tree, budget: &mut u32) -> u64 {
    if Arc::ptr_eq(old, new) || old.digest == new.digest {
        return new.entries + 1;
    }
    if *budget == 0 {
        return 0;
    }
    *budget -= 1;
    let mut sum = 0;
    let (a, b) = (&old.directory, &new.directory);
    merge(
        &a.directories,
        &b.directories,
        |entry| &entry.0,
        |i, j| {
            if let (Some(i), Some(j)) = (i, j) {
                sum += shared_entries(&old.children[i], &new.children[j], budget);
            }
        },
    );
    if a.files.len() + b.files.len() <= 1_000 {
        merge(
            &a.files,
            &b.files,
            |file| &file.name,
            |i, j| {
                if let (Some(i), Some(j)) = (i, j) {
                    sum += u64::from(a.files[i].key == b.files[j].key);
                }
            },
        );
    }
    sum
}

#[cfg(test)]
#[expect(
    clippy::disallowed_types,
    reason = "a walk's result is what a tree is built from"
)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::{
        directory_message::{Directory, FileEntry},
        merkle_tree,
    };
    use super::*;
    use crate::digest::DigestFunction;

    #[derive(Clone, Debug)]
    enum TestEntry {
        File(u8),
        Link(u8),
        Directory(BTreeMap<u8, TestEntry>),
    }

    fn entries() -> impl Strategy<Value = BTreeMap<u8, TestEntry>> {
        let leaf = prop_oneof![
            (0..4u8).prop_map(TestEntry::File),
            (0..2u8).prop_map(TestEntry::Link)
        ];
        let entry = leaf.prop_recursive(4, 40, 6, |below| {
            prop::collection::btree_map(0..6u8, below, 0..6).prop_map(TestEntry::Directory)
        });
        prop::collection::btree_map(0..6u8, entry, 0..6)
    }

    fn add(
        entries: &BTreeMap<u8, TestEntry>,
        found: &mut HashMap<Digest, Arc<Directory>>,
    ) -> Digest {
        let mut directory = Directory::default();
        for (name, entry) in entries {
            let name = Component::parse(&name.to_string()).unwrap();
            match entry {
                TestEntry::File(content) => directory.files.push(FileEntry {
                    name,
                    key: FileKey {
                        digest: DigestFunction::Sha256.digest_of(&[*content]),
                        executable: false,
                    },
                }),
                TestEntry::Link(target) => {
                    directory.symlinks.push((name, target.to_string().into()))
                }
                TestEntry::Directory(below) => {
                    directory.directories.push((name, add(below, found)))
                }
            }
        }
        let digest = DigestFunction::Sha256.digest_of(format!("{directory:?}").as_bytes());
        found.insert(digest, Arc::new(directory));
        digest
    }

    fn tree_of(entries: &BTreeMap<u8, TestEntry>) -> Tree {
        let mut found = HashMap::new();
        let root = add(entries, &mut found);
        merkle_tree::build(root, &found, &HashMap::new()).unwrap().0
    }

    /// What performing a plan leaves, as digests of whole directories.
    struct Performed<'a> {
        plan: &'a LayOutPlan<Tree>,
        dropped: Vec<Option<Tree>>,
    }

    impl Performed<'_> {
        fn drop_all(&mut self, old: &Tree, rewrite: &Rewrite) {
            for dropped in &rewrite.dropped_children {
                let child = old.children[dropped.child as usize].clone();
                self.dropped[dropped.dropped_index as usize] = Some(child);
            }
            for child in &rewrite.children {
                if let DirectorySource::Rewritten(i, rewrite) = child {
                    self.drop_all(&old.children[*i as usize], rewrite);
                }
            }
        }

        fn check(&mut self, old: &Tree, rewrite: &Rewrite) {
            let (a, b) = (&old.directory, &rewrite.node.directory);
            let mut gone: Vec<u32> = rewrite.dropped_files.clone();
            for (file, source) in b.files.iter().zip(&rewrite.files) {
                if let EntrySource::Unchanged(i) = source {
                    assert_eq!(&a.files[*i as usize], file);
                    gone.push(*i);
                }
            }
            gone.sort_unstable();
            assert_eq!(gone, (0..a.files.len() as u32).collect::<Vec<_>>());
            for (link, source) in b.symlinks.iter().zip(&rewrite.symlinks) {
                if let EntrySource::Unchanged(i) = source {
                    assert_eq!(&a.symlinks[*i as usize], link);
                }
            }
            let places = rewrite.children.iter().zip(&b.directories);
            for ((child, (name, _)), wanted) in places.zip(&rewrite.node.children) {
                match child {
                    DirectorySource::Unchanged(i) => {
                        assert_eq!(&a.directories[*i as usize].0, name);
                        assert_eq!(old.children[*i as usize].digest, wanted.digest);
                    }
                    DirectorySource::Rewritten(i, below) => {
                        assert_eq!(&a.directories[*i as usize].0, name);
                        assert_eq!(below.node.digest, wanted.digest);
                        self.check(&old.children[*i as usize], below);
                    }
                    DirectorySource::New(source) => self.check_source(*source, wanted),
                }
            }
        }

        fn check_source(&mut self, source: SubtreeSource, wanted: &Tree) {
            match source {
                SubtreeSource::Stashed(i) => {
                    assert_eq!(self.plan.unstashed[i as usize].digest, wanted.digest);
                }
                SubtreeSource::Moved(i) => {
                    assert!(self.plan.moved.contains(&i));
                    let moved = self.dropped[i as usize].take().expect("moved once");
                    assert_eq!(moved.digest, wanted.digest);
                }
                SubtreeSource::NewDirectory(i) => {
                    let new_directory = &self.plan.new_directories[i as usize];
                    assert_eq!(new_directory.node.digest, wanted.digest);
                    for (source, wanted) in new_directory.children.iter().zip(&wanted.children) {
                        self.check_source(*source, wanted);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_plan_leads_to_what_is_wanted(old in entries(), new in entries(), pool in entries()) {
            let (old, new, pool) = (tree_of(&old), tree_of(&new), tree_of(&pool));
            let mut stashed: Vec<Tree> = pool.children.to_vec();
            let is_stashed = |digest: &Digest| pool.children.iter().any(|tree| tree.digest == *digest);
            let rewrite = compare(&old, &new, &is_stashed);
            prop_assert_eq!(rewrite.is_none(), old.digest == new.digest);
            let plan = resolve(&old, rewrite, &mut |digest| {
                let at = stashed.iter().position(|tree| tree.digest == *digest)?;
                Some(stashed.remove(at))
            });
            if let Some(rewrite) = &plan.rewrite {
                prop_assert_eq!(rewrite.node.digest, new.digest);
                let dropped = vec![None; plan.dropped_count as usize];
                let mut performed = Performed { plan: &plan, dropped };
                performed.drop_all(&old, rewrite);
                performed.check(&old, rewrite);
            }
        }
    }
}
