//! Execution: the streams of operations, what becomes of an action, and whose fault it is.

use std::time::{Duration, SystemTime};

use bb_remote_execution::{
    digest::DigestFunction,
    proto::{
        longrunning::{Operation, operation},
        reapi::{
            self, Action, ActionResult, BatchUpdateBlobsRequest, Command, Directory, DirectoryNode,
            ExecuteOperationMetadata, ExecuteRequest, ExecuteResponse, FileNode,
            WaitExecutionRequest, command::EnvironmentVariable, execution_stage,
        },
        rpc, system_time, unpack,
    },
};
use prost::Message;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, fail, rules, unsupported},
    server::{Server, update},
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
    Must, "Execution.Execute", "an action that is missing is FAILED_PRECONDITION", missing_action;
    Must, "Execution.Execute", "a command that is missing is FAILED_PRECONDITION", missing_command;
    Must, "Execution.Execute", "an input that is missing is FAILED_PRECONDITION", missing_input;
    Should, "Execution.Execute", "for each input that is missing there is a violation MISSING, whose subject is blobs/HASH/SIZE", violations;
    Must, "Execution.Execute", "an action that cannot be parsed, or has no command_digest, is an error of the client's", ill_formed_action;
    Must, "Command.arguments", "a command without arguments is an error of the client's", no_arguments;
    Should, "Directory", "an input root whose names occur twice, or are no single path component, is INVALID_ARGUMENT", not_canonical;
    Must, "Execution.Execute", "an input root whose names are not sorted is taken as it is, or INVALID_ARGUMENT", not_sorted;
    Must, "Directory", "no input leaves the input root by its name", no_escape;
    Must, "Command.environment_variables", "the command has them", environment;
    Must, "Command.working_directory", "the command runs in it", working_directory;
    Must, "Action.input_root_digest", "the command finds the files, directories, symlinks and executable bits of its input root", input_root;
    Must, "PriorityCapabilities", "priorities that are announced are taken", priorities;
    Must, "RequestMetadata", "the header is taken", metadata;
    Must, "ExecutionCapabilities.digest_functions", "an action is executed by every function announced", all_functions;
    Should, "ExecuteRequest.digest_function", "left out, it is told by the hash's length", inferred;
    Should, "ExecutedActionMetadata", "a worker is named, and timestamps are there and in order", execution_metadata;
    Should, "Platform.Property", "a property that no worker has is refused", unknown_property;
}

/// Whether actions are executed here; if not, why not.
pub type Runs = Result<(), Stop>;

/// An action in the making.
pub struct Task {
    pub command: Command,
    pub root: Directory,
    pub action: Action,
}

impl Server {
    /// Its result is nobody else's.
    pub fn task(&self, script: &str) -> Task {
        Task {
            command: Command {
                arguments: vec![self.shell.clone(), "-c".to_owned(), script.to_owned()],
                environment_variables: vec![EnvironmentVariable {
                    name: "PATH".to_owned(),
                    value: "/usr/bin:/bin".to_owned(),
                }],
                #[expect(deprecated, reason = "servers before version 2.2 look there")]
                platform: Some(self.platform.clone()),
                ..Default::default()
            },
            root: Directory::default(),
            action: Action {
                platform: Some(self.platform.clone()),
                salt: self.random(16),
                ..Default::default()
            },
        }
    }

    /// Stores a task's messages; the digest of its action.
    pub async fn prepare(&self, task: &Task) -> Result<reapi::Digest, Stop> {
        let mut action = task.action.clone();
        if action.command_digest.is_none() {
            action.command_digest = Some(self.store_message(&task.command).await?);
        }
        if action.input_root_digest.is_none() {
            action.input_root_digest = Some(self.store_message(&task.root).await?);
        }
        self.store_message(&action).await
    }

