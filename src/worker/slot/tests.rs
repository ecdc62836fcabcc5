//! What a slot does, step by step.

use super::*;

type Steps = Vec<SlotStep<&'static str, &'static str>>;
const SECOND: Duration = Duration::from_secs(1);

struct Fixture {
    slot: Slot<&'static str, &'static str>,
    now: Instant,
}

fn action(name: &str) -> Digest {
    Digest {
        hash: name.to_owned(),
        size_bytes: 1,
    }
}

fn call(activity: Activity<&'static str>) -> SlotStep<&'static str, &'static str> {
    SlotStep::Call(SlotReport {
        activity,
        prefer_being_idle: false,
    })
}

fn unwilling(activity: Activity<&'static str>) -> SlotStep<&'static str, &'static str> {
    SlotStep::Call(SlotReport {
        activity,
        prefer_being_idle: true,
    })
}

impl Fixture {
    /// A slot that has asked for work.
    fn asking() -> Fixture {
        #[expect(clippy::disallowed_methods, reason = "tests are not pure")]
        let now = Instant::now();
        let mut fixture = Fixture {
            slot: Slot::new(now),
            now,
        };
        assert_eq!(fixture.steps(), [SlotStep::CheckReadiness]);
        fixture.slot.readiness(now, true, SECOND);
        assert_eq!(fixture.steps(), [call(Activity::Idle)]);
        fixture
    }

    /// A slot that runs "x", and is to call again in ten seconds.
    fn executing() -> Fixture {
        let mut fixture = Fixture::asking();
        fixture.answer(Desired::Executing(action("x"), "x"), 10);
        assert_eq!(fixture.steps(), [SlotStep::Start("x")]);
        fixture
    }

    fn answer(&mut self, desired: Desired<&'static str>, seconds: u32) {
        let due = self.now + seconds * SECOND;
        self.slot.answered(self.now, Answer { desired, due });
    }

    /// All steps but the last one, which is to wait or to leave.
    fn steps(&mut self) -> Steps {
        let mut steps = Vec::new();
        loop {
            match self.slot.next(self.now) {
                SlotStep::Wait(_) => return steps,
                SlotStep::Exit => {
                    steps.push(SlotStep::Exit);
                    return steps;
                }
                step => steps.push(step),
            }
        }
    }

    fn pass(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }
}

#[test]
fn a_busy_slot_calls_when_it_is_due_and_not_before() {
    let mut fixture = Fixture::executing();
    assert_eq!(fixture.pass(9 * SECOND).steps(), []);
    let executing = || call(Activity::Executing(action("x")));
    assert_eq!(fixture.pass(SECOND).steps(), [executing()]);
    fixture.answer(Desired::Unchanged, 10);
    assert_eq!(fixture.steps(), []);
    assert_eq!(fixture.pass(10 * SECOND).steps(), [executing()]);
}

#[test]
fn what_replaces_an_execution_starts_after_that_has_returned() {
    let mut fixture = Fixture::executing();
    fixture.pass(10 * SECOND).steps();
    fixture.answer(Desired::Executing(action("y"), "y"), 10);
    assert_eq!(fixture.steps(), [SlotStep::Cancel]);
    // The scheduler goes on hearing of what it asked for.
    let started = call(Activity::Started(action("y")));
    assert_eq!(fixture.pass(10 * SECOND).steps(), [started]);
    fixture.answer(Desired::Unchanged, 10);
    fixture.slot.finished(fixture.now, "cancelled", false);
    assert_eq!(fixture.steps(), [SlotStep::Start("y")]);
}

#[test]
fn an_execution_that_nobody_wants_is_cancelled_and_its_result_dropped() {
    let mut fixture = Fixture::executing();
    fixture.pass(10 * SECOND).steps();
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [SlotStep::Cancel]);
    assert_eq!(fixture.pass(100 * SECOND).steps(), []);
    fixture.slot.finished(fixture.now, "cancelled", false);
    assert_eq!(fixture.steps(), [SlotStep::CheckReadiness]);
}

