//! Reading one blob by ByteStream, resumed where it was interrupted.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Status, Streaming};

use super::{Client, LARGEST_BATCHED, call::timely, status::observed};
use crate::{
    digest::{Digest, Hasher},
    instance::InstanceName,
    proto::bytestream::{ReadRequest, ReadResponse},
    resource::{Compressor, ReadName},
    storage::{
        BlobStream, Error, blocking,
        compression::{self, DecodeError, Decoder},
        retry::Attempts,
        verify,
    },
};

/// Less than this, in as long as a server may be silent, is no progress.
const LEAST_PROGRESS: u64 = 64 << 10;

/// The pieces of a blob as its server sends them, from one stream or, after interruptions, several.
/// Nothing is verified.
struct PieceReader {
    client: Client,
    instance: InstanceName,
    digest: Digest,
    at: u64,
    end: u64,
    attempts: Attempts,
    /// How far it had come when it last made progress, and how long it has waited for messages since.
    marked: u64,
    waited: Duration,
    /// `None` until the first stream is opened.
    compressor: Option<Compressor>,
    open: Option<OpenStream>,
}

struct OpenStream {
    messages: Streaming<ReadResponse>,
    /// Of a stream that is compressed, with what came and is not decoded yet.
    decoder: Option<(Decoder, Bytes)>,
    _permit: OwnedSemaphorePermit,
}

impl OpenStream {
    /// What can be decoded without another message.
    async fn decoded(&mut self) -> Result<Result<Option<Bytes>, DecodeError>, Error> {
        let Some((decoder, input)) = self.decoder.take() else {
            return Ok(Ok(None));
        };
        let (decoder, input, decoded) = compression::decode(decoder, input).await?;
        self.decoder = Some((decoder, input));
        Ok(decoded)
    }
}

impl PieceReader {
    /// The next piece; `None` when all of them have come.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let silence = self.client.0.timeouts.idle;
        loop {
            if self.open.is_none()
                && let Err(status) = self.open().await
            {
                self.wait(&status).await?;
                continue;
            }
            let Some(stream) = &mut self.open else {
                continue;
            };
            match stream.decoded().await? {
                Ok(None) => {}
                Ok(Some(data)) => return self.advance(data).map(Some),
                Err(_) => {
                    // The rest comes as it is.
                    self.compressor = Some(Compressor::Identity);
                    self.open = None;
                    continue;
                }
            }
            let begun = Instant::now();
            let rest = silence.saturating_sub(self.waited);
            let message = timely(rest, stream.messages.message()).await;
            self.waited += begun.elapsed();
            let status = match message {
                // Nothing has come: the time for something goes on.
                Ok(Some(message)) if message.data.is_empty() => continue,
                Ok(Some(message)) => match &mut stream.decoder {
                    Some((_, input)) => {
                        *input = message.data;
                        continue;
                    }
                    None => return self.advance(message.data).map(Some),
                },
                Ok(None) if self.at == self.end => return Ok(None),
                // How the stream ends says nothing about what has come.
                Err(_) if self.at == self.end && self.at > 0 => return Ok(None),
                Ok(None) => {
                    let (at, size) = (self.at, self.digest.size());
                    let text = format!(
                        "ended the stream after {at} of {size} bytes of blob {}",
                        self.digest
                    );
                    observed(Code::Aborted, text)
                }
                Err(_) if self.waited >= silence => {
                    let (came, seconds) = (self.at - self.marked, silence.as_secs());
                    let text = format!(
                        "sent no more than {came} bytes of blob {} in {seconds} seconds",
                        self.digest
                    );
                    observed(Code::DeadlineExceeded, text)
                }
                Err(status) => status,
            };
            // Others may stream while this one waits.
            self.open = None;
            self.wait(&status).await?;
        }
    }

    /// Before the next attempt. The error when there should be none.
    async fn wait(&mut self, status: &Status) -> Result<(), Error> {
        // Each attempt may be silent for as long; whoever waits has waited for as long as that.
        let waited = std::mem::take(&mut self.waited);
        if waited >= self.client.0.timeouts.idle
            && let Some(begun) = Instant::now().checked_sub(waited)
        {
            self.attempts.failing_since(begun);
        }
        // Perhaps the server does not give what it announces.
        if self.compressor == Some(Compressor::Zstd)
            && matches!(status.code(), Code::InvalidArgument | Code::Unimplemented)
        {
            self.compressor = Some(Compressor::Identity);
            return Ok(());
        }
        let server = &self.client.0.cas_server;
        server
            .wait(&mut self.attempts, status, Some(&self.digest))
            .await
    }

    fn advance(&mut self, data: Bytes) -> Result<Bytes, Error> {
        self.at += data.len() as u64;
        if self.at - self.marked >= LEAST_PROGRESS || self.at >= self.end {
            self.marked = self.at;
            self.waited = Duration::ZERO;
            self.attempts.progressed();
        }
        match self.at > self.end {
            true => Err(Error::Internal(format!(
                "the CAS sent more than {} bytes for blob {}",
                self.end, self.digest
            ))),
            false => Ok(data),
        }
    }

    /// A part that ends before the blob does is read as it is: REAPI has no limits for compressed reads.
    async fn choose_compressor(&mut self) -> Compressor {
        if let Some(chosen) = self.compressor {
            return chosen;
        }
        let length = match self.end == self.digest.size() {
            true => self.end - self.at,
            false => 0,
        };
        let chosen = self.client.stream_compressor(&self.instance, length).await;
        self.compressor = Some(chosen);
        chosen
    }

    async fn open(&mut self) -> Result<(), Status> {
        let compressor = self.choose_compressor().await;
        let decoder = match compressor {
            Compressor::Identity => None,
            Compressor::Zstd => {
                let decoder = Decoder::new(self.end - self.at);
                let decoder = decoder.map_err(|error| Status::internal(error.to_string()))?;
                Some((decoder, Bytes::new()))
            }
        };
        let shared = &self.client.0;
        // Never closed.
        let permit = shared.downloads.clone().acquire_owned().await;
        let permit = permit.map_err(|error| Status::internal(error.to_string()))?;
        let to_the_end = self.end == self.digest.size();
        let request = ReadRequest {
            resource_name: ReadName::format_as(
                &self.client.name_there(&self.instance),
                &self.digest,
                compressor,
            ),
            read_offset: self.at as i64,
            read_limit: if to_the_end {
                0
            } else {
                (self.end - self.at) as i64
            },
        };
        let mut client = self.client.bytes();
        let answer = timely(shared.timeouts.idle, client.read(request)).await?;
        self.open = Some(OpenStream {
            messages: answer.into_inner(),
            decoder,
            _permit: permit,
        });
        Ok(())
    }
}

