//! SplitBlob and SpliceBlob.

use bb_remote_execution::{
    proto::reapi::{self, SpliceBlobRequest, SplitBlobRequest, SplitBlobResponse},
    storage::chunking::{ChunkingFunction, Chunks},
};
use bytes::Bytes;
use tonic::{Code, Status};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, rules, unsupported},
    server::{Server, wrong_hash},
};

rules! {
    Must, "CacheCapabilities.split_blob_support", "what is announced as supported is, and the chunks of a blob make up the blob", split;
    Must, "ContentAddressableStorage.SplitBlob", "a blob that is not there is NOT_FOUND", split_absent;
    Should, "ChunkingFunction", "a blob is split where the function that is announced cuts it", split_where_announced;
    Must, "CacheCapabilities.splice_blob_support", "chunks that are there make up a blob, which can be read", splice;
    Must, "ContentAddressableStorage.SpliceBlob", "of a blob that is there, the chunks need not be", splice_what_is_there;
    Must, "ContentAddressableStorage.SpliceBlob", "a chunk that is not there is NOT_FOUND", splice_absent;
    Must, "ContentAddressableStorage.SpliceBlob", "chunks that make up another blob are INVALID_ARGUMENT, and make no blob", splice_wrong;
    Must, "FastCdc2020Params.avg_chunk_size_bytes", "it is between 1 KiB and 1 MiB", average;
    Must, "RepMaxCdcParams.min_chunk_size_bytes", "it is at least 64", minimum;
}

fn can_split(server: &Server) -> Outcome {
    match server.cache().split_blob_support {
        true => Ok(()),
        false => unsupported("split_blob_support is not announced"),
    }
}

fn can_splice(server: &Server) -> Outcome {
    match server.cache().splice_blob_support {
        true => Ok(()),
        false => unsupported("splice_blob_support is not announced"),
    }
}

async fn ask_to_split(
    server: &Server,
    blob: &reapi::Digest,
    function: i32,
) -> Result<SplitBlobResponse, Status> {
    let request = SplitBlobRequest {
        instance_name: server.instance.clone(),
        blob_digest: Some(blob.clone()),
        digest_function: server.function_value(),
        chunking_function: function,
    };
    Ok(server.cas().split_blob(request).await?.into_inner())
}

async fn ask_to_splice(
    server: &Server,
    blob: &reapi::Digest,
    chunks: Vec<reapi::Digest>,
) -> Result<(), Status> {
    let request = SpliceBlobRequest {
        instance_name: server.instance.clone(),
        blob_digest: Some(blob.clone()),
        chunk_digests: chunks,
        digest_function: server.function_value(),
        chunking_function: 0,
    };
    server.cas().splice_blob(request).await.map(drop)
}

async fn split(server: &Server) -> Outcome {
    can_split(server)?;
    let content = server.random(4 << 20);
    let digest = server.store(content.clone()).await?;
    let answer = match ask_to_split(server, &digest, 0).await {
        Err(status) if status.code() == Code::NotFound => {
            return unsupported("NOT_FOUND: there is no split information for this blob");
        }
        answer => answer.expect_ok("SplitBlob")?,
    };
    let mut whole = Vec::new();
    for chunk in &answer.chunk_digests {
        let read = server.read(&server.read_name(chunk), 0, 0).await;
        whole.extend(read.expect_ok("ByteStream.Read of a chunk")?);
    }
    ensure!(whole == content, "the chunks make up another content");
    Ok(())
}

async fn split_absent(server: &Server) -> Outcome {
    can_split(server)?;
    let absent = server.digest(&server.random(100));
    let answer = ask_to_split(server, &absent, 0).await;
    expect_code(
        answer,
        &[Code::NotFound],
        "SplitBlob of a blob that is not there",
    )
}

