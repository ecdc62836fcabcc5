//! Lost workers, and the attempts that fence off what they bring too late.

use super::*;
use crate::proto;

/// The attempt that an instruction hands out.
fn attempt(instruction: &Instruction) -> Attempt {
    let DesiredWorkerState::Execute { attempt, .. } = &instruction.desired else {
        panic!("{instruction:?}");
    };
    *attempt
}

fn with(attempt: Attempt, report: WorkerReport) -> WorkerReport {
    let named = |action| ReportedAction {
        attempt: Some(attempt),
        ..action
    };
    WorkerReport {
        activity: match report.activity {
            WorkerActivity::Idle => WorkerActivity::Idle,
            WorkerActivity::Executing(action) => WorkerActivity::Executing(named(action)),
            WorkerActivity::Completed(action, outcome) => {
                WorkerActivity::Completed(named(action), outcome)
            }
        },
        ..report
    }
}

#[test]
fn what_a_lost_worker_had_is_executed_elsewhere_and_its_client_hears_of_nothing_but_that() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.pass(50 * SECOND);
    farm.held("b", idle(), 2);
    farm.pass(20 * SECOND);
    assert_eq!(action(&farm.answered[&2]), Some(digest("x")));
    assert_eq!(farm.told[&7], Stage::Executing);
    farm.held("b", completed("x", rpc::Code::Ok), 3);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn a_task_that_lost_four_workers_fails_and_names_them() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    for worker in ["b", "c", "d"] {
        farm.pass(70 * SECOND);
        assert_eq!(farm.told[&7], Stage::Queued);
        assert_eq!(action(&farm.now(worker, idle())), Some(digest("x")));
    }
    farm.pass(70 * SECOND);
    let (code, message) = status(&farm.told[&7]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert!(message.starts_with("Worker {\"name\":\"d\"} disappeared while task was executing"));
    assert!(
        ["a", "b", "c"]
            .iter()
            .all(|w| message.contains(&worker(w).to_string())),
        "{message}"
    );
}

#[test]
fn what_fails_for_a_fault_of_the_worker_is_executed_elsewhere_until_the_limit() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.held("b", idle(), 2);
    farm.execute(request("x"), 7).unwrap();
    let (first, second, call) = match farm.answered.contains_key(&1) {
        true => ("a", "b", 2),
        false => ("b", "a", 1),
    };
    // Its next call is not answered with the same at once, since another one takes it.
    let answer = farm.now(first, completed("x", rpc::Code::Unavailable));
    assert_eq!(answer.desired, DesiredWorkerState::Idle);
    assert_eq!(farm.told[&7], Stage::Executing);
    assert_eq!(action(&farm.answered[&call]), Some(digest("x")));
    // Nobody else is there: it is the same worker's again, once it calls.
    for _ in 0..2 {
        farm.now(second, completed("x", rpc::Code::Unavailable));
        assert_eq!(farm.told[&7], Stage::Queued);
        assert_eq!(action(&farm.now(second, idle())), Some(digest("x")));
    }
    farm.held(second, completed("x", rpc::Code::Unavailable), 9);
    assert_eq!(
        farm.told[&7],
        Stage::Completed(outcome(rpc::Code::Unavailable))
    );
}

