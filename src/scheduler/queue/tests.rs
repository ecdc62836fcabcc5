//! The laws of the queue, one by one; `tests/it/simulation.rs` has them all at once.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prost::Message;
use uuid::Uuid;

use super::*;
use crate::{
    digest::DigestFunction,
    proto::{reapi, rpc},
    scheduler::size_class::Analyzer,
};

const SECOND: Duration = Duration::from_secs(1);

struct Farm {
    queue: Queue<u32, u32>,
    now: Instant,
    names: u128,
    /// What was told to waiters, by watch; what was answered to held calls.
    told: BTreeMap<u32, Stage>,
    answered: BTreeMap<u32, Instruction>,
}

fn linux() -> Platform {
    Platform::from(&BTreeMap::from([("OSFamily".into(), "linux".into())]))
}

fn key(prefix: &str) -> SizeClassQueueKey {
    SizeClassQueueKey {
        platform: linux(),
        prefix: InstanceName::parse(prefix).unwrap(),
        size_class: 0,
    }
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(BTreeMap::from([("name".to_owned(), name.to_owned())]))
}

fn caller(name: &str) -> Caller {
    caller_at(name, "its address")
}

fn caller_at(name: &str, peer: &str) -> Caller {
    Caller {
        id: worker(name),
        peer: peer.into(),
        call: None,
    }
}

fn digest(action: &str) -> Digest {
    DigestFunction::Sha256.digest_of(action.as_bytes())
}

fn reported(instance: &str, action: &str) -> ReportedAction {
    ReportedAction {
        digest: (&digest(action)).into(),
        instance: Some(InstanceName::parse(instance).unwrap()),
        attempt: None,
    }
}

fn request(action: &str) -> Request {
    request_of("", action)
}

fn request_of(instance: &str, action: &str) -> Request {
    request_for(instance, digest(action), false)
}

fn request_for(instance: &str, digest: Digest, do_not_cache: bool) -> Request {
    let action = reapi::Action {
        do_not_cache,
        ..Default::default()
    };
    let timeout = 60 * SECOND;
    Request {
        name: Uuid::nil(),
        resumes: false,
        action: Arc::new(QueuedAction::new(
            InstanceName::parse(instance).unwrap(),
            digest,
            action,
            timeout,
            Vec::new(),
            Default::default(),
        )),
        platform: linux(),
        selector: Analyzer::Fallback.selector(timeout, None, SystemTime::UNIX_EPOCH),
        priority: 0,
        invocation: InvocationKeys::default(),
        skip_cache_lookup: false,
    }
}

fn invocation(name: &str) -> InvocationKeys {
    InvocationKeys::new([InvocationKey::from_bytes(name.as_bytes())])
}

fn idle() -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Idle,
        prefer_being_idle: false,
    }
}

fn executing(action: &str) -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Executing(reported("", action)),
        prefer_being_idle: false,
    }
}

fn outcome(code: rpc::Code) -> Arc<EncodedResponse> {
    Arc::new(EncodedResponse::failure(code, "of a worker".to_owned()))
}

fn completed(action: &str, code: rpc::Code) -> WorkerReport {
    WorkerReport {
        activity: WorkerActivity::Completed(reported("", action), outcome(code)),
        prefer_being_idle: false,
    }
}

fn status(stage: &Stage) -> (i32, String) {
    let Stage::Completed(outcome) = stage else {
        panic!("{stage:?}");
    };
    let response = reapi::ExecuteResponse::decode(&*outcome.response).unwrap();
    let status = response.status.unwrap();
    (status.code, status.message)
}

fn action(instruction: &Instruction) -> Option<Digest> {
    match &instruction.desired {
        DesiredWorkerState::Execute { action, .. } => Some(action.digest),
        DesiredWorkerState::Idle | DesiredWorkerState::Unchanged => None,
    }
}

impl Farm {
    fn new() -> Farm {
        let settings = Settings::from(&crate::config::scheduler::Scheduling::default());
        #[expect(clippy::disallowed_methods, reason = "tests are not pure")]
        let now = Instant::now();
        Farm {
            queue: Queue::new(settings, now),
            now,
            names: 0,
            told: BTreeMap::new(),
            answered: BTreeMap::new(),
        }
    }

