//! Zstandard (RFC 8878), piece by piece and within bounds.
//!
//! 1. A decoder gives no more bytes than its blob has, and one chunk at a time: what is sent decides over
//!    neither memory nor disk.
//! 2. A decoder reads no more bytes than twice its blob's size, for frames that are empty or skipped have
//!    no end otherwise.
//! 3. Coding takes a processor, so that it happens on threads that may block.
//! 4. Whether a content is right is for its digest to say; here it is only well formed.

use std::{io, sync::LazyLock};

use bytes::{Buf, Bytes};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::Semaphore;
use zstd::stream::raw::{self, CParameter, DParameter, Operation, OutBuffer};

use super::{BlobStream, Error, blocking};
use crate::resource::Compressor;

/// Measured on libraries, sources and programs, which become 3 to 5 times smaller at some 200 MB/s: level
/// 3 makes a tenth less of them, at two thirds of the speed.
const LEVEL: i32 = 1;

/// 8 MiB, which RFC 8878 asks decoders to support, and encoders not to exceed.
const WINDOW_LOG_MAXIMUM: u32 = 23;

/// Smaller contents are not worth it.
pub const MINIMUM: u64 = 1 << 10;

/// What a decoder gives at a time, at most.
const DECODED_SIZE: u64 = 256 << 10;

/// What a coder needs beside its blob: its tables, and a block of input and output each.
const TABLES: u64 = 1 << 20;

/// Pieces that are coded at the same time, however many streams there are; first come, first served.
static PROCESSORS: LazyLock<Semaphore> = LazyLock::new(|| {
    let count = std::thread::available_parallelism().map_or(1, |count| count.get());
    Semaphore::new(count)
});

/// Bytes of memory that coding a blob of this size takes, at most.
pub fn memory(size: u64) -> u64 {
    size.min(1 << WINDOW_LOG_MAXIMUM) + TABLES
}

/// What was sent cannot be decompressed to a blob of its size.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum DecodeError {
    #[error("the compressed data decompresses to more than the blob's size")]
    TooMuch,
    #[error("the compressed data is larger than twice the blob's size")]
    TooMuchInput,
    #[error("the compressed data is no Zstandard, or needs a window of more than 8 MiB: {0}")]
    IllFormed(String),
    #[error("the compressed data ends in the middle of a frame")]
    Truncated,
}

/// Decompresses frames, one after another.
pub struct Decoder {
    raw: raw::Decoder<'static>,
    /// Bytes that are still to come.
    left: u64,
    /// Bytes that may still be read.
    input_left: u64,
    is_between_frames: bool,
    /// It has more to give without more input.
    is_full: bool,
}

impl Decoder {
    /// Of a blob that has this many bytes, or of what is left of one.
    pub fn new(size: u64) -> Result<Self, Error> {
        let make = || {
            let mut raw = raw::Decoder::new()?;
            raw.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAXIMUM))?;
            io::Result::Ok(raw)
        };
        Ok(Decoder {
            raw: make().map_err(unavailable)?,
            left: size,
            input_left: size.saturating_mul(2).saturating_add(64 << 10),
            is_between_frames: true,
            is_full: false,
        })
    }

    /// Takes input off its front, and gives what that makes. `None` when more input is needed.
    pub fn decode(&mut self, input: &mut Bytes) -> Result<Option<Bytes>, DecodeError> {
        while !input.is_empty() || self.is_full {
            // One more than what is left, so that more is noticed.
            let mut output = vec![0; DECODED_SIZE.min(self.left + 1) as usize];
            let done = self
                .raw
                .run_on_buffers(input, &mut output)
                .map_err(|error| DecodeError::IllFormed(error.to_string()))?;
            input.advance(done.bytes_read);
            self.input_left = self
                .input_left
                .checked_sub(done.bytes_read as u64)
                .ok_or(DecodeError::TooMuchInput)?;
            self.is_between_frames = done.remaining == 0;
            // At the end of a frame all of it has been given.
            self.is_full = !self.is_between_frames && done.bytes_written == output.len();
            self.left = self
                .left
                .checked_sub(done.bytes_written as u64)
                .ok_or(DecodeError::TooMuch)?;
            if done.bytes_written > 0 {
                output.truncate(done.bytes_written);
                return Ok(Some(output.into()));
            }
        }
        Ok(None)
    }

    /// Whether the input may end here.
    pub fn finish(&self) -> Result<(), DecodeError> {
        match self.is_between_frames {
            true => Ok(()),
            false => Err(DecodeError::Truncated),
        }
    }
}

