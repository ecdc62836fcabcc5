//! What is served where.

use super::*;

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
        "google.longrunning.Operations".to_owned(),
    ];
    let workers = [
        "bb_remote_execution.live_output.LiveOutput".to_owned(),
        "buildbarn.remoteworker.OperationQueue".to_owned(),
    ];
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
