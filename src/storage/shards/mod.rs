//! Storage of several servers: shards, each of which is a server or some that mirror each other. In this
//! order: `rendezvous`, which shard has what; `member` and `shard`, who is used; `repair`; this
//! file, what becomes of a call; `upload`, a client's upload that is passed on.
//!
//! 1. The first shard in a digest's order that is in use has it. While that is out of use, the next one
//!    has: what was only on the lost shard is missing, so that clients upload it again, and it is there
//!    when they do.
//! 2. What the first one lacks is read from the second one, too: it may have been put there while the first
//!    was out of use, or before the first was added. FindMissing asks the second one only when a server
//!    was out of use within the last hour.
//! 3. Every call ends: one that waits for a server that is taken out of use is made again elsewhere. All
//!    rounds together have a bound, which is also how long a call waits when no shard is in use, so that
//!    one that restarts is not noticed, except by the delay.

use std::{
    collections::HashSet,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use parking_lot::Mutex;

use self::{
    member::Member,
    rendezvous::Contender,
    shard::{Shard, may_be_elsewhere},
};
use super::{
    BlobStream, Content, Error, batch, content,
    grpc::{Client, LocalFiles, Options, Timeouts},
    retry::RetryPolicy,
    seen_outputs::SeenOutputs,
};
use crate::{
    config::{Endpoint, storage as config},
    digest::Digest,
    instance::InstanceName,
    proto::reapi::ActionResult,
};

mod member;
mod rendezvous;
mod repair;
mod shard;
mod upload;

pub use upload::ShardUpload;

/// From the first failure, how long a call is tried again at one server, before it counts as failed.
const RETRY_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a server may be silent that answers health checks.
const SILENCE: Duration = Duration::from_secs(20);

/// How long a call is made again because shards were lost meanwhile, or waits when none is in use.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long after a server was out of use blobs may be on the next shard.
const SETTLED_AFTER: Duration = Duration::from_secs(60 * 60);

/// All shards.
pub struct Shards {
    shards: Vec<(Contender, Arc<Shard>)>,
    /// How often any server was taken out of use, and what of it was seen when.
    losses: Arc<AtomicU64>,
    last_loss: Mutex<(u64, Option<Instant>)>,
    health_timeout: Duration,
    seen_outputs: SeenOutputs,
}

/// What a call asks of each shard.
type Parts<T> = Vec<(Arc<Shard>, Vec<T>)>;

/// The rounds of a call.
struct Rounds(Instant);

impl Rounds {
    fn begin() -> Self {
        Rounds(Instant::now())
    }

    /// The error when there should be no other round.
    async fn next(&self, text: String) -> Result<(), Error> {
        if self.0.elapsed() >= TIMEOUT {
            return Err(Error::Unavailable(text));
        }
        // Faults that come at once do not keep a processor busy.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok(())
    }
}

impl Shards {
    /// Connects at the first call; checks the health of all servers from now on. Within a runtime.
    pub fn start(
        shards: &[config::Shard],
        health: &config::Health,
        options: &Options,
    ) -> Arc<Self> {
        let losses: Arc<AtomicU64> = Arc::default();
        let start = |shard: &config::Shard| {
            let connect = |endpoint: &Endpoint| {
                let options = Options {
                    timeouts: Timeouts {
                        call: SILENCE,
                        idle: SILENCE,
                        capabilities: health.timeout.get(),
                    },
                    retry: RetryPolicy::budgeted(RETRY_TIMEOUT),
                    instance_name_prefix: InstanceName::parse(&shard.instance_name_prefix)
                        .unwrap_or_else(|_| InstanceName::empty()),
                    ..options.clone()
                };
                let client = Client::connect(endpoint, endpoint, options);
                let name = format!("{} at {endpoint}", shard.name);
                let limits = (health.faults, health.interval.get());
                Member::start(name, client, limits, losses.clone())
            };
            let members = shard.endpoints.iter().map(connect).collect();
            let shard_here = Shard::new(shard.name.clone(), members);
            (
                Contender::new(&shard.name, shard.weight),
                Arc::new(shard_here),
            )
        };
        Arc::new(Shards {
            shards: shards.iter().map(start).collect(),
            losses: losses.clone(),
            last_loss: Mutex::default(),
            health_timeout: health.timeout.get(),
            seen_outputs: SeenOutputs::default(),
        })
    }

    /// Tells each server's client where the files are that this host has already.
    pub(super) fn set_local_files(&self, files: &LocalFiles) {
        for member in self.shards.iter().flat_map(|(_, shard)| &shard.members) {
            member.client.set_local_files(files.clone());
        }
    }

    /// What their CAS had a moment ago.
    pub(super) fn seen_outputs(&self) -> &SeenOutputs {
        &self.seen_outputs
    }

    /// Whether at least one server answers, so that something can be done.
    pub async fn answers(&self) -> Result<(), Error> {
        let members = self.shards.iter().flat_map(|(_, shard)| &shard.members);
        let answers = join_all(members.map(|member| member.call(member.client.probe()))).await;
        match answers.iter().any(Result::is_ok) {
            true => Ok(()),
            false => answers.into_iter().collect(),
        }
    }

    fn usable(&self) -> impl Iterator<Item = &(Contender, Arc<Shard>)> {
        self.shards.iter().filter(|(_, shard)| shard.is_usable())
    }

    /// The shards that are in use, in a digest's order.
    fn order(&self, digest: &Digest) -> Vec<&Arc<Shard>> {
        let mut scored: Vec<(u64, &Arc<Shard>)> = self
            .usable()
            .map(|(contender, shard)| (contender.score(digest), shard))
            .collect();
        scored.sort_by(|(a, x), (b, y)| b.cmp(a).then_with(|| x.name.cmp(&y.name)));
        scored.into_iter().map(|(_, shard)| shard).collect()
    }

    /// The first one in a digest's order.
    fn owner(&self, digest: &Digest) -> Result<&Arc<Shard>, Error> {
        let scored = self
            .usable()
            .map(|(contender, shard)| (contender.score(digest), shard));
        let first = scored.max_by(|(a, x), (b, y)| a.cmp(b).then_with(|| y.name.cmp(&x.name)));
        first.map(|(_, shard)| shard).ok_or_else(|| {
            let names: Vec<&str> = self.shards.iter().map(|(_, shard)| &*shard.name).collect();
            Error::Unavailable(format!(
                "no shard of the storage answers, of {}; look at their servers' logs, and at the network",
                names.join(", ")
            ))
        })
    }

    /// Returns when a shard is in use, or it is no use to wait any longer.
    async fn wait_for_any(&self, rounds: &Rounds) {
        while self.usable().next().is_none() && rounds.0.elapsed() < TIMEOUT {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Items by their owners.
    fn by_owner<T>(&self, items: Vec<T>, digest: impl Fn(&T) -> Digest) -> Result<Parts<T>, Error> {
        let mut parts: Parts<T> = Vec::new();
        for item in items {
            let owner = self.owner(&digest(&item))?;
            match parts
                .iter_mut()
                .find(|(shard, _)| Arc::ptr_eq(shard, owner))
            {
                Some((_, part)) => part.push(item),
                None => parts.push((owner.clone(), vec![item])),
            }
        }
        Ok(parts)
    }

    /// Whether blobs may be on the next shard since a server was out of use.
    fn is_unsettled(&self) -> bool {
        let now = Instant::now();
        let losses = self.losses.load(Ordering::Relaxed);
        let mut last = self.last_loss.lock();
        let lost_now = self
            .shards
            .iter()
            .any(|(_, shard)| shard.members.iter().any(|member| !member.is_usable()));
        if losses != last.0 || lost_now {
            *last = (losses, Some(now));
        }
        last.1
            .is_some_and(|at| now.saturating_duration_since(at) < SETTLED_AFTER)
    }

    /// Bytes of the largest blob that all of them take.
    pub async fn maximum_blob_size(&self, instance: &InstanceName) -> u64 {
        let members = self.shards.iter().flat_map(|(_, shard)| &shard.members);
        let sizes = members.filter(|member| member.is_usable()).map(|member| {
            let size = member.client.maximum_blob_size(instance);
            tokio::time::timeout(self.health_timeout, size)
        });
        let sizes = join_all(sizes).await.into_iter().flatten();
        sizes.min().unwrap_or(u64::MAX)
    }

    /// The digests that the CAS lacks, in the order given, without repetition.
    pub async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        let distinct = batch::distinct(digests);
        let mut missing: HashSet<Digest> = HashSet::new();
        let (mut open, rounds) = (distinct.clone(), Rounds::begin());
        while !open.is_empty() {
            self.wait_for_any(&rounds).await;
            let parts = self.by_owner(std::mem::take(&mut open), |digest| *digest)?;
            let asked = parts
                .iter()
                .map(|(shard, part)| shard.find_missing(instance, part));
            let mut lost = None;
            for (answer, (_, part)) in join_all(asked).await.into_iter().zip(&parts) {
                match answer {
                    Ok(found) => missing.extend(found),
                    Err(Error::Unavailable(text)) => {
                        lost = Some(text);
                        open.extend(part);
                    }
                    Err(error) => return Err(error),
                }
            }
            if let Some(text) = lost {
                rounds.next(text).await?;
            }
        }
        if !missing.is_empty() && self.is_unsettled() {
            self.look_at_second(instance, &mut missing).await;
        }
        let missing = distinct
            .into_iter()
            .filter(|digest| missing.contains(digest));
        Ok(missing.collect())
    }

    /// Takes out what the second shard has.
    async fn look_at_second(&self, instance: &InstanceName, missing: &mut HashSet<Digest>) {
        for (_, shard) in &self.shards {
            let here = missing.iter().filter(|digest| {
                let second = self.order(digest).get(1).copied();
                second.is_some_and(|second| Arc::ptr_eq(second, shard))
            });
            let here: Vec<Digest> = here.copied().collect();
            if here.is_empty() {
                continue;
            }
            // One that cannot be asked has nothing.
            if let Ok(lacking) = shard.find_missing(instance, &here).await {
                let lacking: HashSet<Digest> = lacking.into_iter().collect();
                let has = here.iter().filter(|digest| !lacking.contains(digest));
                has.for_each(|digest| {
                    missing.remove(digest);
                });
            }
        }
    }

    /// Whole blobs of at most `limit` bytes each, verified, in the order asked for.
    pub async fn read_many(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        let mut results: Vec<Option<Result<Bytes, Error>>> = vec![None; digests.len()];
        let (mut open, rounds) = ((0..digests.len()).collect::<Vec<usize>>(), Rounds::begin());
        while !open.is_empty() {
            self.wait_for_any(&rounds).await;
            let parts = match self.by_owner(std::mem::take(&mut open), |i| digests[*i]) {
                Ok(parts) => parts,
                Err(error) => {
                    let unread = results.iter_mut().filter(|result| result.is_none());
                    unread.for_each(|result| *result = Some(Err(error.clone())));
                    break;
                }
            };
            let mut lost = None;
            for (i, answer) in Self::read_parts(&parts, instance, digests, limit).await {
                if let Err(Error::Unavailable(text)) = &answer {
                    lost = Some(text.clone());
                    open.push(i);
                }
                results[i] = Some(answer);
            }
            if let Some(text) = lost
                && rounds.next(text).await.is_err()
            {
                break;
            }
            for i in &open {
                results[*i] = None;
            }
        }
        self.read_from_second(instance, digests, limit, &mut results)
            .await;
        results.into_iter().flatten().collect()
    }

    async fn read_parts(
        parts: &[(Arc<Shard>, Vec<usize>)],
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<(usize, Result<Bytes, Error>)> {
        let reads = parts.iter().map(|(shard, part)| async move {
            let wanted: Vec<Digest> = part.iter().map(|i| digests[*i]).collect();
            let answers = shard.read_many(instance, &wanted, limit).await;
            part.iter().copied().zip(answers).collect::<Vec<_>>()
        });
        join_all(reads).await.into_iter().flatten().collect()
    }

    /// What the first shard lacks or has damaged.
    async fn read_from_second(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
        results: &mut [Option<Result<Bytes, Error>>],
    ) {
        let mut parts: Parts<usize> = Vec::new();
        for (i, result) in results.iter().enumerate() {
            let lacks = matches!(result, Some(Err(Error::Missing(_) | Error::Corrupt { .. })));
            let Some(second) = lacks
                .then(|| self.order(&digests[i]).get(1).copied())
                .flatten()
            else {
                continue;
            };
            match parts
                .iter_mut()
                .find(|(shard, _)| Arc::ptr_eq(shard, second))
            {
                Some((_, part)) => part.push(i),
                None => parts.push((second.clone(), vec![i])),
            }
        }
        for (i, answer) in Self::read_parts(&parts, instance, digests, limit).await {
            if answer.is_ok() {
                results[i] = Some(answer);
            }
        }
    }

    /// Asks the first shard, then the second one where the first lacks it. Again when they are lost.
    async fn at_first_or_second<T>(
        &self,
        digest: &Digest,
        ask: impl Fn(Arc<Shard>) -> BoxFuture<'static, Result<T, Error>>,
    ) -> Result<T, Error> {
        let rounds = Rounds::begin();
        loop {
            self.wait_for_any(&rounds).await;
            let error = match ask(self.owner(digest)?.clone()).await {
                Err(Error::Unavailable(text)) => {
                    rounds.next(text).await?;
                    continue;
                }
                Err(error @ (Error::Missing(_) | Error::Corrupt { .. })) => error,
                result => return result,
            };
            let second = self.order(digest).get(1).copied().cloned();
            return match second {
                Some(second) => ask(second)
                    .await
                    .map_err(|other| match may_be_elsewhere(&other) {
                        true => error,
                        false => other,
                    }),
                None => Err(error),
            };
        }
    }

    /// A stream whose first piece has come.
    pub async fn stream(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        start: u64,
        end: u64,
    ) -> Result<BlobStream, Error> {
        self.at_first_or_second(digest, |shard| {
            let (instance, digest) = (instance.clone(), *digest);
            Box::pin(shard.stream(instance, digest, start, end))
        })
        .await
    }

    /// Writes a blob into an open, empty file, verified; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: Arc<File>,
    ) -> Result<(), Error> {
        self.at_first_or_second(digest, |shard| {
            let (instance, digest, file) = (instance.clone(), *digest, file.clone());
            Box::pin(async move { shard.read_to_file(&instance, &digest, &file).await })
        })
        .await
    }

    /// Uploads what the CAS lacks of these.
    pub async fn upload(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Content)>,
    ) -> Result<(), Error> {
        let (mut open, rounds) = (blobs, Rounds::begin());
        while !open.is_empty() {
            self.wait_for_any(&rounds).await;
            let parts = self.by_owner(std::mem::take(&mut open), |(digest, _)| *digest)?;
            let uploads = parts
                .iter()
                .map(|(shard, part)| shard.upload(instance, part));
            let mut lost = None;
            for (answer, (_, part)) in join_all(uploads).await.into_iter().zip(&parts) {
                match answer {
                    Ok(()) => {}
                    Err(Error::Unavailable(text)) => {
                        lost = Some(text);
                        open.extend(part.iter().cloned());
                    }
                    Err(error) => return Err(error),
                }
            }
            if let Some(text) = lost {
                rounds.next(text).await?;
            }
        }
        Ok(())
    }

    /// Uploads whole blobs that somebody else sent, once they have proved right.
    pub async fn put_many(
        &self,
        instance: &InstanceName,
        blobs: Vec<(Digest, Bytes)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        content::put_verified(blobs, |right| self.upload(instance, right)).await
    }

    /// `None` when there is no result.
    pub async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let rounds = Rounds::begin();
        loop {
            self.wait_for_any(&rounds).await;
            match self.owner(action)?.action_result(instance, action).await {
                Ok(None) if self.is_unsettled() => break,
                Err(Error::Unavailable(text)) => rounds.next(text).await?,
                result => return result,
            }
        }
        match self.order(action).get(1) {
            Some(second) => Ok(second.action_result(instance, action).await.ok().flatten()),
            None => Ok(None),
        }
    }

    /// Keeps an action's result in the Action Cache.
    pub async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: ActionResult,
    ) -> Result<(), Error> {
        let rounds = Rounds::begin();
        loop {
            self.wait_for_any(&rounds).await;
            let owner = self.owner(action)?;
            match owner.update_action_result(instance, action, &result).await {
                Err(Error::Unavailable(text)) => rounds.next(text).await?,
                result => return result,
            }
        }
    }

    /// Passes on an upload of a client to the servers that the blob belongs to.
    pub fn forward_upload(&self, name: &str, digest: Digest) -> Result<ShardUpload, Error> {
        let members = self.owner(&digest)?.usable();
        Ok(ShardUpload::start(members, name, digest))
    }

    /// How many bytes of a client's upload all servers have that it goes to.
    pub async fn upload_progress(&self, name: &str, digest: &Digest) -> Result<u64, Error> {
        let members = self.owner(digest)?.usable();
        let asked = members
            .iter()
            .map(|member| member.call(member.client.upload_progress(name)));
        let progress = join_all(asked).await.into_iter().flatten().min();
        Ok(progress.unwrap_or(0))
    }
}
