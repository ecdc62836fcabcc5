//! Content-defined chunking: where blobs are cut, so that two that have much in common have most of their
//! chunks in common (REAPI: ChunkingFunction, SplitBlob, SpliceBlob).
//!
//! `rep_max_cdc` cuts by that function, the crate `fastcdc` by the other one; [`Chunks`] reads a blob and
//! has it cut.
//!
//! 1. No more of a blob is in memory than a function looks at for one cut, and as much again.
//! 2. Chunks follow one another, and make up the blob.

use fastcdc::v2020::{FastCDC, Normalization};

use self::rep_max_cdc::RepMaxCutter;
use super::Error;
use crate::proto::reapi::{self, FastCdc2020Params, RepMaxCdcParams, chunking_function::Value};

mod rep_max_cdc;

/// How blobs are cut, with its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "REAPI says what each parameter is")]
pub enum ChunkingFunction {
    /// FAST_CDC_2020, at normalization level 2.
    FastCdc2020 { average: usize, seed: u32 },
    /// REP_MAX_CDC.
    RepMaxCdc { minimum: usize, horizon: usize },
}

/// No peer may have us keep more of a blob than this for one cut.
const LARGEST_WINDOW: usize = 64 << 20;

impl ChunkingFunction {
    /// As REAPI recommends.
    pub const FAST_CDC_2020: Self = ChunkingFunction::FastCdc2020 {
        average: 512 << 10,
        seed: 0,
    };

    /// As REAPI recommends.
    pub const REP_MAX_CDC: Self = ChunkingFunction::RepMaxCdc {
        minimum: 256 << 10,
        horizon: 8 * (256 << 10),
    };

    /// Of a request for chunks: any other than ours is one that a server may replace.
    pub fn requested(value: i32) -> Self {
        match Value::try_from(value) {
            Ok(Value::RepMaxCdc) => Self::REP_MAX_CDC,
            _ => Self::FAST_CDC_2020,
        }
    }

    /// The function that a server announces, and that is known and within REAPI's ranges; of two, the one
    /// that more clients have.
    pub fn announced(cache: &reapi::CacheCapabilities) -> Option<Self> {
        let fast = cache.fast_cdc_2020_params.as_ref().and_then(|params| {
            let average = usize::try_from(params.avg_chunk_size_bytes).ok()?;
            let is_known = (1 << 10..=1 << 20).contains(&average) && average.is_power_of_two();
            is_known.then_some(ChunkingFunction::FastCdc2020 {
                average,
                seed: params.seed,
            })
        });
        fast.or_else(|| {
            let params = cache.rep_max_cdc_params.as_ref()?;
            let minimum = usize::try_from(params.min_chunk_size_bytes).ok()?;
            let horizon = usize::try_from(params.horizon_size_bytes).ok()?;
            let is_bearable = (rep_max_cdc::HASHED..=LARGEST_WINDOW / 4).contains(&minimum)
                && horizon <= LARGEST_WINDOW / 2;
            is_bearable.then_some(ChunkingFunction::RepMaxCdc { minimum, horizon })
        })
    }

    /// The function's value in messages.
    pub const fn to_proto(self) -> Value {
        match self {
            ChunkingFunction::FastCdc2020 { .. } => Value::FastCdc2020,
            ChunkingFunction::RepMaxCdc { .. } => Value::RepMaxCdc,
        }
    }

    /// What a server that cuts by this function announces.
    pub fn announce(self, cache: &mut reapi::CacheCapabilities) {
        match self {
            ChunkingFunction::FastCdc2020 { average, seed } => {
                cache.fast_cdc_2020_params = Some(FastCdc2020Params {
                    avg_chunk_size_bytes: average as u64,
                    seed,
                });
            }
            ChunkingFunction::RepMaxCdc { minimum, horizon } => {
                cache.rep_max_cdc_params = Some(RepMaxCdcParams {
                    min_chunk_size_bytes: minimum as u64,
                    horizon_size_bytes: horizon as u64,
                });
            }
        }
    }

    /// Smaller blobs travel as a whole (REAPI: FastCdc2020Params).
    pub const fn smallest_blob(self) -> u64 {
        match self {
            ChunkingFunction::FastCdc2020 { average, .. } => 4 * average as u64,
            ChunkingFunction::RepMaxCdc { minimum, .. } => 2 * minimum as u64,
        }
    }