/// Takes input off its front, on another thread; see `Decoder::decode`.
pub async fn decode(
    mut decoder: Decoder,
    mut input: Bytes,
) -> Result<(Decoder, Bytes, Result<Option<Bytes>, DecodeError>), Error> {
    let _processor = PROCESSORS.acquire().await;
    blocking(move || {
        let decoded = decoder.decode(&mut input);
        (decoder, input, decoded)
    })
    .await
}

/// All of a blob of this size. Blocks for a processor.
pub fn decode_whole(mut input: Bytes, size: u64) -> Result<Bytes, DecodeError> {
    let mut decoder =
        Decoder::new(size).map_err(|error| DecodeError::IllFormed(error.to_string()))?;
    let mut content = Vec::new();
    while let Some(chunk) = decoder.decode(&mut input)? {
        content.extend_from_slice(&chunk);
    }
    decoder.finish()?;
    Ok(content.into())
}

/// Compresses into one frame.
pub struct Encoder {
    raw: raw::Encoder<'static>,
    buffer: Vec<u8>,
}

impl Encoder {
    /// Of so many bytes; no more and no fewer may follow.
    pub fn new(size: u64) -> Result<Self, Error> {
        let make = || {
            let mut raw = raw::Encoder::new(LEVEL)?;
            raw.set_parameter(CParameter::ChecksumFlag(false))?;
            raw.set_pledged_src_size(Some(size))?;
            io::Result::Ok(raw)
        };
        Ok(Encoder {
            raw: make().map_err(unavailable)?,
            buffer: vec![0; 128 << 10],
        })
    }

    /// What there is of the frame after these bytes; perhaps nothing yet.
    pub fn encode(&mut self, mut data: &[u8]) -> Result<Vec<u8>, Error> {
        let mut output = Vec::new();
        while !data.is_empty() {
            let done = self.raw.run_on_buffers(data, &mut self.buffer);
            let done = done.map_err(unavailable)?;
            output.extend(self.buffer.iter().take(done.bytes_written));
            data = data.get(done.bytes_read..).unwrap_or_default();
        }
        Ok(output)
    }

    /// The rest of the frame.
    pub fn finish(mut self) -> Result<Vec<u8>, Error> {
        let mut output = Vec::new();
        loop {
            let mut buffer = OutBuffer::around(self.buffer.as_mut_slice());
            let remaining = self.raw.finish(&mut buffer, true).map_err(unavailable)?;
            output.extend_from_slice(buffer.as_slice());
            if remaining == 0 {
                return Ok(output);
            }
        }
    }
}

/// All of a content in one frame. Blocks for a processor.
pub fn encode_whole(content: &[u8]) -> Result<Bytes, Error> {
    let mut encoder = Encoder::new(content.len() as u64)?;
    let mut output = encoder.encode(content)?;
    output.extend(encoder.finish()?);
    Ok(output.into())
}

/// A content, compressed where that makes less of it. Blocks for a processor.
pub fn compressed(content: Bytes) -> Result<(Bytes, Compressor), Error> {
    if content.len() as u64 >= MINIMUM {
        let output = encode_whole(&content)?;
        if output.len() < content.len() {
            return Ok((output, Compressor::Zstd));
        }
    }
    Ok((content, Compressor::Identity))
}

/// Some of a content, on another thread; with `last`, all that is left of the frame.
pub async fn encode(
    mut encoder: Encoder,
    data: Bytes,
    last: bool,
) -> Result<(Option<Encoder>, Bytes), Error> {
    let _processor = PROCESSORS.acquire().await;
    blocking(move || {
        let mut output = encoder.encode(&data)?;
        if last {
            output.extend(encoder.finish()?);
            return Ok((None, output.into()));
        }
        Ok((Some(encoder), output.into()))
    })
    .await?
}

/// A stream of `length` bytes, compressed.
pub fn encoded(pieces: BlobStream, length: u64) -> Result<BlobStream, Error> {
    let state = (pieces, Some(Encoder::new(length)?));
    let pieces = stream::try_unfold(state, |(mut pieces, mut encoder)| async move {
        while let Some(open) = encoder.take() {
            let piece = pieces.try_next().await?;
            let last = piece.is_none();
            let (still, output) = encode(open, piece.unwrap_or_default(), last).await?;
            encoder = still;
            if !output.is_empty() {
                return Ok(Some((output, (pieces, encoder))));
            }
        }
        Ok(None)
    });
    Ok(pieces.boxed())
}

