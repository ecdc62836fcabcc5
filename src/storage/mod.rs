//! Storage: the Content Addressable Storage (CAS) and the Action Cache (AC), embedded or elsewhere.
//!
//! [`Backend`] is the one way to blobs and action results, for the worker, the scheduler, and the
//! services. To read in this order: this file; `single_flight`, `batch`, `retry` and `compression`, which
//! all back ends share; [`embedded`], the store on this host's disk; [`grpc`], the client of any REAPI
//! storage; [`serve`], the services over any back end.
//!
//! 1. No blob is returned whose content does not match its digest.
//! 2. The empty blob of every digest function is always present.

#![warn(missing_docs)]

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::{
    config::{
        Endpoint,
        scheduler::{self as config, StorageLocation},
    },
    daemon::{self, Credentials, Failure},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::ActionResult,
};

pub mod batch;
mod completeness;
pub mod compression;
mod content;
pub mod embedded;
pub mod grpc;
mod initial_size_class_cache;
mod inline;
mod retry;
pub mod serve;
pub mod single_flight;
mod upload;

pub use content::Content;
pub use initial_size_class_cache::InitialSizeClassCache;
pub use inline::InlineHints;
pub use upload::{Upload, UploadError};

/// Why storage did not do what it was asked; each variant says who must act.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
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

impl Error {
    /// What a failed write of a blob to a file means.
    fn of_file(error: std::io::Error) -> Self {
        let text = format!("could not write a blob to a file: {error}");
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Error::Full(text),
            _ => Error::Internal(text),
        }
    }
}

/// Whether a content has the digest that it should have.
fn verify(expected: &Digest, actual: Digest) -> Result<(), Error> {
    match actual == *expected {
        true => Ok(()),
        false => Err(Error::Corrupt {
            expected: *expected,
            actual: Box::new(actual),
        }),
    }
}

/// The pieces of a blob, in their order.
pub type BlobStream = BoxStream<'static, Result<Bytes, Error>>;

/// Where CAS and AC are. Cheap to clone.
#[derive(Clone)]
pub enum Backend {
    /// The embedded store of this process.
    Embedded(Arc<embedded::Store>),
    /// Another server's, over gRPC.
    Grpc(grpc::Client),
}

impl Backend {
    /// A client of REAPI servers, which connects at the first call.
    pub fn connect(cas: &Endpoint, action_cache: &Endpoint, options: grpc::Options) -> Self {
        Backend::Grpc(grpc::Client::connect(cas, action_cache, options))
    }

    /// Opens the embedded store, which blocks for up to a few seconds, or prepares to connect.
    pub fn open(config: &config::Storage, credentials: Credentials) -> Result<Self, Failure> {
        let embedded = || {
            let size = config.embedded.maximum_size.0;
            let minimum_free = config.embedded.minimum_free.0;
            let directory = &config.embedded.directory;
            let store = embedded::Store::open_leaving(directory, size, minimum_free)?;
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
            (StorageLocation::Endpoint(cas), StorageLocation::Endpoint(action_cache)) => {
                let options = grpc::Options {
                    credentials,
                    ..Default::default()
                };
                let client = grpc::Client::connect(cas, action_cache, options);
                Ok(Backend::Grpc(client))
            }
            // The configuration's check refuses a mixture.
            _ => embedded(),
        }
    }

