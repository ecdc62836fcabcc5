//! BatchUpdateBlobs and BatchReadBlobs.

use std::collections::HashMap;

use bytes::Bytes;
use tonic::Code;

use super::{
    rule::{Expect, Outcome, ensure, expect_code, rules, unsupported},
    server::{Server, update, wrong_hash},
};

rules! {
    Must, "ContentAddressableStorage.BatchUpdateBlobs", "each blob is stored, and answered once, with its digest and status OK", update_many;
    Must, "ContentAddressableStorage.BatchUpdateBlobs", "a blob that does not match its hash is INVALID_ARGUMENT, on its own, and is not stored", update_mismatch;
    Must, "ContentAddressableStorage.BatchUpdateBlobs", "a blob that does not match its size is INVALID_ARGUMENT, on its own", update_wrong_size;
    Must, "ContentAddressableStorage.BatchUpdateBlobs", "a blob that is there already is OK", update_again;
    Must, "ContentAddressableStorage.BatchUpdateBlobs", "the empty blob is OK", update_empty;
    Must, "CacheCapabilities.max_batch_total_size_bytes", "a batch of the size announced is stored, and can be read in one call", batch_at_limit;
    Must, "CacheCapabilities.max_batch_total_size_bytes", "many small blobs of the size announced are stored in one call", small_blobs_at_limit;
    Should, "ContentAddressableStorage.BatchUpdateBlobs", "a batch beyond the size announced is stored, or INVALID_ARGUMENT", update_beyond_limit;
    Must, "ContentAddressableStorage.BatchReadBlobs", "each blob is answered once, with its digest, its content and status OK", read_many;
    Must, "ContentAddressableStorage.BatchReadBlobs", "a blob that is missing is NOT_FOUND, on its own", read_missing;
    Should, "ContentAddressableStorage.BatchReadBlobs", "a batch beyond the size announced is answered, or INVALID_ARGUMENT", read_beyond_limit;
    Must, "BatchReadBlobsResponse.Response.compressor", "the content is not compressed unless the request accepts it", read_identity;
    Must, "BatchUpdateBlobsRequest.Request.compressor", "a compressor that is not announced is not taken as if it were none", update_other_compressor;
}

/// Larger batches than these are not tried, whatever is announced.
const LARGEST_BATCH: i64 = 8 << 20;

fn code(status: Option<&bb_remote_execution::proto::rpc::Status>) -> Code {
    Code::from_i32(status.map_or(0, |status| status.code))
}

async fn update_many(server: &Server) -> Outcome {
    let contents: Vec<Bytes> = [1_000, 17, 70_000].map(|size| server.random(size)).into();
    let requests = contents
        .iter()
        .map(|content| update(&server.digest(content), content.clone()));
    let answer = server.batch_update(requests.collect()).await;
    let answer = answer.expect_ok("BatchUpdateBlobs")?;
    ensure!(answer.len() == 3, "{} responses for 3 blobs", answer.len());
    let statuses: HashMap<_, _> = answer
        .iter()
        .map(|one| {
            (
                one.digest.clone().unwrap_or_default().hash,
                code(one.status.as_ref()),
            )
        })
        .collect();
    for content in &contents {
        let told = statuses.get(&server.digest(content).hash);
        ensure!(told == Some(&Code::Ok), "a blob's status is {told:?}");
        ensure!(
            !server.is_missing(&server.digest(content)).await?,
            "it is missing afterwards"
        );
    }
    Ok(())
}

