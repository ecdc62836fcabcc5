//! A client of any REAPI CAS and AC: batching, bounded concurrency, retries with back-off, typed
//! errors, single flight.

use std::{num::NonZeroUsize, sync::Arc};

use bytes::Bytes;

use super::{Content, Error};
use crate::{config::Endpoint, digest::Digest, instance::InstanceName, proto::reapi::ActionResult};

#[derive(Clone, Debug)]
pub struct Options {
    pub download_concurrency: NonZeroUsize,
    pub upload_concurrency: NonZeroUsize,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Client {
    _shared: Arc<()>,
}

impl Client {
    /// Connects at the first call, so that it never fails here.
    pub fn connect(_cas: &Endpoint, _action_cache: &Endpoint, _options: Options) -> Self {
        todo!()
    }

    /// One GetCapabilities, for `--check`: is there a CAS at the other end?
    pub async fn probe(&self) -> Result<(), Error> {
        todo!()
    }

    /// The digests that the CAS lacks, in the order given, without repetition.
    pub async fn find_missing(
        &self,
        _instance: &InstanceName,
        _digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        todo!()
    }

    /// A whole blob of at most `limit` bytes, verified.
    pub async fn read(
        &self,
        _instance: &InstanceName,
        _digest: &Digest,
        _limit: u64,
    ) -> Result<Bytes, Error> {
        todo!()
    }

    /// Whole blobs, verified, in the order asked for; each result on its own, so that a caller can
    /// tell all missing ones at once. Small ones travel in batches.
    pub async fn read_many(
        &self,
        _instance: &InstanceName,
        _digests: &[Digest],
        _limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        todo!()
    }

    /// Streams a blob into an open, empty file, verified; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        _instance: &InstanceName,
        _digest: &Digest,
        _file: Arc<std::fs::File>,
    ) -> Result<(), Error> {
        todo!()
    }

    /// Uploads what the CAS lacks. The content must match its digest: it is the server that checks.
    pub async fn upload(
        &self,
        _instance: &InstanceName,
        _blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        todo!()
    }

    /// `None` when there is no result.
    pub async fn action_result(
        &self,
        _instance: &InstanceName,
        _action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        todo!()
    }

    pub async fn update_action_result(
        &self,
        _instance: &InstanceName,
        _action: &Digest,
        _result: ActionResult,
    ) -> Result<(), Error> {
        todo!()
    }
}
