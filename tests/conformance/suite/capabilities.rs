//! Capabilities: what is announced makes sense.

use bb_remote_execution::proto::reapi::{
    PriorityCapabilities, ServerCapabilities, symlink_absolute_path_strategy,
};

use super::{
    rule::{Expect, Outcome, Stop, ensure, rules, unsupported},
    server::Server,
};

rules! {
    Must, "Capabilities.GetCapabilities", "there is an answer, with cache_capabilities, execution_capabilities or both", answers;
    Must, "ServerCapabilities", "low_api_version is not above high_api_version, and version 2 is between them", versions;
    Must, "CacheCapabilities.digest_functions", "at least one function is announced, none twice, and none is UNKNOWN", functions;
    Must, "ExecutionCapabilities.digest_functions", "digest_function and digest_functions have each other's functions, and the cache has all of them", execution_functions;
    Must, "CacheCapabilities", "sizes that are announced are not negative", sizes;
    Must, "SymlinkAbsolutePathStrategy.Value", "the strategy is announced, DISALLOWED or ALLOWED", symlinks;
    Must, "PriorityCapabilities.PriorityRange", "ranges of priorities begin before they end", priorities;
    Must, "Compressor.Value", "compressors of batches are known, and none is announced twice", compressors;
}

fn announced(server: &Server) -> Result<ServerCapabilities, Stop> {
    server.capabilities.clone().expect_ok("GetCapabilities")
}

async fn answers(server: &Server) -> Outcome {
    let all = announced(server)?;
    ensure!(
        all.cache_capabilities.is_some() || all.execution_capabilities.is_some(),
        "the answer has neither"
    );
    Ok(())
}

async fn versions(server: &Server) -> Outcome {
    let all = announced(server)?;
    let (Some(low), Some(high)) = (all.low_api_version, all.high_api_version) else {
        ensure!(false, "low_api_version or high_api_version is not set");
        return Ok(());
    };
    let key = |version: &bb_remote_execution::proto::semver::SemVer| (version.major, version.minor);
    ensure!(
        key(&low) <= key(&high) && low.major <= 2 && high.major >= 2,
        "versions {:?} to {:?} are announced",
        key(&low),
        key(&high)
    );
    Ok(())
}

async fn functions(server: &Server) -> Outcome {
    let Some(cache) = announced(server)?.cache_capabilities else {
        return unsupported("no cache_capabilities are announced");
    };
    let mut functions = cache.digest_functions.clone();
    functions.sort_unstable();
    functions.dedup();
    ensure!(
        !functions.is_empty() && !functions.contains(&0),
        "functions {functions:?} are announced"
    );
    ensure!(
        functions.len() == cache.digest_functions.len(),
        "a function is announced twice: {:?}",
        cache.digest_functions
    );
    Ok(())
}

async fn execution_functions(server: &Server) -> Outcome {
    let execution = server.execution_capabilities()?;
    announced(server)?;
    let one = execution.digest_function;
    let mut all = execution.digest_functions.clone();
    ensure!(one != 0 || !all.is_empty(), "none is announced");
    // Older servers announce one alone.
    if all.is_empty() {
        all.push(one);
    }
    ensure!(
        one == 0 || all.contains(&one),
        "digest_function {one} is not among digest_functions {all:?}"
    );
    let cache = server.cache().digest_functions;
    let lacking: Vec<_> = all.iter().filter(|one| !cache.contains(one)).collect();
    ensure!(
        cache.is_empty() || lacking.is_empty(),
        "the cache does not announce {lacking:?}"
    );
    Ok(())
}

async fn sizes(server: &Server) -> Outcome {
    announced(server)?;
    let cache = server.cache();
    let (batch, blob) = (
        cache.max_batch_total_size_bytes,
        cache.max_cas_blob_size_bytes,
    );
    ensure!(
        batch >= 0 && blob >= 0,
        "max_batch_total_size_bytes {batch}, max_cas_blob_size_bytes {blob}"
    );
    Ok(())
}

async fn symlinks(server: &Server) -> Outcome {
    let Some(cache) = announced(server)?.cache_capabilities else {
        return unsupported("no cache_capabilities are announced");
    };
    let value = cache.symlink_absolute_path_strategy;
    let unknown = symlink_absolute_path_strategy::Value::Unknown as i32;
    ensure!(value != unknown, "it is UNKNOWN, which is an invalid value");
    Ok(())
}

async fn priorities(server: &Server) -> Outcome {
    let all = announced(server)?;
    let check = |priorities: Option<PriorityCapabilities>| -> Outcome {
        for range in priorities.unwrap_or_default().priorities {
            ensure!(
                range.min_priority <= range.max_priority,
                "{range:?} is none"
            );
        }
        Ok(())
    };
    let cache = all.cache_capabilities.unwrap_or_default();
    check(cache.cache_priority_capabilities)?;
    let execution = all.execution_capabilities.unwrap_or_default();
    check(execution.execution_priority_capabilities)
}

async fn compressors(server: &Server) -> Outcome {
    announced(server)?;
    let cache = server.cache();
    for announced in [
        cache.supported_compressors,
        cache.supported_batch_update_compressors,
    ] {
        let mut distinct = announced.clone();
        distinct.sort_unstable();
        distinct.dedup();
        ensure!(
            distinct.len() == announced.len() && announced.iter().all(|value| *value >= 0),
            "compressors {announced:?} are announced"
        );
    }
    Ok(())
}
