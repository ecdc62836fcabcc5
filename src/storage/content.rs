//! What the content of an upload comes from.

use std::{fs::File, io::ErrorKind, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;

use super::{Error, computing, verify};
use crate::digest::Digest;

/// Uploads whole blobs that somebody else sent, once they have proved right; each has a result of its own.
pub(super) async fn put_verified<F: Future<Output = Result<(), Error>>>(
    blobs: Vec<(Digest, Bytes)>,
    upload: impl FnOnce(Vec<(Digest, Content)>) -> F,
) -> Result<Vec<Result<(), Error>>, Error> {
    let (mut results, right) = verify_all(blobs).await?;
    if let Err(error) = upload(right).await {
        let rights = results.iter_mut().filter(|result| result.is_ok());
        rights.for_each(|result| *result = Err(error.clone()));
    }
    Ok(results)
}

/// Which of the blobs that somebody sent have the digests that they should have, with those that have.
async fn verify_all(
    blobs: Vec<(Digest, Bytes)>,
) -> Result<(Vec<Result<(), Error>>, Vec<(Digest, Content)>), Error> {
    let verify =
        |(digest, content): &(Digest, Bytes)| verify(digest, digest.function().digest_of(content));
    let bytes = blobs.iter().map(|(_, content)| content.len() as u64).sum();
    let (results, blobs) = computing(bytes, move || {
        let results: Vec<Result<(), Error>> = blobs.iter().map(verify).collect();
        (results, blobs)
    })
    .await?;
    let right = blobs.into_iter().zip(&results);
    let right = right.filter(|(_, result)| result.is_ok());
    let right = right.map(|((digest, content), _)| (digest, Content::Bytes(content)));
    let right = right.collect();
    Ok((results, right))
}

/// The content of a blob that is to be uploaded.
#[derive(Clone, Debug)]
pub enum Content {
    /// All of it, in memory.
    Bytes(Bytes),
    /// An open file, read from offset 0 with pread(2), up to the digest's size.
    File(Arc<File>),
    /// Part of an open file, from this offset on.
    FilePart {
        /// Which file.
        file: Arc<File>,
        /// Where the blob begins in it.
        start: u64,
    },
}

impl Content {
    /// Its bytes; `None` when reading them may wait for a disk.
    pub(super) fn in_memory(&self) -> Option<u64> {
        match self {
            Content::Bytes(content) => Some(content.len() as u64),
            Content::File(_) | Content::FilePart { .. } => None,
        }
    }

    /// Where the blob begins in its file.
    fn offset(&self) -> u64 {
        match self {
            Content::FilePart { start, .. } => *start,
            Content::Bytes(_) | Content::File(_) => 0,
        }
    }

    /// The part that is a blob of its own: of so many bytes, from `start` on.
    pub fn sub(&self, start: u64, length: u64) -> Content {
        match self {
            Content::Bytes(bytes) => {
                let start = start.min(bytes.len() as u64);
                let length = length.min(bytes.len() as u64 - start);
                Content::Bytes(bytes.slice(start as usize..(start + length) as usize))
            }
            Content::File(file) | Content::FilePart { file, .. } => Content::FilePart {
                file: file.clone(),
                start: self.offset() + start,
            },
        }
    }

    /// The bytes from `start` to `end`, of what is to be uploaded as `digest`. Blocks for files.
    pub fn part(&self, digest: &Digest, start: u64, end: u64) -> Result<Bytes, Error> {
        let short = |length: u64| {
            Error::Internal(format!(
                "the content to upload for blob {digest} has only {length} bytes"
            ))
        };
        match self {
            Content::Bytes(bytes) if (bytes.len() as u64) < end => Err(short(bytes.len() as u64)),
            Content::Bytes(bytes) => Ok(bytes.slice(start as usize..end as usize)),
            Content::File(file) | Content::FilePart { file, .. } => {
                let mut data = vec![0; (end - start) as usize];
                match file.read_exact_at(&mut data, self.offset() + start) {
                    Ok(()) => Ok(data.into()),
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                        Err(short(file.metadata().map_or(0, |metadata| metadata.len())))
                    }
                    Err(error) => Err(Error::Internal(format!(
                        "could not read the content of blob {digest}: {error}"
                    ))),
                }
            }
        }
    }
}
