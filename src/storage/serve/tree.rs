//! GetTree: a walk over a tree, page by page.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use prost::Message;
use tonic::Status;

use super::status;
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::{Directory, GetTreeResponse},
    storage::{Backend, Error},
};

pub(super) const MAXIMUM_PAGE_LENGTH: usize = 10_000;

/// A page is ended before its directories are this large together, unless it has only one.
const TARGET_PAGE_SIZE: u64 = 2 << 20;

/// Larger messages are no Directories that a client could read.
const MAXIMUM_DIRECTORY_SIZE: u64 = 4 << 20;
pub(super) const MAXIMUM_PAGE_SIZE: u64 = MAXIMUM_DIRECTORY_SIZE;

/// Distinct directories of one tree; a walk keeps 80 bytes for each.
const MAXIMUM_DIRECTORIES: usize = 1 << 20;

/// A walk over a tree, breadth first, each distinct directory once: a directory that occurs in many
/// places costs no more than one that occurs in one.
pub(super) struct TreeWalk {
    backend: Backend,
    instance: InstanceName,
    function: DigestFunction,
    seen: HashSet<Digest>,
    queue: VecDeque<Digest>,
    page_size: usize,
    returned: usize,
    root: Option<Digest>,
}

impl TreeWalk {
    pub(super) fn start(
        backend: Backend,
        instance: InstanceName,
        root: Digest,
        page_size: usize,
    ) -> Self {
        TreeWalk {
            backend,
            instance,
            function: root.function(),
            seen: HashSet::from([root]),
            queue: VecDeque::from([root]),
            page_size,
            returned: 0,
            root: Some(root),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.queue.is_empty()
    }

    /// Passes over what earlier pages had.
    pub(super) async fn skip(&mut self, count: usize) -> Result<(), Status> {
        while self.returned < count && !self.is_done() {
            self.step().await?;
        }
        Ok(())
    }

    pub(super) async fn page(&mut self) -> Result<GetTreeResponse, Status> {
        let mut directories = Vec::new();
        let mut size = 0;
        while let Some(next) = self.queue.front() {
            let full = size + next.size() > TARGET_PAGE_SIZE && !directories.is_empty();
            if full || directories.len() >= self.page_size {
                break;
            }
            if let Some((directory, length)) = self.step().await? {
                size += length as u64;
                directories.push(directory);
            }
        }
        let next_page_token = if self.is_done() {
            String::new()
        } else {
            self.returned.to_string()
        };
        Ok(GetTreeResponse {
            directories,
            next_page_token,
        })
    }

    async fn read(&self, digest: &Digest) -> Result<Bytes, Error> {
        self.backend
            .read(&self.instance, digest, MAXIMUM_DIRECTORY_SIZE)
            .await
    }

    /// The next directory with its length. REAPI: what is missing is left out, except the root.
    async fn step(&mut self) -> Result<Option<(Directory, usize)>, Status> {
        let Some(digest) = self.queue.pop_front() else {
            return Ok(None);
        };
        let root = self.root.take();
        let content = match self.read(&digest).await {
            Ok(content) => content,
            Err(Error::Missing(_)) if root.is_none() => return Ok(None),
            Err(error) => return Err(status::of_read(error)),
        };
        let length = content.len();
        let directory = Directory::decode(content).map_err(|error| {
            Status::invalid_argument(format!("blob {digest} is no Directory: {error}"))
        })?;
        for child in &directory.directories {
            let child = Digest::parse_required(Some(self.function), child.digest.as_ref())
                .map_err(|error| {
                    Status::invalid_argument(format!("Directory {digest} is ill-formed: {error}"))
                })?;
            if self.seen.insert(child) {
                self.queue.push_back(child);
            }
        }
        if self.seen.len() > MAXIMUM_DIRECTORIES {
            return Err(Status::invalid_argument(format!(
                "the tree has more than {MAXIMUM_DIRECTORIES} distinct directories"
            )));
        }
        self.returned += 1;
        Ok(Some((directory, length)))
    }
}
