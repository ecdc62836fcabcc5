//! ByteStream: Read, Write and QueryWriteStatus.

use std::time::Duration;

use bb_remote_execution::proto::bytestream::{QueryWriteStatusRequest, WriteRequest};
use bytes::Bytes;
use tonic::{Code, Status};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, fail, rules, unsupported},
    server::{Server, pieces, wrong_hash},
};

rules! {
    Must, "ByteStream.Read", "a blob is read as it was stored, small or large", read_whole;
    Must, "ReadRequest.read_offset", "what comes from an offset on is read, at the blob's end nothing", read_offset;
    Must, "ReadRequest.read_offset", "an offset that is negative, or beyond the blob's end, is OUT_OF_RANGE", read_offset_outside;
    Must, "ReadRequest.read_limit", "no more than the limit is read, from the offset on", read_limit;
    Must, "ReadRequest.read_limit", "a negative limit is INVALID_ARGUMENT", read_limit_negative;
    Must, "ByteStream.Read", "a blob that is missing is NOT_FOUND", read_missing;
    Should, "ByteStream.Read", "a resource name that names no blob is INVALID_ARGUMENT", read_ill_formed;
    Must, "ByteStream.Write", "a blob in several messages is stored, and committed_size is its size", write_pieces;
    Must, "ByteStream.Write", "a blob in one message is stored", write_one_message;
    Must, "ByteStream.Write", "the empty blob can be written", write_empty;
    Must, "WriteRequest.resource_name", "it may be repeated in later messages", write_repeated_name;
    Must, "WriteRequest.resource_name", "whatever follows the size is ignored", write_metadata;
    Must, "ByteStream.Write", "the last message may be empty, with finish_write", write_empty_last;
    Must, "ContentAddressableStorage", "a content that does not match its hash is INVALID_ARGUMENT, and is not stored", write_mismatch;
    Must, "ContentAddressableStorage", "less than the size, with finish_write, is INVALID_ARGUMENT", write_short;
    Must, "ContentAddressableStorage", "more than the size is INVALID_ARGUMENT", write_long;
    Must, "ContentAddressableStorage", "a Write of a blob that is there ends at once, with its full size", write_existing;
    Should, "WriteRequest.write_offset", "a message that does not begin where the one before ended is refused", write_gap;
    Should, "ByteStream.Write", "a resource name that names no upload is INVALID_ARGUMENT", write_ill_formed;
    Must, "ByteStream.QueryWriteStatus", "of an upload that is finished, complete is true and committed_size the blob's size", query_complete;
    Must, "ByteStream.QueryWriteStatus", "of an upload that was never begun, it is NOT_FOUND, or not complete with 0 bytes", query_unknown;
    Should, "ByteStream.Write", "an upload that was interrupted goes on at the committed_size that QueryWriteStatus tells", resume;
    Must, "ByteStream.Write", "an upload that was interrupted can be begun again at 0", begin_again;
    Must, "ContentAddressableStorage", "the same blob can be uploaded by two at once", write_twice;
    Should, "CacheCapabilities.max_cas_blob_size_bytes", "an upload beyond the size announced is INVALID_ARGUMENT", write_too_large;
}

/// Several messages, and no multiple of anything.
const LARGE: usize = (3 << 20) + 12_345;

async fn stored(server: &Server, length: usize) -> Result<(Bytes, String), Stop> {
    let content = server.random(length);
    let digest = server.store(content.clone()).await?;
    let name = server.read_name(&digest);
    Ok((content, name))
}

async fn read_whole(server: &Server) -> Outcome {
    for length in [1, 1_000, 70_000, LARGE] {
        let (content, name) = stored(server, length.max(16)).await?;
        let read = server
            .read(&name, 0, 0)
            .await
            .expect_ok("ByteStream.Read")?;
        ensure!(
            read == content,
            "a blob of {} bytes is read as {} others",
            content.len(),
            read.len()
        );
    }
    Ok(())
}

