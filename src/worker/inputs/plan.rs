//! PURE: how a directory tree becomes another one: what is unlinked, stashed, brought back, made.
//!
//! 1. Equal digests are equal subtrees: nothing below them is looked at.
//! 2. A plan is exact: it never makes what is there, and leaves nothing that is not wanted.
//! 3. All removals come before the first addition, so that a name is free when it is needed, and a
//!    subtree that goes from one place can come to another.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use super::{
    file_cache::FileKey,
    merkle_tree::{Node, Tree},
};
use crate::{digest::Digest, path::Component};

/// Costs, in units of about 4 microseconds.
const LINK: u64 = 2;
const UNLINK: u64 = 1;
const SYMLINK: u64 = 3;
const MAKE: u64 = 6;
const MOVE: u64 = 3;

/// Where an entry of the wanted directory comes from: it is there, at this index, or it is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntrySource {
    Unchanged(u32),
    New,
}

/// Where a subdirectory of the wanted directory comes from.
#[derive(Debug)]
pub enum Child {
    Unchanged(u32),
    Rewritten(u32, Box<Rewrite>),
    New(Origin),
}

/// Where a whole subtree comes from that was not in this place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the stash: which of `LayOutPlan::taken`.
    Stashed(u32),
    /// From elsewhere in the root: its number among what is removed.
    Moved(u32),
    /// Which of `LayOutPlan::made`.
    NewDirectory(u32),
}

/// A directory that stays, with other entries.
#[derive(Debug)]
pub struct Rewrite {
    pub node: Tree,
    /// For each file of `node`; likewise the others.
    pub files: Vec<EntrySource>,
    pub symlinks: Vec<EntrySource>,
    pub children: Vec<Child>,
    /// Indices of what is there and not wanted.
    pub dropped_files: Vec<u32>,
    pub dropped_symlinks: Vec<u32>,
    pub dropped_children: Vec<DroppedSubtree>,
    /// Which of `LayOutPlan::links` is the first that is new in this directory.
    pub first_link: usize,
    cost: u64,
}

#[derive(Debug)]
pub struct DroppedSubtree {
    pub child: u32,
    /// Among all that are dropped.
    pub number: u32,
}

/// A directory that is made.
#[derive(Debug)]
pub struct NewDirectory {
    pub node: Tree,
    /// Which of `LayOutPlan::links` is the first in this directory.
    pub first_link: usize,
    /// For each directory in it.
    pub children: Vec<Origin>,
}

#[derive(Debug)]
pub struct LayOutPlan<P> {
    /// `None` when the root is as wanted.
    pub rewrite: Option<Rewrite>,
    pub made: Vec<NewDirectory>,
    pub taken: Vec<P>,
    /// How many subtrees are dropped.
    pub dropped: u32,
    /// The numbers of those that come to other places.
    pub moved: Vec<u32>,
    /// The files that are linked, with repetitions; empty ones are made of nothing.
    pub links: Vec<FileKey>,
}

/// How `old` becomes `new`; `None` when they are equal. `has` tells whether a subtree is stashed.
pub(super) fn compare(old: &Tree, new: &Tree, has: &dyn Fn(&Digest) -> bool) -> Option<Rewrite> {
    (old.digest != new.digest).then(|| diff(old, new, has))
}

/// Settles where everything comes from; `take` takes a stashed subtree.
pub(super) fn resolve<P>(
    old: &Tree,
    mut rewrite: Option<Rewrite>,
    take: &mut dyn FnMut(&Digest) -> Option<P>,
) -> LayOutPlan<P> {
    let mut resolver = Resolver::new(take);
    if let Some(rewrite) = &mut rewrite {
        resolver.number(old, rewrite);
        resolver.resolve(rewrite);
    }
    let mut plan = resolver.plan;
    plan.rewrite = rewrite;
    plan
}

/// Walks two lists that are in the order of their names.
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

