//! Blobs that travel compressed by Zstandard.

use std::time::Duration;

use bb_remote_execution::proto::{
    bytestream::WriteRequest,
    reapi::{self, BatchReadBlobsRequest, compressor},
};
use bytes::Bytes;
use tonic::{Code, Status};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, fail, rules, unsupported},
    server::{Server, pieces, update, wrong_hash},
};

rules! {
    Must, "CacheCapabilities.supported_compressors", "a blob is read compressed, and is what was stored", read_whole;
    Must, "ContentAddressableStorage", "read compressed, an offset is one of the blob", read_offset;
    Must, "ContentAddressableStorage", "read compressed, a limit is INVALID_ARGUMENT", read_limit;
    Must, "ContentAddressableStorage", "read compressed, a blob that is missing is NOT_FOUND", read_missing;
    Must, "ContentAddressableStorage", "read compressed, an offset beyond the blob's end is OUT_OF_RANGE", read_beyond;
    Must, "ContentAddressableStorage", "read compressed, the empty blob is empty", read_empty;
    Must, "CacheCapabilities.supported_compressors", "a blob is written compressed, in several messages, and read as it is", write_pieces;
    Must, "ContentAddressableStorage", "what is written compressed and does not match its hash is INVALID_ARGUMENT, and is not stored", write_mismatch;
    Must, "ContentAddressableStorage", "what is written compressed and has more or fewer bytes than its size is INVALID_ARGUMENT", write_wrong_size;
    Should, "ContentAddressableStorage", "what is written compressed and is cut, or followed by something else, is INVALID_ARGUMENT", write_garbage;
    Should, "ContentAddressableStorage", "several frames are one content (RFC 8878)", write_frames;
    Must, "ContentAddressableStorage", "a compressed Write of a blob that is there ends at once, with a committed_size of -1", write_existing;
    Must, "ContentAddressableStorage", "a compressor that is not announced is refused", other_compressor;
    Must, "CacheCapabilities.supported_batch_update_compressors", "a blob of a batch is stored by what it decompresses to", batch_update;
    Must, "BatchUpdateBlobsRequest.Request.compressor", "a blob of a batch that decompresses to something else is INVALID_ARGUMENT", batch_mismatch;
    Must, "BatchReadBlobsRequest.acceptable_compressors", "a blob of a batch is compressed in a way that the request accepts, or not at all", batch_read;
}

const ZSTD: i32 = compressor::Value::Zstd as i32;

/// Several messages of text, so that it becomes smaller.
const LENGTH: usize = (2 << 20) + 4_321;

fn streams(server: &Server) -> Result<(), Stop> {
    match server.cache().supported_compressors.contains(&ZSTD) {
        true => Ok(()),
        false => unsupported("ZSTD is not among supported_compressors"),
    }
}

fn batches(server: &Server) -> Result<(), Stop> {
    match server
        .cache()
        .supported_batch_update_compressors
        .contains(&ZSTD)
    {
        true => Ok(()),
        false => unsupported("ZSTD is not among supported_batch_update_compressors"),
    }
}

fn text(server: &Server, length: usize) -> Bytes {
    let seed = server.random(16);
    let line = format!("{seed:?} a line that comes again and again\n");
    line.bytes().cycle().take(length).collect()
}

fn compress(content: &[u8]) -> Bytes {
    let compressed = zstd::stream::encode_all(content, 1);
    compressed.map(Bytes::from).unwrap_or_default()
}

fn compressed_name(name: &str, compressor: &str) -> String {
    match name.rsplit_once("blobs/") {
        Some((start, rest)) => format!("{start}compressed-blobs/{compressor}/{rest}"),
        None => String::new(),
    }
}

async fn read(server: &Server, digest: &reapi::Digest, offset: i64) -> Result<Vec<u8>, Status> {
    let name = compressed_name(&server.read_name(digest), "zstd");
    let data = server.read(&name, offset, 0).await?;
    let content = zstd::stream::decode_all(&*data);
    content.map_err(|error| Status::data_loss(format!("it is no Zstandard: {error}")))
}

fn write_name(server: &Server, digest: &reapi::Digest) -> String {
    compressed_name(&server.write_name(digest), "zstd")
}

