//! One slot's side of the worker protocol, PURE: what to say to the scheduler, when, and what to do
//! about its answers.
//!
//! 1. At most one call is in flight, and at most one execution is under way.
//! 2. A result is kept until a scheduler has answered the call that carried it.
//! 3. Nothing is started before the execution before it has returned.
//! 4. An idle slot asks for work only after a readiness check that passed.
//! 5. A paused slot asks for nothing, drops the call that asked already, and takes nothing new with
//!    the answer to a result.
//! 6. A result that schedulers refuse `REFUSALS` times is given up.
//! 7. A slot that leaves has handed in its result, or said that it runs nothing; unless the
//!    scheduler cannot be reached until the drain limit.
//!
//! `T` is a task, `R` a result. The shell calls `next` until it says `Wait`, then tells the next
//! event.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

use crate::proto::reapi::Digest;

/// After a first failed call; doubles up to `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between two calls of an idle slot whose scheduler does not hold its calls.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
/// Of one result, after which it is given up.
const REFUSALS: u32 = 3;
/// How long a call may take that is in flight, or still due, at the drain limit.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long an idle slot that stops waits for a scheduler to take note. One that is stopped at the
/// same time may never answer.
const LONGEST_FAREWELL: Duration = Duration::from_secs(5);

pub struct Slot<T, R> {
    doing: Doing<T, R>,
    call: Option<Call>,
    /// Calls that failed since the last answer.
    failures: u32,
    /// No call before this, except for news.
    not_before: Instant,
    /// No work is asked for before this.
    paused: Instant,
    /// When the scheduler wants to hear of an execution again.
    due: Instant,
    life: Life,
}

enum Doing<T, R> {
    Idle(Readiness),
    /// The shell is to start it.
    Starting {
        action: Digest,
        task: T,
    },
    Executing {
        action: Digest,
    },
    /// The result waits for a scheduler that takes it.
    Finished {
        action: Digest,
        result: R,
        healthy: bool,
        refusals: u32,
    },
    /// The execution is unwanted, and has not returned yet.
    Cancelling {
        told: bool,
        then: Option<(Digest, T)>,
    },
}

enum Readiness {
    Unknown { not_before: Instant },
    Checking,
    Ready,
}

struct Call {
    began: Instant,
    said: Said,
    prefer_being_idle: bool,
}

/// What the call in flight said.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    Idle,
    Farewell,
    Executing,
    Completed,
}

#[derive(Clone, Copy)]
enum Life {
    Serving,
    /// Finishes what it runs, until then.
    Draining {
        deadline: Instant,
    },
    Gone,
}

/// What the shell is to do now.
#[derive(Debug, PartialEq)]
pub enum Step<T, R> {
    /// Call the scheduler; then tell `answered` or `failed`.
    Call(Report<R>),
    /// Drop the call that is in flight.
    HangUp,
    /// Start this; then tell `finished`.
    Start(T),
    /// Cancel the execution; it still tells `finished`.
    Cancel,
    /// Check whether an action could run; then tell `readiness`.
    CheckReadiness,
    /// Nothing, until an event or this time.
    Wait(Option<Instant>),
    /// Never call again.
    Leave,
}

#[derive(Debug, PartialEq)]
pub struct Report<R> {
    pub activity: Activity<R>,
    pub prefer_being_idle: bool,
}

#[derive(Debug, PartialEq)]
pub enum Activity<R> {
    Idle,
    /// Accepted; another execution is still being cancelled.
    Started(Digest),
    /// The shell knows the stage.
    Executing(Digest),
    Completed(Digest, R),
}

/// What a scheduler answered.
pub struct Answer<T> {
    pub desired: Desired<T>,
    /// When it wants the next call.
    pub due: Instant,
}

pub enum Desired<T> {
    Unchanged,
    Idle,
    Executing(Digest, T),
}

impl<T, R: Clone> Slot<T, R> {
    pub fn new(now: Instant) -> Self {
        Slot {
            doing: Doing::Idle(Readiness::Unknown { not_before: now }),
            call: None,
            failures: 0,
            not_before: now,
            paused: now,
            due: now,
            life: Life::Serving,
        }
    }

