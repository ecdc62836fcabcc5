//! Where actions go, by the configuration.

use bb_remote_execution::config::{OptionalEndpoint, routing::PlatformQueue};
use bb_remote_execution::proto::remoteactionrouter::{
    RouteActionRequest, RouteActionResponse,
    action_router_server::{ActionRouter, ActionRouterServer},
};

use super::*;

fn property(name: &str, value: &str) -> Property {
    Property {
        name: name.to_owned(),
        value: value.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_bazel_sends_unasked_finds_ordinary_workers() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let action = scheduler
        .action("x", |action| {
            let platform = action.platform.as_mut().unwrap();
            platform
                .properties
                .push(property("persistentWorkerKey", "0123"));
            platform.properties.push(property("resources:cpu", "10"));
        })
        .await;
    let _stream = scheduler.execute(&action).await.unwrap();
    let work = desired(held.await.unwrap().unwrap());
    // The worker sees the action as it is.
    assert_eq!(work.action.unwrap().platform.unwrap().properties.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predeclared_queue_holds_work_for_workers_to_come_also_of_those_who_ask_for_less() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.platform_queue_with_no_workers_timeout = seconds(0);
        config.predeclared_platform_queues = vec![PlatformQueue {
            platform: BTreeMap::from([("cpus".to_owned(), "16".to_owned())]),
            at_least: vec!["cpus".to_owned()],
            ..Default::default()
        }];
    })
    .await;
    let asks = async |cpus: &str| {
        scheduler
            .action("x", |action| {
                let platform = action.platform.as_mut().unwrap();
                platform.properties = vec![property("cpus", cpus)];
            })
            .await
    };
    let small = asks("4").await;
    let mut stream = scheduler.execute(&small).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Queued);
    let status = scheduler.execute(&asks("17").await).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let mut worker = synchronize("w");
    worker.prefer_being_idle = false;
    worker.platform = Some(Platform {
        properties: vec![property("cpus", "16")],
    });
    worker.current_state = Some(CurrentState {
        worker_state: Some(IDLE),
    });
    let work = desired(scheduler.call(worker).await.unwrap());
    assert_eq!(work.action_digest, Some(small));
}

/// Sends everything to ordinary workers, and one invocation.
struct ToLinux;

#[tonic::async_trait]
impl ActionRouter for ToLinux {
    async fn route_action(
        &self,
        request: Request<RouteActionRequest>,
    ) -> Result<tonic::Response<RouteActionResponse>, Status> {
        let request = request.into_inner();
        if request.instance_name == "refused" {
            return Err(Status::permission_denied("not here"));
        }
        Ok(tonic::Response::new(RouteActionResponse {
            action: request.action.map(|action| Action {
                platform: Some(linux()),
                ..action
            }),
            invocation_keys: vec![proto::pack(&RequestMetadata::default())],
        }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_router_decides_and_its_refusal_is_the_clients() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("router");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let serving = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(ActionRouterServer::new(ToLinux))
            .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener)),
    );
    let scheduler = Scheduler::start(|config| {
        config.action_router.remote = OptionalEndpoint(Some(Endpoint::Unix(socket)));
    })
    .await;
    let held = scheduler.parked("w").await;
    let action = scheduler
        .action("x", |action| {
            action.platform.as_mut().unwrap().properties = vec![property("anything", "")];
        })
        .await;
    let refused = ExecuteRequest {
        instance_name: "refused".to_owned(),
        ..execute(&action)
    };
    let status = scheduler.request(refused).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("not here"), "{status}");
    let _stream = scheduler.execute(&action).await.unwrap();
    let work = desired(held.await.unwrap().unwrap());
    assert_eq!(work.action.unwrap().platform, Some(linux()));
    serving.abort();
}
