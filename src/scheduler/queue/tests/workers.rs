//! What workers may rely on, and what is done about lost ones.

use super::*;

#[test]
fn an_idle_synchronizing_worker_gets_a_task_at_once_and_its_client_hears_that_it_executes() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 7).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn a_silent_worker_is_gone_and_its_task_fails_where_it_may_not_be_executed_again() {
    let mut farm = Farm::with(|settings| settings.lost_worker_retry_count = 0);
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    farm.pass(69 * SECOND);
    assert!(!matches!(farm.told.get(&1), Some(Stage::Completed(_))));
    farm.pass(SECOND);
    let (code, message) = status(&farm.told[&1]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert_eq!(
        message,
        "Worker {\"name\":\"a\"} disappeared while task was executing"
    );
}

#[test]
fn a_worker_that_forgets_its_task_gets_it_nine_times_again() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    for _ in 0..9 {
        assert_eq!(action(&farm.now("a", idle())), Some(digest("x")));
    }
    farm.held("a", idle(), 2);
    let (code, message) = status(&farm.told[&1]);
    assert_eq!(code, rpc::Code::Internal as i32);
    assert!(message.contains("10 times"), "{message}");
}

#[test]
fn a_call_that_dies_gives_its_task_back() {
    let mut farm = Farm::new();
    let held = farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    farm.held("b", idle(), 2);
    farm.queue.drop_call(farm.now, held);
    farm.perform();
    assert_eq!(action(&farm.answered[&2]), Some(digest("x")));
    // And the worker may call again at once, though it was being answered.
    farm.held("a", idle(), 3);
}

#[test]
fn a_worker_that_stops_hands_its_task_back() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    let stopping = WorkerReport {
        prefer_being_idle: true,
        ..idle()
    };
    assert_eq!(farm.now("a", stopping).desired, DesiredWorkerState::Idle);
    assert_eq!(farm.told[&1], Stage::Queued);
    assert_eq!(action(&farm.now("b", idle())), Some(digest("x")));
}

#[test]
fn two_calls_of_one_worker_at_once_are_one_too_many() {
    let mut farm = Farm::new();
    let held = farm.held("a", idle(), 1);
    let again = farm
        .queue
        .synchronize(farm.now, &key(""), &caller("a"), idle(), 2, SECOND);
    assert!(matches!(
        again,
        Err(Refusal::AlreadySynchronizing { news: false, .. })
    ));
    farm.queue.drop_call(farm.now, held);
    farm.held("a", idle(), 3);
}

#[test]
fn a_held_call_ends_after_its_time() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.pass(120 * SECOND);
    assert_eq!(farm.answered[&1].desired, DesiredWorkerState::Idle);
    assert_eq!(farm.answered[&1].next, Duration::ZERO);
}

#[test]
fn a_second_caller_of_one_name_gets_nothing_that_the_first_one_has_and_hears_whose_it_is() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let asks = |farm: &mut Farm, report: WorkerReport| {
        let second = caller_at("a", "elsewhere");
        let answer = farm
            .queue
            .synchronize(farm.now, &key(""), &second, report, 9, 120 * SECOND);
        farm.perform();
        answer
    };
    let refused = asks(&mut farm, idle()).unwrap_err();
    assert!(matches!(
        refused,
        Refusal::AlreadySynchronizing { news: true, .. }
    ));
    farm.execute(request("x"), 0).unwrap();
    // It neither has the action, nor gets it, for as long as the first one calls.
    for round in 0..20 {
        for report in [idle(), executing("y"), completed("y", rpc::Code::Ok)] {
            let refused = asks(&mut farm, report).unwrap_err();
            let Refusal::Executing { news, .. } = refused else {
                panic!("{refused}");
            };
            assert!(!news, "it was told before");
            let text = refused.to_string();
            assert!(text.contains("elsewhere") && text.contains("its address"));
        }
        if round % 2 == 0 {
            let answer = farm.now("a", executing("x"));
            assert_eq!(answer.desired, DesiredWorkerState::Unchanged);
        }
        farm.pass(6 * SECOND);
    }
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&0], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn a_worker_that_connects_again_goes_on_and_one_that_starts_again_is_let_in_when_it_is_overdue() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 0).unwrap();
    let calls = |farm: &mut Farm, peer: &str, report: WorkerReport| {
        let caller = caller_at("a", peer);
        let answer = farm
            .queue
            .synchronize(farm.now, &key(""), &caller, report, 9, 120 * SECOND);
        farm.perform();
        answer
    };
    let answer = calls(&mut farm, "second", executing("x")).unwrap();
    assert!(
        matches!(answer, SynchronizeAnswer::Now(instruction) if instruction.desired == DesiredWorkerState::Unchanged)
    );
    assert!(calls(&mut farm, "third", idle()).is_err());
    farm.pass(16 * SECOND);
    let Ok(SynchronizeAnswer::Now(instruction)) = calls(&mut farm, "third", idle()) else {
        panic!("the successor is not let in");
    };
    assert_eq!(action(&instruction), Some(digest("x")));
    let answer = calls(&mut farm, "third", completed("x", rpc::Code::Ok)).unwrap();
    assert!(matches!(answer, SynchronizeAnswer::Held(_)));
    assert_eq!(farm.told[&0], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn what_a_worker_reports_by_its_digest_alone_is_not_taken_for_the_same_action_of_another_instance()
{
    let mut farm = Farm::new();
    let bare = |report: WorkerReport| match report.activity {
        WorkerActivity::Completed(action, outcome) => WorkerReport {
            activity: WorkerActivity::Completed(
                ReportedAction {
                    instance: None,
                    ..action
                },
                outcome,
            ),
            ..report
        },
        _ => report,
    };
    farm.held("a", idle(), 1);
    farm.execute(request_of("", "x"), 7).unwrap();
    farm.execute(request_of("other", "x"), 8).unwrap();
    // The answer is lost, and the worker says it again.
    for _ in 0..2 {
        let answer = farm.now("a", bare(completed("x", rpc::Code::Ok)));
        assert_eq!(answer.desired, DesiredWorkerState::Idle);
    }
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
    assert!(!farm.told.contains_key(&8));
    assert_eq!(action(&farm.now("a", idle())), Some(digest("x")));
    // Nor is what comes while its call is held.
    farm.now("a", bare(completed("x", rpc::Code::Ok)));
    farm.now("a", bare(completed("x", rpc::Code::Ok)));
    farm.held("a", idle(), 2);
}
