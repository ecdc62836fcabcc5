//! Digests, the empty blob, and FindMissingBlobs.

use bb_remote_execution::{
    digest::DigestFunction,
    proto::reapi::{self, BatchUpdateBlobsRequest, FindMissingBlobsRequest},
};
use tonic::Code;

use super::{
    rule::{Expect, Outcome, ensure, expect_code, rules, unsupported},
    server::{Server, blob_of, update},
};

rules! {
    Must, "ContentAddressableStorage.FindMissingBlobs", "of blobs that are there and others, exactly the others are missing", tells_apart;
    Must, "ContentAddressableStorage.FindMissingBlobs", "of no digests none are missing", of_none;
    Must, "ContentAddressableStorage.FindMissingBlobs", "1,000 digests are taken in one call", of_many;
    Must, "ContentAddressableStorage", "the empty blob of every function announced is never missing", empty_blob_is_there;
    Must, "ContentAddressableStorage", "the empty blob of every function announced can be read", empty_blob_is_read;
    Must, "Digest", "the hash of a blob with another size names no blob that is there", size_is_part;
    Should, "Digest", "a hash that has not the function's length, or other characters than 0-9 and a-f, is INVALID_ARGUMENT", ill_formed;
    Should, "Digest", "a hash in upper case is refused, or is another blob's", upper_case;
    Should, "Digest", "a negative size is INVALID_ARGUMENT", negative_size;
    Should, "FindMissingBlobsRequest.digest_function", "left out, it is told by the hash's length, for all functions of which it may be left out", inferred;
    Must, "CacheCapabilities.digest_functions", "a blob can be stored, found and read by every function announced", all_functions;
    Must, "DigestFunction.Value", "a function that is not announced is refused", other_function;
}

async fn tells_apart(server: &Server) -> Outcome {
    let there = [server.random(10), server.random(5_000)];
    for content in &there {
        server.store(content.clone()).await?;
    }
    let others = [server.random(10), server.random(5_000), server.random(1)];
    // A single byte may be there; a longer one cannot.
    let mut digests: Vec<_> = there.iter().map(|content| server.digest(content)).collect();
    digests.extend(others[..2].iter().map(|content| server.digest(content)));
    let missing = server.find_missing(&digests).await?;
    for (i, digest) in digests.iter().enumerate() {
        let told = missing.contains(&(digest.hash.clone(), digest.size_bytes));
        ensure!(
            told == (i >= there.len()),
            "a blob of {} bytes that {} is told as {}",
            digest.size_bytes,
            if i < there.len() {
                "was stored"
            } else {
                "was never stored"
            },
            if told { "missing" } else { "present" }
        );
    }
    ensure!(
        missing.len() == 2,
        "digests are told that were not asked for"
    );
    Ok(())
}

async fn of_none(server: &Server) -> Outcome {
    let missing = server.find_missing(&[]).await?;
    ensure!(missing.is_empty(), "{missing:?}");
    Ok(())
}

async fn of_many(server: &Server) -> Outcome {
    let digests: Vec<_> = (0..1_000)
        .map(|_| server.digest(&server.random(16)))
        .collect();
    let missing = server.find_missing(&digests).await?;
    ensure!(
        missing.len() == 1_000,
        "{} of 1,000 are told",
        missing.len()
    );
    Ok(())
}

async fn empty_blob_is_there(server: &Server) -> Outcome {
    for function in server.functions() {
        let request = FindMissingBlobsRequest {
            instance_name: server.instance.clone(),
            blob_digests: vec![function.empty().to_proto()],
            digest_function: function.to_proto() as i32,
        };
        let answer = server.cas().find_missing_blobs(request).await;
        let missing = answer.expect_ok("FindMissingBlobs")?.into_inner();
        ensure!(
            missing.missing_blob_digests.is_empty(),
            "that of {function} is missing"
        );
    }
    Ok(())
}

async fn empty_blob_is_read(server: &Server) -> Outcome {
    for function in server.functions() {
        let blob = blob_of(function, &function.empty().to_proto());
        let name = server.read_name(&server.digest(b""));
        let name = match name.rsplit_once("blobs/") {
            Some((prefix, _)) => format!("{prefix}blobs/{blob}"),
            None => name,
        };
        let content = server.read(&name, 0, 0).await;
        let content = content.expect_ok(&format!("ByteStream.Read of {function}'s"))?;
        ensure!(content.is_empty(), "it has {} bytes", content.len());
    }
    let read = server.batch_read(vec![server.digest(b"")]).await;
    let read = read.expect_ok("BatchReadBlobs")?;
    ensure!(
        matches!(read.as_slice(), [one] if one.status.clone().unwrap_or_default().code == 0 && one.data.is_empty()),
        "BatchReadBlobs answered {read:?}"
    );
    Ok(())
}

async fn size_is_part(server: &Server) -> Outcome {
    let mut digest = server.store(server.random(100)).await?;
    digest.size_bytes += 1;
    let request = FindMissingBlobsRequest {
        instance_name: server.instance.clone(),
        blob_digests: vec![digest.clone()],
        digest_function: server.function_value(),
    };
    if let Ok(answer) = server.cas().find_missing_blobs(request).await {
        let missing = answer.into_inner().missing_blob_digests;
        ensure!(
            !missing.is_empty(),
            "FindMissingBlobs says that it is there"
        );
    }
    let read = server.read(&server.read_name(&digest), 0, 0).await;
    ensure!(read.is_err(), "ByteStream.Read gives a content for it");
    Ok(())
}