    /// What to do now. To be called after every event, until it says `Wait` or `Leave`.
    pub fn next(&mut self, now: Instant) -> Step<T, R> {
        let deadline = match self.life {
            Life::Serving => None,
            Life::Draining { deadline } => Some(deadline),
            Life::Gone => return Step::Leave,
        };
        let draining = deadline.is_some();
        let overdue = deadline.is_some_and(|deadline| deadline <= now);
        let paused = now < self.paused;
        if paused
            && !draining
            && let Doing::Idle(readiness) = &mut self.doing
        {
            *readiness = Readiness::Unknown {
                not_before: self.paused,
            };
            // It may have been answered with work already, which the scheduler hands out again when
            // it hears that nothing runs here.
            if self.call.take_if(|call| call.said == Said::Idle).is_some() {
                return Step::HangUp;
            }
        }
        match &mut self.doing {
            Doing::Cancelling { told, .. } if !*told => {
                *told = true;
                return Step::Cancel;
            }
            // Hands it back: the scheduler hears that nothing runs here any more.
            Doing::Executing { .. } if overdue => {
                self.doing = Doing::Cancelling {
                    told: true,
                    then: None,
                };
                return Step::Cancel;
            }
            Doing::Starting { .. } => return self.start(),
            _ => {}
        }
        if let Some(call) = &self.call {
            // The scheduler holds calls that ask for work; a slot that leaves must not wait for it.
            let held = draining && !call.prefer_being_idle && call.said != Said::Executing;
            let limit = deadline.map(|deadline| match call.said {
                Said::Farewell => {
                    (call.began + LONGEST_FAREWELL).min(deadline.max(call.began + LAST_WORDS))
                }
                _ => deadline.max(call.began + LAST_WORDS),
            });
            if held || limit.is_some_and(|limit| limit <= now) {
                if call.said == Said::Farewell {
                    self.life = Life::Gone;
                }
                self.call = None;
                return Step::HangUp;
            }
            // An execution is cancelled at the deadline, whatever the call does.
            return Step::Wait(match self.doing {
                Doing::Executing { .. } => deadline,
                _ => limit,
            });
        }
        let (at, said, activity) = match &mut self.doing {
            Doing::Idle(_) if draining => (now, Said::Farewell, Activity::Idle),
            Doing::Idle(readiness) => match readiness {
                Readiness::Unknown { not_before } if *not_before <= now => {
                    *readiness = Readiness::Checking;
                    return Step::CheckReadiness;
                }
                Readiness::Unknown { not_before } => return Step::Wait(Some(*not_before)),
                Readiness::Checking => return Step::Wait(None),
                Readiness::Ready => (self.not_before, Said::Idle, Activity::Idle),
            },
            Doing::Executing { action } => (
                self.due.max(self.not_before),
                Said::Executing,
                Activity::Executing(action.clone()),
            ),
            Doing::Finished { .. } if overdue => {
                self.life = Life::Gone;
                return Step::Leave;
            }
            Doing::Finished { action, result, .. } => (
                self.not_before,
                Said::Completed,
                Activity::Completed(action.clone(), result.clone()),
            ),
            Doing::Cancelling {
                then: Some((action, _)),
                ..
            } => (
                self.due.max(self.not_before),
                Said::Executing,
                Activity::Started(action.clone()),
            ),
            Doing::Cancelling { then: None, .. } | Doing::Starting { .. } => {
                return Step::Wait(None);
            }
        };
        if at > now {
            return Step::Wait(Some(match deadline {
                Some(deadline) if deadline > now => at.min(deadline),
                _ => at,
            }));
        }
        let unwell = matches!(self.doing, Doing::Finished { healthy: false, .. });
        let has_paused = paused && said == Said::Completed;
        let prefer_being_idle = draining || unwell || has_paused;
        self.call = Some(Call {
            began: now,
            said,
            prefer_being_idle,
        });
        Step::Call(Report {
            activity,
            prefer_being_idle,
        })
    }

    fn start(&mut self) -> Step<T, R> {
        let idle = Doing::Idle(Readiness::Checking);
        match std::mem::replace(&mut self.doing, idle) {
            Doing::Starting { action, task } => {
                self.doing = Doing::Executing { action };
                Step::Start(task)
            }
            other => {
                self.doing = other;
                Step::Wait(None)
            }
        }
    }

