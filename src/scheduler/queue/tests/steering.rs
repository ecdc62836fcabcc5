//! What administrators and clients do to what runs: drains, termination, killing, cancelling.

use super::*;

fn pattern(labels: &[(&str, &str)]) -> WorkerPattern {
    let labels = labels
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    WorkerPattern::new(labels.collect())
}

fn drain(name: &str) -> Drain {
    Drain {
        key: key(""),
        pattern: pattern(&[("name", name)]),
        created: Default::default(),
    }
}

fn numbered(name: &str, session: u64, number: u64) -> WorkerCaller {
    WorkerCaller {
        call: Some(crate::metadata::WorkerCall {
            session,
            number,
            token: None,
        }),
        ..caller(name)
    }
}

impl Farm {
    fn numbered_call(&mut self, number: u64, report: WorkerReport, call: u32) -> SynchronizeAnswer {
        let caller = numbered("a", 1, number);
        let answer = self
            .queue
            .synchronize(self.now, &key(""), &caller, report, call, 120 * SECOND)
            .unwrap();
        self.perform();
        answer
    }

    fn add_drain(&mut self, drain: Drain) -> Result<(), DrainRefusal> {
        let key = drain.key.clone();
        self.queue.add_drain(drain)?;
        let mut last = None;
        loop {
            last = self.queue.apply_drains(self.now, &key, last.as_ref());
            if last.is_none() {
                return Ok(());
            }
        }
    }
}

#[test]
fn a_drained_worker_waits_without_work_and_gets_it_when_the_drain_goes() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.add_drain(drain("a")).unwrap();
    farm.add_drain(drain("a")).unwrap();
    farm.add_drain(drain("b")).unwrap();
    farm.perform();
    assert_eq!(farm.drains, 2);
    assert_eq!(farm.queue.drains(&key("")).unwrap().len(), 2);
    farm.execute(request("x"), 7).unwrap();
    assert!(farm.answered.is_empty());
    let row = &farm
        .queue
        .workers(&key(""), &WorkerFilter::All, None, 9)
        .unwrap()
        .rows[0];
    assert!(row.drained);
    farm.queue
        .remove_drain(&key(""), &drain("a").pattern)
        .unwrap();
    assert_eq!(farm.queue.apply_drains(farm.now, &key(""), None), None);
    farm.perform();
    assert_eq!(action(&farm.answered[&1]), Some(digest("x")));
}

#[test]
fn a_drain_may_come_before_its_queue() {
    let mut farm = Farm::new();
    farm.add_drain(drain("a")).unwrap();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    assert!(farm.answered.is_empty());
    assert_eq!(farm.queue.drained_queues(), [key("")]);
}

#[test]
fn drains_are_there_after_a_restart_for_workers_that_come_then() {
    let mut farm = Farm::with(|settings| settings.drains = vec![drain("a")]);
    farm.execute(request("x"), 7).unwrap_err();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    assert!(farm.answered.is_empty());
    assert_eq!(action(&farm.now("b", idle())), Some(digest("x")));
}

#[test]
fn a_drained_worker_ends_what_it_executes() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.execute(request("y"), 8).unwrap();
    farm.add_drain(drain("a")).unwrap();
    farm.perform();
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
    assert!(!farm.told.contains_key(&8));
}

#[test]
fn who_terminates_workers_hears_what_they_execute_and_they_get_nothing_new() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.held("b", idle(), 2);
    let mut executing = Vec::new();
    let all = WorkerPattern::default();
    let next = farm
        .queue
        .terminate(farm.now, &all, NextWorker::default(), &mut executing);
    assert_eq!(next, None);
    farm.perform();
    assert_eq!(executing.len(), 1);
    assert!(farm.queue.is_executing(executing[0]));
    let terminating = farm.queue.terminating_workers(NextWorker::default());
    assert_eq!(terminating.0.len(), 2);
    farm.execute(request("y"), 8).unwrap();
    farm.held("a", completed("x", rpc::Code::Ok), 3);
    assert!(!farm.queue.is_executing(executing[0]));
    assert_eq!(action(&farm.now("c", idle())), Some(digest("y")));
}