    /// What would keep this storage from working.
    pub async fn probe(config: &config::Storage) -> Vec<Failure> {
        match (&config.cas, &config.action_cache) {
            (StorageLocation::Endpoint(cas), StorageLocation::Endpoint(action_cache)) => {
                let options = grpc::Options {
                    credentials: Credentials::of("storage.tls", &config.tls),
                    ..Default::default()
                };
                let client = grpc::Client::connect(cas, action_cache, options);
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

    /// Whether there is a storage at the other end.
    pub async fn answers(&self) -> Result<(), Error> {
        match self {
            Backend::Embedded(_) => Ok(()),
            Backend::Grpc(client) => client.probe().await,
        }
    }

    /// The embedded store, if that is what this is.
    pub fn embedded(&self) -> Option<&Arc<embedded::Store>> {
        match self {
            Backend::Embedded(store) => Some(store),
            Backend::Grpc(_) => None,
        }
    }

    /// Whether clients must be served here, since this back end is no REAPI server itself.
    pub fn needs_services(&self) -> bool {
        matches!(self, Backend::Embedded(_))
    }

    /// Bytes of the largest blob that is taken; the most there is when a server does not say.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        match self {
            Backend::Embedded(store) => store.maximum_blob_size(),
            Backend::Grpc(client) => client.maximum_blob_size(instance).await,
        }
    }

    /// The digests that the CAS lacks, in the order given. One that is given twice may be told once.
    pub async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        match self {
            // The index is in memory.
            Backend::Embedded(store) => Ok(store.find_missing(digests)),
            Backend::Grpc(client) => client.find_missing(instance, digests).await,
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

    /// Whole blobs of at most `limit` bytes each, in the order asked for; each result on its own, so
    /// that a caller can tell all missing ones at once.
    pub async fn read_many(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        match self {
            Backend::Embedded(store) => {
                let (store, wanted) = (store.clone(), digests.to_vec());
                let read = move |digest: &Digest| store.read(digest, limit);
                blocking(move || wanted.iter().map(read).collect())
                    .await
                    .unwrap_or_else(|error| vec![Err(error); digests.len()])
            }
            Backend::Grpc(client) => client.read_many(instance, digests, limit).await,
        }
    }

    /// A blob's bytes from `start` to `end`, piece by piece. Of a blob as a whole, the last piece
    /// comes when all of it has proved right.
    pub async fn stream(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> Result<BlobStream, Error> {
        match self {
            Backend::Embedded(store) => store.stream(digest, start, end).await,
            Backend::Grpc(client) => Ok(client.stream(instance, digest, start, end)),
        }
    }

    /// Writes a blob into an open, empty file; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: Arc<std::fs::File>,
    ) -> Result<(), Error> {
        match self {
            Backend::Embedded(store) => {
                let (store, digest) = (store.clone(), *digest);
                blocking(move || store.read_to_file(&digest, &file)).await?
            }
            Backend::Grpc(client) => client.read_to_file(instance, digest, file).await,
        }
    }

    /// Uploads what the CAS lacks of these.
    pub async fn upload(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        match self {
            Backend::Embedded(store) => {
                let store = store.clone();
                blocking(move || store.store_all(blobs)).await?
            }
            Backend::Grpc(client) => client.upload(instance, blobs).await,
        }
    }

    /// Stores whole blobs that somebody else sent, each of which succeeds or fails on its own.
    pub async fn put_many(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        match self {
            Backend::Embedded(store) => {
                let store = store.clone();
                blocking(move || store.put(&blobs)).await
            }
            Backend::Grpc(client) => client.put_many(instance, blobs).await,
        }
    }

    /// Takes up the upload that has this resource name, or begins it when `offset` is 0 or nothing is
    /// known of it.
    pub async fn resume_upload(
        &self,
        resource_name: &str,
        digest: Digest,
        offset: i64,
    ) -> Result<Upload, UploadError> {
        match self {
            Backend::Embedded(store) => {
                Upload::resume_embedded(store, resource_name, digest, offset).await
            }
            Backend::Grpc(client) => Ok(Upload::Grpc(client.forward_upload(resource_name, digest))),
        }
    }

    /// How many bytes of an upload have been received, for a blob that is not there yet.
    pub async fn upload_progress(&self, resource_name: &str) -> Result<u64, Error> {
        match self {
            Backend::Embedded(store) => {
                let (uploads, name) = (store.uploads().clone(), resource_name.to_owned());
                blocking(move || uploads.received(&name)).await
            }
            Backend::Grpc(client) => client.committed_size(resource_name).await,
        }
    }

    /// A result all of whose outputs are in the CAS. `None` when there is none, or it is incomplete.
    pub async fn complete_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let result = self.action_result(instance, action).await?;
        let (Backend::Grpc(client), Some(result)) = (self, &result) else {
            return Ok(result);
        };
        let function = action.function();
        let complete = completeness::is_complete(client, instance, function, result).await?;
        Ok(complete.then(|| result.clone()))
    }

    /// Whether all outputs of a result are in the CAS.
    pub async fn is_complete(
        &self,
        instance: &InstanceName,
        function: DigestFunction,
        result: &ActionResult,
    ) -> Result<bool, Error> {
        match self {
            Backend::Embedded(store) => {
                let (store, result) = (store.clone(), result.clone());
                blocking(move || store.is_complete(function, &result)).await
            }
            Backend::Grpc(client) => {
                completeness::is_complete(client, instance, function, result).await
            }
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

    /// Keeps an action's result, in place of an older one.
    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: ActionResult,
    ) -> Result<(), Error> {
        match self {
            Backend::Embedded(store) => {
                let (store, instance, action) = (store.clone(), instance.clone(), *action);
                blocking(move || store.update_action_result(&instance, &action, &result)).await?
            }
            Backend::Grpc(client) => client.update_action_result(instance, action, result).await,
        }
    }
}

/// Away from the threads that serve.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    daemon::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("a storage task failed: {error}")))
}