    /// The scheduler answered.
    pub fn answered(&mut self, now: Instant, answer: Answer<T>) {
        let Some(call) = self.call.take() else { return };
        self.failures = 0;
        self.not_before = now;
        self.due = answer.due.max(now);
        let executes = matches!(answer.desired, Desired::Executing(..));
        if call.said == Said::Farewell && !executes {
            self.life = Life::Gone;
            return;
        }
        if call.said == Said::Idle && !executes {
            self.not_before = self.due.max(call.began + IDLE_PAUSE);
        }
        let idle = Doing::Idle(Readiness::Unknown {
            not_before: self.not_before,
        });
        let doing = std::mem::replace(&mut self.doing, Doing::Idle(Readiness::Checking));
        self.doing = match (doing, answer.desired) {
            // The answer takes the result, whatever else it says.
            (Doing::Finished { .. }, Desired::Unchanged) if call.said == Said::Completed => idle,
            (doing, Desired::Unchanged) => doing,
            (Doing::Executing { .. }, Desired::Idle) => Doing::Cancelling {
                told: false,
                then: None,
            },
            (Doing::Cancelling { told, .. }, Desired::Idle) => {
                Doing::Cancelling { told, then: None }
            }
            (Doing::Idle(_) | Doing::Starting { .. } | Doing::Finished { .. }, Desired::Idle) => {
                idle
            }
            (Doing::Executing { .. }, Desired::Executing(action, task)) => Doing::Cancelling {
                told: false,
                then: Some((action, task)),
            },
            (Doing::Cancelling { told, .. }, Desired::Executing(action, task)) => {
                Doing::Cancelling {
                    told,
                    then: Some((action, task)),
                }
            }
            (
                Doing::Idle(_) | Doing::Starting { .. } | Doing::Finished { .. },
                Desired::Executing(action, task),
            ) => Doing::Starting { action, task },
        };
    }

    /// The call failed, or nobody could be called. `random` spreads the slots of a farm.
    pub fn failed(&mut self, now: Instant, random: u64) {
        let Some(call) = self.call.take() else { return };
        if call.said == Said::Farewell {
            // The scheduler forgets a silent worker by itself.
            self.life = Life::Gone;
            return;
        }
        let longest = FIRST_PAUSE
            .saturating_mul(1 << self.failures.min(16))
            .min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        let spread = (longest / 2).as_nanos() as u64;
        self.not_before = now + longest / 2 + Duration::from_nanos(random % spread.max(1));
    }

    /// The call failed, since the scheduler does not take what it said. When that was a result, there
    /// is one that it may take instead; when even that has been refused, the result is given up, and
    /// the scheduler learns that nothing runs here.
    pub fn refused(&mut self, now: Instant, random: u64, smaller: impl FnOnce(R) -> R) {
        let completed = self.call.as_ref().map(|call| call.said) == Some(Said::Completed);
        self.failed(now, random);
        if completed
            && let Doing::Finished {
                result, refusals, ..
            } = &mut self.doing
        {
            *refusals += 1;
            if *refusals >= REFUSALS {
                self.doing = Doing::Idle(Readiness::Unknown {
                    not_before: self.not_before,
                });
            } else {
                *result = smaller(result.clone());
            }
        }
    }

    /// Ask for no work before `until`, such as when actions cannot be run here.
    pub fn pause(&mut self, until: Instant) {
        self.paused = self.paused.max(until);
    }

    /// The execution returned. `healthy` unless its status was a failure.
    pub fn finished(&mut self, now: Instant, result: R, healthy: bool) {
        let idle = Doing::Idle(Readiness::Unknown { not_before: now });
        let doing = std::mem::replace(&mut self.doing, Doing::Idle(Readiness::Checking));
        self.doing = match doing {
            Doing::Executing { action } => {
                // News is worth a call at once, even while the scheduler seems to be away.
                self.not_before = now;
                Doing::Finished {
                    action,
                    result,
                    healthy,
                    refusals: 0,
                }
            }
            Doing::Cancelling { then: None, .. } => idle,
            Doing::Cancelling {
                then: Some((action, task)),
                ..
            } => Doing::Starting { action, task },
            other => other,
        };
    }

    /// The readiness check returned; when it failed, the next one is after `pause`.
    pub fn readiness(&mut self, now: Instant, ready: bool, pause: Duration) {
        if let Doing::Idle(readiness) = &mut self.doing {
            *readiness = if ready {
                Readiness::Ready
            } else {
                Readiness::Unknown {
                    not_before: now + pause,
                }
            };
        }
    }

