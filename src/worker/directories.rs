//! Directory messages: fetched level by level, parsed once, kept in memory, put together to the
//! tree that an input root is laid out from.
//!
//! 1. A `Directory` is well formed: every name is one path component and occurs once; each list is
//!    in the order of the names.
//! 2. A Directory is fetched once, however many actions ask for it at the same time.
//! 3. A walk stops at every subtree that is in memory as a whole, so that its cost follows what is
//!    new in a root.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use prost::Message;
use tokio_util::sync::CancellationToken;

use super::{
    cache::Key,
    fault::Fault,
    lru::Lru,
    tree::{self, Node, Tree},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    path::Component,
    proto::reapi,
    storage::{self, remote::Client},
};

/// Directories below one another. A path of more has over 2,000 bytes, half of PATH_MAX.
pub const MAXIMUM_DEPTH: u32 = 1_024;

/// Files, directories and symbolic links of one input root. A few hundred bytes of Directory
/// messages that repeat one another can describe more than any disk holds.
pub const MAXIMUM_ENTRIES: u64 = 2_000_000;

/// What one batch of reads brings into memory; REAPI servers accept 4 MiB.
pub const BATCH_SIZE: u64 = 3 << 20;
pub const BATCH_BLOBS: usize = 1_000;

/// REAPI: Directory.
#[derive(Debug, Default, PartialEq)]
pub struct Directory {
    pub files: Vec<File>,
    pub directories: Vec<(Component, Digest)>,
    pub symlinks: Vec<(Component, Box<str>)>,
}

#[derive(Debug, PartialEq)]
pub struct File {
    pub name: Component,
    pub key: Key,
}

impl Directory {
    /// The text says what is wrong, and reads as a sentence after the Directory's name.
    pub fn parse(digest: &Digest, data: &[u8]) -> Result<Self, String> {
        let message = reapi::Directory::decode(data)
            .map_err(|error| format!("it is no Directory message: {error}"))?;
        let name = |name: &str| Component::parse(name).map_err(|error| error.to_string());
        let child = |name: &str, child: Option<&reapi::Digest>| {
            Digest::parse_required(Some(digest.function()), child)
                .map_err(|error| format!("the digest of its entry {name:?} is wrong: {error}"))
        };
        let mut directory = Directory::default();
        directory.files.reserve_exact(message.files.len());
        for file in &message.files {
            directory.files.push(File {
                name: name(&file.name)?,
                key: Key {
                    digest: child(&file.name, file.digest.as_ref())?,
                    executable: file.is_executable,
                },
            });
        }
        directory
            .directories
            .reserve_exact(message.directories.len());
        for entry in &message.directories {
            directory.directories.push((
                name(&entry.name)?,
                child(&entry.name, entry.digest.as_ref())?,
            ));
        }
        for symlink in &message.symlinks {
            if symlink.target.is_empty()
                || symlink.target.len() > 4095
                || symlink.target.contains('\0')
            {
                return Err(format!(
                    "the target of its symbolic link {:?} is empty, longer than 4095 bytes, or has a NUL character",
                    symlink.name
                ));
            }
            directory
                .symlinks
                .push((name(&symlink.name)?, symlink.target.as_str().into()));
        }
        directory.sort();
        // Twice is ambiguous.
        let mut names: Vec<&str> = directory.names().collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("it has two entries with the name {:?}", pair[0])),
            None => Ok(directory),
        }
    }

    /// REAPI wants the lists sorted; comparing two directories relies on it.
    pub fn sort(&mut self) {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
        self.directories.sort_by(|a, b| a.0.cmp(&b.0));
        self.symlinks.sort_by(|a, b| a.0.cmp(&b.0));
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let files = self.files.iter().map(|file| &file.name);
        let directories = self.directories.iter().map(|(name, _)| name);
        let symlinks = self.symlinks.iter().map(|(name, _)| name);
        files.chain(directories).chain(symlinks).map(|n| n.as_str())
    }

    /// Of its names, each with so many bytes beside it.
    pub fn size_on_disk(&self, beside_a_name: u64) -> u64 {
        self.names()
            .fold(0, |sum, name| sum + name.len() as u64 + beside_a_name)
    }

    pub fn entries(&self) -> u64 {
        (self.files.len() + self.directories.len() + self.symlinks.len()) as u64
    }

    /// Bytes in memory, roughly.
    fn weight(&self) -> u64 {
        let fixed = size_of::<Self>()
            + self.files.len() * size_of::<File>()
            + self.directories.len() * size_of::<(Component, Digest)>()
            + self.symlinks.len() * size_of::<(Component, Box<str>)>();
        let names: usize = self.names().map(|name| name.len() + 16).sum();
        let targets: usize = self.symlinks.iter().map(|(_, target)| target.len()).sum();
        (fixed + names + targets + 128) as u64
    }
}