    fn perform(&mut self) {
        for effect in self.queue.effects() {
            match effect {
                Effect::Answer { call, instruction } => {
                    self.answered.insert(call, instruction);
                }
                Effect::Tell { watch, progress } => {
                    self.told.insert(watch, progress.stage);
                }
                Effect::Learned(_) | Effect::KeepDrains { .. } => {}
            }
        }
        self.queue.check_invariants().unwrap();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.queue.poll_timeout().filter(|next| *next <= end) {
            self.now = next;
            self.queue.expire(next);
            self.perform();
        }
        self.now = end;
    }

    fn execute(
        &mut self,
        request: Request,
        watch: u32,
    ) -> Result<AttachedWaiter<u32>, ExecuteRefusal> {
        self.names += 1;
        let request = Request {
            name: Uuid::from_u128(self.names),
            ..request
        };
        let attached = self.queue.execute(self.now, request, watch);
        self.perform();
        attached
    }

    fn call(
        &mut self,
        key: &SizeClassQueueKey,
        name: &str,
        report: WorkerReport,
        call: u32,
    ) -> SynchronizeAnswer {
        let wait = 120 * SECOND;
        let answer = self
            .queue
            .synchronize(self.now, key, &caller(name), report, call, wait)
            .unwrap();
        self.perform();
        answer
    }

    fn now(&mut self, name: &str, report: WorkerReport) -> Instruction {
        match self.call(&key(""), name, report, 0) {
            SynchronizeAnswer::Now(instruction) => instruction,
            SynchronizeAnswer::Held(_) => panic!("the call is held"),
        }
    }

    fn held(&mut self, name: &str, report: WorkerReport, call: u32) -> HeldCall {
        match self.call(&key(""), name, report, call) {
            SynchronizeAnswer::Held(held) => held,
            SynchronizeAnswer::Now(instruction) => panic!("{instruction:?}"),
        }
    }
}

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
fn the_most_urgent_then_the_oldest_task_comes_first() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("busy"), 0).unwrap();
    for (action, priority) in [
        ("later", 0),
        ("last", i32::MAX),
        ("first", i32::MIN),
        ("latest", 0),
    ] {
        let request = Request {
            priority,
            ..request(action)
        };
        farm.execute(request, 0).unwrap();
    }
    // Someone else wants the last one soon.
    let urgent = Request {
        priority: -1,
        invocation: invocation("other"),
        ..request("last")
    };
    farm.execute(urgent, 0).unwrap();
    let mut before = "busy";
    for next in ["first", "last", "later", "latest"] {
        let instruction = farm.now("a", completed(before, rpc::Code::Ok));
        assert_eq!(action(&instruction), Some(digest(next)));
        before = next;
    }
}

#[test]
fn the_longest_instance_name_prefix_wins_and_the_worker_learns_the_rest() {
    let mut farm = Farm::new();
    for (i, prefix) in ["", "a", "a/b"].into_iter().enumerate() {
        assert!(matches!(
            farm.call(&key(prefix), "w", idle(), i as u32),
            SynchronizeAnswer::Held(_)
        ));
    }
    for (instance, call, suffix) in [("a/b/c", 2, "c"), ("ab", 0, "ab"), ("a", 1, "")] {
        let mut request = request("x");
        Arc::make_mut(&mut request.action).instance = InstanceName::parse(instance).unwrap();
        farm.execute(request, 0).unwrap();
        let DesiredWorkerState::Execute { suffix: rest, .. } = &farm.answered[&call].desired else {
            panic!("{instance} went elsewhere");
        };
        assert_eq!(rest.as_str(), suffix);
    }
}

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
    assert_eq!(other.watch, 1);
    let uncacheable = request_for("", digest("x"), true);
    let alone = farm.execute(uncacheable, 4).unwrap();
    assert_eq!((alone.watch, alone.progress.stage), (4, Stage::Queued));
    let mut elsewhere = request("x");
    Arc::make_mut(&mut elsewhere.action).instance = InstanceName::parse("i").unwrap();
    assert_eq!(farm.execute(elsewhere, 5).unwrap().watch, 5);
}

