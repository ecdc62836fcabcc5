//! The streams of operations, what becomes of an action, and what a request says of it.

use std::time::{Duration, SystemTime};

use bb_remote_execution::{
    digest::DigestFunction,
    proto::{
        longrunning::operation,
        reapi::{
            self, BatchUpdateBlobsRequest, ExecuteResponse, WaitExecutionRequest, execution_stage,
        },
        system_time,
    },
};
use prost::Message;
use tonic::{Code, Request, metadata::MetadataValue};

use super::{
    super::{
        rule::{Expect, Outcome, Stop, ensure, expect_code, fail, rules, unsupported},
        server::{Server, update},
    },
    Task, response, result, stage, to_the_end,
};

rules! {
    Must, "Execution.Execute", "an action is executed, and its exit code and standard output returned", executes;
    Must, "Execution.Execute", "all operations of a stream have one name, and metadata with the action's digest; the last one alone is done", operations;
    Must, "ExecutionStage.Value", "stages never go back, and end with COMPLETED", stages;
    Must, "Execution.Execute", "the error of an operation is never set, whatever becomes of the action", no_error;
    Must, "ExecuteResponse.result", "a command that fails has an exit code, and a status that is OK", exit_code;
    Must, "Execution.WaitExecution", "the operation of an action under way is answered at once, and to its end", wait;
    Must, "Execution.WaitExecution", "a name that is none is NOT_FOUND", wait_unknown;
    Must, "Execution.WaitExecution", "an action goes on when the stream of Execute is closed", goes_on;
    Must, "ExecuteRequest.skip_cache_lookup", "where it is false, the result of the same action is returned again, and cached_result says so", cached;
    Must, "ExecuteRequest.skip_cache_lookup", "where it is true, the action is executed again", not_cached;
    Should, "Action", "the result of an action that succeeded is in the Action Cache", result_is_cached;
    Must, "Action.do_not_cache", "the result of such an action is not in the Action Cache", do_not_cache;
    Must, "Action.timeout", "a command that runs longer is ended, with DEADLINE_EXCEEDED", timeout;
    Must, "PriorityCapabilities", "priorities that are announced are taken", priorities;
    Must, "RequestMetadata", "the header is taken", metadata;
    Must, "ExecutionCapabilities.digest_functions", "an action is executed by every function announced", all_functions;
    Should, "ExecuteRequest.digest_function", "left out, it is told by the hash's length", inferred;
    Should, "ExecutedActionMetadata", "a worker is named, and timestamps are there and in order", execution_metadata;
    Should, "Platform.Property", "a property that no worker has is refused", unknown_property;
}

async fn executes(server: &Server) -> Outcome {
    server.execution_capabilities()?;
    let response = server
        .outcome(&server.task("echo out; echo err >&2"))
        .await?;
    let result = response.expect_ok("Execute")?.result.unwrap_or_default();
    ensure!(
        result.exit_code == 0,
        "the exit code is {}",
        result.exit_code
    );
    let stdout = server.stdout(&result).await?;
    ensure!(stdout == b"out\n", "the standard output is {stdout:?}");
    let stderr = server
        .log(&result.stderr_raw, result.stderr_digest.as_ref())
        .await?;
    ensure!(stderr == b"err\n", "the standard error is {stderr:?}");
    Ok(())
}

async fn operations(server: &Server) -> Outcome {
    server.runs().await?;
    let action = server.prepare(&server.task("exit 0")).await?;
    let operations = server
        .execute(server.request(&action))
        .await
        .expect_ok("Execute")?;
    response(&operations)?;
    let name = &operations[0].name;
    ensure!(!name.is_empty(), "the operation has no name");
    for operation in &operations {
        ensure!(
            operation.name == *name,
            "the name changes to {:?}",
            operation.name
        );
        let Some(metadata) = stage(operation) else {
            return fail("metadata is no ExecuteOperationMetadata");
        };
        ensure!(
            metadata.action_digest.as_ref() == Some(&action),
            "action_digest is {:?}",
            metadata.action_digest
        );
    }
    let done = operations.iter().filter(|operation| operation.done).count();
    ensure!(done == 1, "{done} operations are done");
    Ok(())
}