/// What a walk through the storage brought.
pub struct Walk {
    /// The tree, when nothing is missing.
    pub tree: Option<Tree>,
    /// Directories that the storage lacks.
    pub missing: Vec<Digest>,
    /// What was read beside the root.
    pub beside: Result<Bytes, storage::Error>,
    found: HashMap<Digest, Arc<Directory>>,
    known: HashMap<Digest, Tree>,
}

impl Walk {
    /// Every file of every directory that was found. Takes as long as the root is large.
    pub fn files(&self) -> Vec<Key> {
        let mut files: Vec<Key> = self.known.values().flat_map(|tree| tree.files()).collect();
        let found = self.found.values();
        files.extend(found.flat_map(|directory| directory.files.iter().map(|file| file.key)));
        files
    }
}

/// Fetches Directories, and keeps those last used.
pub struct Directories {
    storage: Client,
    /// Of one message, in bytes.
    message_limit: u64,
    /// Of what is kept, and of what one input root may have.
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    kept: Lru<Digest, Arc<Directory>>,
    /// Subtrees that somebody holds as a whole: input roots that are kept on disk do.
    trees: HashMap<Digest, Weak<Node>>,
    /// From so many on the dead ones are looked for.
    trees_limit: usize,
    fetching: HashMap<Digest, CancellationToken>,
}

impl State {
    fn remember(&mut self, trees: Vec<Tree>) {
        for tree in trees {
            self.trees.insert(tree.digest, Arc::downgrade(&tree));
        }
        if self.trees.len() > self.trees_limit {
            self.trees.retain(|_, tree| tree.strong_count() > 0);
            self.trees_limit = self.trees.len() * 2 + 10_000;
        }
    }
}

/// Digests that we fetch; others wait for us.
struct Claim<'a> {
    directories: &'a Directories,
    digests: Vec<Digest>,
    done: CancellationToken,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.directories.state.lock();
        for digest in &self.digests {
            state.fetching.remove(digest);
        }
        drop(state);
        self.done.cancel();
    }
}

impl Directories {
    pub fn new(storage: Client, message_limit: u64, limit: u64) -> Self {
        Directories {
            storage,
            message_limit,
            limit,
            state: Mutex::default(),
        }
    }

    /// Reads everything reachable from `root`, and in the same batch as the root the blob `beside`.
    pub async fn walk(
        &self,
        instance: &InstanceName,
        root: Digest,
        beside: Digest,
    ) -> Result<Walk, Fault> {
        let mut found: HashMap<Digest, Arc<Directory>> = HashMap::new();
        let mut known: HashMap<Digest, Tree> = HashMap::new();
        let mut missing = HashSet::new();
        let mut size = 0_u64;
        let mut level = vec![root];
        let beside_digest = beside;
        let mut beside = Some(beside);
        let mut read_beside = None;
        while !level.is_empty() {
            for digest in &level {
                size = size.saturating_add(digest.size());
            }
            if size > self.limit {
                return Err(Fault::Invalid(format!(
                    "the Directory messages of the input root have more than the {} bytes that cache.maximum_directories_size of this worker allows",
                    self.limit
                )));
            }
            let mut wanted = level.clone();
            while !wanted.is_empty() || beside.is_some() {
                let (claim, waiting) =
                    self.claim(std::mem::take(&mut wanted), &mut found, &mut known);
                let mut digests = claim.digests.clone();
                let first = beside.take();
                digests.extend(first);
                let mut batches = stream::iter(batches(digests, |digest| digest.size()))
                    .map(|batch| async move {
                        let read = self.storage.read_many(instance, &batch, self.message_limit);
                        (read.await, batch)
                    })
                    .buffer_unordered(4);
                while let Some((results, batch)) = batches.next().await {
                    for (digest, result) in batch.into_iter().zip(results) {
                        if first == Some(digest) && read_beside.is_none() {
                            read_beside = Some(result.clone());
                            if !claim.digests.contains(&digest) {
                                continue;
                            }
                        }
                        match result {
                            Ok(data) => {
                                let directory = self.keep(digest, &data)?;
                                found.insert(digest, directory);
                            }
                            Err(storage::Error::Missing(_)) => {
                                missing.insert(digest);
                            }
                            Err(error) => {
                                let what = format!("read directory {digest} of the input root");
                                return Err(Fault::of_storage(what, error));
                            }
                        }
                    }
                }
                drop(batches);
                drop(claim);
                for (digest, done) in waiting {
                    done.cancelled().await;
                    wanted.push(digest);
                }
            }
            let mut next = Vec::new();
            let mut seen = HashSet::new();
            for directory in level.iter().filter_map(|digest| found.get(digest)) {
                for (_, child) in &directory.directories {
                    if !found.contains_key(child)
                        && !known.contains_key(child)
                        && !missing.contains(child)
                        && seen.insert(*child)
                    {
                        next.push(*child);
                    }
                }
            }
            level = next;
        }
        let mut missing: Vec<Digest> = missing.into_iter().collect();
        missing.sort_unstable();
        let tree = match missing.is_empty() {
            true => Some(self.build(root, &found, &known)?),
            false => None,
        };
        Ok(Walk {
            tree,
            missing,
            beside: match read_beside {
                Some(result) => result,
                None => Err(storage::Error::Internal(format!(
                    "storage gave no answer about blob {beside_digest}"
                ))),
            },
            found,
            known,
        })
    }

