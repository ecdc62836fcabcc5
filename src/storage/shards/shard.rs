//! One shard: a server, or several that mirror each other.
//!
//! 1. What is written goes to all that are in use; one that takes it is enough.
//! 2. What is read comes from one of them; what that one lacks, or has damaged, comes from another, and is
//!    written where it was lacking.
//! 3. A blob is missing when every server that answers lacks it.

use std::{
    collections::{HashSet, VecDeque},
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt, future::join_all, stream};

use super::{member::Member, repair::Repairs};
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::ActionResult,
    storage::{BlobStream, Content, Error, blocking, grpc},
};

pub(super) struct Shard {
    pub(super) name: String,
    pub(super) members: Vec<Arc<Member>>,
    /// Who is read from, in turn.
    next: AtomicUsize,
    repairs: Repairs,
}

/// Blobs up to this are streamed when they have been read and verified: one that a server has damaged comes from
/// another one. Of larger ones, a part would have gone to who asked.
const LARGEST_READ_FIRST: u64 = 1 << 20;

/// Whether another server may have what this one failed to give. What it refuses, it may refuse by itself: it is busy,
/// say, or has another configuration.
pub(super) fn may_be_elsewhere(error: &Error) -> bool {
    match error {
        Error::Missing(_)
        | Error::Corrupt { .. }
        | Error::Unavailable(_)
        | Error::Internal(_)
        | Error::Full(_)
        | Error::Invalid(_) => true,
        Error::TooLarge { .. } => false,
    }
}

/// Members that were asked for a blob in vain.
struct TriedMembers {
    /// What is told when nobody else has it: that it is missing, if one says so.
    failure: Error,
    /// Where it is to be written if another one has it.
    lacking: Vec<Arc<Member>>,
}

impl TriedMembers {
    fn new(failure: Error) -> Self {
        TriedMembers {
            failure,
            lacking: Vec::new(),
        }
    }

    /// An error that would be the same elsewhere is the answer.
    fn fail(&mut self, member: Arc<Member>, error: Error) -> Result<(), Error> {
        if !may_be_elsewhere(&error) {
            return Err(error);
        }
        if matches!(error, Error::Missing(_)) {
            self.lacking.push(member);
        }
        if !matches!(self.failure, Error::Missing(_)) {
            self.failure = error;
        }
        Ok(())
    }
}

/// A blob, or a part of it, that comes from one member; what that one fails to give comes from the next one.
struct Reading {
    shard: Arc<Shard>,
    instance: InstanceName,
    digest: Digest,
    at: u64,
    end: u64,
    /// Whom nobody has asked yet.
    members: VecDeque<Arc<Member>>,
    tried: TriedMembers,
    open: Option<(Arc<Member>, BlobStream)>,
}

impl Reading {
    /// The next piece, which nobody has verified; `None` when all of them have come.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let (member, mut pieces) = match self.open.take() {
                Some(open) => open,
                None if self.at == self.end && self.at > 0 => return Ok(None),
                None => {
                    let Some(member) = self.members.pop_front() else {
                        return Err(self.tried.failure.clone());
                    };
                    let client = &member.client;
                    let pieces = client.unverified(&self.instance, &self.digest, self.at, self.end);
                    (member, pieces)
                }
            };
            let piece = async { Ok((pieces.next().await.transpose()?, pieces)) };
            match member.call(piece).await {
                Ok((piece, pieces)) => {
                    for to in self.tried.lacking.drain(..) {
                        let repairs = &self.shard.repairs;
                        repairs.copy_blob(&self.instance, &self.digest, &member, &to);
                    }
                    if let Some(piece) = &piece {
                        self.at += piece.len() as u64;
                        self.open = Some((member, pieces));
                    }
                    return Ok(piece);
                }
                Err(error) => self.tried.fail(member, error)?,
            }
        }
    }
}

impl Shard {
    pub(super) fn new(name: String, members: Vec<Arc<Member>>) -> Self {
        Shard {
            name,
            members,
            next: AtomicUsize::new(0),
            repairs: Repairs::default(),
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        self.members.iter().any(|member| member.is_usable())
    }

    /// Those in use; each begins in its turn.
    pub(super) fn usable(&self) -> Vec<Arc<Member>> {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.members.len();
        let (later, earlier) = self.members.split_at(first);
        let in_turn = earlier.iter().chain(later);
        in_turn
            .filter(|member| member.is_usable())
            .cloned()
            .collect()
    }

    fn lost(&self) -> Error {
        let name = &self.name;
        Error::Unavailable(format!(
            "shard {name} is out of use, since it does not answer"
        ))
    }

    pub(super) async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        let members = self.usable();
        let asked = members
            .iter()
            .map(|member| member.call(member.client.find_missing(instance, digests)));
        let mut answers = Vec::new();
        let mut failure = None;
        for (member, answer) in members.iter().zip(join_all(asked).await) {
            match answer {
                Ok(missing) => answers.push((member, HashSet::from_iter(missing))),
                Err(error) => failure = Some(error),
            }
        }
        let Some((first, lacking)) = answers.first() else {
            return Err(failure.unwrap_or_else(|| self.lost()));
        };
        let mut missing: HashSet<Digest> = lacking.clone();
        for (other, theirs) in &answers[1..] {
            for (from, to, lack) in [
                (other, first, lacking.difference(theirs)),
                (first, other, theirs.difference(lacking)),
            ] {
                for digest in lack {
                    self.repairs.copy_blob(instance, digest, from, to);
                }
            }
            missing.retain(|digest| theirs.contains(digest));
        }
        let missing = digests.iter().filter(|digest| missing.remove(digest));
        Ok(missing.copied().collect())
    }