async fn read_whole(server: &Server) -> Outcome {
    streams(server)?;
    for content in [
        text(server, 1_000),
        text(server, LENGTH),
        server.random(LENGTH),
    ] {
        let digest = server.store(content.clone()).await?;
        let read = read(server, &digest, 0)
            .await
            .expect_ok("ByteStream.Read")?;
        ensure!(read == content, "it decompresses to something else");
    }
    Ok(())
}

async fn read_offset(server: &Server) -> Outcome {
    streams(server)?;
    let content = text(server, LENGTH);
    let digest = server.store(content.clone()).await?;
    for offset in [1, 1_000_003, LENGTH - 1, LENGTH] {
        let read = read(server, &digest, offset as i64).await;
        let read = read.expect_ok(&format!("ByteStream.Read from {offset}"))?;
        ensure!(
            read == content[offset..],
            "from {offset}, it is something else"
        );
    }
    Ok(())
}

async fn read_limit(server: &Server) -> Outcome {
    streams(server)?;
    let digest = server.store(text(server, 1_000)).await?;
    let name = compressed_name(&server.read_name(&digest), "zstd");
    let read = server.read(&name, 0, 10).await;
    expect_code(read, &[Code::InvalidArgument], "ByteStream.Read")
}

async fn read_missing(server: &Server) -> Outcome {
    streams(server)?;
    let digest = server.digest(&server.random(1_000));
    expect_code(
        read(server, &digest, 0).await,
        &[Code::NotFound],
        "ByteStream.Read",
    )
}

async fn read_beyond(server: &Server) -> Outcome {
    streams(server)?;
    let digest = server.store(text(server, 1_000)).await?;
    let read = read(server, &digest, 1_001).await;
    expect_code(read, &[Code::OutOfRange], "ByteStream.Read")
}

async fn read_empty(server: &Server) -> Outcome {
    streams(server)?;
    let read = read(server, &server.digest(b""), 0)
        .await
        .expect_ok("ByteStream.Read")?;
    ensure!(read.is_empty(), "it has {} bytes", read.len());
    Ok(())
}

async fn check_written(server: &Server, content: &Bytes, messages: Vec<WriteRequest>) -> Outcome {
    server.write(messages).await.expect_ok("ByteStream.Write")?;
    let name = server.read_name(&server.digest(content));
    let read = server
        .read(&name, 0, 0)
        .await
        .expect_ok("ByteStream.Read")?;
    ensure!(read == *content, "it is read as something else");
    Ok(())
}

async fn write_pieces(server: &Server) -> Outcome {
    streams(server)?;
    for content in [
        text(server, 1_000),
        text(server, LENGTH),
        server.random(LENGTH),
    ] {
        let name = write_name(server, &server.digest(&content));
        let data = compress(&content);
        let piece = data.len() / 3 + 1;
        check_written(server, &content, pieces(&name, &data, piece)).await?;
    }
    Ok(())
}

async fn refused(server: &Server, digest: &reapi::Digest, data: &Bytes, what: &str) -> Outcome {
    let name = write_name(server, digest);
    let written = server.write(pieces(&name, data, 1 << 20)).await;
    let call = format!("ByteStream.Write of {what}");
    expect_code(written, &[Code::InvalidArgument], &call)?;
    ensure!(
        server.is_missing(digest).await?,
        "{what} is there afterwards"
    );
    Ok(())
}

async fn write_mismatch(server: &Server) -> Outcome {
    streams(server)?;
    let content = text(server, LENGTH);
    let claimed = wrong_hash(&server.digest(&content));
    refused(server, &claimed, &compress(&content), "another content").await
}

async fn write_wrong_size(server: &Server) -> Outcome {
    streams(server)?;
    let content = text(server, LENGTH);
    for size in [LENGTH - 1, LENGTH + 1, 10] {
        let mut digest = server.digest(&content);
        digest.size_bytes = size as i64;
        let what = format!("{LENGTH} bytes as {size}");
        refused(server, &digest, &compress(&content), &what).await?;
    }
    Ok(())
}

async fn write_garbage(server: &Server) -> Outcome {
    streams(server)?;
    let content = text(server, 100_000);
    let digest = server.digest(&content);
    let whole = compress(&content);
    let cut = whole.slice(..whole.len() - 1);
    refused(server, &digest, &cut, "data that is cut").await?;
    let more = Bytes::from([&whole, &b"something else"[..]].concat());
    refused(server, &digest, &more, "data with something else behind it").await?;
    refused(server, &digest, &content, "data that is not compressed").await
}