    fn build(
        &self,
        root: Digest,
        found: &HashMap<Digest, Arc<Directory>>,
        known: &HashMap<Digest, Tree>,
    ) -> Result<Tree, Fault> {
        let (tree, new) = tree::build(root, found, known)?;
        if tree.entries > MAXIMUM_ENTRIES {
            return Err(Fault::Invalid(format!(
                "the input root has {} files, directories and symbolic links, more than the {MAXIMUM_ENTRIES} that are laid out",
                match tree.entries {
                    u64::MAX => "over 10^19".to_owned(),
                    entries => entries.to_string(),
                },
            )));
        }
        self.state.lock().remember(new);
        Ok(tree)
    }

    /// Sorts digests into those that are here, those that are ours to fetch, and those that
    /// others are fetching.
    fn claim(
        &self,
        wanted: Vec<Digest>,
        found: &mut HashMap<Digest, Arc<Directory>>,
        known: &mut HashMap<Digest, Tree>,
    ) -> (Claim<'_>, Vec<(Digest, CancellationToken)>) {
        let done = CancellationToken::new();
        let mut digests = Vec::new();
        let mut waiting = Vec::new();
        let mut state = self.state.lock();
        for digest in wanted {
            if digest.is_empty_blob() {
                found.insert(digest, Arc::default());
            } else if let Some(tree) = state.trees.get(&digest).and_then(Weak::upgrade) {
                known.insert(digest, tree);
            } else if let Some(directory) = state.kept.get(&digest) {
                found.insert(digest, directory.clone());
            } else if let Some(other) = state.fetching.get(&digest) {
                waiting.push((digest, other.clone()));
            } else {
                state.fetching.insert(digest, done.clone());
                digests.push(digest);
            }
        }
        drop(state);
        let claim = Claim {
            directories: self,
            digests,
            done,
        };
        (claim, waiting)
    }

    fn keep(&self, digest: Digest, data: &[u8]) -> Result<Arc<Directory>, Fault> {
        let directory = Directory::parse(&digest, data).map_err(|reason| {
            Fault::Invalid(format!(
                "directory {digest} of the input root is wrong: {reason}"
            ))
        })?;
        let directory = Arc::new(directory);
        let mut state = self.state.lock();
        state
            .kept
            .insert(digest, directory.clone(), directory.weight());
        let evicted = state.kept.evict(|weight, _| weight > self.limit);
        drop(state);
        drop(evicted);
        Ok(directory)
    }
}

/// Groups that can each be read into memory by one call.
pub fn batches<T>(items: Vec<T>, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut batches = Vec::new();
    let mut batch = Vec::new();
    let mut bytes = 0_u64;
    for item in items {
        let more = size(&item);
        if !batch.is_empty() && (bytes + more > BATCH_SIZE || batch.len() == BATCH_BLOBS) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes = bytes.saturating_add(more);
        batch.push(item);
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}
