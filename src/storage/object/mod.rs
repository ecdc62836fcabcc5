//! Object stores and Redis: blobs and results as values of their names, without anybody who understands them.
//! In this order: `service`, what is asked of both; `cloud`, with its HTTP (`http`) and what it shows
//! (`secrets`); `redis`; `health`, whether a service is asked; this file, who is asked and what is there; `read` and `write`, blobs.
//!
//! ```text
//! PREFIX/cas/FUNCTION/HASH-SIZE           a blob, whatever its instance
//! PREFIX/ac/INSTANCE/FUNCTION/HASH-SIZE   an action's result, after a checksum of it and of its action
//! ```
//!
//! 1. What is read has its digest, as a whole; what is written has it, too. A value that is another one is
//!    missing until it is uploaded again, whatever the service says of it.
//! 2. Blobs are kept in the cache, if there is one: an embedded store, which is read first. Whether a blob is
//!    there, and results, the service alone says: the cache may have what others can't read.
//! 3. That a blob is there is believed for five seconds. That it is not is never.
//! 4. Every call ends, and is made again as long as `retry` says, or until the service is taken out of use.
//!    What is under way in memory is bounded.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Semaphore;

use self::{
    cloud::{Cloud, Connecting},
    health::ServiceHealth,
    redis::Redis,
    service::{FailedAttempt, Service},
};
use super::{
    Error, batch, embedded, grpc::Options, recently::Recently, retry::RetryPolicy,
    seen_outputs::SeenOutputs, single_flight::SingleFlight,
};
use crate::{
    config::{
        object_storage::{ObjectService, ObjectStores},
        storage::Health,
    },
    daemon::Failure,
    digest::Digest,
    instance::InstanceName,
    proto::reapi::ActionResult,
};

mod attempt;
mod cloud;
mod health;
mod http;
mod read;
mod redis;
mod secrets;
mod service;
mod write;

/// How long a blob is believed to be there that was, and how many are.
const LIFETIME: Duration = Duration::from_secs(5);
const MOST_BELIEVED: usize = 200_000;

/// Blobs that are known to be damaged.
const MOST_DAMAGED: usize = 10_000;

/// An action's result is no larger.
const LARGEST_RESULT: u64 = 64 << 20;

/// Bytes of blobs that are being written, all together.
const MEMORY: usize = 128 << 20;

/// CAS and AC in a service.
pub struct ObjectStorage {
    service: Arc<Service>,
    health: Arc<ServiceHealth>,
    /// With its slash; before all names.
    prefix: String,
    /// Blobs on this host's disk.
    cache: Option<Arc<embedded::Store>>,
    retry: RetryPolicy,
    calls: Semaphore,
    /// In KiB.
    memory: Semaphore,
    reads: SingleFlight<Digest, Result<Bytes, Error>>,
    fills: SingleFlight<Digest, ()>,
    present: Mutex<Recently<Digest>>,
    damaged: Mutex<HashSet<Digest>>,
    seen_outputs: SeenOutputs,
}