    pub fn request(&self, action: &reapi::Digest) -> ExecuteRequest {
        ExecuteRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.clone()),
            skip_cache_lookup: true,
            digest_function: self.function_value(),
            ..Default::default()
        }
    }

    /// All operations of a stream.
    async fn execute(&self, request: ExecuteRequest) -> Result<Vec<Operation>, Status> {
        let stream = self.execution().execute(request).await?.into_inner();
        to_the_end(stream).await
    }

    /// What becomes of an action. The inner error is of the call, or of the response.
    pub async fn outcome(&self, task: &Task) -> Result<Result<ExecuteResponse, Status>, Stop> {
        let action = self.prepare(task).await?;
        self.outcome_of(self.request(&action)).await
    }

    pub async fn outcome_of(
        &self,
        request: ExecuteRequest,
    ) -> Result<Result<ExecuteResponse, Status>, Stop> {
        let operations = match self.execute(request).await {
            Ok(operations) => operations,
            Err(status) => return Ok(Err(status)),
        };
        let response = response(&operations)?;
        let status = response.status.clone().unwrap_or_default();
        Ok(match status.code {
            0 => Ok(response),
            code => Err(Status::with_details(
                code.into(),
                status.message.clone(),
                status.encode_to_vec().into(),
            )),
        })
    }

    /// The result of an action that is expected to have one, whatever its exit code.
    pub async fn result(&self, task: &Task) -> Result<ActionResult, Stop> {
        self.runs().await?;
        let response = self.outcome(task).await?.expect_ok("Execute")?;
        let Some(result) = response.result else {
            return fail("the ExecuteResponse has no result");
        };
        Ok(result)
    }

    /// What a result says of standard output, inlined or not.
    pub async fn stdout(&self, result: &ActionResult) -> Result<Vec<u8>, Stop> {
        self.log(&result.stdout_raw, result.stdout_digest.as_ref())
            .await
    }

    pub async fn log(&self, raw: &[u8], digest: Option<&reapi::Digest>) -> Result<Vec<u8>, Stop> {
        match digest {
            Some(digest) if raw.is_empty() => self.content(digest).await,
            _ => Ok(raw.to_vec()),
        }
    }

    pub async fn content(&self, digest: &reapi::Digest) -> Result<Vec<u8>, Stop> {
        let read = self.read(&self.read_name(digest), 0, 0).await;
        read.expect_ok("ByteStream.Read of an output")
    }

    /// Unsupported where no action is executed.
    pub async fn runs(&self) -> Runs {
        let find_out = async || {
            self.execution_capabilities()?;
            match self.outcome(&self.task("exit 0")).await? {
                Ok(_) => Ok(()),
                Err(status) => unsupported(format!(
                    "no action is executed here: {:?}: {}",
                    status.code(),
                    status.message()
                )),
            }
        };
        self.runs.get_or_init(find_out).await.clone()
    }
}

async fn to_the_end(mut stream: Streaming<Operation>) -> Result<Vec<Operation>, Status> {
    let mut operations = Vec::new();
    while let Some(operation) = stream.message().await? {
        let done = operation.done;
        operations.push(operation);
        if done {
            break;
        }
    }
    Ok(operations)
}

fn response(operations: &[Operation]) -> Result<ExecuteResponse, Stop> {
    match operations.last() {
        Some(Operation {
            done: true,
            result: Some(operation::Result::Response(any)),
            ..
        }) => match unpack(any) {
            Some(response) => Ok(response),
            None => fail(format!(
                "the response of the operation is a {}",
                any.type_url
            )),
        },
        Some(last) => fail(format!("the stream ended with {last:?}")),
        None => fail("the stream ended without an operation"),
    }
}

/// The result of an action whose status is expected to be OK.
fn result(operations: &[Operation]) -> Result<ActionResult, Stop> {
    let response = response(operations)?;
    let status = response.status.unwrap_or_default();
    match status.code {
        0 => Ok(response.result.unwrap_or_default()),
        code => fail(format!(
            "the response's status is {:?}: {}",
            Code::from_i32(code),
            status.message
        )),
    }
}