    /// Take no new work, and leave when the running action is done; at the latest at `deadline`.
    pub fn stop(&mut self, deadline: Instant) {
        if let Life::Serving = self.life {
            self.life = Life::Draining { deadline };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Steps = Vec<Step<&'static str, &'static str>>;
    const SECOND: Duration = Duration::from_secs(1);

    struct Stage {
        slot: Slot<&'static str, &'static str>,
        now: Instant,
    }

    fn action(name: &str) -> Digest {
        Digest {
            hash: name.to_owned(),
            size_bytes: 1,
        }
    }

    fn call(activity: Activity<&'static str>) -> Step<&'static str, &'static str> {
        Step::Call(Report {
            activity,
            prefer_being_idle: false,
        })
    }

    fn unwilling(activity: Activity<&'static str>) -> Step<&'static str, &'static str> {
        Step::Call(Report {
            activity,
            prefer_being_idle: true,
        })
    }

    impl Stage {
        /// A slot that has asked for work.
        fn asking() -> Stage {
            #[expect(clippy::disallowed_methods, reason = "tests are not pure")]
            let now = Instant::now();
            let mut stage = Stage {
                slot: Slot::new(now),
                now,
            };
            assert_eq!(stage.steps(), [Step::CheckReadiness]);
            stage.slot.readiness(now, true, SECOND);
            assert_eq!(stage.steps(), [call(Activity::Idle)]);
            stage
        }

        /// A slot that runs "x", and is to call again in ten seconds.
        fn executing() -> Stage {
            let mut stage = Stage::asking();
            stage.answer(Desired::Executing(action("x"), "x"), 10);
            assert_eq!(stage.steps(), [Step::Start("x")]);
            stage
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
                    Step::Wait(_) => return steps,
                    Step::Leave => {
                        steps.push(Step::Leave);
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
        let mut stage = Stage::executing();
        assert_eq!(stage.pass(9 * SECOND).steps(), []);
        let executing = || call(Activity::Executing(action("x")));
        assert_eq!(stage.pass(SECOND).steps(), [executing()]);
        stage.answer(Desired::Unchanged, 10);
        assert_eq!(stage.steps(), []);
        assert_eq!(stage.pass(10 * SECOND).steps(), [executing()]);
    }

    #[test]
    fn what_replaces_an_execution_starts_after_that_has_returned() {
        let mut stage = Stage::executing();
        stage.pass(10 * SECOND).steps();
        stage.answer(Desired::Executing(action("y"), "y"), 10);
        assert_eq!(stage.steps(), [Step::Cancel]);
        // The scheduler goes on hearing of what it asked for.
        let started = call(Activity::Started(action("y")));
        assert_eq!(stage.pass(10 * SECOND).steps(), [started]);
        stage.answer(Desired::Unchanged, 10);
        stage.slot.finished(stage.now, "cancelled", false);
        assert_eq!(stage.steps(), [Step::Start("y")]);
    }

    #[test]
    fn an_execution_that_nobody_wants_is_cancelled_and_its_result_dropped() {
        let mut stage = Stage::executing();
        stage.pass(10 * SECOND).steps();
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), [Step::Cancel]);
        assert_eq!(stage.pass(100 * SECOND).steps(), []);
        stage.slot.finished(stage.now, "cancelled", false);
        assert_eq!(stage.steps(), [Step::CheckReadiness]);
    }

    #[test]
    fn a_result_outlives_the_absence_of_its_scheduler() {
        let mut stage = Stage::executing();
        stage.pass(10 * SECOND).steps();
        stage.slot.failed(stage.now, 0);
        stage.slot.finished(stage.now, "result", true);
        let completed = || call(Activity::Completed(action("x"), "result"));
        for _ in 0..20 {
            // The longest pause is five seconds.
            assert_eq!(stage.pass(5 * SECOND).steps(), [completed()]);
            stage.slot.failed(stage.now, u64::MAX);
        }
        assert_eq!(stage.pass(5 * SECOND).steps(), [completed()]);
        stage.answer(Desired::Executing(action("y"), "y"), 10);
        assert_eq!(stage.steps(), [Step::Start("y")]);
    }

    #[test]
    fn after_a_failure_a_slot_looks_whether_it_is_well_before_it_asks_again() {
        let mut stage = Stage::executing();
        stage.slot.finished(stage.now, "failure", false);
        let completed = unwilling(Activity::Completed(action("x"), "failure"));
        assert_eq!(stage.steps(), [completed]);
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), [Step::CheckReadiness]);
        stage.slot.readiness(stage.now, false, 3 * SECOND);
        assert_eq!(stage.steps(), []);
        assert_eq!(stage.pass(3 * SECOND).steps(), [Step::CheckReadiness]);
        stage.slot.readiness(stage.now, true, SECOND);
        assert_eq!(stage.steps(), [call(Activity::Idle)]);
    }