async fn update_mismatch(server: &Server) -> Outcome {
    let (right, wrong) = (server.random(100), server.random(100));
    let claimed = wrong_hash(&server.digest(&wrong));
    let requests = vec![
        update(&claimed, wrong),
        update(&server.digest(&right), right.clone()),
    ];
    let answer = server.batch_update(requests).await;
    let answer = answer.expect_ok("BatchUpdateBlobs")?;
    for one in &answer {
        let is_wrong = one.digest.clone().unwrap_or_default().hash == claimed.hash;
        let (told, expected) = match is_wrong {
            true => (code(one.status.as_ref()), Code::InvalidArgument),
            false => (code(one.status.as_ref()), Code::Ok),
        };
        ensure!(
            told == expected,
            "a blob's status is {told:?}, not {expected:?}"
        );
    }
    ensure!(answer.len() == 2, "{} responses for 2 blobs", answer.len());
    ensure!(
        server.is_missing(&claimed).await?,
        "the blob is there by the hash that is not its own"
    );
    ensure!(
        !server.is_missing(&server.digest(&right)).await?,
        "the other blob is not there"
    );
    Ok(())
}

async fn update_wrong_size(server: &Server) -> Outcome {
    let content = server.random(100);
    let mut digest = server.digest(&content);
    digest.size_bytes = 99;
    let answer = server.batch_update(vec![update(&digest, content)]).await;
    let answer = answer.expect_ok("BatchUpdateBlobs")?;
    let told = answer.first().map(|one| code(one.status.as_ref()));
    ensure!(
        told == Some(Code::InvalidArgument),
        "its status is {told:?}"
    );
    Ok(())
}

async fn update_again(server: &Server) -> Outcome {
    let content = server.random(100);
    server.store(content.clone()).await?;
    server.store(content).await.map(drop)
}

async fn update_empty(server: &Server) -> Outcome {
    server.store(Bytes::new()).await.map(drop)
}

/// What is announced, if it may be tried.
fn limit(server: &Server) -> Result<usize, super::rule::Stop> {
    match server.cache().max_batch_total_size_bytes {
        ..=0 => unsupported("no limit is announced"),
        limit if limit > LARGEST_BATCH => unsupported(format!(
            "the limit of {limit} bytes is more than this program sends"
        )),
        limit => Ok(limit as usize),
    }
}

async fn batch_at_limit(server: &Server) -> Outcome {
    let limit = limit(server)?;
    let contents = [server.random(limit / 2), server.random(limit - limit / 2)];
    let requests = contents
        .iter()
        .map(|content| update(&server.digest(content), content.clone()));
    let answer = server.batch_update(requests.collect()).await;
    let answer = answer.expect_ok(&format!("BatchUpdateBlobs of {limit} bytes"))?;
    for one in &answer {
        let told = code(one.status.as_ref());
        ensure!(told == Code::Ok, "a blob's status is {told:?}");
    }
    let digests = contents.iter().map(|content| server.digest(content));
    let read = server.batch_read(digests.collect()).await;
    let read = read.expect_ok(&format!("BatchReadBlobs of {limit} bytes"))?;
    let total: usize = read.iter().map(|one| one.data.len()).sum();
    ensure!(
        total == limit,
        "BatchReadBlobs answered {total} of {limit} bytes"
    );
    Ok(())
}

async fn small_blobs_at_limit(server: &Server) -> Outcome {
    const SIZE: usize = 4_096;
    let count = (limit(server)? / SIZE).min(1_000);
    let contents: Vec<Bytes> = (0..count).map(|_| server.random(SIZE)).collect();
    let requests = contents
        .iter()
        .map(|content| update(&server.digest(content), content.clone()));
    let answer = server.batch_update(requests.collect()).await;
    let answer = answer.expect_ok(&format!("BatchUpdateBlobs of {count} blobs"))?;
    let stored = answer
        .iter()
        .filter(|one| code(one.status.as_ref()) == Code::Ok);
    let stored = stored.count();
    ensure!(stored == count, "{stored} of {count} blobs are stored");
    Ok(())
}

