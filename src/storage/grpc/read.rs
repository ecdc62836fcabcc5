//! Reading blobs.

use std::{os::unix::fs::FileExt, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream::FuturesUnordered};
use tonic::{Code, Status};

use super::{
    Client, OVERHEAD, SMALL, Seat,
    flight::{Passenger, Pilot},
    group, halve, retry, weight,
};
use crate::{
    digest::{Digest, Hasher},
    instance::InstanceName,
    proto::{bytestream::ReadRequest, reapi::BatchReadBlobsRequest},
    resource::ReadName,
    storage::{Error, blocking},
};

/// What a stream's pieces go into; it starts again from nothing when the content proves wrong.
enum Sink {
    Memory(BytesMut),
    File(Arc<std::fs::File>),
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
            let mut pilots = Vec::new();
            let mut passengers: Vec<(usize, Passenger)> = Vec::new();
            let mut landed: Vec<(usize, Passenger)> = Vec::new();
            for i in open.drain(..) {
                match self.shared.reads.board(instance, &digests[i]) {
                    Seat::Pilot(pilot) => {
                        // Its own result comes the way of all others'.
                        landed.push((i, pilot.passenger()));
                        pilots.push(pilot);
                    }
                    Seat::Passenger(passenger) => passengers.push((i, passenger)),
                }
            }
            self.fly(instance, pilots, batch_size).await;
            for (i, passenger) in landed.into_iter().chain(passengers) {
                match passenger.arrive().await {
                    Some(result) => results[i] = Some(result),
                    None => open.push(i),
                }
            }
        }
        results.into_iter().flatten().collect()
    }

    async fn fly(&self, instance: &InstanceName, pilots: Vec<Pilot>, batch_size: u64) {
        let fits =
            |pilot: &Pilot| pilot.digest().size() <= SMALL.min(batch_size.saturating_sub(OVERHEAD));
        let (small, large): (Vec<_>, Vec<_>) = pilots.into_iter().partition(fits);
        let mut flights = FuturesUnordered::new();
        for batch in group(small, batch_size, |pilot| pilot.digest().size()) {
            flights.push(futures::future::Either::Left(
                self.read_batch(instance, batch),
            ));
        }
        for pilot in large {
            flights.push(futures::future::Either::Right(async move {
                let content = self.read_stream(instance, pilot.digest()).await;
                pilot.land(content);
            }));
        }
        while flights.next().await.is_some() {}
    }

    /// Whoever asks has said that he can bear as much.
    async fn read_stream(&self, instance: &InstanceName, digest: &Digest) -> Result<Bytes, Error> {
        let sink = Sink::Memory(BytesMut::with_capacity(digest.size() as usize));
        match self.stream(instance, digest, sink).await? {
            Sink::Memory(content) => Ok(content.freeze()),
            Sink::File(_) => Ok(Bytes::new()),
        }
    }

    /// One batch; in halves, and at last by streams, when the server does not take it.
    async fn read_batch(&self, instance: &InstanceName, pilots: Vec<Pilot>) {
        let size = |pilot: &Pilot| pilot.digest().size();
        let mut refused = false;
        // The most that went through at once.
        let mut accepted = 0;
        let mut open = vec![pilots];
        while let Some(pilots) = open.pop() {
            let (count, total) = (pilots.len(), pilots.iter().map(size).sum());
            let refusal = self.read_batch_once(instance, pilots).await;
            let Some((mut pilots, status)) = refusal else {
                accepted = accepted.max(weight(count, total));
                continue;
            };
            refused = true;
            if pilots.len() > 1 {
                let [first, later] = halve(pilots, size);
                open.extend([later, first]);
                continue;
            }
            let Some(pilot) = pilots.pop() else {
                continue;
            };
            let content = self.read_stream(instance, pilot.digest()).await;
            // It was not the size.
            let hopeless = matches!(content, Err(Error::Invalid(_)));
            pilot.land(content);
            if hopeless {
                let error = retry::error(&status, None);
                for pilot in open.drain(..).flatten() {
                    pilot.land(Err(error.clone()));
                }
                return;
            }
        }
        if refused && accepted > 0 {
            self.shared.limits.learn_batch_size(accepted);
        }
    }

    /// A blob that comes corrupt, or with an error that may pass, is asked for again. What is left
    /// when the server refuses a call as a whole, with its status.
    async fn read_batch_once(
        &self,
        instance: &InstanceName,
        mut pilots: Vec<Pilot>,
    ) -> Option<(Vec<Pilot>, Status)> {
        let mut failures = retry::Failures::default();
        let mut corrupt_before = false;
        while let Some(first) = pilots.first() {
            let function = first.digest().function();
            let (same, other) = pilots
                .into_iter()
                .partition(|pilot| pilot.digest().function() == function);
            pilots = same;
            let rest: Vec<Pilot> = other;
            let request = BatchReadBlobsRequest {
                instance_name: instance.to_string(),
                digests: pilots.iter().map(|p| p.digest().to_proto()).collect(),
                acceptable_compressors: Vec::new(),
                digest_function: function.to_proto() as i32,
            };
            let permit = self.shared.downloads.acquire().await;
            let answer = retry::divisible(self.shared.timeouts.call, || {
                let (mut client, request) = (self.cas(), request.clone());
                async move { client.batch_read_blobs(request).await }
            });
            let answer = answer.await;
            drop(permit);
            let answer = match answer {
                Ok(Ok(answer)) => answer,
                Ok(Err(refusal)) => {
                    pilots.extend(rest);
                    return Some((pilots, refusal));
                }
                Err(error) => {
                    for pilot in pilots {
                        pilot.land(Err(error.clone()));
                    }
                    pilots = rest;
                    continue;
                }
            };
            let mut again = Vec::new();
            let mut trouble = None;
            let mut answers: std::collections::HashMap<_, _> = answer
                .responses
                .into_iter()
                .filter_map(|response| Some((response.digest.as_ref()?.hash.clone(), response)))
                .collect();
            for pilot in pilots {
                let digest = *pilot.digest();
                let Some(response) = answers.remove(&digest.hash_hex()) else {
                    pilot.land(Err(Error::Internal(format!(
                        "the CAS answered a BatchReadBlobs without blob {digest}"
                    ))));
                    continue;
                };
                let status = response.status.unwrap_or_default();
                if status.code != 0 {
                    let status = Status::new(Code::from_i32(status.code), status.message);
                    match status.code() {
                        Code::Unavailable | Code::Aborted | Code::ResourceExhausted => {
                            trouble = Some(status);
                            again.push(pilot);
                        }
                        _ => pilot.land(Err(retry::error(&status, Some(&digest)))),
                    }
                    continue;
                }
                let actual = function.digest_of(&response.data);
                if actual == digest {
                    pilot.land(Ok(response.data));
                } else if corrupt_before {
                    pilot.land(Err(Error::Corrupt {
                        expected: digest,
                        actual: Box::new(actual),
                    }));
                } else {
                    again.push(pilot);
                }
            }
            corrupt_before = true;
            if let Some(status) = trouble
                && let Err(error) = failures.wait(&status, None).await
            {
                for pilot in again.drain(..) {
                    pilot.land(Err(error.clone()));
                }
            }
            again.extend(rest);
            pilots = again;
        }
        None
    }

    /// Streams a blob into an open, empty file, verified; on error the file's content is undefined.
    pub async fn read_to_file(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        file: Arc<std::fs::File>,
    ) -> Result<(), Error> {
        if digest.size() <= SMALL {
            let content = self.read(instance, digest, SMALL).await?;
            let written = blocking(move || file.write_all_at(&content, 0)).await?;
            return written.map_err(write_error);
        }
        self.stream(instance, digest, Sink::File(file))
            .await
            .map(drop)
    }

    /// By ByteStream, resumed where it was interrupted; once more from the start when corrupt.
    async fn stream(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        mut sink: Sink,
    ) -> Result<Sink, Error> {
        let mut corrupt_before = false;
        loop {
            let mut hasher = digest.function().hasher();
            (sink, hasher) = self.receive(instance, digest, sink, hasher).await?;
            let actual = hasher.finish();
            if actual == *digest {
                return Ok(sink);
            }
            if corrupt_before {
                return Err(Error::Corrupt {
                    expected: *digest,
                    actual: Box::new(actual),
                });
            }
            corrupt_before = true;
            match &mut sink {
                Sink::Memory(content) => content.clear(),
                Sink::File(file) => file.set_len(0).map_err(write_error)?,
            }
        }
    }

    async fn receive(
        &self,
        instance: &InstanceName,
        digest: &Digest,
        mut sink: Sink,
        mut hasher: Hasher,
    ) -> Result<(Sink, Hasher), Error> {
        let mut failures = retry::Failures::default();
        loop {
            let permit = self.shared.downloads.acquire().await;
            let request = ReadRequest {
                resource_name: ReadName::format(instance, digest),
                read_offset: hasher.size() as i64,
                read_limit: 0,
            };
            let mut client = self.bytes();
            let silence = self.shared.timeouts.idle;
            let opened = retry::timely(silence, client.read(request));
            let end = match opened.await {
                Err(status) => Some(status),
                Ok(answer) => {
                    let mut stream = answer.into_inner();
                    loop {
                        let next = retry::timely(silence, stream.message());
                        let data = match next.await {
                            Ok(Some(message)) => message.data,
                            Ok(None) => break None,
                            Err(status) => break Some(status),
                        };
                        if hasher.size() + data.len() as u64 > digest.size() {
                            return Err(Error::Internal(format!(
                                "the CAS sent more than {} bytes for blob {digest}",
                                digest.size()
                            )));
                        }
                        (sink, hasher) = absorb(sink, hasher, data).await?;
                    }
                }
            };
            drop(permit);
            match end {
                None if hasher.size() == digest.size() => return Ok((sink, hasher)),
                None => {
                    let short = Status::aborted(format!(
                        "the stream ended after {} of {} bytes of blob {digest}",
                        hasher.size(),
                        digest.size()
                    ));
                    failures.wait(&short, Some(digest)).await?;
                }
                Some(status) => failures.wait(&status, Some(digest)).await?,
            }
        }
    }
}

/// Takes a piece of a large blob, away from the threads that talk to peers.
async fn absorb(mut sink: Sink, mut hasher: Hasher, data: Bytes) -> Result<(Sink, Hasher), Error> {
    blocking(move || {
        match &mut sink {
            Sink::Memory(content) => content.extend_from_slice(&data),
            Sink::File(file) => file
                .write_all_at(&data, hasher.size())
                .map_err(write_error)?,
        }
        hasher.update(&data);
        Ok((sink, hasher))
    })
    .await?
}

fn write_error(error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            Error::Full(format!("could not write a blob to a file: {error}"))
        }
        _ => Error::Internal(format!("could not write a blob to a file: {error}")),
    }
}