    #[test]
    fn a_stopping_slot_finishes_reports_and_leaves() {
        let mut stage = Stage::executing();
        stage.slot.stop(stage.now + 60 * SECOND);
        assert_eq!(stage.pass(SECOND).steps(), []);
        stage.slot.finished(stage.now, "result", true);
        let completed = unwilling(Activity::Completed(action("x"), "result"));
        assert_eq!(stage.steps(), [completed]);
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), [unwilling(Activity::Idle)]);
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), [Step::Leave]);
    }

    #[test]
    fn a_stopping_slot_does_not_wait_for_a_call_that_is_held() {
        let mut stage = Stage::asking();
        stage.slot.stop(stage.now + 60 * SECOND);
        assert_eq!(stage.steps(), [Step::HangUp, unwilling(Activity::Idle)]);
        stage.slot.failed(stage.now, 0);
        assert_eq!(stage.steps(), [Step::Leave]);
    }

    #[test]
    fn an_idle_slot_that_stops_does_not_wait_long_for_a_scheduler_that_is_silent() {
        let mut stage = Stage::asking();
        stage.slot.stop(stage.now + 60 * SECOND);
        assert_eq!(stage.steps(), [Step::HangUp, unwilling(Activity::Idle)]);
        assert_eq!(stage.pass(4 * SECOND).steps(), []);
        assert_eq!(stage.pass(SECOND).steps(), [Step::HangUp, Step::Leave]);
    }

    #[test]
    fn at_the_drain_limit_a_slot_hands_back_what_it_runs() {
        let mut stage = Stage::executing();
        stage.slot.stop(stage.now + 5 * SECOND);
        assert_eq!(stage.pass(5 * SECOND).steps(), [Step::Cancel]);
        stage.slot.finished(stage.now, "cancelled", false);
        assert_eq!(stage.steps(), [unwilling(Activity::Idle)]);
        // Nobody answers.
        assert_eq!(stage.pass(SECOND).steps(), [Step::HangUp, Step::Leave]);
    }

    #[test]
    fn a_paused_slot_drops_the_call_that_asks_for_work_and_checks_before_it_asks_again() {
        let mut stage = Stage::asking();
        stage.slot.pause(stage.now + 30 * SECOND);
        assert_eq!(stage.steps(), [Step::HangUp]);
        assert_eq!(stage.pass(29 * SECOND).steps(), []);
        assert_eq!(stage.pass(SECOND).steps(), [Step::CheckReadiness]);
        stage.slot.readiness(stage.now, true, SECOND);
        assert_eq!(stage.steps(), [call(Activity::Idle)]);
    }

    #[test]
    fn a_paused_slot_finishes_what_it_runs_and_takes_nothing_with_the_answer() {
        let mut stage = Stage::executing();
        stage.slot.pause(stage.now + 30 * SECOND);
        let executing = call(Activity::Executing(action("x")));
        assert_eq!(stage.pass(10 * SECOND).steps(), [executing]);
        stage.answer(Desired::Unchanged, 10);
        stage.slot.finished(stage.now, "result", true);
        let completed = unwilling(Activity::Completed(action("x"), "result"));
        assert_eq!(stage.steps(), [completed]);
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), []);
        // It stops at once all the same.
        stage.slot.stop(stage.now + SECOND);
        assert_eq!(stage.steps(), [unwilling(Activity::Idle)]);
    }

    #[test]
    fn a_result_that_is_refused_becomes_smaller_and_is_given_up_in_the_end() {
        let mut stage = Stage::executing();
        stage.slot.finished(stage.now, "whole", true);
        let completed = |result| call(Activity::Completed(action("x"), result));
        assert_eq!(stage.steps(), [completed("whole")]);
        stage.slot.refused(stage.now, 0, |_| "smaller");
        assert_eq!(stage.pass(5 * SECOND).steps(), [completed("smaller")]);
        // A scheduler that is away refuses nothing.
        for _ in 0..10 {
            stage.slot.failed(stage.now, 0);
            assert_eq!(stage.pass(5 * SECOND).steps(), [completed("smaller")]);
        }
        stage.slot.refused(stage.now, 0, |_| "smallest");
        assert_eq!(stage.pass(5 * SECOND).steps(), [completed("smallest")]);
        stage.slot.refused(stage.now, 0, |_| unreachable!());
        assert_eq!(stage.pass(5 * SECOND).steps(), [Step::CheckReadiness]);
        stage.slot.readiness(stage.now, true, SECOND);
        assert_eq!(stage.steps(), [call(Activity::Idle)]);
    }

    #[test]
    fn a_scheduler_that_does_not_hold_calls_is_not_called_in_a_loop() {
        let mut stage = Stage::asking();
        stage.answer(Desired::Idle, 0);
        assert_eq!(stage.steps(), []);
        assert_eq!(stage.pass(SECOND).steps(), [Step::CheckReadiness]);
    }
}
