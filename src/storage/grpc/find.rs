//! FindMissingBlobs, in calls of as many digests as the server takes.

use std::collections::HashSet;

use futures::{StreamExt, TryStreamExt, stream};
use tonic::Status;

use super::Client;
use crate::{
    digest::Digest,
    instance::InstanceName,
    proto::reapi::FindMissingBlobsRequest,
    storage::{Error, batch},
};

impl Client {
    /// The digests that the CAS lacks, in the order given, without repetition.
    pub async fn find_missing(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        self.find_missing_of_distinct(instance, &batch::distinct(digests))
            .await
    }

    /// The same where each digest is given once, and none is of an empty blob.
    pub(super) async fn find_missing_of_distinct(
        &self,
        instance: &InstanceName,
        distinct: &[Digest],
    ) -> Result<Vec<Digest>, Error> {
        // One call has digests of one function.
        let mut calls: Vec<Vec<Digest>> = Vec::new();
        for run in distinct.chunk_by(|a, b| a.function() == b.function()) {
            let most = self.0.limits.digests();
            calls.extend(run.chunks(most).map(<[Digest]>::to_vec));
        }
        let answers: Vec<Vec<Digest>> = stream::iter(calls)
            .map(|digests| self.find_missing_of(instance, digests))
            .buffered(4)
            .try_collect()
            .await?;
        Ok(answers.concat())
    }

    /// Of digests of one function; in halves when the server does not take so many.
    async fn find_missing_of(
        &self,
        instance: &InstanceName,
        digests: Vec<Digest>,
    ) -> Result<Vec<Digest>, Error> {
        let mut missing = Vec::new();
        let (mut refused, mut accepted) = (false, 0);
        let mut open = vec![digests];
        while let Some(mut digests) = open.pop() {
            let count = digests.len();
            match self.find_missing_once(instance, &digests).await? {
                Ok(found) => {
                    accepted = accepted.max(count);
                    missing.extend(found);
                }
                Err(status) if count <= 1 => return Err(self.0.cas_server.error(&status, None)),
                Err(_) => {
                    refused = true;
                    let later = digests.split_off(count / 2);
                    open.extend([later, digests]);
                }
            }
        }
        if refused && accepted > 0 {
            self.0.limits.learn_digests(accepted);
        }
        Ok(missing)
    }

    /// The inner error is a refusal that a smaller call may not get.
    async fn find_missing_once(
        &self,
        instance: &InstanceName,
        digests: &[Digest],
    ) -> Result<Result<Vec<Digest>, Status>, Error> {
        let Some(function) = digests.first().map(Digest::function) else {
            return Ok(Ok(Vec::new()));
        };
        let request = || FindMissingBlobsRequest {
            instance_name: self.name_there(instance).to_string(),
            blob_digests: digests.iter().map(Digest::to_proto).collect(),
            digest_function: function.to_proto() as i32,
        };
        let answer = self.0.cas_server.divisible(|| {
            let (mut client, request) = (self.cas(), request());
            async move { client.find_missing_blobs(request).await }
        });
        let missing = match answer.await? {
            Ok(answer) => answer.missing_blob_digests,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if missing.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        let missing: HashSet<Digest> = missing
            .iter()
            .map(|digest| Digest::parse(Some(function), digest))
            .collect::<Result<_, _>>()
            .map_err(|error| {
                Error::Internal(format!(
                    "the CAS answered with an ill-formed digest: {error}"
                ))
            })?;
        let of_ours = digests.iter().filter(|digest| missing.contains(digest));
        Ok(Ok(of_ours.copied().collect()))
    }
}