async fn split_where_announced(server: &Server) -> Outcome {
    can_split(server)?;
    let Some(function) = ChunkingFunction::announced(&server.cache()) else {
        return unsupported(
            "no function is announced that is known, with parameters in their ranges",
        );
    };
    let content = server.random(12 << 20);
    let digest = server.store(content.clone()).await?;
    let value = function.to_proto() as i32;
    let answer = match ask_to_split(server, &digest, value).await {
        Err(status) if status.code() == Code::NotFound => {
            return unsupported("NOT_FOUND: there is no split information for this blob");
        }
        answer => answer.expect_ok("SplitBlob")?,
    };
    if answer.chunking_function != value {
        return unsupported("it uses another function, as it may");
    }
    let read = |start, end| Ok(content.slice(start as usize..end as usize));
    let mut chunks = Chunks::new(function, content.len() as u64, read);
    let mut expected = Vec::new();
    while let Some(chunk) = chunks.next_chunk().map_err(|e| Stop::Fail(e.to_string()))? {
        expected.push(server.digest(chunk));
    }
    ensure!(
        answer.chunk_digests == expected,
        "{} chunks, where {function:?} makes {}, or other ones",
        answer.chunk_digests.len(),
        expected.len()
    );
    Ok(())
}

/// Two chunks that are there, and what they make up.
async fn two(server: &Server) -> Result<(Vec<reapi::Digest>, Bytes), Stop> {
    let parts = [server.random(300_000), server.random(200_000)];
    let mut digests = Vec::new();
    for part in &parts {
        digests.push(server.store(part.clone()).await?);
    }
    Ok((digests, parts.concat().into()))
}

async fn splice(server: &Server) -> Outcome {
    can_splice(server)?;
    let (chunks, whole) = two(server).await?;
    let digest = server.digest(&whole);
    let spliced = ask_to_splice(server, &digest, chunks).await;
    spliced.expect_ok("SpliceBlob")?;
    let read = server.read(&server.read_name(&digest), 0, 0).await;
    let read = read.expect_ok("ByteStream.Read of the blob")?;
    ensure!(read == whole, "the blob has another content");
    let missing = server.find_missing(std::slice::from_ref(&digest)).await?;
    ensure!(
        missing.is_empty(),
        "FindMissingBlobs says that it is missing"
    );
    Ok(())
}

async fn splice_what_is_there(server: &Server) -> Outcome {
    can_splice(server)?;
    let content = server.random(1000);
    let digest = server.store(content.clone()).await?;
    let absent = vec![
        server.digest(&server.random(600)),
        server.digest(&server.random(400)),
    ];
    match ask_to_splice(server, &digest, absent).await {
        Ok(()) => {}
        Err(status) if matches!(status.code(), Code::AlreadyExists | Code::NotFound) => {}
        Err(status) => return Err(status).expect_ok("SpliceBlob of a blob that is there"),
    }
    let read = server.read(&server.read_name(&digest), 0, 0).await;
    let read = read.expect_ok("ByteStream.Read of the blob")?;
    ensure!(read == content, "the blob has another content now");
    Ok(())
}

async fn splice_absent(server: &Server) -> Outcome {
    can_splice(server)?;
    let (mut chunks, whole) = two(server).await?;
    let absent = server.random(50);
    chunks.push(server.digest(&absent));
    let digest = server.digest(&[whole, absent].concat());
    let answer = ask_to_splice(server, &digest, chunks).await;
    expect_code(
        answer,
        &[Code::NotFound],
        "SpliceBlob of a chunk that is not there",
    )
}

async fn splice_wrong(server: &Server) -> Outcome {
    can_splice(server)?;
    let (mut chunks, whole) = two(server).await?;
    let right = server.digest(&whole);
    chunks.reverse();
    let answer = ask_to_splice(server, &right, chunks.clone()).await;
    expect_code(
        answer,
        &[Code::InvalidArgument],
        "SpliceBlob in the wrong order",
    )?;
    let answer = ask_to_splice(server, &wrong_hash(&right), chunks).await;
    expect_code(
        answer,
        &[Code::InvalidArgument],
        "SpliceBlob to another hash",
    )?;
    let missing = server.find_missing(std::slice::from_ref(&right)).await?;
    ensure!(missing.len() == 1, "FindMissingBlobs says that it is there");
    Ok(())
}

async fn average(server: &Server) -> Outcome {
    let Some(params) = server.cache().fast_cdc_2020_params else {
        return unsupported("fast_cdc_2020_params are not announced");
    };
    let average = params.avg_chunk_size_bytes;
    ensure!((1 << 10..=1 << 20).contains(&average), "it is {average}");
    Ok(())
}

async fn minimum(server: &Server) -> Outcome {
    let Some(params) = server.cache().rep_max_cdc_params else {
        return unsupported("rep_max_cdc_params are not announced");
    };
    let minimum = params.min_chunk_size_bytes;
    ensure!(minimum >= 64, "it is {minimum}");
    Ok(())
}