async fn update_beyond_limit(server: &Server) -> Outcome {
    let size = limit(server)? + 1;
    let contents = [server.random(size / 2), server.random(size - size / 2)];
    let requests = contents
        .iter()
        .map(|content| update(&server.digest(content), content.clone()));
    match server.batch_update(requests.collect()).await {
        Ok(answer) => {
            let stored = answer
                .iter()
                .all(|one| code(one.status.as_ref()) == Code::Ok);
            ensure!(stored, "it succeeded, but some blobs did not: {answer:?}");
            Ok(())
        }
        refused => expect_code(refused, &[Code::InvalidArgument], "BatchUpdateBlobs"),
    }
}

async fn read_many(server: &Server) -> Outcome {
    let contents: Vec<Bytes> = [1_000, 17, 70_000].map(|size| server.random(size)).into();
    for content in &contents {
        server.store(content.clone()).await?;
    }
    let digests = contents.iter().map(|content| server.digest(content));
    let read = server.batch_read(digests.collect()).await;
    let read = read.expect_ok("BatchReadBlobs")?;
    ensure!(read.len() == 3, "{} responses for 3 blobs", read.len());
    let by_hash: HashMap<_, _> = read
        .iter()
        .map(|one| (one.digest.clone().unwrap_or_default().hash, one))
        .collect();
    for content in &contents {
        let Some(one) = by_hash.get(&server.digest(content).hash) else {
            ensure!(false, "a blob is not answered");
            return Ok(());
        };
        let told = code(one.status.as_ref());
        ensure!(told == Code::Ok, "a blob's status is {told:?}");
        ensure!(one.data == content, "a blob has another content");
    }
    Ok(())
}

async fn read_missing(server: &Server) -> Outcome {
    let there = server.store(server.random(100)).await?;
    let missing = server.digest(&server.random(100));
    let read = server.batch_read(vec![missing.clone(), there]).await;
    let read = read.expect_ok("BatchReadBlobs")?;
    ensure!(read.len() == 2, "{} responses for 2 blobs", read.len());
    for one in &read {
        let is_missing = one.digest.clone().unwrap_or_default().hash == missing.hash;
        let told = code(one.status.as_ref());
        let expected = if is_missing { Code::NotFound } else { Code::Ok };
        ensure!(
            told == expected,
            "a blob's status is {told:?}, not {expected:?}"
        );
    }
    Ok(())
}

async fn read_beyond_limit(server: &Server) -> Outcome {
    let size = limit(server)? + 2;
    let contents = [server.random(size / 2), server.random(size - size / 2)];
    let mut digests = Vec::new();
    for content in contents {
        digests.push(server.store(content).await?);
    }
    match server.batch_read(digests).await {
        Ok(read) => {
            let total: usize = read.iter().map(|one| one.data.len()).sum();
            ensure!(total == size, "it succeeded with {total} of {size} bytes");
            Ok(())
        }
        refused => expect_code(refused, &[Code::InvalidArgument], "BatchReadBlobs"),
    }
}

async fn read_identity(server: &Server) -> Outcome {
    let content = Bytes::from([server.random(16).as_ref(), &[b'x'; 50_000]].concat());
    let digest = server.store(content.clone()).await?;
    let read = server.batch_read(vec![digest]).await;
    let read = read.expect_ok("BatchReadBlobs")?;
    ensure!(
        matches!(read.as_slice(), [one] if one.compressor == 0 && one.data == content),
        "the content is compressed, or another"
    );
    Ok(())
}

async fn update_other_compressor(server: &Server) -> Outcome {
    // ZSTD, DEFLATE, BROTLI.
    let announced = server.cache().supported_batch_update_compressors;
    let Some(other) = (1..=3).find(|value| !announced.contains(value)) else {
        return unsupported("all compressors are announced");
    };
    let content = server.random(100);
    let digest = server.digest(&content);
    let mut request = update(&digest, content);
    request.compressor = other;
    if let Ok(answer) = server.batch_update(vec![request]).await {
        let told = answer.first().map(|one| code(one.status.as_ref()));
        ensure!(
            told != Some(Code::Ok),
            "a blob that says it is compressed is stored as it is"
        );
    }
    Ok(())
}