async fn stages(server: &Server) -> Outcome {
    server.runs().await?;
    let action = server.prepare(&server.task("sleep 1")).await?;
    let operations = server
        .execute(server.request(&action))
        .await
        .expect_ok("Execute")?;
    let seen: Vec<i32> = operations
        .iter()
        .map(|operation| stage(operation).map_or(0, |metadata| metadata.stage))
        .collect();
    ensure!(seen.is_sorted(), "stages are {seen:?}");
    let completed = execution_stage::Value::Completed as i32;
    ensure!(seen.last() == Some(&completed), "stages are {seen:?}");
    Ok(())
}

async fn no_error(server: &Server) -> Outcome {
    server.runs().await?;
    let mut late = server.task("sleep 30");
    late.action.timeout = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    let mut lacking = server.task("exit 0");
    lacking.action.input_root_digest = Some(server.digest(&server.random(50)));
    for task in [late, lacking, server.task("exit 1")] {
        let action = server.prepare(&task).await?;
        let Ok(operations) = server.execute(server.request(&action)).await else {
            continue;
        };
        for operation in operations {
            ensure!(
                !matches!(operation.result, Some(operation::Result::Error(_))),
                "it is {:?}",
                operation.result
            );
        }
    }
    Ok(())
}

async fn exit_code(server: &Server) -> Outcome {
    for code in [1, 42, 255] {
        let result = server.result(&server.task(&format!("exit {code}"))).await?;
        ensure!(
            result.exit_code == code,
            "{} instead of {code}",
            result.exit_code
        );
    }
    Ok(())
}

/// Begins an action, and leaves its stream after the first operation; its name.
async fn begin(server: &Server, task: &Task) -> Result<String, Stop> {
    server.runs().await?;
    let action = server.prepare(task).await?;
    let stream = server.execution().execute(server.request(&action)).await;
    let mut stream = stream.expect_ok("Execute")?.into_inner();
    match stream.message().await.expect_ok("Execute")? {
        Some(first) => Ok(first.name),
        None => fail("the stream ended without an operation"),
    }
}

async fn wait(server: &Server) -> Outcome {
    let name = begin(server, &server.task("sleep 3; echo waited")).await?;
    let request = WaitExecutionRequest { name: name.clone() };
    let stream = server.execution().wait_execution(request).await;
    let mut stream = stream.expect_ok("WaitExecution")?.into_inner();
    let first = tokio::time::timeout(Duration::from_secs(2), stream.message()).await;
    let Ok(first) = first else {
        return fail("there was no operation within 2 seconds");
    };
    let Some(first) = first.expect_ok("WaitExecution")? else {
        return fail("the stream ended without an operation");
    };
    ensure!(
        first.name == name,
        "the operation's name is {:?}",
        first.name
    );
    let rest = to_the_end(stream).await.expect_ok("WaitExecution")?;
    let result = result(&rest)?;
    let stdout = server.stdout(&result).await?;
    ensure!(stdout == b"waited\n", "the standard output is {stdout:?}");
    Ok(())
}

async fn wait_unknown(server: &Server) -> Outcome {
    server.execution_capabilities()?;
    let request = WaitExecutionRequest {
        name: uuid::Uuid::new_v4().to_string(),
    };
    let answer = match server.execution().wait_execution(request).await {
        Ok(stream) => to_the_end(stream.into_inner()).await,
        Err(status) => Err(status),
    };
    expect_code(answer, &[Code::NotFound], "WaitExecution")
}

async fn goes_on(server: &Server) -> Outcome {
    let name = begin(server, &server.task("sleep 3; echo went on")).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let request = WaitExecutionRequest { name };
    let stream = server.execution().wait_execution(request).await;
    let stream = stream.expect_ok("WaitExecution")?.into_inner();
    let operations = to_the_end(stream).await.expect_ok("WaitExecution")?;
    let result = result(&operations)?;
    let stdout = server.stdout(&result).await?;
    ensure!(stdout == b"went on\n", "the standard output is {stdout:?}");
    Ok(())
}