async fn read_offset(server: &Server) -> Outcome {
    for length in [1_000, LARGE] {
        let (content, name) = stored(server, length).await?;
        for offset in [1, length / 2, length - 1, length] {
            let read = server.read(&name, offset as i64, 0).await;
            let read = read.expect_ok(&format!("ByteStream.Read from {offset} of {length}"))?;
            ensure!(
                read == content[offset..],
                "from {offset} of {length} bytes, {} are read, or others",
                read.len()
            );
        }
    }
    Ok(())
}

async fn read_offset_outside(server: &Server) -> Outcome {
    let (_, name) = stored(server, 1_000).await?;
    for offset in [-1, 1_001] {
        let call = format!("ByteStream.Read from {offset} of 1000");
        let read = server.read(&name, offset, 0).await;
        expect_code(read, &[Code::OutOfRange], &call)?;
    }
    Ok(())
}

async fn read_limit(server: &Server) -> Outcome {
    for length in [1_000, LARGE] {
        let (content, name) = stored(server, length).await?;
        for (offset, limit) in [(0, 1), (10, 500), (length - 5, 100)] {
            let read = server.read(&name, offset as i64, limit as i64).await;
            let call = format!("ByteStream.Read of {limit} bytes from {offset} of {length}");
            let read = read.expect_ok(&call)?;
            let end = (offset + limit).min(length);
            ensure!(
                read == content[offset..end],
                "{call} gives {} bytes, or others",
                read.len()
            );
        }
    }
    Ok(())
}

async fn read_limit_negative(server: &Server) -> Outcome {
    let (_, name) = stored(server, 1_000).await?;
    let read = server.read(&name, 0, -1).await;
    expect_code(read, &[Code::InvalidArgument], "ByteStream.Read")
}

async fn read_missing(server: &Server) -> Outcome {
    for length in [100, LARGE] {
        let name = server.read_name(&server.digest(&server.random(length)));
        let read = server.read(&name, 0, 0).await;
        expect_code(read, &[Code::NotFound], "ByteStream.Read")?;
    }
    Ok(())
}

async fn read_ill_formed(server: &Server) -> Outcome {
    let right = server.read_name(&server.digest(b"x"));
    let no_size = right
        .rsplit_once('/')
        .map_or("", |(start, _)| start)
        .to_owned();
    let no_number = format!("{no_size}/many");
    for name in ["", "blobs", "no/name/of/a/thing", &no_size, &no_number] {
        let read = server.read(name, 0, 0).await;
        let call = format!("ByteStream.Read of {name:?}");
        expect_code(read, &[Code::InvalidArgument], &call)?;
    }
    Ok(())
}

async fn check_written(server: &Server, content: &Bytes, messages: Vec<WriteRequest>) -> Outcome {
    let digest = server.digest(content);
    let committed = server.write(messages).await.expect_ok("ByteStream.Write")?;
    ensure!(
        committed == digest.size_bytes,
        "committed_size is {committed}, the blob has {} bytes",
        digest.size_bytes
    );
    let read = server.read(&server.read_name(&digest), 0, 0).await;
    ensure!(
        read.expect_ok("ByteStream.Read")? == *content,
        "it is read as something else"
    );
    Ok(())
}

async fn write_pieces(server: &Server) -> Outcome {
    for (length, piece) in [(1_000, 300), (70_000, 20_000), (LARGE, 1 << 20)] {
        let content = server.random(length);
        let name = server.write_name(&server.digest(&content));
        check_written(server, &content, pieces(&name, &content, piece)).await?;
    }
    Ok(())
}

async fn write_one_message(server: &Server) -> Outcome {
    let content = server.random(100_000);
    let name = server.write_name(&server.digest(&content));
    check_written(server, &content, pieces(&name, &content, 1 << 20)).await
}

async fn write_empty(server: &Server) -> Outcome {
    let content = Bytes::new();
    let name = server.write_name(&server.digest(&content));
    check_written(server, &content, pieces(&name, &content, 1)).await
}

async fn write_repeated_name(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let name = server.write_name(&server.digest(&content));
    let mut messages = pieces(&name, &content, 300);
    for message in &mut messages {
        message.resource_name = name.clone();
    }
    check_written(server, &content, messages).await
}