/// Which entries stay, and which are dropped; `same` compares two of one name.
fn sources<T>(
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

fn added(sources: &[EntrySource]) -> u64 {
    sources
        .iter()
        .filter(|source| **source == EntrySource::New)
        .count() as u64
}

fn fresh_cost(node: &Node) -> u64 {
    node.entries
        .saturating_mul(LINK)
        .saturating_add(node.directories.saturating_mul(MAKE))
}

fn diff(old: &Node, new: &Tree, has: &dyn Fn(&Digest) -> bool) -> Rewrite {
    let (a, b) = (&old.directory, &new.directory);
    let (files, dropped_files) =
        sources(&a.files, &b.files, |file| &file.name, |a, b| a.key == b.key);
    let (symlinks, dropped_symlinks) =
        sources(&a.symlinks, &b.symlinks, |link| &link.0, |a, b| a.1 == b.1);
    let mut cost = added(&files) * LINK
        + added(&symlinks) * SYMLINK
        + (dropped_files.len() + dropped_symlinks.len()) as u64 * UNLINK;
    let mut children = Vec::with_capacity(b.directories.len());
    let mut dropped_children = Vec::new();
    let mut drop_child = |i: usize| {
        dropped_children.push(DroppedSubtree {
            child: i as u32,
            number: 0,
        });
    };
    // Settled later, when it is known what is dropped elsewhere.
    let undecided = || Child::New(Origin::NewDirectory(u32::MAX));
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
                    cost = cost.saturating_add(match has(&new.children[j].digest) {
                        true => MOVE,
                        false => fresh_cost(&new.children[j]),
                    });
                    return children.push(undecided());
                }
                (None, None) => return,
            };
            let (before, after) = (&old.children[i], &new.children[j]);
            if before.digest == after.digest {
                return children.push(Child::Unchanged(i as u32));
            }
            let replaced = MOVE.saturating_add(match has(&after.digest) {
                true => MOVE,
                false => fresh_cost(after),
            });
            let rewrite = diff(before, after, has);
            if rewrite.cost < replaced {
                cost = cost.saturating_add(rewrite.cost);
                children.push(Child::Rewritten(i as u32, Box::new(rewrite)));
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
        first_link: 0,
        cost,
    }
}

struct Resolver<'a, P> {
    take: &'a mut dyn FnMut(&Digest) -> Option<P>,
    /// Numbers of dropped subtrees that nobody has asked for yet.
    movable: BTreeMap<Digest, Vec<u32>>,
    plan: LayOutPlan<P>,
}

impl<'a, P> Resolver<'a, P> {
    fn new(take: &'a mut dyn FnMut(&Digest) -> Option<P>) -> Self {
        Resolver {
            take,
            movable: BTreeMap::new(),
            plan: LayOutPlan {
                rewrite: None,
                made: Vec::new(),
                taken: Vec::new(),
                dropped: 0,
                moved: Vec::new(),
                links: Vec::new(),
            },
        }
    }

    fn number(&mut self, old: &Node, rewrite: &mut Rewrite) {
        for dropped in &mut rewrite.dropped_children {
            dropped.number = self.plan.dropped;
            self.plan.dropped += 1;
            let node = &old.children[dropped.child as usize];
            if node.entries > 0 {
                self.movable
                    .entry(node.digest)
                    .or_default()
                    .push(dropped.number);
            }
        }
        for child in &mut rewrite.children {
            if let Child::Rewritten(i, rewrite) = child {
                self.number(&old.children[*i as usize], rewrite);
            }
        }
    }

    fn resolve(&mut self, rewrite: &mut Rewrite) {
        let files = rewrite.node.directory.files.iter().zip(&rewrite.files);
        let new = files.filter(|(_, source)| **source == EntrySource::New);
        rewrite.first_link = self.plan.links.len();
        self.link(new.map(|(file, _)| file.key));
        let node = rewrite.node.clone();
        for (child, node) in rewrite.children.iter_mut().zip(&node.children) {
            match child {
                Child::Unchanged(_) => {}
                Child::Rewritten(_, rewrite) => self.resolve(rewrite),
                Child::New(origin) => *origin = self.origin(node),
            }
        }
    }

