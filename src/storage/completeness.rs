//! Whether all outputs of an action's result are in a CAS elsewhere. The embedded store looks at its own
//! index instead.
//!
//! 1. All that one result names is asked for at once, Directories level by level.
//! 2. That a result is complete, and that an output is there, is believed for two seconds; that something
//!    is missing is never. It is forgotten when a read finds a blob missing.

use std::{collections::HashSet, time::Instant};

use bytes::Bytes;
use prost::Message;

use super::{Backend, Error, SeenOutputs, SingleBackend, blocking};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::{self, ActionResult},
};

/// A Tree or Directory beyond this is not read: the result counts as incomplete.
const MAXIMUM_MESSAGE_SIZE: u64 = 64 << 20;
/// Directories below an output directory's root.
const MAXIMUM_DIRECTORIES: usize = 1 << 20;

/// What a result names, and so must be there.
struct NamedOutputs {
    function: DigestFunction,
    blobs: Vec<Digest>,
    trees: Vec<Digest>,
    directories: Vec<Digest>,
}

impl Backend {
    /// Whether all outputs of a result are in the CAS. Elsewhere than in the embedded store, what was
    /// there two seconds ago counts.
    pub async fn is_complete(
        &self,
        instance: &InstanceName,
        function: DigestFunction,
        result: &ActionResult,
    ) -> Result<bool, Error> {
        match (self.cas(), self.cas().seen_outputs()) {
            (SingleBackend::Embedded(store), _) => {
                let (store, result) = (store.clone(), result.clone());
                blocking(move || store.is_complete(function, &result)).await
            }
            (_, None) => Ok(false),
            (_, Some(seen)) => is_complete(self, seen, instance, function, result).await,
        }
    }
}

/// Whether the CAS has all that the result names.
async fn is_complete(
    cas: &Backend,
    seen: &SeenOutputs,
    instance: &InstanceName,
    function: DigestFunction,
    result: &ActionResult,
) -> Result<bool, Error> {
    let key = function.digest_of(&result.encode_to_vec());
    let key = (instance.clone(), key);
    let begun = Instant::now();
    if seen.results.lock().contains(&key, begun) {
        return Ok(true);
    }
    let complete = look(cas, seen, instance, function, result).await?;
    if complete {
        // As old as the first of its looks.
        seen.results.lock().insert(key, begun);
    }
    Ok(complete)
}

async fn look(
    cas: &Backend,
    seen_outputs: &SeenOutputs,
    instance: &InstanceName,
    function: DigestFunction,
    result: &ActionResult,
) -> Result<bool, Error> {
    let Some(mut outputs) = NamedOutputs::of(function, result) else {
        return Ok(false);
    };
    let trees = std::mem::take(&mut outputs.trees);
    let Some(trees) = read::<reapi::Tree>(cas, instance, &trees).await? else {
        return Ok(false);
    };
    let in_trees = trees
        .iter()
        .flat_map(|tree| tree.root.iter().chain(&tree.children));
    for directory in in_trees {
        if outputs.add_files(directory).is_none() {
            return Ok(false);
        }
    }
    let mut seen: HashSet<Digest> = outputs.directories.iter().copied().collect();
    while !outputs.directories.is_empty() {
        let wanted = std::mem::take(&mut outputs.directories);
        let Some(directories) = read::<reapi::Directory>(cas, instance, &wanted).await? else {
            return Ok(false);
        };
        for directory in &directories {
            let children = directory.directories.iter();
            let children: Option<Vec<Digest>> = children
                .map(|child| Digest::parse_required(Some(function), child.digest.as_ref()).ok())
                .collect();
            let (Some(children), Some(())) = (children, outputs.add_files(directory)) else {
                return Ok(false);
            };
            let unseen = children.into_iter().filter(|child| seen.insert(*child));
            outputs.directories.extend(unseen);
        }
        if seen.len() > MAXIMUM_DIRECTORIES {
            return Ok(false);
        }
    }
    outputs.blobs.sort_unstable();
    outputs.blobs.dedup();
    let now = Instant::now();
    {
        let mut known = seen_outputs.blobs.lock();
        outputs
            .blobs
            .retain(|digest| !known.contains(&(instance.clone(), *digest), now));
    }
    if outputs.blobs.is_empty() {
        return Ok(true);
    }
    let missing = cas.find_missing(instance, &outputs.blobs).await?;
    let missing: HashSet<Digest> = missing.into_iter().collect();
    let mut known = seen_outputs.blobs.lock();
    for digest in outputs
        .blobs
        .iter()
        .filter(|digest| !missing.contains(digest))
    {
        known.insert((instance.clone(), *digest), now);
    }
    Ok(missing.is_empty())
}

/// `None` when one is missing, or is none.
async fn read<M: Message + Default>(
    cas: &Backend,
    instance: &InstanceName,
    digests: &[Digest],
) -> Result<Option<Vec<M>>, Error> {
    let contents = cas.read_many(instance, digests, MAXIMUM_MESSAGE_SIZE).await;
    let mut messages = Vec::with_capacity(contents.len());
    for content in contents {
        let content: Bytes = match content {
            Ok(content) => content,
            Err(Error::Unavailable(error)) => return Err(Error::Unavailable(error)),
            Err(_) => return Ok(None),
        };
        match M::decode(content) {
            Ok(message) => messages.push(message),
            Err(_) => return Ok(None),
        }
    }
    Ok(Some(messages))
}

impl NamedOutputs {
    /// `None` when the result names something that cannot be.
    fn of(function: DigestFunction, result: &ActionResult) -> Option<Self> {
        let parse = |digest: &reapi::Digest| Digest::parse(Some(function), digest).ok();
        let mut outputs = NamedOutputs {
            function,
            blobs: Vec::new(),
            trees: Vec::new(),
            directories: Vec::new(),
        };
        for digest in result.stdout_digest.iter().chain(&result.stderr_digest) {
            outputs.blobs.push(parse(digest)?);
        }
        for file in &result.output_files {
            outputs.blobs.push(parse(file.digest.as_ref()?)?);
        }
        for directory in &result.output_directories {
            let (tree, root) = (&directory.tree_digest, &directory.root_directory_digest);
            if tree.is_none() && root.is_none() {
                return None;
            }
            if let Some(digest) = tree {
                outputs.trees.push(parse(digest)?);
            }
            if let Some(digest) = root {
                outputs.directories.push(parse(digest)?);
            }
        }
        Some(outputs)
    }

    fn add_files(&mut self, directory: &reapi::Directory) -> Option<()> {
        for file in &directory.files {
            let digest = Digest::parse_required(Some(self.function), file.digest.as_ref()).ok()?;
            self.blobs.push(digest);
        }
        Some(())
    }
}
