//! Storage: the Content Addressable Storage (CAS) and the Action Cache (AC), embedded or elsewhere.
//!
//! 1. No blob is returned whose content does not match its digest.
//! 2. The empty blob of every digest function is always present.

use std::sync::Arc;

use bytes::Bytes;

use crate::{digest::Digest, instance::InstanceName, proto::reapi::ActionResult};

pub mod remote;

/// Why storage did not do what it was asked; each variant says who must act.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Blobs that are not there. The client uploads them and tries again.
    #[error("{} of the blobs asked for {} not in the Content Addressable Storage, the first being {}", .0.len(), if .0.len() == 1 { "is" } else { "are" }, .0[0])]
    Missing(Vec<Digest>),
    /// Content that does not match its digest: from a client, its fault; from a server, the farm's.
    #[error("blob {expected} has a content whose digest is {actual}")]
    Corrupt { expected: Digest, actual: Digest },
    #[error("blob {digest} is larger than the limit of {limit} bytes")]
    TooLarge { digest: Digest, limit: u64 },
    /// The request itself is at fault.
    #[error("{0}")]
    Invalid(String),
    /// Cannot be reached, or is overloaded; later it may work.
    #[error("{0}")]
    Unavailable(String),
    /// The disk or the store's limit is full; the administrator must act.
    #[error("{0}")]
    Full(String),
    /// A defect of the farm.
    #[error("{0}")]
    Internal(String),
}

/// What an upload's content comes from.
#[derive(Clone, Debug)]
pub enum Content {
    Bytes(Bytes),
    /// An open file, read from offset 0 with pread(2), up to the digest's size.
    File(Arc<std::fs::File>),
}

/// CAS and AC of a scheduler.
#[derive(Clone)]
pub enum Storage {
    // Local(Arc<local::Store>),
    Remote(remote::Client),
}

impl Storage {
    /// A whole blob of at most `limit` bytes.
    pub async fn read(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        limit: u64,
    ) -> Result<Bytes, Error> {
        match self {
            Storage::Remote(client) => client.read(instance, digest, limit).await,
        }
    }

    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        match self {
            Storage::Remote(client) => client.action_result(instance, action).await,
        }
    }
}
