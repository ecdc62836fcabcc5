//! Action results. One that is returned names only blobs that are there, and makes them recently
//! used, so that a client that builds without the bytes can fetch them later.

use std::collections::HashSet;

use bytes::Bytes;
use prost::Message;

use super::{super::Error, Store, key::IndexKey, segment::NewContent};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::{self, ActionResult},
};

/// A Tree or Directory beyond this is not read: the result counts as incomplete.
const MAXIMUM_MESSAGE_SIZE: u64 = 64 << 20;

/// Directories below an output directory's root.
const MAXIMUM_DIRECTORIES: usize = 1 << 20;

/// Why a result is not returned.
struct Incomplete;

/// What was stored for an action.
pub(super) fn decode(action: &Digest, content: Bytes) -> Result<ActionResult, Error> {
    ActionResult::decode(content).map_err(|error| {
        Error::Internal(format!(
            "the stored result of action {action} cannot be read: {error}"
        ))
    })
}

impl Store {
    /// `None` when there is no result, or not all of its outputs are there.
    pub fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let result = self.unchecked_action_result(instance, action)?;
        Ok(result.filter(|result| self.check_complete(action.function(), result).is_ok()))
    }

    /// The same for outputs that are in another CAS.
    pub fn unchecked_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        self.require_directory()?;
        let key = IndexKey::action(instance, action);
        let Some(content) = self
            .space
            .index
            .find(&key, self.space.now())
            .and_then(|found| self.space.content(found))
        else {
            return Ok(None);
        };
        decode(action, content).map(Some)
    }

    /// Whether all outputs of a result are there; they are then recently used.
    pub fn is_complete(&self, function: DigestFunction, result: &ActionResult) -> bool {
        self.check_complete(function, result).is_ok()
    }

    /// Keeps an action's result, in place of an older one.
    pub fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: &ActionResult,
    ) -> Result<(), Error> {
        self.space.store_small(&[NewContent {
            key: IndexKey::action(instance, action),
            limit: self.limit_of(instance),
            content: Bytes::from(result.encode_to_vec()),
        }])
    }

    fn check_complete(
        &self,
        function: DigestFunction,
        result: &ActionResult,
    ) -> Result<(), Incomplete> {
        let present = |digest: Option<&reapi::Digest>| self.check_present(function, digest);
        for file in &result.output_files {
            present(file.digest.as_ref())?;
        }
        for digest in [&result.stdout_digest, &result.stderr_digest] {
            if digest.is_some() {
                present(digest.as_ref())?;
            }
        }
        for directory in &result.output_directories {
            if let Some(digest) = &directory.tree_digest {
                let tree: reapi::Tree = self.read_message(function, digest)?;
                for directory in tree.root.iter().chain(&tree.children) {
                    for file in &directory.files {
                        present(file.digest.as_ref())?;
                    }
                }
            }
            if let Some(root) = &directory.root_directory_digest {
                self.check_directories(function, root)?;
            }
            if directory.tree_digest.is_none() && directory.root_directory_digest.is_none() {
                return Err(Incomplete);
            }
        }
        Ok(())
    }

    fn check_directories(
        &self,
        function: DigestFunction,
        root: &reapi::Digest,
    ) -> Result<(), Incomplete> {
        let mut seen = HashSet::new();
        let mut rest = vec![root.clone()];
        while let Some(digest) = rest.pop() {
            let parsed = Digest::parse(Some(function), &digest).map_err(|_| Incomplete)?;
            if !seen.insert(parsed) {
                continue;
            }
            if seen.len() > MAXIMUM_DIRECTORIES {
                return Err(Incomplete);
            }
            let directory: reapi::Directory = self.read_message(function, &digest)?;
            for file in &directory.files {
                self.check_present(function, file.digest.as_ref())?;
            }
            for child in directory.directories {
                rest.push(child.digest.ok_or(Incomplete)?);
            }
        }
        Ok(())
    }

    fn check_present(
        &self,
        function: DigestFunction,
        digest: Option<&reapi::Digest>,
    ) -> Result<(), Incomplete> {
        let digest = Digest::parse_required(Some(function), digest).map_err(|_| Incomplete)?;
        self.contains(&digest).then_some(()).ok_or(Incomplete)
    }

    fn read_message<M: Message + Default>(
        &self,
        function: DigestFunction,
        digest: &reapi::Digest,
    ) -> Result<M, Incomplete> {
        let digest = Digest::parse(Some(function), digest).map_err(|_| Incomplete)?;
        let content = self
            .read(&digest, MAXIMUM_MESSAGE_SIZE)
            .map_err(|_| Incomplete)?;
        M::decode(content).map_err(|_| Incomplete)
    }
}