    fn link(&mut self, files: impl Iterator<Item = FileKey>) {
        let links = &mut self.plan.links;
        links.extend(files.filter(|key| key.digest.size() > 0));
    }

    fn origin(&mut self, node: &Tree) -> Origin {
        if node.entries > 0 {
            if let Some(number) = self.movable.get_mut(&node.digest).and_then(Vec::pop) {
                self.plan.moved.push(number);
                return Origin::Moved(number);
            }
            if let Some(stashed) = (self.take)(&node.digest) {
                self.plan.taken.push(stashed);
                return Origin::Stashed(self.plan.taken.len() as u32 - 1);
            }
        }
        let at = self.plan.made.len();
        self.plan.made.push(NewDirectory {
            node: node.clone(),
            first_link: self.plan.links.len(),
            children: Vec::new(),
        });
        self.link(node.directory.files.iter().map(|file| file.key));
        let children = node
            .children
            .iter()
            .map(|child| self.origin(child))
            .collect();
        self.plan.made[at].children = children;
        Origin::NewDirectory(at as u32)
    }
}

/// A plan to make all of `node` from nothing: the first directory is it.
pub(super) fn fresh<P>(node: &Tree) -> LayOutPlan<P> {
    let mut nothing = |_: &Digest| None;
    let mut resolver = Resolver::new(&mut nothing);
    resolver.origin(node);
    resolver.plan
}

/// How many entries two trees share in the same places, looking at no more than `budget` directories.
pub(super) fn shared(old: &Tree, new: &Tree, budget: &mut u32) -> u64 {
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
                sum += shared(&old.children[i], &new.children[j], budget);
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
                self.dropped[dropped.number as usize] = Some(child);
            }
            for child in &rewrite.children {
                if let Child::Rewritten(i, rewrite) = child {
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
                    Child::Unchanged(i) => {
                        assert_eq!(&a.directories[*i as usize].0, name);
                        assert_eq!(old.children[*i as usize].digest, wanted.digest);
                    }
                    Child::Rewritten(i, below) => {
                        assert_eq!(&a.directories[*i as usize].0, name);
                        assert_eq!(below.node.digest, wanted.digest);
                        self.check(&old.children[*i as usize], below);
                    }
                    Child::New(origin) => self.check_origin(*origin, wanted),
                }
            }
        }

        fn check_origin(&mut self, origin: Origin, wanted: &Tree) {
            match origin {
                Origin::Stashed(i) => {
                    assert_eq!(self.plan.taken[i as usize].digest, wanted.digest);
                }
                Origin::Moved(i) => {
                    assert!(self.plan.moved.contains(&i));
                    let moved = self.dropped[i as usize].take().expect("moved once");
                    assert_eq!(moved.digest, wanted.digest);
                }
                Origin::NewDirectory(i) => {
                    let made = &self.plan.made[i as usize];
                    assert_eq!(made.node.digest, wanted.digest);
                    for (origin, wanted) in made.children.iter().zip(&wanted.children) {
                        self.check_origin(*origin, wanted);
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
            let has = |digest: &Digest| pool.children.iter().any(|tree| tree.digest == *digest);
            let rewrite = compare(&old, &new, &has);
            prop_assert_eq!(rewrite.is_none(), old.digest == new.digest);
            let plan = resolve(&old, rewrite, &mut |digest| {
                let at = stashed.iter().position(|tree| tree.digest == *digest)?;
                Some(stashed.remove(at))
            });
            if let Some(rewrite) = &plan.rewrite {
                prop_assert_eq!(rewrite.node.digest, new.digest);
                let dropped = vec![None; plan.dropped as usize];
                let mut performed = Performed { plan: &plan, dropped };
                performed.drop_all(&old, rewrite);
                performed.check(&old, rewrite);
            }
        }
    }
}