async fn write_metadata(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let name = server.write_name(&server.digest(&content)) + "/some/file.txt";
    check_written(server, &content, pieces(&name, &content, 300)).await
}

async fn write_empty_last(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let name = server.write_name(&server.digest(&content));
    let mut messages = pieces(&name, &content, 500);
    for message in &mut messages {
        message.finish_write = false;
    }
    messages.push(WriteRequest {
        resource_name: String::new(),
        write_offset: 1_000,
        finish_write: true,
        data: Bytes::new(),
    });
    check_written(server, &content, messages).await
}

async fn write_mismatch(server: &Server) -> Outcome {
    for length in [1_000, LARGE] {
        let content = server.random(length);
        let claimed = wrong_hash(&server.digest(&content));
        let name = server.write_name(&claimed);
        let written = server.write(pieces(&name, &content, 1 << 20)).await;
        expect_code(written, &[Code::InvalidArgument], "ByteStream.Write")?;
        ensure!(
            server.is_missing(&claimed).await?,
            "the blob is there afterwards"
        );
    }
    Ok(())
}

async fn write_short(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let digest = server.digest(&content);
    let name = server.write_name(&digest);
    let written = server
        .write(pieces(&name, &content.slice(..900), 300))
        .await;
    expect_code(written, &[Code::InvalidArgument], "ByteStream.Write")?;
    ensure!(
        server.is_missing(&digest).await?,
        "the blob is there afterwards"
    );
    Ok(())
}

async fn write_long(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let mut digest = server.digest(&content.slice(..900));
    let name = server.write_name(&digest);
    let written = server.write(pieces(&name, &content, 300)).await;
    expect_code(written, &[Code::InvalidArgument], "ByteStream.Write")?;
    // The size that lies beside the hash of all of it.
    digest.hash = server.digest(&content).hash;
    let name = server.write_name(&digest);
    let written = server.write(pieces(&name, &content, 300)).await;
    expect_code(written, &[Code::InvalidArgument], "ByteStream.Write")
}

async fn write_existing(server: &Server) -> Outcome {
    let content = server.random(LARGE);
    let digest = server.store(content.clone()).await?;
    let name = server.write_name(&digest);
    // The client sends a part, and then waits.
    let first = pieces(&name, &content, 1 << 16)
        .into_iter()
        .take(1)
        .collect();
    match server.write_and_wait(first, Duration::from_secs(10)).await {
        None => fail("there was no answer within 10 seconds after the first message"),
        Some(answer) => {
            let committed = answer.expect_ok("ByteStream.Write")?;
            ensure!(
                committed == digest.size_bytes,
                "committed_size is {committed}, the blob has {} bytes",
                digest.size_bytes
            );
            Ok(())
        }
    }
}

async fn write_gap(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let digest = server.digest(&content);
    let mut messages = pieces(&server.write_name(&digest), &content, 500);
    if let Some(last) = messages.last_mut() {
        last.write_offset += 1;
    }
    let written = server.write(messages).await;
    ensure!(written.is_err(), "it is stored");
    Ok(())
}

async fn write_ill_formed(server: &Server) -> Outcome {
    let content = server.random(10);
    let read_name = server.read_name(&server.digest(&content));
    for name in ["", "uploads", "no/name/of/a/thing", &read_name] {
        let written = server.write(pieces(name, &content, 100)).await;
        let call = format!("ByteStream.Write to {name:?}");
        expect_code(written, &[Code::InvalidArgument], &call)?;
    }
    Ok(())
}

async fn query(server: &Server, name: &str) -> Result<(i64, bool), Status> {
    let request = QueryWriteStatusRequest {
        resource_name: name.to_owned(),
    };
    let answer = server.byte_stream().query_write_status(request).await?;
    let answer = answer.into_inner();
    Ok((answer.committed_size, answer.complete))
}