#[test]
fn a_result_outlives_the_absence_of_its_scheduler() {
    let mut fixture = Fixture::executing();
    fixture.pass(10 * SECOND).steps();
    fixture.slot.failed(fixture.now, 0);
    fixture.slot.finished(fixture.now, "result", true);
    let completed = || call(Activity::Completed(action("x"), "result"));
    for _ in 0..20 {
        // The longest pause is five seconds.
        assert_eq!(fixture.pass(5 * SECOND).steps(), [completed()]);
        fixture.slot.failed(fixture.now, u64::MAX);
    }
    assert_eq!(fixture.pass(5 * SECOND).steps(), [completed()]);
    fixture.answer(Desired::Executing(action("y"), "y"), 10);
    assert_eq!(fixture.steps(), [SlotStep::Start("y")]);
}

#[test]
fn after_a_failure_a_slot_looks_whether_it_is_well_before_it_asks_again() {
    let mut fixture = Fixture::executing();
    fixture.slot.finished(fixture.now, "failure", false);
    let completed = unwilling(Activity::Completed(action("x"), "failure"));
    assert_eq!(fixture.steps(), [completed]);
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [SlotStep::CheckReadiness]);
    fixture.slot.readiness(fixture.now, false, 3 * SECOND);
    assert_eq!(fixture.steps(), []);
    assert_eq!(fixture.pass(3 * SECOND).steps(), [SlotStep::CheckReadiness]);
    fixture.slot.readiness(fixture.now, true, SECOND);
    assert_eq!(fixture.steps(), [call(Activity::Idle)]);
}

#[test]
fn a_stopping_slot_finishes_reports_and_leaves() {
    let mut fixture = Fixture::executing();
    fixture.slot.stop(fixture.now + 60 * SECOND);
    assert_eq!(fixture.pass(SECOND).steps(), []);
    fixture.slot.finished(fixture.now, "result", true);
    let completed = unwilling(Activity::Completed(action("x"), "result"));
    assert_eq!(fixture.steps(), [completed]);
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [unwilling(Activity::Idle)]);
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [SlotStep::Exit]);
}

#[test]
fn a_stopping_slot_does_not_wait_for_a_call_that_is_held() {
    let mut fixture = Fixture::asking();
    fixture.slot.stop(fixture.now + 60 * SECOND);
    assert_eq!(
        fixture.steps(),
        [SlotStep::AbortCall, unwilling(Activity::Idle)]
    );
    fixture.slot.failed(fixture.now, 0);
    assert_eq!(fixture.steps(), [SlotStep::Exit]);
}

#[test]
fn a_slot_that_leaves_tells_a_scheduler_that_has_not_noticed_the_end_of_the_call_before() {
    let mut fixture = Fixture::asking();
    assert!(!fixture.slot.already_synchronizing(fixture.now));
    fixture.slot.stop(fixture.now + 60 * SECOND);
    let leaving = || unwilling(Activity::Idle);
    assert_eq!(fixture.steps(), [SlotStep::AbortCall, leaving()]);
    assert!(fixture.slot.already_synchronizing(fixture.now));
    assert_eq!(fixture.steps(), []);
    assert_eq!(fixture.pass(SECOND / 40).steps(), [leaving()]);
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [SlotStep::Exit]);
}

#[test]
fn a_slot_whose_place_another_one_has_gives_up_at_last() {
    let mut fixture = Fixture::asking();
    fixture.slot.stop(fixture.now + 60 * SECOND);
    fixture.steps();
    let mut times = 0;
    while fixture.slot.already_synchronizing(fixture.now) {
        times += 1;
        fixture.pass(SECOND * 4 / 5).steps();
    }
    assert_eq!(times, 6);
    fixture.slot.failed(fixture.now, 0);
    assert_eq!(fixture.steps(), [SlotStep::Exit]);
}

#[test]
fn an_idle_slot_that_stops_does_not_wait_long_for_a_scheduler_that_is_silent() {
    let mut fixture = Fixture::asking();
    fixture.slot.stop(fixture.now + 60 * SECOND);
    assert_eq!(
        fixture.steps(),
        [SlotStep::AbortCall, unwilling(Activity::Idle)]
    );
    assert_eq!(fixture.pass(4 * SECOND).steps(), []);
    assert_eq!(
        fixture.pass(SECOND).steps(),
        [SlotStep::AbortCall, SlotStep::Exit]
    );
}