fn unavailable(error: io::Error) -> Error {
    Error::Internal(format!("could not compress or decompress: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode_in_pieces(data: &[u8], piece: usize, size: u64) -> Result<Vec<u8>, DecodeError> {
        let mut decoder = Decoder::new(size).unwrap();
        let mut content = Vec::new();
        for piece in data.chunks(piece) {
            let mut input = Bytes::copy_from_slice(piece);
            while let Some(chunk) = decoder.decode(&mut input)? {
                assert!(chunk.len() as u64 <= DECODED_SIZE);
                content.extend_from_slice(&chunk);
            }
            assert!(input.is_empty());
        }
        decoder.finish()?;
        Ok(content)
    }

    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|i| b'a' + (i / 100 % 26) as u8).collect()
    }

    #[test]
    fn what_was_encoded_is_decoded_in_pieces_of_any_size() {
        for length in [0, 1, 1_000, 262_144, 3_000_001] {
            let content = text(length);
            let whole = encode_whole(&content).unwrap();
            assert_eq!(decode_whole(whole.clone(), length as u64).unwrap(), content);
            for piece in [1, 7, 100_000] {
                let decoded = decode_in_pieces(&whole, piece, length as u64);
                assert_eq!(decoded.unwrap(), content);
            }
        }
    }

    #[test]
    fn a_bomb_gives_no_more_than_its_blob_may_have() {
        let bomb = encode_whole(&vec![0; 50_000_000]).unwrap();
        assert!(bomb.len() < 10_000);
        let error = decode_in_pieces(&bomb, 1 << 20, 1_000_000).unwrap_err();
        assert!(matches!(error, DecodeError::TooMuch), "{error}");
        let error = decode_whole(bomb, 49_999_999).unwrap_err();
        assert!(matches!(error, DecodeError::TooMuch), "{error}");
    }

    #[test]
    fn frames_that_follow_one_another_or_are_skipped_are_one_content() {
        let (one, other) = (text(1_000), text(70_000));
        // RFC 8878: a magic number, a length, and what is skipped.
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let data = [
            encode_whole(&one).unwrap().as_ref(),
            &skipped,
            &encode_whole(b"").unwrap(),
            &encode_whole(&other).unwrap(),
            &skipped,
        ]
        .concat();
        for piece in [1, 5, 1_000_000] {
            let decoded = decode_in_pieces(&data, piece, 71_000).unwrap();
            assert_eq!(decoded, [one.clone(), other.clone()].concat());
        }
        // But not without end.
        let error = decode_in_pieces(&skipped.repeat(10_000), 1 << 20, 10).unwrap_err();
        assert!(matches!(error, DecodeError::TooMuchInput), "{error}");
    }

    #[test]
    fn what_is_cut_followed_by_garbage_or_no_zstandard_is_refused() {
        let content = text(70_000);
        let whole = encode_whole(&content).unwrap();
        for length in [1, 4, 20, whole.len() - 1] {
            let error = decode_in_pieces(&whole[..length], 1_000, 70_000).unwrap_err();
            assert!(matches!(error, DecodeError::Truncated), "{length}: {error}");
        }
        for garbage in [&b"garbage"[..], b"g", &[0; 20]] {
            let data = [&whole, garbage].concat();
            assert!(decode_in_pieces(&data, 1_000, 70_000).is_err());
        }
        assert!(decode_in_pieces(&content, 1_000, 70_000).is_err());
    }

    #[test]
    fn a_window_that_is_too_large_is_refused_before_it_is_taken() {
        let mut raw = raw::Encoder::new(1).unwrap();
        raw.set_parameter(CParameter::WindowLog(WINDOW_LOG_MAXIMUM + 1))
            .unwrap();
        let mut output = vec![0; 1 << 20];
        // Its size is not known, so that the header has the window.
        let content = text(300_000);
        let begun = raw.run_on_buffers(&content, &mut output).unwrap();
        let mut rest = OutBuffer::around(&mut output[begun.bytes_written..]);
        raw.finish(&mut rest, true).unwrap();
        let length = begun.bytes_written + rest.as_slice().len();
        let error = decode_in_pieces(&output[..length], 1_000, 300_000).unwrap_err();
        assert!(matches!(error, DecodeError::IllFormed(_)), "{error}");
    }
}