/// Executes twice an action that tells its executions apart, the second time with this
/// skip_cache_lookup; the second response, and whether its result is the first one's.
async fn twice(server: &Server, skip: bool) -> Result<(ExecuteResponse, bool), Stop> {
    server.runs().await?;
    let task = server.task("date +%s%N; od -An -N8 -tx1 /dev/urandom 2>/dev/null || echo $$");
    let action = server.prepare(&task).await?;
    let first = server.outcome_of(server.request(&action)).await?;
    let first = first.expect_ok("Execute")?.result.unwrap_or_default();
    let mut request = server.request(&action);
    request.skip_cache_lookup = skip;
    let second = server.outcome_of(request).await?.expect_ok("Execute")?;
    let result = second.result.clone().unwrap_or_default();
    let same = server.stdout(&first).await? == server.stdout(&result).await?;
    Ok((second, same))
}

async fn cached(server: &Server) -> Outcome {
    let (response, same) = twice(server, false).await?;
    if !same {
        ensure!(
            !response.cached_result,
            "cached_result is set on another result"
        );
        return unsupported("it is executed again; the server does not cache what it executes");
    }
    ensure!(response.cached_result, "cached_result is not set");
    Ok(())
}

async fn not_cached(server: &Server) -> Outcome {
    let (response, same) = twice(server, true).await?;
    ensure!(!same, "the older result is returned");
    ensure!(!response.cached_result, "cached_result is set");
    Ok(())
}

async fn result_is_cached(server: &Server) -> Outcome {
    server.runs().await?;
    let task = server.task("echo cached");
    let action = server.prepare(&task).await?;
    server
        .outcome_of(server.request(&action))
        .await?
        .expect_ok("Execute")?;
    let got = server.get_action_result(&action, |_| ()).await;
    got.expect_ok("GetActionResult").map(drop)
}

async fn do_not_cache(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("echo not cached");
    task.action.do_not_cache = true;
    let action = server.prepare(&task).await?;
    server
        .outcome_of(server.request(&action))
        .await?
        .expect_ok("Execute")?;
    let got = server.get_action_result(&action, |_| ()).await;
    expect_code(got, &[Code::NotFound], "GetActionResult")
}

async fn timeout(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("sleep 30");
    task.action.timeout = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    let outcome = server.outcome(&task).await?;
    expect_code(outcome, &[Code::DeadlineExceeded], "Execute")
}

async fn priorities(server: &Server) -> Outcome {
    server.runs().await?;
    let execution = server.execution_capabilities()?;
    let ranges = execution
        .execution_priority_capabilities
        .unwrap_or_default()
        .priorities;
    if ranges.is_empty() {
        return unsupported("none are announced");
    }
    for range in ranges {
        for priority in [range.min_priority, range.max_priority] {
            let action = server.prepare(&server.task("exit 0")).await?;
            let mut request = server.request(&action);
            request.execution_policy = Some(reapi::ExecutionPolicy { priority });
            let outcome = server.outcome_of(request).await?;
            outcome.expect_ok(&format!("Execute with priority {priority}"))?;
        }
    }
    Ok(())
}

async fn metadata(server: &Server) -> Outcome {
    server.runs().await?;
    let metadata = reapi::RequestMetadata {
        tool_details: Some(reapi::ToolDetails {
            tool_name: "conformance".to_owned(),
            tool_version: "1".to_owned(),
        }),
        action_id: "action".to_owned(),
        tool_invocation_id: uuid::Uuid::new_v4().to_string(),
        ..Default::default()
    };
    let action = server.prepare(&server.task("exit 0")).await?;
    let mut request = Request::new(server.request(&action));
    let key = "build.bazel.remote.execution.v2.requestmetadata-bin";
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin(key, value);
    let stream = server
        .execution()
        .execute(request)
        .await
        .expect_ok("Execute")?;
    let operations = to_the_end(stream.into_inner()).await.expect_ok("Execute")?;
    response(&operations).map(drop)
}

async fn all_functions(server: &Server) -> Outcome {
    server.runs().await?;
    let announced = server.execution_capabilities()?.digest_functions;
    let known = |value: &i32| DigestFunction::from_proto(*value).ok().flatten();
    for function in announced.iter().filter_map(known) {
        execute_by(server, function, true).await?;
    }
    Ok(())
}

