//! What clients execute and wait for.

use bb_remote_execution::proto::{
    auth::AuthenticationMetadata, buildqueuestate::GetOperationRequest,
};

use super::*;

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
    let [user, told] = &work.auxiliary_metadata[..] else {
        panic!("{:?}", work.auxiliary_metadata);
    };
    let user: AuthenticationMetadata = proto::unpack(user).unwrap();
    assert!(user.public.is_some() && user.private.is_none());
    assert_eq!(proto::unpack(told), Some(metadata));

    let first = next(&mut stream).await;
    assert_eq!(stage(&first), Stage::Executing);
    let (uuid, _) = first.name.split_once('.').unwrap();
    assert!(uuid::Uuid::try_parse(uuid).is_ok());
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
async fn an_action_that_comes_before_the_first_workers_waits_for_them() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.worker_registration_timeout = seconds(60);
    })
    .await;
    let action = scheduler.action("x", |_| {}).await;
    let execution = scheduler.execute(&action);
    tokio::pin!(execution);
    let early = tokio::time::timeout(Duration::from_millis(100), &mut execution).await;
    assert!(early.is_err(), "{early:?}");
    // It only says that it is there.
    scheduler.synchronize("w", IDLE).await.unwrap();
    let mut stream = execution.await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Queued);
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
        let again = next(&mut stream).await;
        assert_eq!((&again.name, stage(&again)), (&first.name, stage(&first)));
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

/// Ctrl-C in a client ends its call, and keeps its connection.
#[tokio::test(flavor = "multi_thread")]
async fn who_ends_a_call_has_its_action_cancelled_soon_and_who_loses_a_connection_has_not() {
    let scheduler =
        Scheduler::start(|config| config.scheduling.abandoned_operation_timeout = seconds(60))
            .await;
    let (one, two) = (scheduler.parked("one").await, scheduler.parked("two").await);
    let lost = scheduler.action("lost", |_| {}).await;
    let socket = scheduler.directory.path().join("clients");
    let mut client = ExecutionClient::new(daemon::connect(&Endpoint::Unix(socket)));
    let mut lost = client.execute(execute(&lost)).await.unwrap().into_inner();
    let lost_name = next(&mut lost).await.name;
    let ended = scheduler.action("ended", |_| {}).await;
    let mut ended = scheduler.execute(&ended).await.unwrap();
    let ended_name = next(&mut ended).await.name;
    let again = scheduler.action("again", |_| {}).await;
    let mut again = scheduler.execute(&again).await.unwrap();
    let again_name = next(&mut again).await.name;
    desired(one.await.unwrap().unwrap());
    desired(two.await.unwrap().unwrap());
    drop((lost, client));
    drop(ended);
    drop(again);
    // Whose call had reached its deadline, say.
    let mut again = scheduler.wait(&again_name).await.unwrap();
    next(&mut again).await;
    let get = async |name: &str| {
        let request = GetOperationRequest {
            operation_name: name.to_owned(),
        };
        scheduler.state().get_operation(request).await
    };
    while let Ok(_there) = get(&ended_name).await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(get(&ended_name).await.unwrap_err().code(), Code::NotFound);
    // As long again: the others are there.
    tokio::time::sleep(Duration::from_secs(3)).await;
    get(&lost_name).await.unwrap();
    get(&again_name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_ends_a_call_may_come_back_within_the_time_that_is_configured() {
    let scheduler = Scheduler::start(|config| {
        config.scheduling.abandoned_operation_timeout = seconds(60);
        config.scheduling.ended_call_timeout = seconds(60);
    })
    .await;
    let worker = scheduler.parked("one").await;
    let action = scheduler.action("ended", |_| {}).await;
    let mut ended = scheduler.execute(&action).await.unwrap();
    let name = next(&mut ended).await.name;
    desired(worker.await.unwrap().unwrap());
    drop(ended);
    // Longer than it is by default.
    tokio::time::sleep(Duration::from_secs(3)).await;
    next(&mut scheduler.wait(&name).await.unwrap()).await;
}