async fn write_frames(server: &Server) -> Outcome {
    streams(server)?;
    let content = text(server, 100_000);
    let name = write_name(server, &server.digest(&content));
    let (first, second) = content.split_at(40_000);
    let data = Bytes::from([compress(first), compress(b""), compress(second)].concat());
    check_written(server, &content, pieces(&name, &data, 1 << 20)).await
}

async fn write_existing(server: &Server) -> Outcome {
    streams(server)?;
    let content = server.random(LENGTH);
    let digest = server.store(content.clone()).await?;
    let name = write_name(server, &digest);
    let data = compress(&content);
    let first = pieces(&name, &data, 1 << 16).into_iter().take(1).collect();
    match server.write_and_wait(first, Duration::from_secs(10)).await {
        None => fail("there was no answer within 10 seconds after the first message"),
        Some(answer) => {
            let committed = answer.expect_ok("ByteStream.Write")?;
            ensure!(committed == -1, "committed_size is {committed}");
            Ok(())
        }
    }
}

async fn other_compressor(server: &Server) -> Outcome {
    let announced = server.cache().supported_compressors;
    let digest = server.store(text(server, 1_000)).await?;
    for (value, name) in [
        (ZSTD, "zstd"),
        (compressor::Value::Deflate as i32, "deflate"),
        (compressor::Value::Brotli as i32, "brotli"),
        (99, "no-such-compressor"),
    ] {
        let resource_name = compressed_name(&server.read_name(&digest), name);
        if !announced.contains(&value) {
            let read = server.read(&resource_name, 0, 0).await;
            ensure!(read.is_err(), "ByteStream.Read by {name} succeeded");
        }
    }
    Ok(())
}

async fn batch_update(server: &Server) -> Outcome {
    batches(server)?;
    let (one, other) = (text(server, 100_000), server.random(100));
    let mut compressed = update(&server.digest(&one), compress(&one));
    compressed.compressor = ZSTD;
    let as_it_is = update(&server.digest(&other), other.clone());
    let answer = server.batch_update(vec![compressed, as_it_is]).await;
    for response in answer.expect_ok("BatchUpdateBlobs")? {
        let status = response.status.unwrap_or_default();
        ensure!(status.code == 0, "a blob's status is {status:?}");
    }
    for content in [one, other] {
        let name = server.read_name(&server.digest(&content));
        let read = server
            .read(&name, 0, 0)
            .await
            .expect_ok("ByteStream.Read")?;
        ensure!(read == content, "a blob is read as something else");
    }
    Ok(())
}

async fn batch_mismatch(server: &Server) -> Outcome {
    batches(server)?;
    let content = text(server, 100_000);
    let right = server.digest(&content);
    let smaller = reapi::Digest {
        size_bytes: 99_999,
        ..right.clone()
    };
    for (digest, data) in [
        (wrong_hash(&right), compress(&content)),
        (smaller, compress(&content)),
        (right, content.clone()),
    ] {
        let mut request = update(&digest, data);
        request.compressor = ZSTD;
        let answer = server.batch_update(vec![request]).await;
        let answer = answer.expect_ok("BatchUpdateBlobs")?;
        let status = answer
            .first()
            .and_then(|one| one.status.clone())
            .unwrap_or_default();
        let code = Code::from_i32(status.code);
        ensure!(code == Code::InvalidArgument, "a blob's status is {code:?}");
    }
    Ok(())
}

async fn batch_read(server: &Server) -> Outcome {
    let contents = [text(server, 100_000), server.random(1_000)];
    let mut digests = Vec::new();
    for content in &contents {
        digests.push(server.store(content.clone()).await?);
    }
    let request = BatchReadBlobsRequest {
        instance_name: server.instance.clone(),
        digests: digests.clone(),
        acceptable_compressors: vec![ZSTD],
        digest_function: server.function_value(),
    };
    let answer = server.cas().batch_read_blobs(request).await;
    for response in answer.expect_ok("BatchReadBlobs")?.into_inner().responses {
        let content = match response.compressor {
            0 => response.data.to_vec(),
            ZSTD => zstd::stream::decode_all(&*response.data).unwrap_or_default(),
            other => return fail(format!("compressor {other} was not accepted")),
        };
        let digest = response.digest.unwrap_or_default();
        ensure!(
            server.digest(&content) == digest,
            "a blob is something else"
        );
    }
    Ok(())
}
