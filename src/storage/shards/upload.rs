//! A client's upload that is passed on, as it comes, to the servers of one shard. One that fails is left
//! out; when the last one does, the client hears of it, and resumes or starts again.

use std::sync::Arc;

use bytes::Bytes;

use super::member::Member;
use crate::{
    digest::Digest,
    storage::{Error, UploadError, grpc::ForwardedUpload},
};

/// Parts of it go to all servers of a shard that are in use.
pub struct ShardUpload {
    parts: Vec<(Arc<Member>, ForwardedUpload)>,
    failure: UploadError,
}

impl ShardUpload {
    pub(super) fn start(members: Vec<Arc<Member>>, name: &str, digest: Digest) -> Self {
        let start = |member: Arc<Member>| {
            let upload = member.client.forward_upload(name, digest);
            (member, upload)
        };
        ShardUpload {
            parts: members.into_iter().map(start).collect(),
            failure: Error::Unavailable("the blob's shard is out of use".to_owned()).into(),
        }
    }

    /// Passes on what begins at `offset`.
    pub async fn write(&mut self, offset: i64, data: Bytes) -> Result<(), UploadError> {
        let mut going_on = Vec::with_capacity(self.parts.len());
        for (member, mut upload) in std::mem::take(&mut self.parts) {
            match heard(&member, upload.write(offset, data.clone())).await {
                Ok(()) => going_on.push((member, upload)),
                Err(error) => self.failure = error,
            }
        }
        self.parts = going_on;
        match self.parts.is_empty() {
            true => Err(self.failure.clone()),
            false => Ok(()),
        }
    }

    /// Waits until a server has all of it, and all others have, or have failed.
    pub async fn finish(self, finish_write: bool) -> Result<(), UploadError> {
        let mut failure = self.failure;
        let mut succeeded = false;
        for (member, upload) in self.parts {
            match heard(&member, upload.finish(finish_write)).await {
                Ok(()) => succeeded = true,
                Err(error) => failure = error,
            }
        }
        match succeeded {
            true => Ok(()),
            false => Err(failure),
        }
    }
}

/// The server's failures are counted, other refusals are the client's.
async fn heard(
    member: &Member,
    work: impl Future<Output = Result<(), UploadError>> + Send,
) -> Result<(), UploadError> {
    let work = async {
        match work.await {
            Err(UploadError::Storage(error)) => Err(error),
            other => Ok(other),
        }
    };
    member.call(work).await?
}