#[test]
fn who_kills_an_operation_says_what_its_client_hears_and_its_worker_becomes_idle() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 7).unwrap();
    let why = Arc::new(EncodedResponse::failure(
        rpc::Code::Unavailable,
        "no".to_owned(),
    ));
    farm.queue
        .kill_operation(farm.now, attached.operation, why.clone())
        .unwrap();
    farm.perform();
    assert_eq!(farm.told[&7], Stage::Completed(why.clone()));
    let answer = farm.now("a", executing("x"));
    assert_eq!(answer.desired, DesiredWorkerState::Idle);
    let unknown = farm
        .queue
        .kill_operation(farm.now, Uuid::from_u128(99), why);
    assert_eq!(unknown, Err(UnknownOperation));
}

#[test]
fn what_is_queued_is_killed_only_where_no_workers_are_a_few_at_a_time() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    for i in 0..200 {
        farm.execute(request(&format!("x{i}")), 10 + i).unwrap();
    }
    let why = Arc::new(EncodedResponse::failure(
        rpc::Code::Aborted,
        "no".to_owned(),
    ));
    let refused = farm.queue.kill_queued(farm.now, &key(""), why.clone());
    assert_eq!(refused, Err(KillRefusal::HasWorkers));
    farm.pass(70 * SECOND);
    farm.queue
        .kill_queued(farm.now, &key(""), why.clone())
        .unwrap();
    farm.perform();
    let left = farm.queue.counts().queued;
    assert!(left > 0 && left < 201, "{left}");
    farm.pass(Duration::ZERO);
    assert_eq!(farm.queue.counts().queued, 0);
    assert!((0..200).all(|i| farm.told[&(10 + i)] == Stage::Completed(why.clone())));
    farm.pass(16 * 60 * SECOND);
    assert_eq!(farm.queue.counts().queues, 0);
}

#[test]
fn a_held_call_of_a_busy_worker_is_answered_at_once_when_its_operation_is_cancelled() {
    let mut farm = Farm::new();
    farm.numbered_call(1, idle(), 1);
    let attached = farm.execute(request("x"), 7).unwrap();
    let held = farm.numbered_call(2, executing("x"), 2);
    assert!(matches!(held, SynchronizeAnswer::Held(_)));
    farm.pass(5 * SECOND);
    assert!(!farm.answered.contains_key(&2));
    farm.queue.cancel(farm.now, attached.operation).unwrap();
    farm.perform();
    assert_eq!(farm.answered[&2].desired, DesiredWorkerState::Idle);
    let (code, _) = status(&farm.told[&7]);
    assert_eq!(code, rpc::Code::Cancelled as i32);
}

#[test]
fn a_held_call_of_a_busy_worker_ends_when_a_busy_worker_is_to_call_again_or_with_its_newer_call() {
    let mut farm = Farm::new();
    farm.numbered_call(1, idle(), 1);
    farm.execute(request("x"), 7).unwrap();
    farm.numbered_call(2, executing("x"), 2);
    farm.pass(10 * SECOND);
    assert_eq!(farm.answered[&2].desired, DesiredWorkerState::Unchanged);
    farm.numbered_call(3, executing("x"), 3);
    farm.numbered_call(4, executing("x"), 4);
    assert_eq!(farm.answered[&3].desired, DesiredWorkerState::Unchanged);
    // One that is overtaken changes nothing.
    let late = farm.numbered_call(3, idle(), 5);
    assert!(matches!(late, SynchronizeAnswer::Now(_)));
    farm.numbered_call(5, completed("x", rpc::Code::Ok), 6);
    assert_eq!(farm.told[&7], Stage::Completed(outcome(rpc::Code::Ok)));
}

#[test]
fn of_several_operations_of_a_task_the_cancelled_one_alone_ends() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let first = farm.execute(request("x"), 1).unwrap();
    let other = Request {
        invocation: invocation("other"),
        ..request("x")
    };
    farm.execute(other, 2).unwrap();
    farm.queue.cancel(farm.now, first.operation).unwrap();
    farm.perform();
    assert_eq!(status(&farm.told[&1]).0, rpc::Code::Cancelled as i32);
    assert_eq!(
        farm.now("a", executing("x")).desired,
        DesiredWorkerState::Unchanged
    );
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    assert_eq!(farm.told[&2], Stage::Completed(outcome(rpc::Code::Ok)));
}