async fn query_complete(server: &Server) -> Outcome {
    let content = server.random(1_000);
    let name = server.write_name(&server.digest(&content));
    check_written(server, &content, pieces(&name, &content, 300)).await?;
    let (committed, complete) = query(server, &name).await.expect_ok("QueryWriteStatus")?;
    ensure!(
        complete && committed == 1_000,
        "complete is {complete}, committed_size {committed}"
    );
    Ok(())
}

async fn query_unknown(server: &Server) -> Outcome {
    let name = server.write_name(&server.digest(&server.random(1_000)));
    match query(server, &name).await {
        Ok((committed, complete)) => {
            ensure!(
                !complete && committed == 0,
                "complete is {complete}, committed_size {committed}"
            );
            Ok(())
        }
        refused => expect_code(refused, &[Code::NotFound], "QueryWriteStatus"),
    }
}

/// Begins an upload, and leaves it after the first of its messages.
async fn interrupt(server: &Server, name: &str, content: &Bytes, piece: usize) -> Outcome {
    let first = pieces(name, content, piece).into_iter().take(1).collect();
    match server
        .write_and_wait(first, Duration::from_millis(500))
        .await
    {
        None => Ok(()),
        Some(answer) => fail(format!(
            "a Write that was not finished was answered: {answer:?}"
        )),
    }
}

async fn resume(server: &Server) -> Outcome {
    let content = server.random(LARGE);
    let name = server.write_name(&server.digest(&content));
    interrupt(server, &name, &content, 1 << 20).await?;
    let committed = match query(server, &name).await {
        Ok((_, true)) => return fail("QueryWriteStatus says that it is complete"),
        Ok((committed @ 1.., false)) => committed,
        Ok((_, false)) => return unsupported("nothing of an interrupted upload is kept"),
        Err(status) if status.code() == Code::NotFound => {
            return unsupported("nothing of an interrupted upload is kept");
        }
        Err(status) => Err(status).expect_ok("QueryWriteStatus")?,
    };
    ensure!(
        committed <= 1 << 20,
        "committed_size is {committed}, where {} bytes were sent",
        1 << 20
    );
    let rest = content.slice(committed as usize..);
    let mut messages = pieces(&name, &rest, 1 << 20);
    for message in &mut messages {
        message.write_offset += committed;
    }
    check_written(server, &content, messages).await
}

async fn begin_again(server: &Server) -> Outcome {
    let content = server.random(LARGE);
    let name = server.write_name(&server.digest(&content));
    interrupt(server, &name, &content, 1 << 20).await?;
    check_written(server, &content, pieces(&name, &content, 1 << 20)).await
}

async fn write_twice(server: &Server) -> Outcome {
    let content = server.random(LARGE);
    let digest = server.digest(&content);
    let (one, other) = (server.write_name(&digest), server.write_name(&digest));
    let (one, other) = (
        pieces(&one, &content, 1 << 20),
        pieces(&other, &content, 1 << 18),
    );
    let (one, other) = tokio::join!(server.write(one), server.write(other));
    for committed in [one, other] {
        let committed = committed.expect_ok("ByteStream.Write")?;
        ensure!(
            committed == digest.size_bytes,
            "committed_size is {committed}"
        );
    }
    Ok(())
}

async fn write_too_large(server: &Server) -> Outcome {
    let Ok(limit @ 1..) = u64::try_from(server.cache().max_cas_blob_size_bytes) else {
        return unsupported("no limit is announced");
    };
    let Some(size) = i64::try_from(limit)
        .ok()
        .and_then(|limit| limit.checked_add(1))
    else {
        return unsupported("the limit is the largest size that there is");
    };
    let content = server.random(1_000);
    let mut digest = server.digest(&content);
    digest.size_bytes = size;
    let mut messages = pieces(&server.write_name(&digest), &content, 1_000);
    messages[0].finish_write = false;
    match server
        .write_and_wait(messages, Duration::from_secs(10))
        .await
    {
        None => fail("there was no answer within 10 seconds after the first message"),
        Some(answer) => expect_code(answer, &[Code::InvalidArgument], "ByteStream.Write"),
    }
}