async fn find(server: &Server, digest: reapi::Digest) -> Result<usize, tonic::Status> {
    let request = FindMissingBlobsRequest {
        instance_name: server.instance.clone(),
        blob_digests: vec![digest],
        digest_function: server.function_value(),
    };
    let answer = server.cas().find_missing_blobs(request).await?;
    Ok(answer.into_inner().missing_blob_digests.len())
}

async fn ill_formed(server: &Server) -> Outcome {
    let right = server.digest(&server.random(10));
    for hash in [
        right.hash[1..].to_owned(),
        format!("{}g", &right.hash[1..]),
        "../../etc/passwd".to_owned(),
        String::new(),
    ] {
        let digest = reapi::Digest {
            hash: hash.clone(),
            size_bytes: 10,
        };
        let call = format!("FindMissingBlobs of the hash {hash:?}");
        expect_code(find(server, digest).await, &[Code::InvalidArgument], &call)?;
    }
    Ok(())
}

async fn upper_case(server: &Server) -> Outcome {
    // One that has letters.
    let content = loop {
        let content = server.random(20);
        if server.digest(&content).hash.contains('a') {
            break content;
        }
    };
    let mut digest = server.store(content).await?;
    digest.hash = digest.hash.to_ascii_uppercase();
    let found = find(server, digest).await;
    ensure!(
        !matches!(found, Ok(0)),
        "it is taken for the one in lower case, so that blobs have two names"
    );
    Ok(())
}

async fn negative_size(server: &Server) -> Outcome {
    let mut digest = server.digest(&server.random(10));
    digest.size_bytes = -1;
    let found = find(server, digest).await;
    expect_code(found, &[Code::InvalidArgument], "FindMissingBlobs")
}

async fn inferred(server: &Server) -> Outcome {
    let functions = server.functions();
    let told = functions.iter().filter(|one| one.is_told_by_length());
    for function in told {
        let content = server.random(30);
        let digest = function.digest_of(&content).to_proto();
        let request = BatchUpdateBlobsRequest {
            instance_name: server.instance.clone(),
            requests: vec![update(&digest, content)],
            digest_function: 0,
        };
        let call = format!("BatchUpdateBlobs of a {function} hash without digest_function");
        let answer = server
            .cas()
            .batch_update_blobs(request)
            .await
            .expect_ok(&call)?;
        let code = answer
            .into_inner()
            .responses
            .first()
            .map_or(0, |one| one.status.clone().unwrap_or_default().code);
        ensure!(code == 0, "{call}: {:?}", Code::from_i32(code));
        let request = FindMissingBlobsRequest {
            instance_name: server.instance.clone(),
            blob_digests: vec![digest],
            digest_function: 0,
        };
        let answer = server.cas().find_missing_blobs(request).await;
        let missing = answer.expect_ok("FindMissingBlobs")?.into_inner();
        ensure!(
            missing.missing_blob_digests.is_empty(),
            "a blob that was stored by its {function} hash is missing"
        );
    }
    Ok(())
}

async fn all_functions(server: &Server) -> Outcome {
    for function in server.functions() {
        let content = server.random(300);
        let digest = function.digest_of(&content).to_proto();
        let value = function.to_proto() as i32;
        let request = BatchUpdateBlobsRequest {
            instance_name: server.instance.clone(),
            requests: vec![update(&digest, content.clone())],
            digest_function: value,
        };
        let call = format!("BatchUpdateBlobs by {function}");
        let answer = server
            .cas()
            .batch_update_blobs(request)
            .await
            .expect_ok(&call)?;
        let answer = answer.into_inner().responses;
        ensure!(
            matches!(answer.as_slice(), [one] if one.status.clone().unwrap_or_default().code == 0),
            "{call} answered {answer:?}"
        );
        let request = FindMissingBlobsRequest {
            instance_name: server.instance.clone(),
            blob_digests: vec![digest.clone()],
            digest_function: value,
        };
        let answer = server.cas().find_missing_blobs(request).await;
        let missing = answer.expect_ok("FindMissingBlobs")?.into_inner();
        ensure!(
            missing.missing_blob_digests.is_empty(),
            "a blob that was stored by {function} is missing"
        );
        let name = server.read_name(&server.digest(b""));
        let prefix = name.rsplit_once("blobs/").map_or("", |(prefix, _)| prefix);
        let name = format!("{prefix}blobs/{}", blob_of(function, &digest));
        let read = server.read(&name, 0, 0).await;
        let read = read.expect_ok(&format!("ByteStream.Read of {name}"))?;
        ensure!(read == content, "{name} has another content");
    }
    Ok(())
}

async fn other_function(server: &Server) -> Outcome {
    let announced = server.functions();
    let other = DigestFunction::ALL
        .into_iter()
        .find(|one| !announced.contains(one));
    let (digest, value) = match other {
        Some(function) => {
            let digest = function.digest_of(&server.random(10)).to_proto();
            (digest, function.to_proto() as i32)
        }
        // No value of the enumeration.
        None => (server.digest(&server.random(10)), 99),
    };
    if server.cache().digest_functions.is_empty() {
        return unsupported("no digest functions are announced");
    }
    let request = FindMissingBlobsRequest {
        instance_name: server.instance.clone(),
        blob_digests: vec![digest],
        digest_function: value,
    };
    let found = server.cas().find_missing_blobs(request).await;
    ensure!(
        found.is_err(),
        "FindMissingBlobs with function {value} succeeded"
    );
    Ok(())
}
