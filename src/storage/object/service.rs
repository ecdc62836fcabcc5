//! The two kinds of services, with what both can do: values by their names, read and written as a whole or
//! in parts. Each call here is one attempt.

use std::ops::Range;

use bytes::Bytes;

pub(super) use super::attempt::{FailedAttempt, Pieces, WrittenPart};
use super::{
    cloud::{Cloud, CloudWrite},
    redis::{Redis, RedisWrite},
};

/// Who keeps the values.
pub(super) enum Service {
    Cloud(Cloud),
    Redis(Redis),
}

/// A value that is written in parts, and is not there before it is finished.
pub(super) enum PartialWrite {
    Cloud(CloudWrite),
    Redis(RedisWrite),
}

impl Service {
    /// What it is and where, for people.
    pub(super) fn place(&self) -> String {
        match self {
            Service::Cloud(cloud) => cloud.place().to_owned(),
            Service::Redis(redis) => redis.place(),
        }
    }

    /// Bytes of the largest value.
    pub(super) fn largest_value(&self) -> u64 {
        match self {
            Service::Cloud(_) => Cloud::LARGEST_VALUE,
            Service::Redis(_) => Redis::LARGEST_VALUE,
        }
    }

    /// Calls at a time.
    pub(super) fn concurrency(&self) -> usize {
        match self {
            Service::Cloud(_) => Cloud::CONCURRENCY,
            Service::Redis(_) => Redis::CONCURRENCY,
        }
    }

    /// Whether it is there, and lets us in.
    pub(super) async fn probe(&self) -> Result<(), FailedAttempt> {
        match self {
            Service::Cloud(cloud) => cloud.probe().await,
            Service::Redis(redis) => redis.probe().await,
        }
    }

    /// `None` when it is not there; of Redis, nor one that is empty.
    pub(super) async fn size(&self, name: &str) -> Result<Option<u64>, FailedAttempt> {
        match self {
            Service::Cloud(cloud) => cloud.size(name).await,
            Service::Redis(redis) => redis.size(name).await,
        }
    }

    /// Part of a value of so many bytes. `None` when it is not there; one that is shorter or longer has
    /// other pieces than asked.
    pub(super) async fn read(
        &self,
        name: &str,
        range: Range<u64>,
        size: u64,
    ) -> Result<Option<Pieces>, FailedAttempt> {
        match self {
            Service::Cloud(cloud) => cloud.read(name, range, size).await,
            Service::Redis(redis) => redis.read(name, range, size).await,
        }
    }

    /// All of a value of at most so many bytes. `None` when it is not there.
    pub(super) async fn read_all(
        &self,
        name: &str,
        most: u64,
    ) -> Result<Option<Bytes>, FailedAttempt> {
        match self {
            Service::Cloud(cloud) => cloud.read_all(name, most).await,
            Service::Redis(redis) => redis.read_all(name, most).await,
        }
    }

    /// In place of what was there.
    pub(super) async fn write(&self, name: &str, value: Bytes) -> Result<(), FailedAttempt> {
        match self {
            Service::Cloud(cloud) => cloud.write(name, value).await,
            Service::Redis(redis) => redis.write(name, value).await,
        }
    }

    pub(super) async fn begin(&self, name: &str) -> Result<PartialWrite, FailedAttempt> {
        match self {
            Service::Cloud(cloud) => Ok(PartialWrite::Cloud(cloud.begin(name).await?)),
            Service::Redis(redis) => Ok(PartialWrite::Redis(redis.begin(name))),
        }
    }
}

impl PartialWrite {
    /// The part of this number, which begins at `offset`; again in place of one that may have been written.
    pub(super) async fn part(
        &self,
        number: usize,
        offset: u64,
        data: Bytes,
    ) -> Result<WrittenPart, FailedAttempt> {
        match self {
            PartialWrite::Cloud(write) => write.part(number, data).await,
            PartialWrite::Redis(write) => write.part(offset, data).await,
        }
    }

    /// Makes the value visible. A second attempt fails when the first one has succeeded after all.
    pub(super) async fn finish(&self, parts: &[WrittenPart]) -> Result<(), FailedAttempt> {
        match self {
            PartialWrite::Cloud(write) => write.finish(parts).await,
            PartialWrite::Redis(write) => write.finish().await,
        }
    }

    /// Removes what was written, if that can be done.
    pub(super) async fn abandon(&self) {
        match self {
            PartialWrite::Cloud(write) => write.abandon().await,
            PartialWrite::Redis(write) => write.abandon().await,
        }
    }
}