impl ObjectStorage {
    /// Connects at the first call; looks at the health of the service from now on. Within a runtime.
    /// `cache` is where blobs are kept that pass.
    pub fn open(
        service: ObjectService,
        config: &ObjectStores<'_>,
        health: &Health,
        cache: Option<Arc<embedded::Store>>,
        options: &Options,
    ) -> Result<Arc<Self>, Failure> {
        let credentials = &options.credentials;
        let timeout = options.timeouts.idle;
        let with = Connecting {
            credentials,
            timeout,
        };
        if let (ObjectService::S3, Some(secret)) =
            (service, credentials.secret(service.secret_key()))
        {
            secrets::aws_credential(&secret).map_err(|message| Failure::Configuration {
                key: service.secret_key(),
                message,
            })?;
        }
        let (prefix, service) = match service {
            ObjectService::S3 => (
                &config.s3.prefix,
                Service::Cloud(Cloud::s3(config.s3, &with)?),
            ),
            ObjectService::Gcs => {
                let cloud = Cloud::gcs(config.gcs, &with)?;
                (&config.gcs.prefix, Service::Cloud(cloud))
            }
            ObjectService::Azure => {
                let cloud = Cloud::azure(config.azure, &with)?;
                (&config.azure.prefix, Service::Cloud(cloud))
            }
            ObjectService::Redis => {
                let redis = Redis::new(config.redis, credentials, timeout);
                (&config.redis.prefix, Service::Redis(redis))
            }
        };
        let service = Arc::new(service);
        let service_health = ServiceHealth::new(service.place(), health.faults);
        let probed = service.clone();
        service_health.watch(health, move || {
            let service = probed.clone();
            async move { service.probe().await.map_err(|failed| failed.error) }
        });
        Ok(Arc::new(ObjectStorage {
            health: service_health,
            prefix: match prefix.as_str() {
                "" => String::new(),
                prefix => format!("{prefix}/"),
            },
            cache,
            retry: options.retry.clone(),
            calls: Semaphore::new(service.concurrency()),
            memory: Semaphore::new(MEMORY >> 10),
            reads: SingleFlight::default(),
            fills: SingleFlight::default(),
            present: Mutex::new(Recently::new(LIFETIME, MOST_BELIEVED)),
            damaged: Mutex::default(),
            seen_outputs: SeenOutputs::default(),
            service,
        }))
    }

    /// Asks the service once, and tells in the log when it is not there or does not let us in: else nobody would
    /// know before the first action. Within a runtime.
    pub(super) fn warn_of_refusal(&self) {
        let service = self.service.clone();
        tokio::spawn(async move {
            if let Err(failed) = service.probe().await {
                tracing::warn!(
                    service = service.place(),
                    error = %failed.error,
                    "the storage does not do what it is asked; whoever needs it is refused until it does"
                );
            }
        });
    }

    /// Blobs of it on this host's disk.
    pub fn cache(&self) -> Option<&Arc<embedded::Store>> {
        self.cache.as_ref()
    }

    /// What its CAS had a moment ago.
    pub(super) fn seen_outputs(&self) -> &SeenOutputs {
        &self.seen_outputs
    }

    /// Bytes of the largest blob that is taken.
    pub fn maximum_blob_size(&self) -> u64 {
        let cached = self.cache.as_ref().map(|cache| cache.maximum_blob_size());
        let most = self.service.largest_value();
        cached.map_or(most, |cached| cached.min(most))
    }

    /// One question, for `--check`: is it there, and does it let us in?
    pub async fn probe(&self) -> Result<(), Error> {
        self.service.probe().await.map_err(|failed| failed.error)
    }

    /// The digests that the CAS lacks, in the order given, without repetition.
    pub async fn find_missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, Error> {
        let distinct = batch::distinct(digests);
        let unknown = {
            let (mut present, now) = (self.present.lock(), Instant::now());
            let unknown = distinct
                .iter()
                .filter(|digest| !present.contains(digest, now));
            unknown.copied().collect::<Vec<Digest>>()
        };
        let looks = unknown.into_iter().map(|digest| async move {
            let is_there = self.look(&digest).await?;
            Ok::<_, Error>((!is_there).then_some(digest))
        });
        let looks = stream::iter(looks).buffer_unordered(self.service.concurrency());
        let missing: Vec<Option<Digest>> = looks.try_collect().await?;
        let missing: HashSet<Digest> = missing.into_iter().flatten().collect();
        let missing = distinct
            .into_iter()
            .filter(|digest| missing.contains(digest));
        Ok(missing.collect())
    }

    async fn look(&self, digest: &Digest) -> Result<bool, Error> {
        if self.damaged.lock().contains(digest) {
            return Ok(false);
        }
        let (name, asked) = (self.blob_name(digest), Instant::now());
        let size = self.call(|| self.service.size(&name)).await?;
        let is_there = size == Some(digest.size());
        if is_there {
            // As old as the question.
            self.present.lock().insert(*digest, asked);
        }
        Ok(is_there)
    }

