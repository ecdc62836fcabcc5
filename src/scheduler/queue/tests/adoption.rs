//! What happens to work of before a restart.

use super::*;

#[test]
fn what_runs_goes_on_when_the_scheduler_restarts() {
    // Whoever comes first: the client, the worker, or the worker with its result.
    let mut farm = Farm::new();
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Unchanged
    );
    let attached = farm.execute(request("x"), 1).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    farm.held("a", completed("x", rpc::Code::Ok), 1);
    assert_eq!(farm.told[&1], Stage::Completed(outcome(rpc::Code::Ok)));

    let mut farm = Farm::new();
    let busy = farm.now("b", executing("other"));
    assert_eq!(busy.desired, DesiredWorkerState::Unchanged);
    farm.execute(request("x"), 1).unwrap();
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Unchanged
    );
    assert_eq!(farm.told[&1], Stage::Executing);

    let mut farm = Farm::new();
    farm.held("a", completed("x", rpc::Code::Ok), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    assert_eq!(
        attached.progress.stage,
        Stage::Completed(outcome(rpc::Code::Ok))
    );
    // It is told once.
    let again = farm.execute(request("x"), 2).unwrap();
    assert_eq!(again.progress.stage, Stage::Executing);
}

#[test]
fn what_nobody_asks_for_within_a_minute_is_stopped() {
    let mut farm = Farm::new();
    for _ in 0..6 {
        assert_eq!(
            farm.now("a", executing("x")).desired,
            DesiredWorkerState::Unchanged
        );
        farm.pass(10 * SECOND);
    }
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Idle
    );
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Idle
    );
}

#[test]
fn what_a_worker_did_before_a_restart_is_for_clients_of_its_instance_alone() {
    let report = |activity| WorkerReport {
        activity,
        prefer_being_idle: false,
    };
    // A result that was kept, and one that is still being made.
    let kept = |instance| {
        report(WorkerActivity::Completed(
            reported(instance, "x"),
            outcome(rpc::Code::Ok),
        ))
    };
    let mut farm = Farm::new();
    farm.held("a", kept("one"), 1);
    let running = report(WorkerActivity::Executing(reported("one", "y")));
    assert_eq!(
        farm.now("b", running).desired,
        DesiredWorkerState::Unchanged
    );
    for action in ["x", "y"] {
        let other = farm.execute(request_of("two", action), 0).unwrap();
        assert!(!matches!(other.progress.stage, Stage::Completed(_)));
    }
    // The first of them went to the worker that waited, the second one waits.
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
    let own = farm.execute(request_of("one", "x"), 0).unwrap();
    assert_eq!(own.progress.stage, Stage::Completed(outcome(rpc::Code::Ok)));
    let own = farm.execute(request_of("one", "y"), 0).unwrap();
    assert_eq!(own.progress.stage, Stage::Executing);

    // A task that waits already, of another instance.
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    farm.execute(request_of("two", "x"), 2).unwrap();
    let answer = farm.now("b", kept("one"));
    assert_eq!(action(&answer), Some(digest("x")));
    assert_eq!(farm.told[&2], Stage::Executing);
}