fn stage(operation: &Operation) -> Option<ExecuteOperationMetadata> {
    unpack(operation.metadata.as_ref()?)
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

/// The outcome of an action whose client has to do something about it.
async fn expect_precondition(server: &Server, task: &Task) -> Result<Status, Stop> {
    match server.outcome(task).await? {
        Err(status) if status.code() == Code::FailedPrecondition => Ok(status),
        other => {
            let codes = &[Code::FailedPrecondition];
            expect_code(other, codes, "Execute")?;
            fail("it succeeded")
        }
    }
}

async fn missing_action(server: &Server) -> Outcome {
    server.runs().await?;
    let action = server.digest(&server.random(50));
    let outcome = server.outcome_of(server.request(&action)).await?;
    expect_code(outcome, &[Code::FailedPrecondition], "Execute")
}

async fn missing_command(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.action.command_digest = Some(server.digest(&server.random(50)));
    expect_precondition(server, &task).await.map(drop)
}

fn lacking_file(server: &Server, name: &str) -> FileNode {
    FileNode {
        name: name.to_owned(),
        digest: Some(server.digest(&server.random(50))),
        ..Default::default()
    }
}

async fn missing_input(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.root.files = vec![lacking_file(server, "file")];
    expect_precondition(server, &task).await?;
    let mut task = server.task("exit 0");
    task.root.directories = vec![DirectoryNode {
        name: "directory".to_owned(),
        digest: Some(server.digest(&server.random(50))),
    }];
    expect_precondition(server, &task).await?;
    let mut task = server.task("exit 0");
    task.action.input_root_digest = Some(server.digest(&server.random(50)));
    expect_precondition(server, &task).await.map(drop)
}

async fn violations(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.root.files = vec![lacking_file(server, "a"), lacking_file(server, "b")];
    let status = expect_precondition(server, &task).await?;
    let details = rpc::Status::decode(status.details())
        .unwrap_or_default()
        .details;
    let failures: Vec<rpc::PreconditionFailure> = details.iter().filter_map(unpack).collect();
    let violations: Vec<_> = failures
        .iter()
        .flat_map(|failure| &failure.violations)
        .collect();
    for file in &task.root.files {
        let digest = file.digest.clone().unwrap_or_default();
        let subject = format!("blobs/{}", server.blob(&digest));
        let told = violations
            .iter()
            .any(|violation| violation.r#type == "MISSING" && violation.subject == subject);
        ensure!(
            told,
            "there is none with the subject {subject}: {violations:?}"
        );
    }
    Ok(())
}

/// Codes by which a client is told that it has to send something else.
const CLIENTS_FAULT: &[Code] = &[Code::InvalidArgument, Code::FailedPrecondition];

async fn ill_formed_action(server: &Server) -> Outcome {
    server.runs().await?;
    let no_message = server.store(vec![0xff; 30].into()).await?;
    let no_digests = Action {
        platform: Some(server.platform.clone()),
        salt: server.random(16),
        ..Default::default()
    };
    for (what, action) in [
        ("no Action", no_message),
        (
            "an Action without digests",
            server.store_message(&no_digests).await?,
        ),
    ] {
        let outcome = server.outcome_of(server.request(&action)).await?;
        expect_code(outcome, CLIENTS_FAULT, &format!("Execute of {what}"))?;
    }
    Ok(())
}

async fn no_arguments(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.command.arguments.clear();
    expect_code(server.outcome(&task).await?, CLIENTS_FAULT, "Execute")
}

async fn not_canonical(server: &Server) -> Outcome {
    server.runs().await?;
    let content = server.store(server.random(20)).await?;
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(content.clone()),
        ..Default::default()
    };
    for names in [&["a", "a"][..], &["a/b"], &[".."], &["."], &[""]] {
        let mut task = server.task("exit 0");
        task.root.files = names.iter().map(|name| file(name)).collect();
        let call = format!("Execute with files {names:?}");
        expect_code(
            server.outcome(&task).await?,
            &[Code::InvalidArgument],
            &call,
        )?;
    }
    Ok(())
}

async fn not_sorted(server: &Server) -> Outcome {
    let content = server.random(20);
    let digest = server.store(content.clone()).await?;
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(digest.clone()),
        ..Default::default()
    };
    server.runs().await?;
    let mut task = server.task("cat a");
    task.root.files = vec![file("b"), file("a")];
    match server.outcome(&task).await? {
        Ok(response) => {
            let result = response.result.unwrap_or_default();
            ensure!(
                server.stdout(&result).await? == content,
                "a file is missing"
            );
            Ok(())
        }
        refused => expect_code(refused, &[Code::InvalidArgument], "Execute"),
    }
}

