//! Reading whole blobs: small ones travel in batches, and nothing is fetched twice at a time.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use tonic::{Code, Status};

use super::{Client, FlightKey, LARGEST_BATCHED, OVERHEAD, sent_size, status::may_pass};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::reapi::{self, BatchReadBlobsRequest, batch_read_blobs_response::Response},
    resource::Compressor,
    storage::{
        Error, batch, compression, computing,
        single_flight::{self, Follower, Role},
        verify,
    },
};

type ReadLeader = single_flight::Leader<FlightKey, Result<Bytes, Error>>;

impl single_flight::Leader<FlightKey, Result<Bytes, Error>> {
    fn digest(&self) -> &Digest {
        &self.key().1
    }
}

impl Client {
    /// Whole blobs, verified, in the order asked for; each result on its own, so that a caller can
    /// tell all missing ones at once. Small ones travel in batches.
    pub async fn read_many(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        let mut results: Vec<Option<Result<Bytes, Error>>> = vec![None; digests.len()];
        let mut open: Vec<usize> = Vec::new();
        for (i, (digest, result)) in digests.iter().zip(&mut results).enumerate() {
            if digest.size() > limit {
                *result = Some(Err(Error::TooLarge {
                    digest: *digest,
                    limit,
                }));
            } else if digest.is_empty_blob() {
                *result = Some(Ok(Bytes::new()));
            } else {
                open.push(i);
            }
        }
        let batch_size = self.batch_size(instance).await;
        // More than one round only if somebody who fetched for us gave up.
        while !open.is_empty() {
            let mut leaders: Vec<ReadLeader> = Vec::new();
            let mut own: Vec<(usize, Follower<_>)> = Vec::new();
            let mut followers = Vec::new();
            for i in open.drain(..) {
                match self.0.reads.join((instance.clone(), digests[i])) {
                    Role::Leader(leader) => {
                        // Its own result comes the way of all others'.
                        own.push((i, leader.follower()));
                        leaders.push(leader);
                    }
                    Role::Follower(follower) => followers.push((i, follower)),
                }
            }
            self.fetch(instance, leaders, batch_size).await;
            for (i, follower) in own.into_iter().chain(followers) {
                match follower.result().await {
                    Some(result) => results[i] = Some(result),
                    None => open.push(i),
                }
            }
        }
        results.into_iter().flatten().collect()
    }

    /// Lets every leader finish.
    async fn fetch(&self, instance: &InstanceName, leaders: Vec<ReadLeader>, batch_size: u64) {
        let fits = |leader: &ReadLeader| {
            leader.digest().size() <= LARGEST_BATCHED.min(batch_size.saturating_sub(OVERHEAD))
        };
        let (small, large): (Vec<_>, Vec<_>) = leaders.into_iter().partition(fits);
        let mut fetches = FuturesUnordered::new();
        let size = |leader: &ReadLeader| leader.digest().size() + OVERHEAD;
        let groups = batch::by_function(small, ReadLeader::digest).into_iter();
        for batch in groups.flat_map(|group| batch::split(group, batch_size, usize::MAX, size)) {
            fetches.push(futures::future::Either::Left(
                self.read_batch(instance, batch),
            ));
        }
        for leader in large {
            fetches.push(futures::future::Either::Right(async move {
                let content = self.read_stream(instance, leader.digest()).await;
                leader.finish(content);
            }));
        }
        while fetches.next().await.is_some() {}
    }

