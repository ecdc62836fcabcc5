//! Clients and workers who fill the queue, and traces that nobody collects.

use std::collections::BTreeMap;

use bb_remote_execution::proto::{
    reapi::{
        Action, Command, Directory, ExecuteRequest, Platform, RequestMetadata, platform::Property,
    },
    remoteworker::{
        CurrentState, SynchronizeRequest, current_state,
        operation_queue_client::OperationQueueClient,
    },
};
use futures::future::join_all;
use tonic::{Request, Status, metadata::MetadataValue};

use super::*;

fn platform(value: &str) -> Platform {
    Platform {
        properties: vec![Property {
            name: "OSFamily".to_owned(),
            value: value.to_owned(),
        }],
    }
}

/// A worker of a platform says once that it is there.
async fn register(attacked: &Attacked, number: usize, value: &str) -> Result<(), Status> {
    let endpoint = Endpoint::Unix(attacked.scheduler.socket("workers"));
    let mut workers = OperationQueueClient::new(daemon::connect(&endpoint));
    let request = SynchronizeRequest {
        worker_id: BTreeMap::from([("name".to_owned(), number.to_string())]),
        platform: Some(platform(value)),
        prefer_being_idle: true,
        current_state: Some(CurrentState {
            worker_state: Some(current_state::WorkerState::Idle(())),
        }),
        ..Default::default()
    };
    workers.synchronize(request).await.map(drop)
}

/// An action for a platform; nobody looks at what it names before it is executed.
fn action(value: &str) -> Action {
    Action {
        command_digest: Some(digest_of(&Command::default().encode_to_vec())),
        input_root_digest: Some(digest_of(&Directory::default().encode_to_vec())),
        platform: Some(platform(value)),
        ..Default::default()
    }
}

/// Execute of an instance name, an invocation and a target of one's own.
fn execute(action: &Digest, number: usize) -> Request<ExecuteRequest> {
    let mut request = Request::new(ExecuteRequest {
        instance_name: format!("instance-{number}"),
        action_digest: Some(action.clone()),
        skip_cache_lookup: true,
        ..Default::default()
    });
    let metadata = RequestMetadata {
        tool_invocation_id: format!("invocation-{number}"),
        correlated_invocations_id: format!("build-{number}"),
        target_id: "t".repeat(1000),
        ..Default::default()
    };
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    let header = "build.bazel.remote.execution.v2.requestmetadata-bin";
    request.metadata_mut().insert_bin(header, value);
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_instance_names_invocations_and_platforms_of_one_client_cost_little() {
    const CALLS: usize = 10_000;
    let attacked = Attacked::start(
        "scheduling = { worker_registration_timeout = \"0s\", limits.queued_operations = 9000 }\n\
         action_router.invocation_key_extractors = [\"tool_invocation_id\", \"correlated_invocations_id\"]\n",
    )
    .await;
    register(&attacked, 0, "linux").await.unwrap();
    let client = attacked.scheduler.client();
    client.upload(Command::default().encode_to_vec()).await;
    client.upload(Directory::default().encode_to_vec()).await;
    let queued = client.upload_message(&action("linux")).await;
    let (mut streams, mut refused) = (Vec::new(), 0);
    for hundred in 0..CALLS / 100 {
        let calls = (0..100).map(|one| {
            let mut execution = client.execution();
            let request = execute(&queued, hundred * 100 + one);
            async move { execution.execute(request).await }
        });
        for answer in join_all(calls).await {
            match answer {
                Ok(stream) => streams.push(stream.into_inner()),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    refused += 1;
                }
            }
        }
    }
    assert_eq!((streams.len(), refused), (9000, 1000));
    // Platforms that no worker has are no queues.
    let actions: Vec<Vec<u8>> = (0..CALLS)
        .map(|number| action(&format!("unknown-{number}")).encode_to_vec())
        .collect();
    let digests: Vec<Digest> = actions.iter().map(|action| digest_of(action)).collect();
    client.upload_many(actions).await;
    for digests in digests.chunks(100) {
        let calls = digests.iter().enumerate().map(|(number, digest)| {
            let mut execution = client.execution();
            let request = execute(digest, number);
            async move { execution.execute(request).await }
        });
        for answer in join_all(calls).await {
            let status = answer.unwrap_err();
            assert!(status.message().len() < 2000, "{status}");
        }
    }
    drop(streams);
    let what = "10,000 instance names, invocations and platforms";
    attacked.end(what, 300 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_more_platforms_than_there_may_be_are_refused_and_cost_little() {
    let attacked = Attacked::start("").await;
    let mut refused = 0;
    for number in (0..10_100).step_by(100) {
        let calls = (number..number + 100).map(|number| {
            let attacked = &attacked;
            async move { register(attacked, number, &number.to_string()).await }
        });
        for answer in join_all(calls).await {
            if let Err(status) = answer {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(status.message().contains("platform_queues"), "{status}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 100);
    attacked.end("workers of 10,000 platforms", 200 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_nobody_collects_stay_within_their_number() {
    // Nobody listens there.
    let attacked = Attacked::start("traces.endpoint = \"grpc://127.0.0.1:1\"\n").await;
    let client = attacked.scheduler.client();
    for hundred in 0..300u64 {
        let calls = (0..100).map(|one| {
            let mut cas = client.cas();
            let mut request = Request::new(FindMissingBlobsRequest::default());
            let trace = format!("00-{:032x}-{:016x}-01", hundred * 100 + one + 1, one + 1);
            request
                .metadata_mut()
                .insert("traceparent", trace.parse().unwrap());
            async move { cas.find_missing_blobs(request).await }
        });
        for answer in join_all(calls).await {
            answer.unwrap();
        }
    }
    let mut stream = tokio::net::UnixStream::connect(attacked.scheduler.socket("web"))
        .await
        .unwrap();
    let page = b"GET /metrics HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n";
    stream.write_all(page).await.unwrap();
    let mut told = String::new();
    stream.read_to_string(&mut told).await.unwrap();
    let lost = told
        .lines()
        .find(|line| line.starts_with("bb_trace_spans_total{result=\"Lost\"}"));
    let lost: f64 = lost.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    // 30,000, of which the buffer and a batch are not lost yet.
    assert!(lost > 20_000.0, "{lost}");
    attacked.end("spans that nobody collects", 50 * MIB).await;
}