async fn inferred(server: &Server) -> Outcome {
    server.runs().await?;
    if !server.function.is_told_by_length() {
        return unsupported("the function must be named");
    }
    execute_by(server, server.function, false).await
}

/// Executes an action whose digests are by this function, which is named or not.
async fn execute_by(server: &Server, function: DigestFunction, named: bool) -> Outcome {
    let Task {
        command,
        root,
        mut action,
    } = server.task("echo out; exit 7");
    let digest = |content: &[u8]| function.digest_of(content).to_proto();
    let (command, root) = (command.encode_to_vec(), root.encode_to_vec());
    action.command_digest = Some(digest(&command));
    action.input_root_digest = Some(digest(&root));
    let action = action.encode_to_vec();
    let action_digest = digest(&action);
    let value = if named { function.to_proto() as i32 } else { 0 };
    let request = BatchUpdateBlobsRequest {
        instance_name: server.instance.clone(),
        requests: [command, root, action]
            .into_iter()
            .map(|content| update(&digest(&content), content.into()))
            .collect(),
        digest_function: value,
    };
    server
        .cas()
        .batch_update_blobs(request)
        .await
        .expect_ok("BatchUpdateBlobs")?;
    let mut request = server.request(&action_digest);
    request.digest_function = value;
    let outcome = server.outcome_of(request).await?;
    let response = outcome.expect_ok(&format!("Execute by {function}"))?;
    let result = response.result.unwrap_or_default();
    let code = result.exit_code;
    ensure!(code == 7, "by {function}, the exit code is {code}");
    if let Some(stdout) = result.stdout_digest {
        ensure!(
            stdout == digest(b"out\n"),
            "the digest of the standard output is not by {function}"
        );
    }
    Ok(())
}

async fn execution_metadata(server: &Server) -> Outcome {
    let result = server.result(&server.task("exit 0")).await?;
    let Some(metadata) = result.execution_metadata else {
        return fail("there is no execution_metadata");
    };
    ensure!(!metadata.worker.is_empty(), "worker is empty");
    let stamps: Vec<(&str, Option<SystemTime>)> = [
        ("queued", &metadata.queued_timestamp),
        ("worker_start", &metadata.worker_start_timestamp),
        ("input_fetch_start", &metadata.input_fetch_start_timestamp),
        (
            "input_fetch_completed",
            &metadata.input_fetch_completed_timestamp,
        ),
        ("execution_start", &metadata.execution_start_timestamp),
        (
            "execution_completed",
            &metadata.execution_completed_timestamp,
        ),
        (
            "output_upload_start",
            &metadata.output_upload_start_timestamp,
        ),
        (
            "output_upload_completed",
            &metadata.output_upload_completed_timestamp,
        ),
        ("worker_completed", &metadata.worker_completed_timestamp),
    ]
    .map(|(name, stamp)| (name, stamp.as_ref().and_then(system_time)))
    .into();
    for (name, stamp) in &stamps {
        ensure!(stamp.is_some(), "{name}_timestamp is not set");
    }
    // The first one is of another host's clock.
    for pair in stamps[1..].windows(2) {
        ensure!(
            pair[0].1 <= pair[1].1,
            "{}_timestamp is later than {}_timestamp",
            pair[0].0,
            pair[1].0
        );
    }
    Ok(())
}

async fn unknown_property(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    let mut platform = server.platform.clone();
    platform.properties.push(reapi::platform::Property {
        name: "reapi-conformance".to_owned(),
        value: "no worker has this".to_owned(),
    });
    platform.properties.sort_by(|a, b| a.name.cmp(&b.name));
    task.action.platform = Some(platform.clone());
    #[expect(deprecated, reason = "servers before version 2.2 look there")]
    {
        task.command.platform = Some(platform);
    }
    let action = server.prepare(&task).await?;
    let outcome = server.outcome_of(server.request(&action));
    match tokio::time::timeout(Duration::from_secs(10), outcome).await {
        Err(_) => fail("there was no answer within 10 seconds"),
        Ok(outcome) => {
            ensure!(outcome?.is_err(), "the action is executed nevertheless");
            Ok(())
        }
    }
}
