//! Fetches Directory messages level by level, parses each once, caches them, and puts them together to the tree that an
//! input root is laid out from.
//!
//! 1. A Directory is fetched once, however many actions ask for it at the same time.
//! 2. A walk stops at every subtree that is in memory as a whole, so that its cost follows what is
//!    new in a root.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;

use super::{
    batches::batches,
    directory_message::{Directory, MAXIMUM_ENTRIES},
    file_cache::FileKey,
    merkle_tree::{self, Node, Tree},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    storage::{
        self, Backend,
        single_flight::{Follower, Leader, Role, SingleFlight},
    },
    worker::{fault::Fault, lru::Lru},
};

/// What a walk from the Directory of an input root brought.
pub struct DirectoryWalk {
    /// The tree, when nothing is missing.
    pub tree: Option<Tree>,
    /// Directories that the storage lacks.
    pub missing: Vec<Digest>,
    /// The blob of the command, which was read beside the Directory of the root.
    pub command_blob: Result<Bytes, storage::Error>,
    /// Directories that were fetched or cached.
    found: HashMap<Digest, Arc<Directory>>,
    /// Subtrees that were in memory as a whole.
    known: HashMap<Digest, Tree>,
}

impl DirectoryWalk {
    /// Every file of every directory that was found. Takes as long as the root is large.
    pub fn files(&self) -> Vec<FileKey> {
        let mut files: Vec<FileKey> = self.known.values().flat_map(|tree| tree.files()).collect();
        let found = self.found.values();
        files.extend(found.flat_map(|directory| directory.files.iter().map(|file| file.key)));
        files
    }
}

// Whoever fetches a Directory, and whoever waits for him. What `FileClaim` and `InProgress` are to files of the cache,
// they are to Directories.
type FetchLeader = Leader<Digest, ()>;
type FetchFollower = (Digest, Follower<()>);

/// Fetches Directories, and caches those last used.
pub struct DirectoryCache {
    storage: Backend,
    /// How many bytes one message may have.
    message_limit: u64,
    /// How many bytes of Directories are cached, and how many one input root may have.
    limit: u64,
    state: Mutex<DirectoryCacheState>,
    /// Who fetches which Directory. Joined under the lock of `state`.
    flights: SingleFlight<Digest, ()>,
}

#[derive(Default)]
struct DirectoryCacheState {
    directories: Lru<Digest, Arc<Directory>>,
    /// Subtrees that somebody holds as a whole: records of roots do.
    trees: HashMap<Digest, Weak<Node>>,
    /// With more trees than this, those that nobody holds any more are removed.
    trees_limit: usize,
}

impl DirectoryCacheState {
    /// Has these subtrees found for as long as somebody holds them.
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

impl DirectoryCache {
    pub fn new(storage: Backend, message_limit: u64, limit: u64) -> Self {
        DirectoryCache {
            storage,
            message_limit,
            limit,
            state: Mutex::default(),
            flights: SingleFlight::default(),
        }
    }

    /// Reads all Directories that can be reached from `root`, and in the same batch as the first the blob of the
    /// command.
    pub async fn walk(
        &self,
        instance: &InstanceName,
        root: Digest,
        command_digest: Digest,
    ) -> Result<DirectoryWalk, Fault> {
        let mut found: HashMap<Digest, Arc<Directory>> = HashMap::new();
        let mut known: HashMap<Digest, Tree> = HashMap::new();
        let mut missing = HashSet::new();
        let mut size = 0_u64;
        let mut level = vec![root];
        let mut unread_command = Some(command_digest);
        let mut command_blob = None;
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
            while !wanted.is_empty() || unread_command.is_some() {
                let (leaders, followers) =
                    self.join(std::mem::take(&mut wanted), &mut found, &mut known);
                let to_fetch: Vec<Digest> = leaders.iter().map(|leader| *leader.key()).collect();
                let mut digests = to_fetch.clone();
                let command = unread_command.take();
                digests.extend(command);
                let mut batches = stream::iter(batches(digests, |digest| digest.size()))
                    .map(|batch| async move {
                        let read = self.storage.read_many(instance, &batch, self.message_limit);
                        (read.await, batch)
                    })
                    .buffer_unordered(4);
                while let Some((results, batch)) = batches.next().await {
                    for (digest, result) in batch.into_iter().zip(results) {
                        if command == Some(digest) && command_blob.is_none() {
                            command_blob = Some(result.clone());
                            if !to_fetch.contains(&digest) {
                                continue;
                            }
                        }
                        match result {
                            Ok(data) => {
                                let directory = self.insert(digest, &data)?;
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
                // What they fetched is cached by now.
                drop(leaders);
                for (digest, follower) in followers {
                    follower.result().await;
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
        Ok(DirectoryWalk {
            tree,
            missing,
            command_blob: match command_blob {
                Some(result) => result,
                None => Err(storage::Error::Internal(format!(
                    "storage gave no answer about blob {command_digest}"
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
        let (tree, new) = merkle_tree::build(root, found, known)?;
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

    /// Looks digests up: adds what is in memory to `found` and `known`; returns which of the rest the caller must
    /// fetch, and which others are fetching.
    fn join(
        &self,
        wanted: Vec<Digest>,
        found: &mut HashMap<Digest, Arc<Directory>>,
        known: &mut HashMap<Digest, Tree>,
    ) -> (Vec<FetchLeader>, Vec<FetchFollower>) {
        let mut leaders = Vec::new();
        let mut followers = Vec::new();
        let mut state = self.state.lock();
        for digest in wanted {
            if digest.is_empty_blob() {
                found.insert(digest, Arc::default());
            } else if let Some(tree) = state.trees.get(&digest).and_then(Weak::upgrade) {
                known.insert(digest, tree);
            } else if let Some(directory) = state.directories.get(&digest) {
                found.insert(digest, directory.clone());
            } else {
                match self.flights.join(digest) {
                    Role::Leader(leader) => leaders.push(leader),
                    Role::Follower(follower) => followers.push((digest, follower)),
                }
            }
        }
        (leaders, followers)
    }

    /// Parses and caches a Directory that was fetched.
    fn insert(&self, digest: Digest, data: &[u8]) -> Result<Arc<Directory>, Fault> {
        let directory = Directory::parse(&digest, data).map_err(|reason| {
            Fault::Invalid(format!(
                "directory {digest} of the input root is wrong: {reason}"
            ))
        })?;
        let directory = Arc::new(directory);
        let mut state = self.state.lock();
        state
            .directories
            .insert(digest, directory.clone(), directory.weight());
        let evicted = state.directories.evict(|weight, _| weight > self.limit);
        drop(state);
        drop(evicted);
        Ok(directory)
    }
}
