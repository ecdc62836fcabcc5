//! A blob on its way into the store, piece by piece.

use bytes::Bytes;

use super::{
    super::{Error, verify},
    file::{self, BlobFileWriter},
    instance_limits::LimitId,
    key::IndexKey,
    segment::{NewContent, SMALL},
    space::{Space, SpaceReservation},
};
use crate::digest::{Digest, Hasher};
use std::{io, sync::Arc};

/// Dropped before it is finished, it leaves nothing.
pub struct BlobWriter {
    space: Arc<Space>,
    digest: Digest,
    limit: LimitId,
    hasher: Hasher,
    content: BlobBuffer,
}

enum BlobBuffer {
    Small(Vec<u8>),
    Large {
        writer: BlobFileWriter,
        reservation: SpaceReservation,
    },
}

/// In a directory that is made again if somebody removed it.
fn create_file(space: &Space) -> Result<BlobFileWriter, Error> {
    let created = match BlobFileWriter::create(space.fresh_upload_path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && space.look_for_directory() => {
            space.mend_directories();
            BlobFileWriter::create(space.fresh_upload_path())
        }
        created => created,
    };
    created.map_err(|error| space.write_error(error))
}

/// Space is taken in steps, as bytes arrive: what a client announces is no reason to evict.
const SPACE_STEP: u64 = 4 << 20;

impl BlobWriter {
    pub(super) fn start(space: Arc<Space>, digest: Digest, limit: LimitId) -> Result<Self, Error> {
        let most = space.maximum_blob_size();
        if digest.size() > most {
            return Err(Error::TooLarge {
                digest,
                limit: most,
            });
        }
        space.require_directory_now()?;
        space.limits.admit(limit, digest.size())?;
        let content = if digest.size() <= SMALL {
            BlobBuffer::Small(Vec::new())
        } else {
            BlobBuffer::Large {
                writer: create_file(&space)?,
                reservation: space.reserve(0)?,
            }
        };
        Ok(BlobWriter {
            space,
            digest,
            limit,
            hasher: digest.function().hasher(digest.size()),
            content,
        })
    }

    /// Bytes so far.
    pub fn received(&self) -> u64 {
        self.hasher.size()
    }

    /// Appends. More than the digest's size is an error, and nothing of it is taken.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        let size = self.received() + data.len() as u64;
        if size > self.digest.size() {
            return Err(Error::Invalid(format!(
                "{size} bytes were sent for blob {}, more than its digest says",
                self.digest
            )));
        }
        match &mut self.content {
            BlobBuffer::Small(content) => content.extend_from_slice(data),
            BlobBuffer::Large {
                writer,
                reservation,
            } => {
                let total = file::footprint(self.digest.size());
                if size > reservation.bytes() {
                    let wanted = (size + SPACE_STEP).min(total);
                    reservation.grow(wanted - reservation.bytes())?;
                }
                writer
                    .append(data)
                    .map_err(|error| self.space.write_error(error))?;
            }
        }
        self.hasher.update(data);
        Ok(())
    }

    /// Makes the blob visible, if it is what its digest says.
    pub fn finish(self) -> Result<(), Error> {
        let received = self.received();
        if received < self.digest.size() {
            return Err(Error::Invalid(format!(
                "only {received} bytes were sent for blob {}",
                self.digest
            )));
        }
        verify(&self.digest, self.hasher.finish())?;
        let key = IndexKey::blob(&self.digest);
        match self.content {
            BlobBuffer::Small(content) if content.is_empty() => Ok(()),
            BlobBuffer::Small(content) => self.space.store_small(&[NewContent {
                key,
                limit: self.limit,
                content: Bytes::from(content),
            }]),
            BlobBuffer::Large {
                writer,
                mut reservation,
            } => {
                let rest = file::footprint(received).saturating_sub(reservation.bytes());
                reservation.grow(rest)?;
                self.space
                    .commit_large(writer, key, self.limit, received)
                    .map_err(|error| self.space.write_error(error))?;
                reservation.keep();
                self.space.keep_limit(self.limit);
                Ok(())
            }
        }
    }
}