    /// One batch; in halves, and at last by streams, when the server does not take it.
    async fn read_batch(&self, instance: &InstanceName, leaders: Vec<ReadLeader>) {
        let size = |leader: &ReadLeader| leader.digest().size();
        let mut refused = false;
        // The most that went through at once.
        let mut accepted = 0;
        let mut open = vec![leaders];
        while let Some(leaders) = open.pop() {
            let (count, total) = (leaders.len(), leaders.iter().map(size).sum());
            let refusal = self.read_batch_once(instance, leaders).await;
            let Some((mut leaders, status)) = refusal else {
                accepted = accepted.max(sent_size(count, total));
                continue;
            };
            refused = true;
            if leaders.len() > 1 {
                let [first, later] = batch::halve(leaders, |leader| size(leader) + OVERHEAD);
                open.extend([later, first]);
                continue;
            }
            let Some(leader) = leaders.pop() else {
                continue;
            };
            let content = self.read_stream(instance, leader.digest()).await;
            // It was not the size.
            let hopeless = matches!(content, Err(Error::Invalid(_)));
            leader.finish(content);
            if hopeless {
                let error = self.0.cas_server.error(&status, None);
                for leader in open.drain(..).flatten() {
                    leader.finish(Err(error.clone()));
                }
                return;
            }
        }
        if refused && accepted > 0 {
            self.0.limits.learn_batch_size(accepted);
        }
    }

    /// Blobs of one digest function. One that comes corrupt, or with an error that may pass, is asked for again.
    /// What is left when the server refuses a call as a whole, with its status.
    async fn read_batch_once(
        &self,
        instance: &InstanceName,
        mut leaders: Vec<ReadLeader>,
    ) -> Option<(Vec<ReadLeader>, Status)> {
        let mut attempts = self.0.cas_server.attempts();
        let mut corrupt_before = HashSet::new();
        while let Some(first) = leaders.first() {
            let function = first.digest().function();
            let digests: Vec<Digest> = leaders.iter().map(|leader| *leader.digest()).collect();
            let compresses = self.compresses_batches(instance).await;
            let request = || BatchReadBlobsRequest {
                instance_name: self.name_there(instance).to_string(),
                digests: digests.iter().map(Digest::to_proto).collect(),
                acceptable_compressors: match compresses {
                    true => vec![Compressor::Zstd.to_proto()],
                    false => Vec::new(),
                },
                digest_function: function.to_proto() as i32,
            };
            let permit = self.0.downloads.acquire().await;
            let answer = self.0.cas_server.divisible(|| {
                let (mut client, request) = (self.cas(), request());
                async move { client.batch_read_blobs(request).await }
            });
            let answer = answer.await;
            drop(permit);
            let contents = match answer {
                Ok(Ok(answer)) => {
                    let received = answer.responses.iter().map(|one| one.data.len() as u64);
                    let bytes = received.chain(digests.iter().map(Digest::size)).sum();
                    let work = move || contents_of(function, answer.responses, &digests);
                    computing(bytes, work).await
                }
                Ok(Err(refusal)) => return Some((leaders, refusal)),
                Err(error) => Err(error),
            };
            let contents = match contents {
                Ok(contents) => contents,
                Err(error) => {
                    for leader in leaders {
                        leader.finish(Err(error.clone()));
                    }
                    return None;
                }
            };
            let mut again = Vec::new();
            let mut trouble = None;
            for (leader, content) in leaders.into_iter().zip(contents) {
                let digest = leader.digest();
                match content {
                    BatchContent::Verified(content) => leader.finish(Ok(content)),
                    BatchContent::Corrupt(_) if corrupt_before.insert(*digest) => {
                        again.push(leader);
                    }
                    BatchContent::Corrupt(error) => leader.finish(Err(error)),
                    BatchContent::Failed(status) if may_pass(&status) => {
                        trouble = Some(status);
                        again.push(leader);
                    }
                    BatchContent::Failed(status) => {
                        let error = self.0.cas_server.error(&status, Some(digest));
                        leader.finish(Err(error));
                    }
                    BatchContent::Absent => {
                        let error =
                            format!("the CAS answered a BatchReadBlobs without blob {digest}");
                        leader.finish(Err(Error::Internal(error)));
                    }
                }
            }
            if let Some(status) = trouble
                && let Err(error) = self.0.cas_server.wait(&mut attempts, &status, None).await
            {
                for leader in again.drain(..) {
                    leader.finish(Err(error.clone()));
                }
            }
            leaders = again;
        }
        None
    }
}

/// What a CAS answered of one blob of a batch.
enum BatchContent {
    Verified(Bytes),
    Corrupt(Error),
    Failed(Status),
    Absent,
}

