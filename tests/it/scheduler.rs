//! The scheduler over real sockets, with an embedded store; workers are calls that the test makes.
//!
//! This file has the few calls that every test is made of.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bb_remote_execution::{
    config::{
        self, Endpoint, ListenAddress, Size,
        routing::InvocationKeyExtractor,
        scheduler::{Config, StorageLocation},
    },
    daemon::{self, Channel, Failure, Lifecycle},
    digest::DigestFunction,
    instance::InstanceName,
    metadata::{self, REQUEST_METADATA_HEADER},
    proto::{
        self,
        longrunning::{Operation, operation},
        reapi::{
            self, Action, BatchUpdateBlobsRequest, Command, Digest, ExecuteOperationMetadata,
            ExecuteRequest, ExecuteResponse, GetCapabilitiesRequest, Platform, RequestMetadata,
            WaitExecutionRequest, batch_update_blobs_request,
            capabilities_client::CapabilitiesClient,
            content_addressable_storage_client::ContentAddressableStorageClient,
            execution_client::ExecutionClient, execution_stage::Value as Stage, platform::Property,
        },
        remoteworker::{
            CurrentState, SynchronizeRequest, SynchronizeResponse, current_state,
            current_state::executing::ExecutionState, desired_state,
            operation_queue_client::OperationQueueClient,
        },
        rpc,
    },
    scheduler,
};
use prost::Message;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

mod bounds;
mod cache;
mod commands;
mod execution;
mod names;
mod operations;
mod pages;
mod restart;
mod routing;
mod rows;
mod services;
mod state;
mod stuck;
mod workers;

struct Scheduler {
    lifecycle: Lifecycle,
    running: JoinHandle<Result<(), Failure>>,
    clients: Channel,
    workers: Channel,
    state: Channel,
    directory: tempfile::TempDir,
    config: Config,
}

fn seconds(seconds: u64) -> config::Duration {
    config::Duration::seconds(seconds)
}

fn milliseconds(milliseconds: u64) -> config::Duration {
    config::Duration(Duration::from_millis(milliseconds))
}

impl Scheduler {
    async fn start(change: impl FnOnce(&mut Config)) -> Scheduler {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { directory.path().join(name) };
        let mut config = Config::default();
        config.clients.listen = ListenAddress::Unix(path("clients"));
        config.workers.listen = ListenAddress::Unix(path("workers"));
        config.state.listen = ListenAddress::Unix(path("state"));
        config.state.directory = path("drains");
        config.control.listen = ListenAddress::Unix(path("control"));
        config.web.listen = ListenAddress::Unix(path("web"));
        // All calls are the same user's, by the sockets.
        config.action_router.invocation_key_extractors =
            vec![InvocationKeyExtractor::ToolInvocationId];
        config.storage.embedded.directory = path("storage");
        config.storage.embedded.maximum_size = Size::mib(64);
        // What is refused is refused at once.
        config.scheduling.worker_registration_timeout = seconds(0);
        std::fs::create_dir(path("storage")).unwrap();
        change(&mut config);
        let lifecycle = Lifecycle::new();
        Scheduler {
            running: tokio::spawn(scheduler::run(config.clone(), lifecycle.clone())),
            clients: daemon::connect(&Endpoint::Unix(path("clients"))),
            workers: daemon::connect(&Endpoint::Unix(path("workers"))),
            state: daemon::connect(&Endpoint::Unix(path("state"))),
            lifecycle,
            directory,
            config,
        }
        .up()
        .await
    }