/// What a blob's pieces go into; it starts again from nothing when the content proves wrong.
enum Sink {
    Memory(BytesMut),
    File(Arc<File>),
}

impl Client {
    fn reader(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> PieceReader {
        PieceReader {
            client: self.clone(),
            instance: instance.clone(),
            digest: *digest,
            at: start,
            end,
            attempts: self.0.cas_server.attempts(),
            marked: start,
            waited: Duration::ZERO,
            compressor: None,
            open: None,
        }
    }

    /// Part of a blob, piece by piece. Of a blob as a whole, the last piece comes when all of it has
    /// been verified; parts are for those who ask to verify.
    pub fn stream(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> BlobStream {
        let pieces = self.unverified(instance, digest, start, end);
        match start == 0 && end == digest.size() {
            true => verified(pieces, *digest),
            false => pieces,
        }
    }

    /// Part of a blob, piece by piece, as its server sends it.
    pub(in crate::storage) fn unverified(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> BlobStream {
        let reader = self.reader(instance, digest, start, end);
        let pieces = stream::try_unfold(reader, |mut reader| async move {
            let data = reader.next().await?;
            Ok(data.map(|data| (data, reader)))
        });
        pieces.boxed()
    }

    /// Reads a blob by a stream into memory. Whoever asks has said that he can bear as much.
    pub(super) async fn read_stream(
        &self,
        instance: &InstanceName,
        digest: &Digest,
    ) -> Result<Bytes, Error> {
        let sink = Sink::Memory(BytesMut::with_capacity(digest.size() as usize));
        match self.collect(instance, digest, sink).await? {
            Sink::Memory(content) => Ok(content.freeze()),
            Sink::File(_) => Ok(Bytes::new()),
        }
    }

    /// Streams a blob into an open, empty file, verified; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: Arc<File>,
    ) -> Result<(), Error> {
        if digest.size() <= LARGEST_BATCHED {
            let content = self.read(instance, digest, LARGEST_BATCHED).await?;
            let written = blocking(move || file.write_all_at(&content, 0)).await?;
            return written.map_err(Error::of_file);
        }
        if self.read_chunks(instance, digest, &file).await? {
            return Ok(());
        }
        let sink = Sink::File(file);
        self.collect(instance, digest, sink).await.map(drop)
    }

    /// Reads all of a blob, verified; once more from the start when it is corrupt.
    async fn collect(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        mut sink: Sink,
    ) -> Result<Sink, Error> {
        let mut corrupt_before = false;
        loop {
            let mut reader = self.reader(instance, digest, 0, digest.size());
            if corrupt_before {
                reader.compressor = Some(Compressor::Identity);
            }
            let mut hasher = digest.function().hasher(digest.size());
            while let Some(data) = reader.next().await? {
                (sink, hasher) = absorb(sink, hasher, data).await?;
            }
            match verify(digest, hasher.finish()) {
                Ok(()) => return Ok(sink),
                Err(error) if corrupt_before => return Err(error),
                Err(_) => corrupt_before = true,
            }
            match &mut sink {
                Sink::Memory(content) => content.clear(),
                Sink::File(file) => file.set_len(0).map_err(Error::of_file)?,
            }
        }
    }
}

/// All pieces of a blob, of which the last one comes when all of them have been verified.
pub(in crate::storage) fn verified(pieces: BlobStream, digest: Digest) -> BlobStream {
    let hasher = digest.function().hasher(digest.size());
    let state = (pieces, Some(hasher));
    let verified = stream::try_unfold(state, move |(mut pieces, mut hasher)| async move {
        let Some(data) = pieces.next().await.transpose()? else {
            return Ok(None);
        };
        if let Some(mut so_far) = hasher.take() {
            let hashed = data.clone();
            so_far = blocking(move || {
                so_far.update(&hashed);
                so_far
            })
            .await?;
            if so_far.size() == digest.size() {
                verify(&digest, so_far.finish())?;
            } else {
                hasher = Some(so_far);
            }
        }
        Ok(Some((data, (pieces, hasher))))
    });
    verified.boxed()
}

/// Takes a piece of a large blob, away from the threads that talk to peers.
async fn absorb(mut sink: Sink, mut hasher: Hasher, data: Bytes) -> Result<(Sink, Hasher), Error> {
    blocking(move || {
        match &mut sink {
            Sink::Memory(content) => content.extend_from_slice(&data),
            Sink::File(file) => file
                .write_all_at(&data, hasher.size())
                .map_err(Error::of_file)?,
        }
        hasher.update(&data);
        Ok((sink, hasher))
    })
    .await?
}
