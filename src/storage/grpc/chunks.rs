//! Large blobs as chunks, of which only those travel that the other side has not (REAPI: SplitBlob,
//! SpliceBlob).
//!
//! 1. Whatever goes wrong with chunks, the blob travels as a whole then: chunks save bytes, and are never
//!    needed.
//! 2. What chunks make up is verified against the blob's digest, and each chunk against its own, whether it
//!    comes from the server or from a file of this host.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::unix::fs::FileExt,
    sync::Arc,
    time::Duration,
};

use tonic::{Code, Status};

use super::{
    Client,
    call::timely,
    local_chunks::{LocalFiles, read_locally},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::{SpliceBlobRequest, SplitBlobRequest},
    storage::{
        Content, Error, batch, blocking,
        chunking::{ChunkingFunction, Chunks},
        verify,
    },
};

/// Bytes of chunks in memory at a time.
const GROUP: u64 = 8 << 20;

/// No server may have us take a chunk into memory that is larger.
const LARGEST_CHUNK: u64 = 16 << 20;

impl Client {
    /// Tells where the files are that this host has already.
    pub fn set_local_files(&self, files: LocalFiles) {
        // Whoever told first stays.
        let _ = self.0.local_files.set(files);
    }

    /// How long a server may take for one that it reads as a whole.
    fn chunks_timeout(&self, digest: &Digest) -> Duration {
        self.0.timeouts.call + Duration::from_secs(digest.size() >> 24)
    }

    /// Uploads those chunks of a blob that the CAS lacks, and has it make the blob of them. False when it
    /// does not.
    pub(super) async fn write_chunks(
        &self,
        instance: &InstanceName,
        digest: Digest,
        content: &Content,
        function: ChunkingFunction,
    ) -> Result<bool, Error> {
        let whole = content.clone();
        let cut = move || {
            let read = |start, end| whole.part(&digest, start, end);
            let mut chunks = Chunks::new(function, digest.size(), read);
            let mut list = Vec::new();
            while let Some(chunk) = chunks.next_chunk()? {
                list.push(digest.function().digest_of(chunk));
            }
            Ok::<_, Error>(list)
        };
        let list = blocking(cut).await??;
        self.0.local_chunks.remember(digest, list.clone());
        let missing = match self.find_missing(instance, &list).await {
            Ok(missing) => missing,
            Err(error) => return Ok(as_a_whole(&digest, &error)),
        };
        let mut missing: HashSet<Digest> = missing.into_iter().collect();
        let mut at = 0;
        let mut blobs = Vec::new();
        for chunk in &list {
            if missing.remove(chunk) {
                blobs.push((*chunk, content.sub(at, chunk.size())));
            }
            at += chunk.size();
        }
        if let Err(error) = Box::pin(self.write(instance, blobs)).await {
            return Ok(as_a_whole(&digest, &error));
        }
        let request = SpliceBlobRequest {
            instance_name: self.name_there(instance).to_string(),
            blob_digest: Some(digest.to_proto()),
            chunk_digests: list.iter().map(Digest::to_proto).collect(),
            digest_function: digest.function().to_proto() as i32,
            chunking_function: function.to_proto() as i32,
        };
        let mut client = self.cas();
        let answer = client.splice_blob(request);
        match timely(self.chunks_timeout(&digest), answer).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::AlreadyExists => Ok(true),
            Err(status) => Ok(as_a_whole(&digest, &status)),
        }
    }

    /// Writes a blob into an open, empty file, of chunks that are in other files here, and of those that are
    /// not. False when the blob must be read as a whole; the file is empty then.
    pub(super) async fn read_chunks(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: &Arc<File>,
    ) -> Result<bool, Error> {
        let smallest = ChunkingFunction::REP_MAX_CDC.smallest_blob();
        let Some(files) = self.0.local_files.get() else {
            return Ok(false);
        };
        if digest.size() < smallest || !self.chunks(instance).await.split {
            return Ok(false);
        }
        let list = match self.split(instance, digest).await {
            Ok(list) => list,
            Err(status) => return Ok(as_a_whole(digest, &status)),
        };
        let places = self.0.local_chunks.find(&list);
        self.0.local_chunks.remember(*digest, list.clone());
        if places.is_empty() {
            // One stream is faster than many chunks.
            return Ok(false);
        }
        let assembled = self.assemble(instance, digest, file, files, list, places);
        match assembled.await {
            Ok(()) => Ok(true),
            Err(error @ Error::Full(_)) => Err(error),
            Err(error) => {
                file.set_len(0).map_err(Error::of_file)?;
                Ok(as_a_whole(digest, &error))
            }
        }
    }

    /// The list is one of chunks that have the blob's size together.
    async fn split(&self, instance: &InstanceName, digest: &Digest) -> Result<Vec<Digest>, Status> {
        let announced = self.0.limits.chunks().splice;
        let request = SplitBlobRequest {
            instance_name: self.name_there(instance).to_string(),
            blob_digest: Some(digest.to_proto()),
            digest_function: digest.function().to_proto() as i32,
            chunking_function: announced.map_or(0, |function| function.to_proto() as i32),
        };
        let mut client = self.cas();
        let answer = client.split_blob(request);
        let answer = timely(self.chunks_timeout(digest), answer).await?;
        let list = answer.into_inner().chunk_digests;
        let list = list
            .iter()
            .map(|chunk| Digest::parse(Some(digest.function()), chunk))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Status::internal(error.to_string()))?;
        let sizes = list.iter().map(Digest::size);
        let total = sizes.fold(0, u64::saturating_add);
        let largest = list.iter().map(Digest::size).max().unwrap_or(0);
        match total == digest.size() && largest <= LARGEST_CHUNK {
            true => Ok(list),
            false => Err(Status::internal(format!(
                "the chunks have {total} bytes together, and the largest of them {largest}"
            ))),
        }
    }

    async fn assemble(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: &Arc<File>,
        files: &LocalFiles,
        list: Vec<Digest>,
        places: HashMap<Digest, (Digest, u64)>,
    ) -> Result<(), Error> {
        let places = Arc::new(places);
        let mut hasher = digest.function().hasher(digest.size());
        let mut open = HashMap::new();
        for group in batch::split(list, GROUP, usize::MAX, Digest::size) {
            let (files, places) = (files.clone(), places.clone());
            let (group, opened, mut contents) = blocking(move || {
                let found = read_locally(&files, &mut open, &places, &group);
                (group, open, found)
            })
            .await?;
            open = opened;
            let mut seen = HashSet::new();
            let is_absent =
                |chunk: &&Digest| !contents.contains_key(*chunk) && seen.insert(**chunk);
            let absent: Vec<Digest> = group.iter().filter(is_absent).copied().collect();
            let read = self.read_many(instance, &absent, LARGEST_CHUNK).await;
            for (chunk, content) in absent.into_iter().zip(read) {
                contents.insert(chunk, content?);
            }
            let file = file.clone();
            hasher = blocking(move || {
                for chunk in &group {
                    // All of them were inserted.
                    let content = contents.get(chunk).cloned().unwrap_or_default();
                    let at = hasher.size();
                    file.write_all_at(&content, at).map_err(Error::of_file)?;
                    hasher.update(&content);
                }
                Ok::<_, Error>(hasher)
            })
            .await??;
        }
        verify(digest, hasher.finish())
    }
}

/// That chunks did not do: the blob is to travel as a whole.
fn as_a_whole(digest: &Digest, reason: &dyn std::fmt::Display) -> bool {
    tracing::debug!(%digest, %reason, "a blob travels as a whole, not by its chunks");
    false
}
