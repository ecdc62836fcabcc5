//! Storage: the Content Addressable Storage (CAS) and the Action Cache (AC), embedded or elsewhere.
//!
//! 1. No blob is returned whose content does not match its digest.
//! 2. The empty blob of every digest function is always present.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    config::scheduler::{self as config, StorageLocation},
    daemon::{self, Failure},
    digest::Digest,
    instance::InstanceName,
    proto::reapi::ActionResult,
};

pub mod embedded;
pub mod grpc;
pub mod serve;

/// Why storage did not do what it was asked; each variant says who must act.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Blobs that are not there. The client uploads them and tries again.
    #[error("{} of the blobs asked for {} not in the Content Addressable Storage, the first being {}", .0.len(), if .0.len() == 1 { "is" } else { "are" }, .0[0])]
    Missing(Vec<Digest>),
    /// Content that does not match its digest: from a client, its fault; from a server, the farm's.
    #[error("blob {expected} has a content whose digest is {actual}")]
    Corrupt {
        expected: Digest,
        actual: Box<Digest>,
    },
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
pub enum Backend {
    Embedded(Arc<embedded::Store>),
    Grpc(grpc::Client),
}

impl Backend {
    /// Opens the embedded store, which blocks for up to a few seconds, or prepares to connect.
    pub fn open(config: &config::Storage) -> Result<Self, Failure> {
        let embedded = || {
            let size = config.embedded.maximum_size.0;
            let store = embedded::Store::open(&config.embedded.directory, size)?;
            tracing::info!(
                directory = %config.embedded.directory.display(),
                entries = store.count(),
                bytes = store.used(),
                "opened the embedded store"
            );
            let directory = &config.embedded.directory;
            if let Some(disk) = daemon::disk::space(directory)
                && store.used().saturating_add(disk.available) < size
            {
                tracing::warn!(
                    directory = %directory.display(),
                    left = %daemon::disk::rounded_to_mib(store.used() + disk.available),
                    "the disk has less left for the embedded store than storage.embedded.maximum_size, \
                     {}; lower that, or free space there",
                    config.embedded.maximum_size
                );
            }
            Ok(Backend::Embedded(Arc::new(store)))
        };
        match (&config.cas, &config.action_cache) {
            (StorageLocation::Endpoint(cas), StorageLocation::Endpoint(action_cache)) => Ok(
                Backend::Grpc(grpc::Client::connect(cas, action_cache, Default::default())),
            ),
            // The configuration's check refuses a mixture.
            _ => embedded(),
        }
    }

    /// What would keep this storage from working.
    pub async fn probe(config: &config::Storage) -> Vec<Failure> {
        match (&config.cas, &config.action_cache) {
            (StorageLocation::Endpoint(cas), StorageLocation::Endpoint(action_cache)) => {
                let client = grpc::Client::connect(cas, action_cache, Default::default());
                match client.probe().await {
                    Ok(()) => Vec::new(),
                    Err(error) => vec![Failure::Configuration {
                        key: "storage.cas",
                        message: error.to_string(),
                    }],
                }
            }
            _ => embedded::probe(&config.embedded.directory, config.embedded.maximum_size.0),
        }
    }

    /// A whole blob of at most `limit` bytes.
    pub async fn read(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        limit: u64,
    ) -> Result<Bytes, Error> {
        match self {
            Backend::Embedded(store) => {
                let (store, digest) = (store.clone(), *digest);
                blocking(move || store.read(&digest, limit)).await?
            }
            Backend::Grpc(client) => client.read(instance, digest, limit).await,
        }
    }

    /// `None` when there is no result, or, in the embedded store, not all its outputs are there.
    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        match self {
            Backend::Embedded(store) => {
                let (store, instance, action) = (store.clone(), instance.clone(), *action);
                blocking(move || store.action_result(&instance, &action)).await?
            }
            Backend::Grpc(client) => client.action_result(instance, action).await,
        }
    }
}

/// Away from the threads that serve.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    crate::daemon::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("a storage task failed: {error}")))
}