    async fn up(self) -> Self {
        loop {
            let up = CapabilitiesClient::new(self.clients.clone())
                .get_capabilities(GetCapabilitiesRequest::default())
                .await;
            match up {
                Ok(_) => return self,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops it, and starts another one in its place.
    async fn restart(self) -> Scheduler {
        self.lifecycle.stop();
        self.running.await.unwrap().unwrap();
        let lifecycle = Lifecycle::new();
        let path = |name: &str| Endpoint::Unix(self.directory.path().join(name));
        Scheduler {
            running: tokio::spawn(scheduler::run(self.config.clone(), lifecycle.clone())),
            clients: daemon::connect(&path("clients")),
            workers: daemon::connect(&path("workers")),
            state: daemon::connect(&path("state")),
            lifecycle,
            directory: self.directory,
            config: self.config,
        }
        .up()
        .await
    }

    async fn upload(&self, data: Vec<u8>) -> Digest {
        let digest = DigestFunction::Sha256.digest_of(&data).to_proto();
        let request = BatchUpdateBlobsRequest {
            requests: vec![batch_update_blobs_request::Request {
                digest: Some(digest.clone()),
                data: data.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let response = ContentAddressableStorageClient::new(self.clients.clone())
            .batch_update_blobs(request)
            .await
            .unwrap();
        assert_eq!(
            response.into_inner().responses[0]
                .status
                .clone()
                .unwrap_or_default()
                .code,
            0
        );
        digest
    }

    async fn action(&self, salt: &str, change: impl FnOnce(&mut Action)) -> Digest {
        let mut action = Action {
            salt: salt.as_bytes().to_vec().into(),
            platform: Some(linux()),
            ..Default::default()
        };
        change(&mut action);
        self.upload(action.encode_to_vec()).await
    }

    async fn execute(&self, action: &Digest) -> Result<Streaming<Operation>, Status> {
        self.request(execute(action)).await
    }

    async fn request(
        &self,
        request: impl tonic::IntoRequest<ExecuteRequest>,
    ) -> Result<Streaming<Operation>, Status> {
        ExecutionClient::new(self.clients.clone())
            .execute(request)
            .await
            .map(tonic::Response::into_inner)
    }

    async fn wait(&self, name: &str) -> Result<Streaming<Operation>, Status> {
        let request = WaitExecutionRequest {
            name: name.to_owned(),
        };
        ExecutionClient::new(self.clients.clone())
            .wait_execution(request)
            .await
            .map(tonic::Response::into_inner)
    }

    /// A call that prefers being idle, and so is answered at once.
    async fn synchronize(
        &self,
        worker: &str,
        state: current_state::WorkerState,
    ) -> Result<SynchronizeResponse, Status> {
        let mut request = synchronize(worker);
        request.current_state = Some(CurrentState {
            worker_state: Some(state),
        });
        let mut request = Request::new(request);
        metadata::set_instance(&mut request, &InstanceName::empty());
        self.call(request).await
    }

    async fn call(
        &self,
        request: impl tonic::IntoRequest<SynchronizeRequest>,
    ) -> Result<SynchronizeResponse, Status> {
        OperationQueueClient::new(self.workers.clone())
            .synchronize(request)
            .await
            .map(tonic::Response::into_inner)
    }

    /// A worker that asks for work, once its call is held.
    async fn parked(&self, worker: &str) -> JoinHandle<Result<SynchronizeResponse, Status>> {
        let mut request = synchronize(worker);
        request.prefer_being_idle = false;
        request.current_state = Some(CurrentState {
            worker_state: Some(IDLE),
        });
        let mut client = OperationQueueClient::new(self.workers.clone());
        let call = tokio::spawn(async move {
            client
                .synchronize(request)
                .await
                .map(tonic::Response::into_inner)
        });
        // A second call is refused exactly while the first one is held.
        while self.synchronize(worker, IDLE).await.is_ok() {
            tokio::task::yield_now().await;
        }
        call
    }
}

const IDLE: current_state::WorkerState = current_state::WorkerState::Idle(());

fn linux() -> Platform {
    Platform {
        properties: vec![Property {
            name: "OSFamily".to_owned(),
            value: "linux".to_owned(),
        }],
    }
}

fn execute(action: &Digest) -> ExecuteRequest {
    ExecuteRequest {
        action_digest: Some(action.clone()),
        ..Default::default()
    }
}

fn synchronize(worker: &str) -> SynchronizeRequest {
    SynchronizeRequest {
        worker_id: BTreeMap::from([("name".to_owned(), worker.to_owned())]),
        platform: Some(linux()),
        prefer_being_idle: true,
        ..Default::default()
    }
}

fn executing(action: &Digest, state: ExecutionState) -> current_state::WorkerState {
    current_state::WorkerState::Executing(current_state::Executing {
        action_digest: Some(action.clone()),
        execution_state: Some(state),
    })
}

fn completed(action: &Digest, message: &str) -> current_state::WorkerState {
    executing(
        action,
        ExecutionState::Completed(ExecuteResponse {
            message: message.to_owned(),
            result: Some(Default::default()),
            ..Default::default()
        }),
    )
}

fn desired(response: SynchronizeResponse) -> desired_state::Executing {
    match response.desired_state.and_then(|state| state.worker_state) {
        Some(desired_state::WorkerState::Executing(executing)) => executing,
        other => panic!("no work, but {other:?}"),
    }
}

fn stage(operation: &Operation) -> Stage {
    let metadata: ExecuteOperationMetadata =
        proto::unpack(operation.metadata.as_ref().unwrap()).unwrap();
    Stage::try_from(metadata.stage).unwrap()
}

async fn next(stream: &mut Streaming<Operation>) -> Operation {
    stream.message().await.unwrap().expect("one more operation")
}

async fn response(stream: &mut Streaming<Operation>) -> ExecuteResponse {
    loop {
        let operation = next(stream).await;
        if operation.done {
            assert_eq!(stage(&operation), Stage::Completed);
            let Some(operation::Result::Response(any)) = operation.result else {
                panic!("{operation:?}");
            };
            assert!(stream.message().await.unwrap().is_none());
            return proto::unpack(&any).unwrap();
        }
    }
}
