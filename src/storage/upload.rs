//! Uploads that arrive piece by piece, by a resource name of their client's choice, under which they
//! go on after an interruption (REAPI: ByteStream's Write).

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{Error, UploadError, blocking, embedded, grpc, object::ObjectStorage, shards};
use crate::digest::Digest;

/// A call's part in an upload.
pub enum Upload {
    /// Into the embedded store.
    Embedded(
        /// The right to write to the upload.
        Arc<embedded::WriteLease>,
    ),
    /// Into the embedded store, which is the cache of a CAS of objects, and on into that when it is whole.
    Cached {
        /// Where the blob will be.
        objects: Arc<ObjectStorage>,
        /// The right to write to the upload.
        lease: Arc<embedded::WriteLease>,
    },
    /// To another server, as it comes.
    Grpc(grpc::ForwardedUpload),
    /// To the servers of a shard, as it comes.
    Shards(shards::ShardUpload),
}

impl Upload {
    pub(super) async fn resume_embedded(
        store: &Arc<embedded::Store>,
        resource_name: &str,
        owner: &str,
        limit: embedded::LimitId,
        digest: Digest,
        offset: i64,
    ) -> Result<Self, UploadError> {
        let lease = lease(store, resource_name, owner, limit, digest, offset).await?;
        Ok(Upload::Embedded(lease))
    }

    pub(super) async fn resume_cached(
        objects: &Arc<ObjectStorage>,
        resource_name: &str,
        owner: &str,
        digest: Digest,
        offset: i64,
    ) -> Result<Self, UploadError> {
        // Before any of it travels.
        objects.require_usable()?;
        let store = objects.cache().cloned().ok_or_else(|| {
            Error::Internal("without a cache, nobody's uploads are taken".to_owned())
        })?;
        // Blobs in a cache count for no instance name.
        let limit = embedded::LimitId::NONE;
        let lease = lease(&store, resource_name, owner, limit, digest, offset).await?;
        let objects = objects.clone();
        Ok(Upload::Cached { objects, lease })
    }

    /// Appends parts, each of which begins at its offset.
    pub async fn write(&mut self, parts: Vec<(i64, Bytes)>) -> Result<(), UploadError> {
        match self {
            Upload::Embedded(lease) | Upload::Cached { lease, .. } => {
                let lease = lease.clone();
                let write = move || {
                    let now = Instant::now();
                    let mut parts = parts.iter();
                    parts.try_for_each(|(offset, data)| lease.write(*offset, data, now))
                };
                blocking(write).await?
            }
            Upload::Grpc(upload) => {
                for (offset, data) in parts {
                    upload.write(offset, data).await?;
                }
                Ok(())
            }
            Upload::Shards(upload) => {
                for (offset, data) in parts {
                    upload.write(offset, data).await?;
                }
                Ok(())
            }
        }
    }

    /// Makes the blob visible. Without `finish_write`, only one of which all has arrived.
    pub async fn finish(self, digest: Digest, finish_write: bool) -> Result<(), UploadError> {
        match self {
            Upload::Embedded(lease) => {
                blocking(move || lease.finish(&digest, finish_write)).await?
            }
            Upload::Cached { objects, lease, .. } => {
                blocking(move || lease.finish(&digest, finish_write)).await??;
                Ok(objects.upload_cached(&digest).await?)
            }
            Upload::Grpc(upload) => upload.finish(finish_write).await,
            Upload::Shards(upload) => upload.finish(finish_write).await,
        }
    }
}

/// The right to write to an upload, which is taken up or begun.
async fn lease(
    store: &Arc<embedded::Store>,
    resource_name: &str,
    owner: &str,
    limit: embedded::LimitId,
    digest: Digest,
    offset: i64,
) -> Result<Arc<embedded::WriteLease>, UploadError> {
    let lease = Arc::new(store.lease_upload(resource_name, owner, limit, Instant::now())?);
    let writer = lease.clone();
    blocking(move || writer.begin(digest, offset, Instant::now())).await??;
    Ok(lease)
}
