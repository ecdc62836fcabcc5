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
    farm.held("b", kept, 1);
    let attached = farm.execute(request("x"), 0).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
    // Of what it was handed, it need not say so.
    let mine = WorkerReport {
        activity: WorkerActivity::Completed(unknown(), outcome(rpc::Code::Ok)),
        prefer_being_idle: false,
    };
    farm.held("b", mine, 2);
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