    /// `None` when there is no result.
    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let name = self.result_name(instance, action);
        let value = self
            .call(|| self.service.read_all(&name, LARGEST_RESULT))
            .await?;
        let Some(value) = value else {
            return Ok(None);
        };
        let result = opened(&name, value);
        if result.is_none() {
            let (action, instance) = (action.hash_hex(), instance.as_str());
            tracing::warn!(
                action,
                instance,
                "the storage gave something else than the result of the action, which counts as none"
            );
        }
        Ok(result)
    }

    /// Keeps an action's result, in place of an older one.
    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: &ActionResult,
    ) -> Result<(), Error> {
        let name = self.result_name(instance, action);
        let value = sealed(&name, result);
        self.call(|| self.service.write(&name, value.clone())).await
    }

    fn blob_name(&self, digest: &Digest) -> String {
        let (prefix, function) = (&self.prefix, digest.function().name());
        format!(
            "{prefix}cas/{function}/{}-{}",
            digest.hash_hex(),
            digest.size()
        )
    }

    fn result_name(&self, instance: &InstanceName, action: &Digest) -> String {
        let (prefix, function) = (&self.prefix, action.function().name());
        let instance = match instance.as_str() {
            "" => String::new(),
            name => format!("{name}/"),
        };
        let (hash, size) = (action.hash_hex(), action.size());
        format!("{prefix}ac/{instance}{function}/{hash}-{size}")
    }

    /// An attempt, and others as long as they may help, each in its turn.
    async fn call<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, FailedAttempt>>,
    {
        let work = async {
            let mut attempts = self.retry.attempts();
            loop {
                let done = {
                    // Never closed.
                    let _turn = self.calls.acquire().await;
                    attempt().await
                };
                let error = done.as_ref().err().map(|failed| &failed.error);
                self.health.note_attempt(error);
                match done {
                    Ok(value) => return Ok(value),
                    Err(failed) => {
                        if !attempts.wait(failed.transience).await {
                            return Err(failed.error);
                        }
                    }
                }
            }
        };
        self.health.call(work).await
    }

    /// The refusal of a call while the service is out of use.
    pub(super) fn require_usable(&self) -> Result<(), Error> {
        self.health.require_usable()
    }

    /// A blob that the service has is another one: it is missing until somebody uploads it again.
    fn note_damaged(&self, digest: &Digest) {
        tracing::warn!(
            blob = %digest,
            "the storage gave other bytes than those of the blob, which counts as missing until it is uploaded again"
        );
        let mut damaged = self.damaged.lock();
        if damaged.len() >= MOST_DAMAGED {
            damaged.clear();
        }
        damaged.insert(*digest);
        drop(damaged);
        self.note_missing();
    }

    /// What was there a moment ago may be gone.
    fn note_missing(&self) {
        self.present.lock().clear();
        self.seen_outputs.forget();
    }
}

/// A result as it is kept under its name.
fn sealed(name: &str, result: &ActionResult) -> Bytes {
    let mut value = BytesMut::with_capacity(4 + result.encoded_len());
    let message = result.encode_to_vec();
    value.put_u32_le(checksum(name, &message));
    value.put_slice(&message);
    value.freeze()
}

/// `None` when it is not what was kept under this name.
fn opened(name: &str, mut value: Bytes) -> Option<ActionResult> {
    if value.len() < 4 {
        return None;
    }
    let message = value.split_off(4);
    let expected = checksum(name, &message).to_le_bytes();
    if *value != expected {
        return None;
    }
    ActionResult::decode(message).ok()
}

fn checksum(name: &str, message: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(name.as_bytes());
    hasher.update(message);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_of_another_action_or_with_other_bytes_is_none() {
        let result = ActionResult {
            exit_code: 7,
            stdout_raw: Bytes::from_static(b"hello"),
            ..ActionResult::default()
        };
        let value = sealed("ac/sha256/a-1", &result);
        assert_eq!(opened("ac/sha256/a-1", value.clone()), Some(result));
        assert_eq!(opened("ac/sha256/b-1", value.clone()), None);
        for at in 0..value.len() {
            let mut other = value.to_vec();
            other[at] ^= 1;
            assert_eq!(opened("ac/sha256/a-1", other.into()), None);
        }
        assert_eq!(opened("ac/sha256/a-1", value.slice(..3)), None);
    }
}