    pub(super) async fn read_many(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
        limit: u64,
    ) -> Vec<Result<Bytes, Error>> {
        let mut results: Vec<Result<Bytes, Error>> =
            digests.iter().map(|_| Err(self.lost())).collect();
        // Who lacked which.
        let mut lacking: Vec<(usize, Arc<Member>)> = Vec::new();
        let mut open: Vec<usize> = (0..digests.len()).collect();
        for (number, member) in self.usable().into_iter().enumerate() {
            let wanted: Vec<Digest> = open.iter().map(|i| digests[*i]).collect();
            let work = member.client.read_many(instance, &wanted, limit);
            let answers = member.call_many(wanted.len(), work).await;
            for (i, answer) in std::mem::take(&mut open).into_iter().zip(answers) {
                match answer {
                    Err(error) if may_be_elsewhere(&error) => {
                        if matches!(error, Error::Missing(_)) {
                            lacking.push((i, member.clone()));
                        }
                        // That one has it not says more than that another could not be asked.
                        if number == 0 || !matches!(results[i], Err(Error::Missing(_))) {
                            results[i] = Err(error);
                        }
                        open.push(i);
                    }
                    answer => {
                        if answer.is_ok() {
                            for (_, to) in lacking.iter().filter(|(lacked, _)| *lacked == i) {
                                self.repairs.copy_blob(instance, &digests[i], &member, to);
                            }
                        }
                        results[i] = answer;
                    }
                }
            }
            if open.is_empty() {
                break;
            }
        }
        results
    }

    /// A stream whose first piece has come.
    pub(super) async fn stream(
        self: Arc<Self>,
        instance: InstanceName,
        digest: Digest,
        start: u64,
        end: u64,
    ) -> Result<BlobStream, Error> {
        let whole = start == 0 && end == digest.size();
        if whole && end <= LARGEST_READ_FIRST {
            let mut one = self
                .read_many(&instance, &[digest], LARGEST_READ_FIRST)
                .await;
            let content = one.pop().unwrap_or_else(|| Err(self.lost()))?;
            return Ok(stream::iter([Ok(content)]).boxed());
        }
        let mut reading = Reading {
            tried: TriedMembers::new(self.lost()),
            members: self.usable().into(),
            shard: self,
            instance,
            digest,
            at: start,
            end,
            open: None,
        };
        let first = stream::iter(reading.next().await?.map(Ok));
        let others = stream::try_unfold(reading, |mut reading| async move {
            let data = reading.next().await?;
            Ok(data.map(|data| (data, reading)))
        });
        let pieces = first.chain(others).boxed();
        Ok(match whole {
            true => grpc::verified(pieces, digest),
            false => pieces,
        })
    }

    pub(super) async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: &Arc<File>,
    ) -> Result<(), Error> {
        let mut tried = TriedMembers::new(self.lost());
        for member in self.usable() {
            let work = member.client.read_to_file(instance, digest, file.clone());
            match member.call(work).await {
                Ok(()) => {
                    for to in &tried.lacking {
                        self.repairs.copy_blob(instance, digest, &member, to);
                    }
                    return Ok(());
                }
                Err(error) => tried.fail(member, error)?,
            }
            let file = file.clone();
            blocking(move || file.set_len(0))
                .await?
                .map_err(Error::of_file)?;
        }
        Err(tried.failure)
    }

    pub(super) async fn upload(
        &self,
        instance: &InstanceName,
        blobs: &[(Digest, Content)],
    ) -> Result<(), Error> {
        let members = self.usable();
        let work = members
            .iter()
            .map(|member| member.call(member.client.upload(instance, blobs.to_vec())));
        self.one_is_enough(join_all(work).await)
    }

    pub(super) async fn action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
    ) -> Result<Option<ActionResult>, Error> {
        let mut failure = None;
        let mut answered = false;
        let mut lacking = Vec::new();
        for member in self.usable() {
            match member
                .call(member.client.action_result(instance, action))
                .await
            {
                Ok(Some(result)) => {
                    for to in lacking {
                        self.repairs.copy_result(instance, action, &result, to);
                    }
                    return Ok(Some(result));
                }
                Ok(None) => {
                    answered = true;
                    lacking.push(member);
                }
                Err(error) => failure = Some(error),
            }
        }
        match answered {
            true => Ok(None),
            false => Err(failure.unwrap_or_else(|| self.lost())),
        }
    }

    pub(super) async fn update_action_result(
        &self,
        instance: &InstanceName,
        action: &Digest,
        result: &ActionResult,
    ) -> Result<(), Error> {
        let members = self.usable();
        let work = members.iter().map(|member| {
            let client = &member.client;
            member.call(client.update_action_result(instance, action, result.clone()))
        });
        self.one_is_enough(join_all(work).await)
    }

    fn one_is_enough(&self, results: Vec<Result<(), Error>>) -> Result<(), Error> {
        let mut failure = self.lost();
        let mut succeeded = false;
        for result in results {
            match result {
                Ok(()) => succeeded = true,
                Err(error) => failure = error,
            }
        }
        match succeeded {
            true => Ok(()),
            false => Err(failure),
        }
    }
}