#[test]
fn an_operation_without_waiters_goes_after_a_minute_and_its_task_with_it() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    farm.queue.detach(farm.now, attached.operation);
    farm.pass(59 * SECOND);
    farm.now("a", executing("x"));
    // Someone comes back, and leaves again.
    assert!(farm.queue.wait(attached.operation).is_some());
    farm.pass(59 * SECOND);
    farm.now("a", executing("x"));
    farm.queue.detach(farm.now, attached.operation);
    farm.pass(60 * SECOND);
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
    farm.pass(50 * SECOND);
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    farm.pass(59 * SECOND);
    let again = farm.queue.wait(attached.operation).unwrap();
    assert_eq!(
        again.progress.stage,
        Stage::Completed(outcome(rpc::Code::Ok))
    );
}

#[test]
fn a_silent_worker_is_gone_and_its_task_fails() {
    let mut farm = Farm::new();
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
fn unknown_platforms_are_unavailable_at_first_and_then_an_error_that_lists_what_there_is() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let plan9 = Platform::from(&BTreeMap::from([("OSFamily".into(), "plan9".into())]));
    let ask = |farm: &mut Farm| {
        let request = Request {
            platform: plan9.clone(),
            ..request("x")
        };
        match farm.execute(request, 1).unwrap_err() {
            ExecuteRefusal::NoWorkers(error) => error,
            full => panic!("{full}"),
        }
    };
    assert!(ask(&mut farm).transient);
    farm.pass(15 * 60 * SECOND);
    farm.held("a", idle(), 2);
    let error = ask(&mut farm);
    assert!(!error.transient);
    assert_eq!(
        error.to_string(),
        "No workers exist for instance name prefix \"\" platform \
         {\"properties\":[{\"name\":\"OSFamily\",\"value\":\"plan9\"}]}; workers exist for \
         \"\" {\"properties\":[{\"name\":\"OSFamily\",\"value\":\"linux\"}]}"
    );
}

#[test]
fn actions_without_properties_go_to_the_default_platform_unless_workers_offer_none() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let nothing = || Request {
        platform: Platform::default(),
        ..request("x")
    };
    let attached = farm.execute(nothing(), 1).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    let bare = SizeClassQueueKey {
        platform: Platform::default(),
        ..key("")
    };
    farm.call(&bare, "b", idle(), 3);
    farm.execute(nothing(), 1).unwrap();
    assert_eq!(action(&farm.answered[&3]), Some(digest("x")));
}

#[test]
fn a_queue_without_workers_goes_after_a_quarter_of_an_hour_with_what_waits_in_it() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    farm.execute(request("y"), 2).unwrap();
    farm.pass(70 * SECOND);
    farm.pass(15 * 60 * SECOND);
    let (code, message) = status(&farm.told[&2]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert!(
        message.contains("disappeared while task was queued"),
        "{message}"
    );
    assert_eq!(farm.queue.counts().queues, 0);
    assert_eq!(farm.queue.platform_queues().len(), 0);
}

#[test]
fn whoever_looks_at_the_queue_sees_what_there_is() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let attached = farm.execute(request("x"), 1).unwrap();
    farm.execute(request("y"), 2).unwrap();
    let platforms = farm.queue.platform_queues();
    let queue = &platforms[0].size_classes[0];
    assert_eq!((queue.workers, queue.root.queued_directly), (1, 1));
    let workers = farm.queue.workers(&key(""), &WorkerFilter::All, None, 9);
    let row = workers.unwrap().rows.remove(0);
    assert_eq!(row.operation.unwrap().name, attached.operation);
    let operations: Vec<_> = farm.queue.operations(None).collect();
    assert_eq!(operations.len(), 2);
    assert_eq!(operations[0].worker, Some(worker("a")));
    assert_eq!(operations[1].stage, Stage::Queued);
    let rest = farm.queue.operations(Some(operations[0].name));
    assert_eq!(rest.count(), 1);
}

#[test]
fn properties_out_of_order_are_no_platform() {
    let property = |name: &str, value: &str| reapi::platform::Property {
        name: name.to_owned(),
        value: value.to_owned(),
    };
    let parse = |properties| Platform::parse(Some(&reapi::Platform { properties }));
    assert!(parse(vec![property("a", "2"), property("b", "1")]).is_ok());
    assert!(parse(vec![property("a", "1"), property("a", "2")]).is_ok());
    assert!(parse(vec![property("b", "1"), property("a", "2")]).is_err());
    assert!(parse(vec![property("a", "1"), property("a", "1")]).is_err());
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