#[test]
fn what_fails_since_the_storage_is_unavailable_is_executed_once_more_and_no_oftener() {
    let refused = |text: &str| {
        let outcome = EncodedResponse::new(&reapi::ExecuteResponse {
            status: Some(proto::storage_unavailable(text)),
            ..Default::default()
        });
        let WorkerReport { activity, .. } = completed("x", rpc::Code::Unavailable);
        let WorkerActivity::Completed(action, _) = activity else {
            panic!("{activity:?}");
        };
        WorkerReport {
            activity: WorkerActivity::Completed(action, Arc::new(outcome)),
            prefer_being_idle: false,
        }
    };
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    let text = "storage grpc://store:1 answered Unavailable: no";
    let answer = farm.now("a", refused(text));
    assert_eq!(answer.desired, DesiredWorkerState::Idle);
    assert_eq!(farm.told[&7], Stage::Queued);
    assert_eq!(action(&farm.now("b", idle())), Some(digest("x")));
    farm.held("b", refused(text), 2);
    let (code, message) = status(&farm.told[&7]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert!(message.contains("grpc://store:1"), "{message}");
}

#[test]
fn what_fails_for_its_own_fault_is_not_executed_again() {
    for code in [
        rpc::Code::Internal,
        rpc::Code::ResourceExhausted,
        rpc::Code::DeadlineExceeded,
    ] {
        let mut farm = Farm::new();
        farm.held("a", idle(), 1);
        farm.execute(request("x"), 7).unwrap();
        farm.held("a", completed("x", code), 2);
        assert_eq!(farm.told[&7], Stage::Completed(outcome(code)));
    }
}

#[test]
fn what_a_lost_worker_brings_late_changes_nothing() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    let lost = attempt(&farm.answered[&1]);
    farm.pass(70 * SECOND);
    let present = attempt(&farm.now("b", idle()));
    assert_ne!(lost.number, present.number);
    // It is back, and is told to stop; its result is given to nobody.
    let answer = farm.now("a", with(lost, executing("x")));
    assert_eq!(answer.desired, DesiredWorkerState::Idle);
    farm.held("a", with(lost, completed("x", rpc::Code::Ok)), 2);
    assert_eq!(farm.told[&7], Stage::Executing);
    assert_eq!(farm.queue.counts().kept_results, 0);
    // Nor is it when the other worker brings it.
    let mixed = farm.now("b", with(lost, completed("x", rpc::Code::Ok)));
    assert_eq!(action(&mixed), Some(digest("x")));
    farm.held("b", with(attempt(&mixed), completed("x", rpc::Code::Ok)), 3);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn another_process_in_the_place_of_a_worker_does_not_have_what_that_one_executed() {
    let mut farm = Farm::new();
    let call = |farm: &mut Farm, session, report, call| {
        let caller = WorkerCaller {
            call: Some(crate::metadata::WorkerCall {
                session,
                number: 1,
                token: None,
            }),
            ..caller_at("a", &session.to_string())
        };
        let answer =
            farm.queue
                .synchronize(farm.now, &key(""), &caller, report, call, 120 * SECOND);
        farm.perform();
        answer
    };
    call(&mut farm, 1, idle(), 1).unwrap();
    farm.execute(request("x"), 7).unwrap();
    farm.pass(16 * SECOND);
    let answer = call(&mut farm, 2, idle(), 2).unwrap();
    let SynchronizeAnswer::Now(instruction) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(action(&instruction), Some(digest("x")));
    let why = farm.queue.explain(farm.now, Uuid::from_u128(1)).unwrap();
    assert!(why.to_string().contains("1 worker was lost"), "{why}");
}

#[test]
fn a_worker_is_adopted_by_the_operation_that_it_says_even_if_it_may_not_be_cached() {
    let mut farm = Farm::with(|settings| settings.first_attempt = 1 << 40);
    let name = Uuid::from_u128(77);
    let former = Attempt {
        operation: name,
        number: 5,
    };
    let answer = farm.now("a", with(former, executing("x")));
    assert_eq!(answer.desired, DesiredWorkerState::Unchanged);
    let stranger = request_for("", digest("x"), true);
    let attached = farm.execute(stranger.clone(), 1).unwrap();
    assert_eq!(attached.progress.stage, Stage::Queued);
    let own = Request {
        name,
        resumes: true,
        skip_cache_lookup: true,
        ..stranger
    };
    let attached = farm.queue.execute(farm.now, own, 2).unwrap();
    farm.perform();
    assert_eq!(
        (attached.operation, attached.progress.stage),
        (name, Stage::Executing)
    );
    // It is the same attempt still.
    let answer = farm.now("a", with(former, completed("x", rpc::Code::Ok)));
    assert_eq!(farm.told[&2], Stage::Completed(outcome(rpc::Code::Ok)));
    assert_eq!(action(&answer), Some(digest("x")));
}

#[test]
fn a_result_of_before_is_not_for_who_skips_the_cache_unless_it_is_its_own() {
    let mut farm = Farm::with(|settings| settings.first_attempt = 1 << 40);
    let name = Uuid::from_u128(77);
    let former = Attempt {
        operation: name,
        number: 5,
    };
    let keep = |farm: &mut Farm| farm.held("a", with(former, completed("x", rpc::Code::Ok)), 1);
    keep(&mut farm);
    let skips = Request {
        skip_cache_lookup: true,
        ..request("x")
    };
    let attached = farm.execute(skips.clone(), 2).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    let own = Request {
        name,
        resumes: true,
        ..skips
    };
    let mut farm = Farm::with(|settings| settings.first_attempt = 1 << 40);
    keep(&mut farm);
    let attached = farm.queue.execute(farm.now, own.clone(), 2).unwrap();
    assert_eq!(
        attached.progress.stage,
        Stage::Completed(outcome(rpc::Code::Ok))
    );
    // A name gives no right to what another action came to.
    let mut farm = Farm::with(|settings| {
        settings.first_attempt = 1 << 40;
        settings.worker_report_timeout = Duration::ZERO;
    });
    keep(&mut farm);
    let forged = Request {
        action: request("other").action,
        ..own
    };
    let attached = farm.queue.execute(farm.now, forged, 2).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
}

#[test]
fn results_that_nobody_asks_for_are_kept_in_a_bounded_number() {
    let mut farm = Farm::with(|settings| settings.limits.kept_results = 3);
    for i in 0..10 {
        farm.held(
            &format!("w{i}"),
            completed(&format!("x{i}"), rpc::Code::Ok),
            i,
        );
        assert!(farm.queue.counts().kept_results <= 3);
    }
    let newest = farm.execute(request("x9"), 1).unwrap();
    assert!(matches!(newest.progress.stage, Stage::Completed(_)));
    let oldest = farm.execute(request("x0"), 2).unwrap();
    assert_eq!(oldest.progress.stage, Stage::Executing);
}

#[test]
fn a_queue_that_ends_without_workers_names_those_that_were_lost_with_an_action() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.pass(1200 * SECOND);
    let (code, message) = status(&farm.told[&7]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert!(
        message.contains("disappeared while task was queued"),
        "{message}"
    );
    assert!(message.contains(&worker("a").to_string()), "{message}");
}

#[test]
fn a_worker_that_started_again_is_let_in_at_once_where_it_proves_that_it_did() {
    let mut farm = Farm::new();
    let call = |farm: &mut Farm, start, number, report| {
        let caller = WorkerCaller {
            call: Some(crate::metadata::WorkerCall {
                session: 100 + start,
                number,
                token: Some(crate::metadata::FencingToken {
                    directory: 9,
                    start,
                }),
            }),
            ..caller_at("a", &format!("start {start}, call {number}"))
        };
        let answer = farm
            .queue
            .synchronize(farm.now, &key(""), &caller, report, 5, 120 * SECOND);
        farm.perform();
        answer
    };
    // The first one is handed the action, and is killed; the scheduler has not heard of its end.
    farm.execute(request("x"), 0).unwrap_err();
    call(&mut farm, 1, 1, idle()).unwrap();
    farm.execute(request("x"), 0).unwrap();
    call(&mut farm, 1, 2, executing("x")).unwrap();
    let answer = call(&mut farm, 2, 1, idle()).unwrap();
    let SynchronizeAnswer::Now(instruction) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(action(&instruction), Some(digest("x")));
    // What the first one said before its end comes late.
    let late = call(&mut farm, 1, 3, completed("x", rpc::Code::Unknown)).unwrap();
    assert!(
        matches!(late, SynchronizeAnswer::Now(instruction) if instruction.desired == DesiredWorkerState::Idle)
    );
    assert!(!matches!(farm.told.get(&0), Some(Stage::Completed(_))));
    call(&mut farm, 2, 2, completed("x", rpc::Code::Ok)).unwrap();
    assert_eq!(farm.told[&0], Stage::Completed(outcome(rpc::Code::Ok)));
    // While its call is held, too.
    let answer = call(&mut farm, 3, 1, idle()).unwrap();
    assert!(matches!(answer, SynchronizeAnswer::Held(_)));
}