    /// Bytes ahead that a cut depends on.
    const fn window(self) -> usize {
        match self {
            ChunkingFunction::FastCdc2020 { average, .. } => 4 * average,
            ChunkingFunction::RepMaxCdc { minimum, horizon } => 2 * minimum + horizon,
        }
    }
}

/// What cuts one blob.
enum Cutter {
    FastCdc2020 { average: usize, seed: u32 },
    RepMaxCdc(RepMaxCutter),
}

impl Cutter {
    fn new(function: ChunkingFunction) -> Self {
        match function {
            ChunkingFunction::FastCdc2020 { average, seed } => {
                Cutter::FastCdc2020 { average, seed }
            }
            ChunkingFunction::RepMaxCdc { minimum, .. } => {
                Cutter::RepMaxCdc(RepMaxCutter::new(minimum))
            }
        }
    }

    /// The length of the next chunk, which begins where `ahead` does: the window, or all that is left.
    fn cut(&mut self, ahead: &[u8]) -> usize {
        match self {
            Cutter::FastCdc2020 { average, seed } => {
                let (minimum, maximum) = (*average / 4, 4 * *average);
                let level = Normalization::Level2;
                let seed = u64::from(*seed);
                FastCDC::with_level_and_seed(ahead, minimum, *average, maximum, level, seed)
                    .cut(0, ahead.len())
                    .1
            }
            Cutter::RepMaxCdc(cutter) => cutter.cut(ahead),
        }
    }
}

/// The chunks of a blob, one after another. `read` gives the blob's bytes from one offset to another.
pub struct Chunks<R> {
    cutter: Cutter,
    window: usize,
    read: R,
    /// Bytes of the blob that were read, and that it has.
    at: u64,
    size: u64,
    /// What was read, of which some has been cut off.
    buffer: Vec<u8>,
    cut: usize,
}

/// Read at a time.
const READ_SIZE: u64 = 1 << 20;

impl<R: FnMut(u64, u64) -> Result<bytes::Bytes, Error>> Chunks<R> {
    /// Of a blob of this size.
    pub fn new(function: ChunkingFunction, size: u64, read: R) -> Self {
        Chunks {
            cutter: Cutter::new(function),
            window: function.window(),
            read,
            at: 0,
            size,
            buffer: Vec::new(),
            cut: 0,
        }
    }

