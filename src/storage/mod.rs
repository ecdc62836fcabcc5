//! Storage: the Content Addressable Storage (CAS) and the Action Cache (AC), embedded or elsewhere.
//!
//! [`Backend`] is the one way to blobs and action results, for the worker, the scheduler, and the
//! services. To read in this order: this file; `error`; `single_flight`, `batch`, `retry`, `breaker`, `compression`
//! and `chunking`, which all back ends share; [`embedded`], the store on this host's disk; [`grpc`], the client
//! of any REAPI storage; [`shards`], several of those as one; [`object`], object stores and Redis; `open`,
//! which of them a configuration asks for; [`serve`], the services over any back end.
//!
//! 1. No blob is returned whose content does not match its digest.
//! 2. The empty blob of every digest function is always present.

#![warn(missing_docs)]

use std::sync::Arc;

use bytes::Bytes;

use crate::{digest::Digest, instance::InstanceName, proto::reapi::ActionResult};

pub mod batch;
mod breaker;
pub mod chunking;
mod completeness;
pub mod compression;
mod content;
pub mod embedded;
mod error;
pub mod grpc;
mod initial_size_class_cache;
mod inline;
pub mod object;
mod open;
mod recently;
mod retry;
mod seen_outputs;
pub mod serve;
pub mod shards;
pub mod single_flight;
mod upload;

pub use content::Content;
pub use error::{BlobStream, Error, UploadError};
use error::{blocking, computing, verify};
pub use initial_size_class_cache::InitialSizeClassCache;
pub use inline::InlineHints;
use object::ObjectStorage;
pub use open::probe_servers;
pub use retry::RetryPolicy;
use seen_outputs::SeenOutputs;
use shards::Shards;
pub use upload::Upload;

/// Where CAS and AC are. Cheap to clone.
#[derive(Clone)]
pub enum Backend {
    /// The embedded store of this process.
    Embedded(Arc<embedded::Store>),
    /// Another server's, over gRPC.
    Grpc(grpc::Client),
    /// Several servers', over gRPC.
    Shards(Arc<Shards>),
    /// An object store's, or those of Redis.
    Objects(Arc<ObjectStorage>),
    /// CAS and AC in different places.
    Separate(Arc<Separate>),
}

/// CAS and AC in different places.
pub struct Separate {
    /// Whose CAS is used.
    pub cas: Backend,
    /// Whose AC is used.
    pub action_cache: Backend,
}