/// Where in a batch a blob was asked for, by what its answer says of it.
struct AskedPositions {
    /// `None` where the hash was asked for with several sizes.
    by_hash: HashMap<String, Option<usize>>,
    /// Where there are such hashes.
    by_digest: HashMap<Digest, usize>,
}

impl AskedPositions {
    fn new(digests: &[Digest]) -> Self {
        let mut by_hash = HashMap::with_capacity(digests.len());
        for (position, digest) in digests.iter().enumerate() {
            let entry = by_hash.entry(digest.hash_hex());
            entry.and_modify(|it| *it = None).or_insert(Some(position));
        }
        let by_digest = match by_hash.len() == digests.len() {
            true => HashMap::new(),
            false => digests.iter().copied().zip(0..).collect(),
        };
        AskedPositions { by_hash, by_digest }
    }

    /// The hash is enough where it is clear: some servers answer without the size.
    fn of(&self, function: DigestFunction, answered: &reapi::Digest) -> Option<usize> {
        self.by_hash.get(&answered.hash)?.or_else(|| {
            let digest = Digest::parse(Some(function), answered).ok()?;
            self.by_digest.get(&digest).copied()
        })
    }
}

/// For each digest, all of one function, what the answer has of it: decompressed and verified. What cannot be
/// decompressed is taken as it came, so that it has not its digest. What was not asked for is dropped.
fn contents_of(
    function: DigestFunction,
    responses: Vec<Response>,
    digests: &[Digest],
) -> Vec<BatchContent> {
    let asked = AskedPositions::new(digests);
    let mut answers: Vec<Option<Response>> = vec![None; digests.len()];
    for response in responses {
        let of = response.digest.as_ref();
        if let Some(position) = of.and_then(|of| asked.of(function, of))
            && let Some(answer) = answers.get_mut(position)
        {
            *answer = Some(response);
        }
    }
    let content = |(digest, response): (&Digest, Option<Response>)| {
        let Some(response) = response else {
            return BatchContent::Absent;
        };
        let status = response.status.unwrap_or_default();
        if status.code != 0 {
            return BatchContent::Failed(Status::new(Code::from_i32(status.code), status.message));
        }
        let mut content = response.data;
        if response.compressor == Compressor::Zstd.to_proto()
            && let Ok(decompressed) = compression::decode_whole(content.clone(), digest.size())
        {
            content = decompressed;
        }
        match verify(digest, function.digest_of(&content)) {
            Ok(()) => BatchContent::Verified(content),
            Err(error) => BatchContent::Corrupt(error),
        }
    };
    digests.iter().zip(answers).map(content).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(digest: &Digest, data: &'static [u8], code: i32) -> Response {
        Response {
            digest: Some(digest.to_proto()),
            data: data.into(),
            status: Some(crate::proto::rpc::Status {
                code,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn each_blob_gets_its_own_answer_also_where_another_has_its_hash() {
        let function = DigestFunction::Sha256;
        let right = function.digest_of(b"right");
        let longer = Digest::new(function, right.hash_bytes(), right.size() + 1);
        let (other, unasked) = (function.digest_of(b"other"), function.digest_of(b"unasked"));
        let asked = [longer, right, other];
        let mut responses = vec![
            response(&unasked, b"unasked", 0),
            response(&right, b"right", 0),
            response(&longer, b"", 5),
            response(&other, b"other", 0),
        ];
        // A server that tells no size.
        responses[3].digest.as_mut().unwrap().size_bytes = 0;
        for _ in 0..2 {
            let contents = contents_of(function, responses.clone(), &asked);
            assert!(
                matches!(&contents[0], BatchContent::Failed(status) if status.code() == Code::NotFound)
            );
            assert!(matches!(&contents[1], BatchContent::Verified(content) if content == "right"));
            assert!(matches!(&contents[2], BatchContent::Verified(content) if content == "other"));
            responses.reverse();
        }
        let contents = contents_of(
            function,
            responses,
            &[unasked, function.digest_of(b"absent")],
        );
        assert!(matches!(
            contents[..],
            [BatchContent::Verified(_), BatchContent::Absent]
        ));
    }
}
