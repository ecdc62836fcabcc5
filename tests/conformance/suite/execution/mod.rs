//! Execution.
//!
//! This file has how an action is made and executed; `streams` has the rules about operations and what
//! becomes of an action, `inputs` those about what it is made of, `outputs` those about what it leaves.

use bb_remote_execution::proto::{
    longrunning::{Operation, operation},
    reapi::{
        self, Action, ActionResult, Command, Directory, ExecuteOperationMetadata, ExecuteRequest,
        ExecuteResponse, command::EnvironmentVariable,
    },
    unpack,
};
use prost::Message;
use tonic::{Code, Status, Streaming};

use super::{
    rule::{self, Expect, Stop, fail, unsupported},
    server::Server,
};

pub mod inputs;
pub mod outputs;
pub mod streams;

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