async fn no_escape(server: &Server) -> Outcome {
    server.runs().await?;
    let content = server.store(server.random(20)).await?;
    let name = format!("reapi-conformance-{}", uuid::Uuid::new_v4().simple());
    let mut task = server.task(&format!("test ! -e ../{name} && test ! -e /tmp/{name}"));
    for path in [format!("../{name}"), format!("/tmp/{name}")] {
        task.root.files = vec![FileNode {
            name: path.clone(),
            digest: Some(content.clone()),
            ..Default::default()
        }];
        if let Ok(response) = server.outcome(&task).await? {
            let code = response.result.unwrap_or_default().exit_code;
            ensure!(
                code == 0,
                "a file named {path:?} is outside of the input root"
            );
        }
    }
    Ok(())
}

async fn environment(server: &Server) -> Outcome {
    let mut task = server.task("echo \"$CONFORMANCE_ONE\" \"$CONFORMANCE_TWO\"");
    for (name, value) in [("CONFORMANCE_ONE", "a b"), ("CONFORMANCE_TWO", "ü=\n$x")] {
        task.command.environment_variables.insert(
            task.command.environment_variables.len() - 1,
            EnvironmentVariable {
                name: name.to_owned(),
                value: value.to_owned(),
            },
        );
    }
    let result = server.result(&task).await?;
    let stdout = server.stdout(&result).await?;
    ensure!(
        stdout == "a b ü=\n$x\n".as_bytes(),
        "they are {:?}",
        String::from_utf8_lossy(&stdout)
    );
    Ok(())
}

async fn working_directory(server: &Server) -> Outcome {
    let content = server.random(20);
    let below = Directory {
        files: vec![FileNode {
            name: "file".to_owned(),
            digest: Some(server.store(content).await?),
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut task = server.task("test -f file && echo out > ../other/out");
    task.root.directories = vec![
        DirectoryNode {
            name: "other".to_owned(),
            digest: Some(server.store_message(&Directory::default()).await?),
        },
        DirectoryNode {
            name: "work".to_owned(),
            digest: Some(server.store_message(&below).await?),
        },
    ];
    task.command.working_directory = "work".to_owned();
    let result = server.result(&task).await?;
    ensure!(
        result.exit_code == 0,
        "the command does not find a file there"
    );
    Ok(())
}

async fn input_root(server: &Server) -> Outcome {
    let (one, tool) = (server.random(20), "#!/bin/sh\nexit 0\n");
    let below = Directory {
        files: vec![FileNode {
            name: "tool".to_owned(),
            digest: Some(server.store(tool.into()).await?),
            is_executable: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let directory = |name: &str, digest| DirectoryNode {
        name: name.to_owned(),
        digest: Some(digest),
    };
    let mut task = server.task(
        "test -d empty || exit 2; test -z \"$(ls -A empty)\" || exit 3; test -s file || exit 4; \
         test ! -x file || test \"$(id -u)\" = 0 || exit 5; test -x sub/tool || exit 6; \
         test \"$(readlink link)\" = sub/tool || exit 7; test -f link || exit 8; cat file",
    );
    task.root.files = vec![FileNode {
        name: "file".to_owned(),
        digest: Some(server.store(one.clone()).await?),
        ..Default::default()
    }];
    task.root.directories = vec![
        directory("empty", server.store_message(&Directory::default()).await?),
        directory("sub", server.store_message(&below).await?),
    ];
    task.root.symlinks = vec![reapi::SymlinkNode {
        name: "link".to_owned(),
        target: "sub/tool".to_owned(),
        ..Default::default()
    }];
    let result = server.result(&task).await?;
    ensure!(
        result.exit_code == 0,
        "the command finds something else, by its exit code {}",
        result.exit_code
    );
    ensure!(
        server.stdout(&result).await? == one,
        "a file has another content"
    );
    Ok(())
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
    } = server.task("exit 7");
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
    let code = response.result.unwrap_or_default().exit_code;
    ensure!(code == 7, "by {function}, the exit code is {code}");
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