    /// The next chunk; `None` at the end.
    pub fn next_chunk(&mut self) -> Result<Option<&[u8]>, Error> {
        if self.buffer.len() - self.cut < self.window && self.at < self.size {
            self.buffer.drain(..self.cut);
            self.cut = 0;
            // As much again, so that what is left is seldom moved.
            while self.buffer.len() < 2 * self.window && self.at < self.size {
                let end = (self.at + READ_SIZE).min(self.size);
                let piece = (self.read)(self.at, end)?;
                if piece.is_empty() {
                    return Err(Error::Internal("a blob ended before its chunks".to_owned()));
                }
                self.buffer.extend_from_slice(&piece);
                self.at += piece.len() as u64;
            }
        }
        let left = self.buffer.len() - self.cut;
        if left == 0 {
            return Ok(None);
        }
        let start = self.cut;
        let ahead = &self.buffer[start..start + left.min(self.window)];
        let length = self.cutter.cut(ahead).clamp(1, ahead.len());
        self.cut += length;
        Ok(Some(&self.buffer[start..self.cut]))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::text::push_hex;

    pub(super) fn lengths(function: ChunkingFunction, data: &[u8]) -> Vec<usize> {
        let blob = Bytes::copy_from_slice(data);
        let read = |start, end| Ok(blob.slice(start as usize..end as usize));
        let mut chunks = Chunks::new(function, data.len() as u64, read);
        let (mut lengths, mut whole) = (Vec::new(), Vec::new());
        while let Some(chunk) = chunks.next_chunk().unwrap() {
            lengths.push(chunk.len());
            whole.extend_from_slice(chunk);
        }
        assert!(whole == data);
        lengths
    }

    /// The picture that the API's vectors of FAST_CDC_2020 are of: a woodblock print of 1781.
    const PICTURE: &[u8] = include_bytes!("../../../tests/data/SekienAkashita.jpg");

    fn check(seed: u32, expected: [(usize, &str); 6]) {
        // Their longest chunk is one byte shorter than four times the average; none comes to it.
        let function = ChunkingFunction::FastCdc2020 {
            average: 16 << 10,
            seed,
        };
        let mut at = 0;
        for (length, (wanted, hash)) in lengths(function, PICTURE).into_iter().zip(expected) {
            assert_eq!(length, wanted);
            let mut hex = String::new();
            push_hex(&mut hex, &Sha256::digest(&PICTURE[at..at + length]));
            assert_eq!(hex, hash);
            at += length;
        }
        assert_eq!(at, PICTURE.len());
    }

    #[test]
    fn fast_cdc_cuts_where_the_vectors_of_the_api_do() {
        check(
            0,
            [
                (
                    19186,
                    "0f9efa589121d5d9e9e2c4ace91337d77cae866537143f6f15a0ffd525a77c2d",
                ),
                (
                    19279,
                    "c7c86a165573c16448cda35c9169742e85645af42be22889f8b96b8ee0ec7cb0",
                ),
                (
                    17354,
                    "bc88521e28a8b4479cdea5f75aa721a24f3a0a7d0be903aa6d505c574e51e89d",
                ),
                (
                    16387,
                    "4b8dac2652e4685c629d2bb1ae9d4448e676b86f2e67ca0b2fff3d9580184b79",
                ),
                (
                    19940,
                    "c0a7062da6f2386c28e086ee0cedd5732252741269838773cff1ddb05b2df6ed",
                ),
                (
                    17320,
                    "7fa5b12134dc75cd2ac8dc60d3a8f3c8d22f0ee9d4cf74a4aa937e2a0d2d79a5",
                ),
            ],
        );
        check(
            666,
            [
                (
                    17635,
                    "cb3a9d80a3569772d4ed331ca37ab0c862c759897b890fc1aac90a4f2ea3a407",
                ),
                (
                    17334,
                    "d758c6b7b0b7eef1e996f8ccd17de6c645360b03a26c35541e7581348ac08944",
                ),
                (
                    19136,
                    "24846aefd89e510594bae3e9d7d5ea5012067601512610fed126a3c57ba993f5",
                ),
                (
                    17467,
                    "efa785e1fefb49f190e665f72fd246c1442079874508c312196da1fb3040d00b",
                ),
                (
                    23593,
                    "a2f557bdd8d40d8faada963ad5f91ec54b10ccee7c5ae72754a65137592dc607",
                ),
                (
                    14301,
                    "e131100b4a7147ccad19dc63c4a2fac1f5d8b644e1373eeb6803825024234efc",
                ),
            ],
        );
    }

    #[test]
    fn announced_parameters_that_are_out_of_range_are_no_function() {
        let of = |average, minimum, horizon| {
            ChunkingFunction::announced(&reapi::CacheCapabilities {
                fast_cdc_2020_params: Some(FastCdc2020Params {
                    avg_chunk_size_bytes: average,
                    seed: 3,
                }),
                rep_max_cdc_params: Some(RepMaxCdcParams {
                    min_chunk_size_bytes: minimum,
                    horizon_size_bytes: horizon,
                }),
                ..Default::default()
            })
        };
        let fast = |average| Some(ChunkingFunction::FastCdc2020 { average, seed: 3 });
        assert_eq!(of(1 << 10, 0, 0), fast(1 << 10));
        assert_eq!(of(1 << 20, 0, 0), fast(1 << 20));
        for average in [0, 512, 700_000, 1 << 21, u64::MAX] {
            assert_eq!(of(average, 63, 0), None);
            assert_eq!(of(average, u64::MAX, 0), None);
            assert_eq!(of(average, 64, u64::MAX), None);
            let function = ChunkingFunction::RepMaxCdc {
                minimum: 64,
                horizon: 0,
            };
            assert_eq!(of(average, 64, 0), Some(function));
        }
        let mut cache = reapi::CacheCapabilities::default();
        assert_eq!(ChunkingFunction::announced(&cache), None);
        ChunkingFunction::REP_MAX_CDC.announce(&mut cache);
        let function = Some(ChunkingFunction::REP_MAX_CDC);
        assert_eq!(ChunkingFunction::announced(&cache), function);
        ChunkingFunction::FAST_CDC_2020.announce(&mut cache);
        let function = Some(ChunkingFunction::FAST_CDC_2020);
        assert_eq!(ChunkingFunction::announced(&cache), function);
    }
}
