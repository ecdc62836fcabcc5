//! The scheduler over real sockets, with an embedded store; workers are calls that the test makes.
//!
//! Long, since every test is made of the same few calls, which are at its top.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bb_remote_execution::{
    config::{self, Endpoint, ListenAddress, Size, scheduler::Config},
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

struct Scheduler {
    lifecycle: Lifecycle,
    running: JoinHandle<Result<(), Failure>>,
    clients: Channel,
    workers: Channel,
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
        config.storage.embedded.directory = path("storage");
        config.storage.embedded.maximum_size = Size::mib(64);
        std::fs::create_dir(path("storage")).unwrap();
        change(&mut config);
        let lifecycle = Lifecycle::new();
        Scheduler {
            running: tokio::spawn(scheduler::run(config.clone(), lifecycle.clone())),
            clients: daemon::connect(&Endpoint::Unix(path("clients"))),
            workers: daemon::connect(&Endpoint::Unix(path("workers"))),
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

#[tokio::test(flavor = "multi_thread")]
async fn an_action_goes_to_a_worker_and_its_result_to_the_client() {
    let scheduler = Scheduler::start(|_| {}).await;
    let mut call = synchronize("w");
    call.instance_name_prefix = "a".to_owned();
    call.prefer_being_idle = false;
    call.current_state = Some(CurrentState {
        worker_state: Some(IDLE),
    });
    let mut worker = OperationQueueClient::new(scheduler.workers.clone());
    let held = tokio::spawn(async move { worker.synchronize(call).await });
    let action = scheduler.action("x", |_| {}).await;
    let metadata = RequestMetadata {
        tool_invocation_id: "build".to_owned(),
        target_id: "//:x".to_owned(),
        ..Default::default()
    };
    let mut stream = loop {
        let mut request = Request::new(ExecuteRequest {
            instance_name: "a/b".to_owned(),
            ..execute(&action)
        });
        request.metadata_mut().insert_bin(
            REQUEST_METADATA_HEADER,
            MetadataValue::from_bytes(&metadata.encode_to_vec()),
        );
        // Until the worker has called.
        match scheduler.request(request).await {
            Ok(stream) => break stream,
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
        }
    };
    let work = desired(held.await.unwrap().unwrap().into_inner());
    assert_eq!(work.action_digest.as_ref(), Some(&action));
    assert_eq!(work.instance_name_suffix, "b");
    assert_eq!(
        work.digest_function,
        reapi::digest_function::Value::Sha256 as i32
    );
    let timeout = work.action.unwrap().timeout.unwrap();
    assert_eq!(timeout.seconds, 30 * 60);
    assert!(work.queued_timestamp.is_some());
    assert_eq!(work.auxiliary_metadata.len(), 1);
    let told: RequestMetadata = proto::unpack(&work.auxiliary_metadata[0]).unwrap();
    assert_eq!(told, metadata);

    let first = next(&mut stream).await;
    assert_eq!(stage(&first), Stage::Executing);
    assert!(uuid::Uuid::try_parse(&first.name).is_ok());
    // Another connection joins.
    let mut waiting = scheduler.wait(&first.name).await.unwrap();
    assert_eq!(next(&mut waiting).await, first);

    let mut call = synchronize("w");
    call.instance_name_prefix = "a".to_owned();
    call.current_state = Some(CurrentState {
        worker_state: Some(executing(&action, ExecutionState::Running(()))),
    });
    let answer = scheduler.call(call.clone()).await.unwrap();
    assert!(answer.desired_state.is_none());
    assert!(answer.next_synchronization_at.is_some());
    call.current_state = Some(CurrentState {
        worker_state: Some(completed(&action, "done")),
    });
    scheduler.call(call).await.unwrap();
    assert_eq!(response(&mut stream).await.message, "done");
    assert_eq!(response(&mut waiting).await.message, "done");
    // Those who come later find it, too.
    let mut late = scheduler.wait(&first.name).await.unwrap();
    assert_eq!(response(&mut late).await.message, "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_actions_are_executed_once_for_all_clients() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push(scheduler.execute(&action).await.unwrap());
    }
    assert_eq!(
        desired(held.await.unwrap().unwrap()).action_digest.as_ref(),
        Some(&action)
    );
    let alone = scheduler
        .action("x", |action| action.do_not_cache = true)
        .await;
    let mut alone = [
        scheduler.execute(&alone).await.unwrap(),
        scheduler.execute(&alone).await.unwrap(),
    ];
    let (first, second) = (next(&mut alone[0]).await, next(&mut alone[1]).await);
    assert_ne!(first.name, second.name);
    scheduler
        .synchronize("w", completed(&action, "once"))
        .await
        .unwrap();
    for mut stream in streams {
        assert_eq!(response(&mut stream).await.message, "once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_at_fault_is_told_so_and_why() {
    let scheduler = Scheduler::start(|_| {}).await;
    let _held = scheduler.parked("w").await;
    let good = scheduler.action("x", |_| {}).await;
    let refused = async |request: ExecuteRequest, code: Code, words: &str| {
        let status = match scheduler.request(request).await {
            Ok(_) => panic!("{words}: accepted"),
            Err(status) => status,
        };
        assert_eq!(status.code(), code, "{words}: {status}");
        assert!(status.message().contains(words), "{status}");
        status
    };
    let with_digest = |change: fn(&mut Digest)| {
        let mut digest = good.clone();
        change(&mut digest);
        execute(&digest)
    };
    let invalid = Code::InvalidArgument;
    for (request, words) in [
        (ExecuteRequest::default(), "no digest was given"),
        (with_digest(|d| d.size_bytes = -1), "negative"),
        (with_digest(|d| d.hash.truncate(10)), "10 characters"),
        (with_digest(|d| d.hash = "Z".repeat(64)), "0-9 and a-f"),
        (with_digest(|d| d.size_bytes = 64 << 20), "limit"),
    ] {
        refused(request, invalid, words).await;
    }
    let request = ExecuteRequest {
        instance_name: "a/uploads".to_owned(),
        ..execute(&good)
    };
    refused(request, invalid, "reserved").await;
    let request = ExecuteRequest {
        digest_function: reapi::digest_function::Value::Vso as i32,
        ..execute(&good)
    };
    refused(request, invalid, "VSO").await;

    let missing = DigestFunction::Sha256.digest_of(b"absent");
    let status = refused(
        execute(&missing.to_proto()),
        Code::FailedPrecondition,
        "Failed to obtain action: ",
    )
    .await;
    let details = rpc::Status::decode(status.details()).unwrap().details;
    let [detail] = &details[..] else {
        panic!("{details:?}");
    };
    let failure: rpc::PreconditionFailure = proto::unpack(detail).unwrap();
    assert_eq!(failure.violations.len(), 1);
    assert_eq!(failure.violations[0].r#type, "MISSING");
    assert_eq!(failure.violations[0].subject, format!("blobs/{missing}"));

    let noise = scheduler.upload(vec![0xff; 100]).await;
    refused(execute(&noise), invalid, "Failed to obtain action: ").await;
    for (seconds, nanos, words) in [
        (-1, 0, "4h"),
        (5 * 60 * 60, 0, "4h"),
        (1, -1, "1 s and -1 ns"),
    ] {
        let action = scheduler
            .action("x", |action| {
                action.timeout = Some(prost_types::Duration { seconds, nanos })
            })
            .await;
        refused(execute(&action), invalid, words).await;
    }
    let unsorted = scheduler
        .action("x", |action| {
            let properties = &mut action.platform.as_mut().unwrap().properties;
            properties.push(Property::default());
        })
        .await;
    refused(execute(&unsorted), invalid, "sorted").await;
    let plan9 = scheduler
        .action("x", |action| {
            action.platform.as_mut().unwrap().properties[0].value = "plan9".to_owned();
        })
        .await;
    let young = refused(execute(&plan9), Code::Unavailable, "No workers exist").await;
    assert!(young.message().contains("linux"), "{young}");
    for name in ["", "nonsense", "00000000-0000-4000-8000-000000000000"] {
        let status = scheduler.wait(name).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().contains(name));
    }

    // Workers, too.
    let changes: [fn(&mut SynchronizeRequest); 5] = [
        |request| request.current_state = None,
        |request| request.current_state = Some(CurrentState::default()),
        |request| {
            request.current_state = Some(CurrentState {
                worker_state: Some(executing(&Digest::default(), ExecutionState::Started(()))),
            })
        },
        |request| request.instance_name_prefix = "blobs".to_owned(),
        |request| request.size_class = 7,
    ];
    for change in changes {
        let mut request = synchronize("other");
        request.current_state = Some(CurrentState {
            worker_state: Some(IDLE),
        });
        change(&mut request);
        let status = scheduler.call(request).await.unwrap_err();
        assert_eq!(status.code(), invalid, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_scheduler_says_that_no_workers_exist_as_the_clients_fault() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.platform_queue_with_no_workers_timeout = seconds(0);
    })
    .await;
    let action = scheduler.action("x", |_| {}).await;
    let status = scheduler.execute(&action).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.details().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_before_2_2_name_the_platform_in_their_command() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    #[expect(deprecated, reason = "clients of REAPI 2.0 use it")]
    let command = Command {
        platform: Some(linux()),
        ..Default::default()
    };
    let command = scheduler.upload(command.encode_to_vec()).await;
    let action = scheduler
        .action("x", |action| {
            action.platform = None;
            action.command_digest = Some(command);
        })
        .await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Executing);
    desired(held.await.unwrap().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_silent_worker_executed_is_executed_by_another_one() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.busy_worker_synchronization_interval = milliseconds(50);
        config.scheduling.worker_with_no_synchronizations_timeout = milliseconds(100);
    })
    .await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    let first = desired(held.await.unwrap().unwrap());
    // Its call may end before the other worker is gone.
    let second = loop {
        let answer = scheduler.parked("v").await.await.unwrap().unwrap();
        let state = answer.desired_state.and_then(|state| state.worker_state);
        if let Some(desired_state::WorkerState::Executing(executing)) = state {
            break executing;
        }
    };
    assert_eq!(first.action_digest, second.action_digest);
    assert_ne!(first.w3c_trace_context, second.w3c_trace_context);
    assert!(!next(&mut stream).await.done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_client_hears_again_and_again() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.execution_update_interval = milliseconds(20);
    })
    .await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let first = next(&mut stream).await;
    for _ in 0..5 {
        assert_eq!(next(&mut stream).await, first);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_hinders_nobody() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.execution_update_interval = milliseconds(1);
    })
    .await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    // On a connection of its own: it leaves no room on it for answers to anything else.
    let socket = scheduler.directory.path().join("clients");
    let channel = daemon::connect(&Endpoint::Unix(socket));
    let mut lazy = Vec::new();
    for _ in 0..100 {
        let mut client = ExecutionClient::new(channel.clone());
        lazy.push(client.execute(execute(&action)).await.unwrap().into_inner());
    }
    desired(held.await.unwrap().unwrap());
    tokio::time::sleep(Duration::from_millis(200)).await;
    scheduler
        .synchronize("w", completed(&action, "done"))
        .await
        .unwrap();
    let held = scheduler.parked("w").await;
    let other = scheduler.action("y", |_| {}).await;
    let mut stream = scheduler.execute(&other).await.unwrap();
    desired(held.await.unwrap().unwrap());
    scheduler
        .synchronize("w", completed(&other, "done"))
        .await
        .unwrap();
    response(&mut stream).await;
    // Once they read, they get what is now, after what the connection had buffered.
    response(&mut lazy[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_call_once_at_a_time_and_again_when_its_connection_is_lost() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let status = scheduler.synchronize("w", IDLE).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(
        status
            .message()
            .starts_with("A worker with the same worker ID is already synchronizing"),
        "{status}"
    );
    held.abort();
    // The cancellation travels; nothing but it makes the next call pass.
    while scheduler.synchronize("w", IDLE).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_stops_sends_everybody_to_its_successor_who_takes_up_the_work() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("busy").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    next(&mut stream).await;
    let idle = scheduler.parked("idle").await;
    let scheduler = scheduler.restart().await;
    assert_eq!(
        stream.message().await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(idle.await.unwrap().unwrap_err().code(), Code::Unavailable);

    let running = executing(&action, ExecutionState::Running(()));
    let answer = scheduler.synchronize("busy", running).await.unwrap();
    assert!(answer.desired_state.is_none(), "{answer:?}");
    let _idle = scheduler.parked("idle").await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Executing);
    scheduler
        .synchronize("busy", completed(&action, "from before"))
        .await
        .unwrap();
    assert_eq!(response(&mut stream).await.message, "from before");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ports_say_that_they_are_healthy_and_what_they_serve() {
    let scheduler = Scheduler::start(|_| {}).await;
    for (channel, service) in [
        (
            &scheduler.clients,
            "build.bazel.remote.execution.v2.Execution",
        ),
        (&scheduler.workers, "buildbarn.remoteworker.OperationQueue"),
    ] {
        let mut health = HealthClient::new(channel.clone());
        for service in ["", service] {
            let request = HealthCheckRequest {
                service: service.to_owned(),
            };
            let answer = health.check(request).await.unwrap().into_inner();
            assert_eq!(answer.status, ServingStatus::Serving as i32);
        }
        let listed = list(channel).await;
        assert!(listed.contains(&service.to_owned()), "{listed:?}");
        use tonic_reflection::pb::v1::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(service.to_owned())),
        };
        let answer = ServerReflectionClient::new(channel.clone())
            .server_reflection_info(tokio_stream::iter([request]))
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        assert!(matches!(
            answer.message_response,
            Some(MessageResponse::FileDescriptorResponse(_))
        ));
    }
}

/// What reflection says is served.
async fn list(channel: &Channel) -> Vec<String> {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    match answers.message().await.unwrap().unwrap().message_response {
        Some(MessageResponse::ListServicesResponse(list)) => list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_just_what_is_served() {
    let scheduler = Scheduler::start(|_| {}).await;
    let everywhere = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ];
    let reapi = "build.bazel.remote.execution.v2";
    let clients = [
        format!("{reapi}.Execution"),
        format!("{reapi}.ContentAddressableStorage"),
        format!("{reapi}.ActionCache"),
        format!("{reapi}.Capabilities"),
        "google.bytestream.ByteStream".to_owned(),
    ];
    let workers = ["buildbarn.remoteworker.OperationQueue".to_owned()];
    for (channel, own) in [
        (&scheduler.clients, &clients[..]),
        (&scheduler.workers, &workers[..]),
    ] {
        let mut listed = list(channel).await;
        let mut expected: Vec<String> = everywhere.map(str::to_owned).into();
        expected.extend_from_slice(own);
        listed.sort();
        expected.sort();
        assert_eq!(listed, expected);
    }
}