#[test]
fn what_a_worker_does_not_say_whose_it_is_is_given_to_nobody() {
    let unknown = || ReportedAction {
        instance: None,
        ..reported("", "x")
    };
    let mut farm = Farm::new();
    let running = WorkerReport {
        activity: WorkerActivity::Executing(unknown()),
        prefer_being_idle: false,
    };
    assert_eq!(farm.now("a", running).desired, DesiredWorkerState::Idle);
    let kept = WorkerReport {
        activity: WorkerActivity::Completed(unknown(), outcome(rpc::Code::Ok)),
        prefer_being_idle: false,
    };
    assert_eq!(farm.now("b", kept).desired, DesiredWorkerState::Idle);
    farm.held("b", idle(), 1);
    let attached = farm.execute(request("x"), 0).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
    // Of what it was handed, it need not say so.
    let mine = WorkerReport {
        activity: WorkerActivity::Completed(unknown(), outcome(rpc::Code::Ok)),
        prefer_being_idle: false,
    };
    assert_eq!(farm.now("b", mine).desired, DesiredWorkerState::Idle);
    assert_eq!(farm.told[&0], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn an_action_of_blake3_is_found_by_the_report_of_its_worker() {
    let blake3 = DigestFunction::Blake3.digest_of(b"x");
    let mut wanted = request("");
    Arc::make_mut(&mut wanted.action).digest = blake3;
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    farm.execute(wanted, 2).unwrap();
    let report = WorkerReport {
        activity: WorkerActivity::Executing(ReportedAction {
            digest: (&blake3).into(),
            instance: Some(InstanceName::empty()),
            attempt: None,
        }),
        prefer_being_idle: false,
    };
    assert_eq!(farm.now("b", report).desired, DesiredWorkerState::Unchanged);
    assert_eq!(farm.told[&2], Stage::Executing);
}

/// A request for an operation of the scheduler before this one.
fn resumed(action: &str, name: u128) -> Request {
    Request {
        name: Uuid::from_u128(name),
        resumes: true,
        ..request(action)
    }
}

#[test]
fn what_another_worker_may_execute_already_is_not_handed_out_until_it_had_time_to_say_so() {
    let mut farm = Farm::new();
    farm.held("idle", idle(), 1);
    for (name, action) in [(71, "x"), (72, "y"), (73, "z")] {
        let attached = farm
            .queue
            .execute(farm.now, resumed(action, name), name as u32)
            .unwrap();
        farm.perform();
        assert_eq!(attached.progress.stage, Stage::Queued);
    }
    assert!(farm.answered.is_empty());
    let why = farm.queue.explain(farm.now, Uuid::from_u128(71)).unwrap();
    assert!(why.to_string().contains("restart"), "{why}");
    // One is reported, one has a result already, and one nobody has.
    farm.pass(SECOND);
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Unchanged
    );
    assert_eq!(farm.told[&71], Stage::Executing);
    farm.held("b", completed("y", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&72], Stage::Completed(outcome(rpc::Code::Ok)));
    assert!(farm.answered.is_empty());
    // Others are not held up by it.
    farm.execute(request("new"), 4).unwrap();
    assert_eq!(farm.answered.len(), 1);
    farm.pass(SECOND);
    assert_eq!(farm.told[&73], Stage::Executing);
    assert_eq!(farm.answered.len(), 2);
    // From then on it is too late.
    farm.held("c", idle(), 5);
    farm.queue
        .execute(farm.now, resumed("late", 74), 74)
        .unwrap();
    farm.perform();
    assert_eq!(farm.told[&74], Stage::Executing);
}

#[test]
fn what_waits_for_a_report_can_be_joined_cancelled_and_left_and_ends_with_its_queue() {
    let mut farm = Farm::with(|settings| {
        settings.platform_queue_with_no_workers_timeout = SECOND;
        settings.worker_report_timeout = 200 * SECOND;
        settings.limits.queued_operations = 4;
    });
    farm.now(
        "gone",
        WorkerReport {
            prefer_being_idle: true,
            ..idle()
        },
    );
    for (name, action) in [(71, "x"), (72, "y"), (73, "z")] {
        farm.queue
            .execute(farm.now, resumed(action, name), name as u32)
            .unwrap();
        farm.perform();
    }
    let other = Request {
        invocation: invocation("other"),
        ..request("x")
    };
    let joined = farm.execute(other, 4).unwrap();
    farm.queue.cancel(farm.now, Uuid::from_u128(71)).unwrap();
    farm.queue.cancel(farm.now, Uuid::from_u128(72)).unwrap();
    farm.queue.detach(farm.now, joined.operation);
    farm.perform();
    for watch in [71, 72] {
        assert_eq!(status(&farm.told[&watch]).0, rpc::Code::Cancelled as i32);
    }
    for name in 80..82 {
        let action = format!("a{name}");
        farm.queue
            .execute(farm.now, resumed(&action, name), name as u32)
            .unwrap();
        farm.perform();
    }
    let full = farm.queue.execute(farm.now, resumed("full", 90), 0);
    assert!(
        matches!(full, Err(ExecuteRefusal::QueueFull(_))),
        "{full:?}"
    );
    // Its one worker is gone after a minute: reports are awaited until then.
    farm.pass(200 * SECOND);
    for watch in [73, 80, 81] {
        assert_eq!(status(&farm.told[&watch]).0, rpc::Code::Unavailable as i32);
    }
}
