//! What clients may rely on.

use super::*;

#[test]
fn equal_actions_share_a_task_unless_they_may_not() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let first = farm.execute(request("x"), 1).unwrap();
    let same = farm.execute(request("x"), 2).unwrap();
    let other = Request {
        invocation: invocation("other"),
        ..request("x")
    };
    let other = farm.execute(other, 3).unwrap();
    assert_eq!((same.operation, same.watch), (first.operation, 1));
    assert_ne!(other.operation, first.operation);
    assert_eq!(other.watch, 3);
    let uncacheable = request_for("", digest("x"), true);
    let alone = farm.execute(uncacheable, 4).unwrap();
    assert_eq!((alone.watch, alone.progress.stage), (4, Stage::Queued));
    let mut elsewhere = request("x");
    Arc::make_mut(&mut elsewhere.action).instance = InstanceName::parse("i").unwrap();
    assert_eq!(farm.execute(elsewhere, 5).unwrap().watch, 5);
}

#[test]
fn an_operation_without_waiters_goes_after_ten_seconds_and_its_task_with_it() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    farm.queue.detach(farm.now, attached.operation);
    farm.pass(9 * SECOND);
    farm.now("a", executing("x"));
    // Someone comes back, and leaves again.
    assert!(farm.queue.wait(attached.operation).is_some());
    farm.pass(9 * SECOND);
    farm.now("a", executing("x"));
    farm.queue.detach(farm.now, attached.operation);
    farm.pass(10 * SECOND);
    let (code, message) = status(&farm.told[&1]);
    assert_eq!(code, rpc::Code::Cancelled as i32);
    assert_eq!(message, "Task no longer has any waiting clients");
    assert!(farm.queue.wait(attached.operation).is_none());
    let instruction = farm.now("a", executing("x"));
    assert_eq!(instruction.desired, DesiredWorkerState::Idle);
}

#[test]
fn a_result_can_be_fetched_for_a_minute() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    farm.queue.detach(farm.now, attached.operation);
    farm.pass(9 * SECOND);
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    farm.pass(59 * SECOND);
    let again = farm.queue.wait(attached.operation).unwrap();
    assert_eq!(
        again.progress.stage,
        Stage::Completed(outcome(rpc::Code::Ok))
    );
}