#[test]
fn at_the_drain_limit_a_slot_hands_back_what_it_runs() {
    let mut fixture = Fixture::executing();
    fixture.slot.stop(fixture.now + 5 * SECOND);
    assert_eq!(fixture.pass(5 * SECOND).steps(), [SlotStep::Cancel]);
    fixture.slot.finished(fixture.now, "cancelled", false);
    assert_eq!(fixture.steps(), [unwilling(Activity::Idle)]);
    // Nobody answers.
    assert_eq!(
        fixture.pass(SECOND).steps(),
        [SlotStep::AbortCall, SlotStep::Exit]
    );
}

#[test]
fn a_paused_slot_drops_the_call_that_asks_for_work_and_checks_before_it_asks_again() {
    let mut fixture = Fixture::asking();
    fixture.slot.pause(fixture.now + 30 * SECOND);
    assert_eq!(fixture.steps(), [SlotStep::AbortCall]);
    assert_eq!(fixture.pass(29 * SECOND).steps(), []);
    assert_eq!(fixture.pass(SECOND).steps(), [SlotStep::CheckReadiness]);
    fixture.slot.readiness(fixture.now, true, SECOND);
    assert_eq!(fixture.steps(), [call(Activity::Idle)]);
}

#[test]
fn a_paused_slot_finishes_what_it_runs_and_takes_nothing_with_the_answer() {
    let mut fixture = Fixture::executing();
    fixture.slot.pause(fixture.now + 30 * SECOND);
    let executing = call(Activity::Executing(action("x")));
    assert_eq!(fixture.pass(10 * SECOND).steps(), [executing]);
    fixture.answer(Desired::Unchanged, 10);
    fixture.slot.finished(fixture.now, "result", true);
    let completed = unwilling(Activity::Completed(action("x"), "result"));
    assert_eq!(fixture.steps(), [completed]);
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), []);
    // It stops at once all the same.
    fixture.slot.stop(fixture.now + SECOND);
    assert_eq!(fixture.steps(), [unwilling(Activity::Idle)]);
}

#[test]
fn a_result_that_is_refused_becomes_smaller_and_is_given_up_in_the_end() {
    let mut fixture = Fixture::executing();
    fixture.slot.finished(fixture.now, "whole", true);
    let completed = |result| call(Activity::Completed(action("x"), result));
    assert_eq!(fixture.steps(), [completed("whole")]);
    fixture.slot.refused(fixture.now, 0, |_| "smaller");
    assert_eq!(fixture.pass(5 * SECOND).steps(), [completed("smaller")]);
    // A scheduler that is away refuses nothing.
    for _ in 0..10 {
        fixture.slot.failed(fixture.now, 0);
        assert_eq!(fixture.pass(5 * SECOND).steps(), [completed("smaller")]);
    }
    fixture.slot.refused(fixture.now, 0, |_| "smallest");
    assert_eq!(fixture.pass(5 * SECOND).steps(), [completed("smallest")]);
    fixture.slot.refused(fixture.now, 0, |_| unreachable!());
    assert_eq!(fixture.pass(5 * SECOND).steps(), [SlotStep::CheckReadiness]);
    fixture.slot.readiness(fixture.now, true, SECOND);
    assert_eq!(fixture.steps(), [call(Activity::Idle)]);
}

#[test]
fn a_scheduler_that_does_not_hold_calls_is_not_called_in_a_loop() {
    let mut fixture = Fixture::asking();
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), []);
    assert_eq!(fixture.pass(SECOND).steps(), [SlotStep::CheckReadiness]);
}

#[test]
fn a_result_does_not_wait_for_a_call_that_is_held() {
    let mut fixture = Fixture::executing();
    fixture.now += 10 * SECOND;
    assert_eq!(fixture.steps(), [call(Activity::Executing(action("x")))]);
    fixture.now += SECOND;
    fixture.slot.finished(fixture.now, "done", true);
    assert_eq!(
        fixture.steps(),
        [
            SlotStep::LeaveCall,
            call(Activity::Completed(action("x"), "done"))
        ]
    );
    // Told while it is held.
    let mut fixture = Fixture::executing();
    fixture.now += 10 * SECOND;
    assert_eq!(fixture.steps(), [call(Activity::Executing(action("x")))]);
    fixture.now += SECOND;
    fixture.answer(Desired::Idle, 0);
    assert_eq!(fixture.steps(), [SlotStep::Cancel]);
}