/// Where one of both is.
#[derive(Clone, Copy)]
enum SingleBackend<'b> {
    Embedded(&'b Arc<embedded::Store>),
    Grpc(&'b grpc::Client),
    Shards(&'b Arc<Shards>),
    Objects(&'b Arc<ObjectStorage>),
}

impl<'b> SingleBackend<'b> {
    async fn answers(self) -> Result<(), Error> {
        match self {
            SingleBackend::Embedded(_) => Ok(()),
            SingleBackend::Grpc(client) => client.probe().await,
            SingleBackend::Shards(shards) => shards.answers().await,
            SingleBackend::Objects(objects) => objects.probe().await,
        }
    }

    /// Of a CAS elsewhere.
    fn seen_outputs(self) -> Option<&'b SeenOutputs> {
        match self {
            SingleBackend::Embedded(_) => None,
            SingleBackend::Grpc(client) => Some(client.seen_outputs()),
            SingleBackend::Shards(shards) => Some(shards.seen_outputs()),
            SingleBackend::Objects(objects) => Some(objects.seen_outputs()),
        }
    }
}

impl Backend {
    /// The embedded store, if blobs or results are in one, or it is the cache of a CAS.
    pub fn embedded(&self) -> Option<&Arc<embedded::Store>> {
        match (self.cas(), self.action_cache()) {
            (SingleBackend::Embedded(store), _) | (_, SingleBackend::Embedded(store)) => {
                Some(store)
            }
            (SingleBackend::Objects(objects), _) => objects.cache(),
            _ => None,
        }
    }

    /// The embedded store, if results are in one.
    pub fn embedded_action_cache(&self) -> Option<&Arc<embedded::Store>> {
        match self.action_cache() {
            SingleBackend::Embedded(store) => Some(store),
            SingleBackend::Grpc(_) | SingleBackend::Shards(_) | SingleBackend::Objects(_) => None,
        }
    }

    /// The embedded store, if blobs are in one.
    pub fn embedded_cas(&self) -> Option<&Arc<embedded::Store>> {
        match self.cas() {
            SingleBackend::Embedded(store) => Some(store),
            SingleBackend::Grpc(_) | SingleBackend::Shards(_) | SingleBackend::Objects(_) => None,
        }
    }

    /// Whether clients must be served here, since nobody else has all of this.
    pub fn needs_services(&self) -> bool {
        !matches!(self, Backend::Grpc(_))
    }

    fn cas(&self) -> SingleBackend<'_> {
        match self {
            Backend::Embedded(store) => SingleBackend::Embedded(store),
            Backend::Grpc(client) => SingleBackend::Grpc(client),
            Backend::Shards(shards) => SingleBackend::Shards(shards),
            Backend::Objects(objects) => SingleBackend::Objects(objects),
            Backend::Separate(places) => places.cas.cas(),
        }
    }

    fn action_cache(&self) -> SingleBackend<'_> {
        match self {
            Backend::Separate(places) => places.action_cache.action_cache(),
            _ => self.cas(),
        }
    }

    /// Outputs that were there a moment ago may be gone.
    fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let (Err(Error::Missing(_)), Some(seen)) = (&result, self.cas().seen_outputs()) {
            seen.forget();
        }
        result
    }

    /// Bytes of the largest blob that is taken; the most there is when a server does not say.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        match self.cas() {
            SingleBackend::Embedded(store) => store.maximum_blob_size_of(instance),
            SingleBackend::Grpc(client) => client.maximum_blob_size(instance).await,
            SingleBackend::Shards(shards) => shards.maximum_blob_size(instance).await,
            SingleBackend::Objects(objects) => objects.maximum_blob_size(),
        }
    }

    /// The digests that the CAS lacks, in the order given. One that is given twice may be told once.
    pub async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        match self.cas() {
            // The index is in memory.
            SingleBackend::Embedded(store) => {
                store.require_directory()?;
                Ok(store.find_missing(digests))
            }
            SingleBackend::Grpc(client) => client.find_missing(instance, digests).await,
            SingleBackend::Shards(shards) => shards.find_missing(instance, digests).await,
            SingleBackend::Objects(objects) => objects.find_missing(digests).await,
        }
    }

    /// A whole blob of at most `limit` bytes.
    pub async fn read(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        limit: u64,
    ) -> Result<Bytes, Error> {
        match self.cas() {
            SingleBackend::Embedded(store) => {
                if let Some(read) = store.read_cached(digest, limit) {
                    return read;
                }
                let (store, digest) = (store.clone(), *digest);
                blocking(move || store.read(&digest, limit)).await?
            }
            SingleBackend::Grpc(client) => self.note(client.read(instance, digest, limit).await),
            SingleBackend::Shards(shards) => {
                let mut one = shards.read_many(instance, &[*digest], limit).await;
                let one = one.pop();
                let none = || Err(Error::Internal("a read had no result".to_owned()));
                self.note(one.unwrap_or_else(none))
            }
            SingleBackend::Objects(objects) => {
                let one = objects.read_many(&[*digest], limit).await.pop();
                let none = || Err(Error::Internal("a read had no result".to_owned()));
                one.unwrap_or_else(none)
            }
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
        match self.cas() {
            SingleBackend::Embedded(store) => {
                if let Some(read) = store.read_many_cached(digests, limit) {
                    return read;
                }
                let (store, wanted) = (store.clone(), digests.to_vec());
                blocking(move || store.read_many(&wanted, limit))
                    .await
                    .unwrap_or_else(|error| vec![Err(error); digests.len()])
            }
            SingleBackend::Grpc(client) => {
                let results = client.read_many(instance, digests, limit).await;
                results
                    .into_iter()
                    .map(|result| self.note(result))
                    .collect()
            }
            SingleBackend::Shards(shards) => {
                let results = shards.read_many(instance, digests, limit).await;
                results
                    .into_iter()
                    .map(|result| self.note(result))
                    .collect()
            }
            SingleBackend::Objects(objects) => objects.read_many(digests, limit).await,
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
        match self.cas() {
            SingleBackend::Embedded(store) => store.stream(digest, start, end).await,
            SingleBackend::Grpc(client) => Ok(client.stream(instance, digest, start, end)),
            SingleBackend::Shards(shards) => {
                self.note(shards.stream(instance, digest, start, end).await)
            }
            SingleBackend::Objects(objects) => objects.stream(digest, start, end).await,
        }
    }

    /// Writes a blob into an open, empty file; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: Arc<std::fs::File>,
    ) -> Result<(), Error> {
        match self.cas() {
            SingleBackend::Embedded(store) => {
                let (store, digest) = (store.clone(), *digest);
                blocking(move || store.read_to_file(&digest, &file)).await?
            }
            SingleBackend::Grpc(client) => {
                self.note(client.read_to_file(instance, digest, file).await)
            }
            SingleBackend::Shards(shards) => {
                self.note(shards.read_to_file(instance, digest, file).await)
            }
            SingleBackend::Objects(objects) => objects.read_to_file(digest, file).await,
        }
    }

    /// Tells where the files are, by their digests, that this host has already: of large blobs, only the
    /// chunks that none of them has travel then.
    pub fn set_local_files(&self, files: grpc::LocalFiles) {
        match self.cas() {
            SingleBackend::Embedded(_) | SingleBackend::Objects(_) => {}
            SingleBackend::Grpc(client) => client.set_local_files(files),
            SingleBackend::Shards(shards) => shards.set_local_files(&files),
        }
    }

    /// Uploads what the CAS lacks of these.
    pub async fn upload(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        match self.cas() {
            SingleBackend::Embedded(store) => {
                let (store, limit) = (store.clone(), store.limit_of(instance));
                blocking(move || store.store_all(blobs, limit)).await?
            }
            SingleBackend::Grpc(client) => client.upload(instance, blobs).await,
            SingleBackend::Shards(shards) => shards.upload(instance, blobs).await,
            SingleBackend::Objects(objects) => objects.upload(blobs).await,
        }
    }

    /// Stores whole blobs that somebody else sent, each of which succeeds or fails on its own.
    pub async fn put_many(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        match self.cas() {
            SingleBackend::Embedded(store) => {
                let (store, limit) = (store.clone(), store.limit_of(instance));
                blocking(move || store.put_within(&blobs, limit)).await
            }
            SingleBackend::Grpc(client) => client.put_many(instance, blobs).await,
            SingleBackend::Shards(shards) => shards.put_many(instance, blobs).await,
            SingleBackend::Objects(objects) => objects.put_many(blobs).await,
        }
    }

    /// Takes up the upload of `owner` that has this resource name, or begins it when `offset` is 0 or
    /// nothing is known of it.
    pub async fn resume_upload(
        &self,
        instance: &InstanceName,
        resource_name: &str,
        owner: &str,
        digest: Digest,
        offset: i64,
    ) -> Result<Upload, UploadError> {
        match self.cas() {
            SingleBackend::Embedded(store) => {
                let limit = store.limit_of(instance);
                Upload::resume_embedded(store, resource_name, owner, limit, digest, offset).await
            }
            SingleBackend::Grpc(client) => {
                Ok(Upload::Grpc(client.forward_upload(resource_name, digest)))
            }
            SingleBackend::Shards(shards) => {
                let upload = shards.forward_upload(resource_name, digest)?;
                Ok(Upload::Shards(upload))
            }
            SingleBackend::Objects(objects) => {
                Upload::resume_cached(objects, resource_name, owner, digest, offset).await
            }
        }
    }

    /// How many bytes of an upload have been received, for a blob that is not there yet.
    pub async fn upload_progress(
        &self,
        resource_name: &str,
        digest: &Digest,
    ) -> Result<u64, Error> {
        match self.cas() {
            SingleBackend::Embedded(store) => received(store, resource_name).await,
            SingleBackend::Objects(objects) => match objects.cache() {
                Some(cache) => received(cache, resource_name).await,
                None => Ok(0),
            },
            SingleBackend::Grpc(client) => client.upload_progress(resource_name).await,
            SingleBackend::Shards(shards) => shards.upload_progress(resource_name, digest).await,
        }
    }

    /// A result all of whose outputs are in the CAS. `None` when there is none, or it is incomplete.
    pub async fn complete_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let Some(result) = self.action_result(instance, action).await? else {
            return Ok(None);
        };
        // The embedded store has looked already.
        let complete = matches!(self, Backend::Embedded(_))
            || self
                .is_complete(instance, action.function(), &result)
                .await?;
        Ok(complete.then_some(result))
    }

    /// `None` when there is no result, or, in the embedded store, not all its outputs are there.
    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        match self.action_cache() {
            SingleBackend::Embedded(store) => {
                let has_blobs = matches!(self, Backend::Embedded(_));
                if let Some(result) = store.cached_action_result(instance, action, !has_blobs) {
                    return result;
                }
                let (store, instance, action) = (store.clone(), instance.clone(), *action);
                blocking(move || match has_blobs {
                    true => store.action_result(&instance, &action),
                    false => store.unchecked_action_result(&instance, &action),
                })
                .await?
            }
            SingleBackend::Grpc(client) => client.action_result(instance, action).await,
            SingleBackend::Shards(shards) => shards.action_result(instance, action).await,
            SingleBackend::Objects(objects) => objects.action_result(instance, action).await,
        }
    }

    /// Keeps an action's result, in place of an older one.
    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: ActionResult,
    ) -> Result<(), Error> {
        match self.action_cache() {
            SingleBackend::Embedded(store) => {
                let (store, instance, action) = (store.clone(), instance.clone(), *action);
                blocking(move || store.update_action_result(&instance, &action, &result)).await?
            }
            SingleBackend::Grpc(client) => {
                client.update_action_result(instance, action, result).await
            }
            SingleBackend::Shards(shards) => {
                shards.update_action_result(instance, action, result).await
            }
            SingleBackend::Objects(objects) => {
                objects
                    .update_action_result(instance, action, &result)
                    .await
            }
        }
    }
}

/// How much of an upload is there.
async fn received(store: &Arc<embedded::Store>, resource_name: &str) -> Result<u64, Error> {
    let (uploads, name) = (store.uploads().clone(), resource_name.to_owned());
    blocking(move || uploads.received(&name)).await
}
