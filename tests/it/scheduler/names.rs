//! Operations that outlive their scheduler, by their names.

use bb_remote_execution::scheduler::operation_name::ParsedName;

use super::*;

/// What a client hears first of an operation that the scheduler may have to take up.
async fn resumed(scheduler: &Scheduler, name: &str) -> (Streaming<Operation>, Operation) {
    let mut stream = scheduler.wait(name).await.unwrap();
    let first = next(&mut stream).await;
    (stream, first)
}

fn uuid(name: &str) -> uuid::Uuid {
    ParsedName::parse(name).unwrap().operation()
}

/// What a worker that asks is given, as soon as there is something.
async fn work(scheduler: &Scheduler, worker: &str) -> desired_state::Executing {
    let mut request = synchronize(worker);
    request.prefer_being_idle = false;
    request.current_state = Some(CurrentState {
        worker_state: Some(IDLE),
    });
    desired(scheduler.call(request).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_queued_is_queued_again_under_its_name_at_the_next_scheduler() {
    let scheduler = Scheduler::start(|_| {}).await;
    // The platform has a queue, whose only worker is busy.
    let held = scheduler.parked("busy").await;
    let other = scheduler.action("other", |_| {}).await;
    let _other = scheduler.execute(&other).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let action = scheduler.action("x", |_| {}).await;
    let mut request = Request::new(ExecuteRequest {
        skip_cache_lookup: true,
        execution_policy: Some(reapi::ExecutionPolicy { priority: -7 }),
        ..execute(&action)
    });
    let metadata = RequestMetadata {
        tool_invocation_id: "build".to_owned(),
        ..Default::default()
    };
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request
        .metadata_mut()
        .insert_bin(REQUEST_METADATA_HEADER, value);
    let mut stream = scheduler.request(request).await.unwrap();
    let queued = next(&mut stream).await;
    assert_eq!(stage(&queued), Stage::Queued);

    let scheduler = scheduler.restart().await;
    let _idle = scheduler.synchronize("idle", IDLE).await.unwrap();
    let (mut stream, again) = resumed(&scheduler, &queued.name).await;
    assert_eq!(uuid(&again.name), uuid(&queued.name));
    // A second client of the same name joins.
    let (mut second, joined) = resumed(&scheduler, &again.name).await;
    assert_eq!(joined.name, again.name);
    let state = scheduler.operation_state(&again.name).await;
    assert_eq!(state.priority, -7);
    let [id] = &state.invocation_name.unwrap().ids[..] else {
        panic!("not one level");
    };
    assert_eq!(proto::unpack::<RequestMetadata>(id), Some(metadata));

    assert_eq!(
        work(&scheduler, "idle").await.action_digest.as_ref(),
        Some(&action)
    );
    scheduler
        .synchronize("idle", completed(&action, "at last"))
        .await
        .unwrap();
    assert_eq!(response(&mut stream).await.message, "at last");
    assert_eq!(response(&mut second).await.message, "at last");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_not_run_again_by_the_scheduler_that_takes_over_the_address() {
    let first = Scheduler::start(|_| {}).await;
    let held = first.parked("busy").await;
    let action = first.action("x", |_| {}).await;
    let mut stream = first.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let operation = next(&mut stream).await;
    // Another one, with a store of its own that has the Action.
    let second = Scheduler::start(|_| {}).await;
    let same = second.action("x", |_| {}).await;
    assert_eq!(same, action);
    let running = executing(&action, ExecutionState::Running(()));
    let answer = second.synchronize("busy", running.clone()).await.unwrap();
    assert!(answer.desired_state.is_none(), "{answer:?}");
    let (mut stream, again) = resumed(&second, &operation.name).await;
    assert_eq!(uuid(&again.name), uuid(&operation.name));
    assert_eq!(stage(&again), Stage::Executing);
    let answer = second.synchronize("busy", running).await.unwrap();
    assert!(answer.desired_state.is_none(), "{answer:?}");
    second
        .synchronize("busy", completed(&action, "once"))
        .await
        .unwrap();
    assert_eq!(response(&mut stream).await.message, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_forged_cut_or_foreign_give_nothing_that_execute_would_not() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("w").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    let name = next(&mut stream).await.name;
    let refused = async |name: &str, code: Code, words: &str| {
        let status = scheduler.wait(name).await.unwrap_err();
        assert_eq!(status.code(), code, "{name}: {status}");
        assert!(status.message().contains(words), "{name}: {status}");
    };
    refused(&name[..name.len() - 1], Code::NotFound, "cut or changed").await;
    refused(&name.replacen(".1", ".2", 1), Code::NotFound, "newer").await;
    refused(&name.replacen(".1", "/", 1), Code::NotFound, "no name").await;
    // The UUID alone is a name of the operation here, as Buildbarn's are; of another one it is none.
    let (plain, _) = name.split_once('.').unwrap();
    resumed(&scheduler, plain).await;
    let unknown = uuid::Uuid::from_u128(7).to_string();
    refused(&unknown, Code::NotFound, "not found").await;
    let ParsedName::Full(parsed) = ParsedName::parse(&name).unwrap() else {
        panic!("{name}");
    };
    // Another action under the UUID of this one.
    let mut forged = (*parsed).clone();
    forged.digest = DigestFunction::Sha256.digest_of(b"another");
    refused(&forged.to_string(), Code::NotFound, "another action").await;
    // What Execute refuses: an action that is not in the CAS, a platform that nobody offers.
    forged.operation = uuid::Uuid::from_u128(8);
    refused(
        &forged.to_string(),
        Code::FailedPrecondition,
        "Failed to obtain action",
    )
    .await;
    let plan9 = scheduler
        .action("x", |action| {
            action.platform.as_mut().unwrap().properties[0].value = "plan9".to_owned();
        })
        .await;
    let function = Some(DigestFunction::Sha256);
    forged.digest = bb_remote_execution::digest::Digest::parse(function, &plan9).unwrap();
    refused(&forged.to_string(), Code::Unavailable, "No workers exist").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_from_before_a_restart_is_given_only_with_its_outputs() {
    let scheduler = Scheduler::start(|config| config.scheduling.action_cache_lookup = false).await;
    let held = scheduler.parked("busy").await;
    let action = scheduler.action("x", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    desired(held.await.unwrap().unwrap());
    next(&mut stream).await;
    let scheduler = scheduler.restart().await;
    // The worker has done it before any client came; what it names is not in the CAS.
    let absent = DigestFunction::Sha256.digest_of(b"absent").to_proto();
    let report = executing(
        &action,
        ExecutionState::Completed(ExecuteResponse {
            result: Some(reapi::ActionResult {
                stdout_digest: Some(absent),
                ..Default::default()
            }),
            ..Default::default()
        }),
    );
    scheduler.synchronize("busy", report).await.unwrap();
    let mut stream = scheduler.execute(&action).await.unwrap();
    assert_eq!(stage(&next(&mut stream).await), Stage::Queued);
    assert_eq!(
        work(&scheduler, "busy").await.action_digest.as_ref(),
        Some(&action)
    );
    scheduler
        .synchronize("busy", completed(&action, "again"))
        .await
        .unwrap();
    assert_eq!(response(&mut stream).await.message, "again");
}