/// Ten operations of ten invocations on one task, whose waiters leave one by one.
fn abandoned(queued: bool) {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    if queued {
        farm.execute(request("busy"), 0).unwrap();
    }
    let waiters: Vec<Uuid> = (0..10)
        .map(|i| {
            let asked = Request {
                invocation: invocation(&i.to_string()),
                ..request("x")
            };
            farm.execute(asked, 10 + i).unwrap().operation
        })
        .collect();
    for (left, operation) in waiters.iter().enumerate() {
        let root = farm.queue.platform_queues()[0].size_classes[0].root;
        assert_eq!(root.active_children, 10 - left);
        assert_eq!(root.queued_indirectly, if queued { 10 - left } else { 0 });
        assert_eq!(root.executing_workers, 1);
        farm.queue.detach(farm.now, *operation);
        farm.pass(10 * SECOND);
        let report = executing(if queued { "busy" } else { "x" });
        let answer = farm.now("a", report);
        let ended = left == 9 && !queued;
        assert_eq!(answer.desired == DesiredWorkerState::Idle, ended);
    }
    assert_eq!(status(&farm.told[&19]).0, rpc::Code::Cancelled as i32);
}

#[test]
fn a_queued_task_leaves_each_invocation_that_abandons_it_and_ends_with_the_last() {
    abandoned(true);
}

#[test]
fn an_executing_task_leaves_each_invocation_that_abandons_it_and_ends_with_the_last() {
    abandoned(false);
}

#[test]
fn a_worker_that_numbers_its_calls_soon_makes_the_one_by_which_it_hears_of_a_cancellation() {
    let mut farm = Farm::new();
    farm.numbered_call(1, idle(), 1);
    farm.held("b", idle(), 2);
    farm.execute(request("x"), 7).unwrap();
    farm.execute(request("y"), 8).unwrap();
    assert!(farm.answered[&1].next < SECOND);
    assert_eq!(farm.answered[&2].next, 10 * SECOND);
}

#[test]
fn changes_of_drains_and_terminations_look_at_many_workers_piece_by_piece() {
    let mut farm = Farm::new();
    for worker in 0..600 {
        farm.held(&format!("{worker:03}"), idle(), worker);
    }
    farm.add_drain(Drain {
        pattern: WorkerPattern::default(),
        ..drain("a")
    })
    .unwrap();
    farm.execute(request("x"), 7).unwrap();
    assert!(farm.answered.is_empty());
    farm.queue
        .remove_drain(&key(""), &WorkerPattern::default())
        .unwrap();
    let piece = farm.queue.apply_drains(farm.now, &key(""), None);
    farm.perform();
    assert!(piece.is_some());
    assert_eq!(farm.answered.len(), 1);
    let (mut next, mut executing, mut calls) = (Some(NextWorker::default()), Vec::new(), 0);
    while let Some(from) = next {
        let all = WorkerPattern::default();
        next = farm.queue.terminate(farm.now, &all, from, &mut executing);
        calls += 1;
    }
    assert_eq!((executing.len(), calls), (1, 3));
}

#[test]
fn a_worker_that_was_told_to_terminate_and_is_started_again_gets_work() {
    let mut farm = Farm::new();
    farm.numbered_call(1, idle(), 1);
    let all = WorkerPattern::default();
    let from = NextWorker::default();
    farm.queue.terminate(farm.now, &all, from, &mut Vec::new());
    farm.execute(request("x"), 7).unwrap();
    assert!(farm.answered.is_empty());
    let held = farm.numbered_call(2, idle(), 2);
    let SynchronizeAnswer::Held(held) = held else {
        panic!("{held:?}");
    };
    farm.queue.drop_call(farm.now, held);
    let successor = numbered("a", 2, 1);
    let answer = farm
        .queue
        .synchronize(farm.now, &key(""), &successor, idle(), 3, 120 * SECOND);
    farm.perform();
    assert!(
        matches!(&answer, Ok(SynchronizeAnswer::Now(next)) if action(next) == Some(digest("x"))),
        "{answer:?}"
    );
}
