//! One slot's side of the worker protocol, PURE: what to say to the scheduler, when, and what to do
//! about its answers.
//!
//! 1. At most one execution is under way, and of at most one call the answer is waited for: one that
//!    reports an execution may be held by the scheduler, and is left when there is a result.
//! 2. A result is kept until a scheduler has answered the call that carried it.
//! 3. Nothing is started before the execution before it has returned.
//! 4. An idle slot asks for work only after a readiness check that passed.
//! 5. A paused slot asks for nothing, drops the call that asked already, and takes nothing new with
//!    the answer to a result.
//! 6. A result that schedulers refuse `MAXIMUM_REFUSALS` times is given up.
//! 7. A slot that leaves has handed in its result, or said that it runs nothing; unless the
//!    scheduler cannot be reached until the drain limit.
//!
//! `T` is a task, `R` a result. The shell calls `next` until it says `Wait`, then tells the next
//! event.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

use crate::proto::reapi::Digest;

/// After a first failed call; doubles up to `MAXIMUM_BACKOFF`.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);
const MAXIMUM_BACKOFF: Duration = Duration::from_secs(5);
/// Of one that has something to report: a scheduler that was started again waits for it, see
/// `scheduling.worker_report_timeout`.
const MAXIMUM_BACKOFF_OF_BUSY: Duration = Duration::from_secs(1);
/// Between two calls of an idle slot whose scheduler does not hold its calls.
const MINIMUM_IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// Of one result, after which it is given up.
const MAXIMUM_REFUSALS: u32 = 3;
/// How long a call may take that is in flight, or still due, at the drain limit.
const FINAL_CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an idle slot that stops waits for a scheduler to take note. One that is stopped at the
/// same time may never answer.
const LEAVING_CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Before the second call of a slot that leaves; doubles. Buildbarn's scheduler refuses the first one until it has
/// noticed that the call before is dropped.
const LEAVING_RETRY_DELAY: Duration = Duration::from_millis(25);
/// Of those calls: 1.6 s in all.
const MAXIMUM_LEAVING_RETRIES: u32 = 6;

pub struct Slot<T, R> {
    state: SlotState<T, R>,
    call: Option<PendingCall>,
    /// Calls that failed since the last answer.
    failures: u32,
    /// No call before this, except for news.
    not_before: Instant,
    /// No work is asked for before this.
    paused: Instant,
    /// When the scheduler wants to hear of an execution again.
    due: Instant,
    drain: DrainState,
    /// Calls of a slot that leaves that were refused, and when the next one is.
    leaving_retries: u32,
    leave_at: Instant,
}

enum SlotState<T, R> {
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

struct PendingCall {
    began: Instant,
    kind: ReportKind,
    prefer_being_idle: bool,
}

/// What the call in flight tells.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReportKind {
    Idle,
    Leaving,
    Executing,
    Completed,
}

#[derive(Clone, Copy)]
enum DrainState {
    Serving,
    /// Finishes what it runs, until then.
    Draining {
        deadline: Instant,
    },
    Left,
}

/// What the shell is to do now.
#[derive(Debug, PartialEq)]
pub enum SlotStep<T, R> {
    /// Call the scheduler; then tell `answered` or `failed`.
    Call(SlotReport<R>),
    /// Drop the call that is in flight.
    AbortCall,
    /// Let the call that is in flight go on, but ignore its answer.
    LeaveCall,
    /// Start this; then tell `finished`.
    Start(T),
    /// Cancel the execution; it still tells `finished`.
    Cancel,
    /// Check whether an action could run; then tell `readiness`.
    CheckReadiness,
    /// Nothing, until an event or this time.
    Wait(Option<Instant>),
    /// Never call again.
    Exit,
}

#[derive(Debug, PartialEq)]
pub struct SlotReport<R> {
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
            state: SlotState::Idle(Readiness::Unknown { not_before: now }),
            call: None,
            failures: 0,
            not_before: now,
            paused: now,
            due: now,
            drain: DrainState::Serving,
            leaving_retries: 0,
            leave_at: now,
        }
    }

    /// What to do now. To be called after every event, until it says `Wait` or `Exit`.
    pub fn next(&mut self, now: Instant) -> SlotStep<T, R> {
        let deadline = match self.drain {
            DrainState::Serving => None,
            DrainState::Draining { deadline } => Some(deadline),
            DrainState::Left => return SlotStep::Exit,
        };
        let draining = deadline.is_some();
        let overdue = deadline.is_some_and(|deadline| deadline <= now);
        let paused = now < self.paused;
        if paused
            && !draining
            && let SlotState::Idle(readiness) = &mut self.state
        {
            *readiness = Readiness::Unknown {
                not_before: self.paused,
            };
            // It may have been answered with work already, which the scheduler hands out again when
            // it hears that nothing runs here.
            if self
                .call
                .take_if(|call| call.kind == ReportKind::Idle)
                .is_some()
            {
                return SlotStep::AbortCall;
            }
        }
        match &mut self.state {
            SlotState::Cancelling { told, .. } if !*told => {
                *told = true;
                return SlotStep::Cancel;
            }
            // Hands it back: the scheduler hears that nothing runs here any more.
            SlotState::Executing { .. } if overdue => {
                self.state = SlotState::Cancelling {
                    told: true,
                    then: None,
                };
                return SlotStep::Cancel;
            }
            SlotState::Starting { .. } => return self.start(),
            _ => {}
        }
        if matches!(self.state, SlotState::Finished { .. })
            && self
                .call
                .take_if(|call| call.kind == ReportKind::Executing)
                .is_some()
        {
            return SlotStep::LeaveCall;
        }
        if self.call.is_some() {
            return self.await_answer(now, deadline);
        }
        let (at, kind, activity) = match self.next_report(now, draining, overdue) {
            Ok(report) => report,
            Err(step) => return step,
        };
        if at > now {
            return SlotStep::Wait(Some(match deadline {
                Some(deadline) if deadline > now => at.min(deadline),
                _ => at,
            }));
        }
        let unwell = matches!(self.state, SlotState::Finished { healthy: false, .. });
        let has_paused = paused && kind == ReportKind::Completed;
        let prefer_being_idle = draining || unwell || has_paused;
        self.call = Some(PendingCall {
            began: now,
            kind,
            prefer_being_idle,
        });
        SlotStep::Call(SlotReport {
            activity,
            prefer_being_idle,
        })
    }

    /// A call is under way: whether it is waited for any longer.
    fn await_answer(&mut self, now: Instant, deadline: Option<Instant>) -> SlotStep<T, R> {
        let Some(call) = &self.call else {
            return SlotStep::Wait(None);
        };
        // The scheduler holds calls that ask for work; a slot that leaves must not wait for it.
        let held =
            deadline.is_some() && !call.prefer_being_idle && call.kind != ReportKind::Executing;
        let limit = deadline.map(|deadline| match call.kind {
            ReportKind::Leaving => (call.began + LEAVING_CALL_TIMEOUT)
                .min(deadline.max(call.began + FINAL_CALL_TIMEOUT)),
            _ => deadline.max(call.began + FINAL_CALL_TIMEOUT),
        });
        if held || limit.is_some_and(|limit| limit <= now) {
            if call.kind == ReportKind::Leaving {
                self.drain = DrainState::Left;
            }
            self.call = None;
            return SlotStep::AbortCall;
        }
        // An execution is cancelled at the deadline, whatever the call does.
        SlotStep::Wait(match self.state {
            SlotState::Executing { .. } => deadline,
            _ => limit,
        })
    }

    /// What is to be reported, and when at the earliest; or what is to be done instead.
    fn next_report(
        &mut self,
        now: Instant,
        draining: bool,
        overdue: bool,
    ) -> Result<(Instant, ReportKind, Activity<R>), SlotStep<T, R>> {
        Ok(match &mut self.state {
            SlotState::Idle(_) if draining => (self.leave_at, ReportKind::Leaving, Activity::Idle),
            SlotState::Idle(readiness) => match readiness {
                Readiness::Unknown { not_before } if *not_before <= now => {
                    *readiness = Readiness::Checking;
                    return Err(SlotStep::CheckReadiness);
                }
                Readiness::Unknown { not_before } => return Err(SlotStep::Wait(Some(*not_before))),
                Readiness::Checking => return Err(SlotStep::Wait(None)),
                Readiness::Ready => (self.not_before, ReportKind::Idle, Activity::Idle),
            },
            SlotState::Executing { action } => (
                self.due.max(self.not_before),
                ReportKind::Executing,
                Activity::Executing(action.clone()),
            ),
            SlotState::Finished { .. } if overdue => {
                self.drain = DrainState::Left;
                return Err(SlotStep::Exit);
            }
            SlotState::Finished { action, result, .. } => (
                self.not_before,
                ReportKind::Completed,
                Activity::Completed(action.clone(), result.clone()),
            ),
            SlotState::Cancelling {
                then: Some((action, _)),
                ..
            } => (
                self.due.max(self.not_before),
                ReportKind::Executing,
                Activity::Started(action.clone()),
            ),
            SlotState::Cancelling { then: None, .. } | SlotState::Starting { .. } => {
                return Err(SlotStep::Wait(None));
            }
        })
    }

    fn start(&mut self) -> SlotStep<T, R> {
        let idle = SlotState::Idle(Readiness::Checking);
        match std::mem::replace(&mut self.state, idle) {
            SlotState::Starting { action, task } => {
                self.state = SlotState::Executing { action };
                SlotStep::Start(task)
            }
            other => {
                self.state = other;
                SlotStep::Wait(None)
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
        if call.kind == ReportKind::Leaving && !executes {
            self.drain = DrainState::Left;
            return;
        }
        if call.kind == ReportKind::Idle && !executes {
            self.not_before = self.due.max(call.began + MINIMUM_IDLE_INTERVAL);
        }
        let idle = SlotState::Idle(Readiness::Unknown {
            not_before: self.not_before,
        });
        let state = std::mem::replace(&mut self.state, SlotState::Idle(Readiness::Checking));
        self.state = match (state, answer.desired) {
            // The answer takes the result, whatever else it says.
            (SlotState::Finished { .. }, Desired::Unchanged)
                if call.kind == ReportKind::Completed =>
            {
                idle
            }
            (state, Desired::Unchanged) => state,
            (SlotState::Executing { .. }, Desired::Idle) => SlotState::Cancelling {
                told: false,
                then: None,
            },
            (SlotState::Cancelling { told, .. }, Desired::Idle) => {
                SlotState::Cancelling { told, then: None }
            }
            (
                SlotState::Idle(_) | SlotState::Starting { .. } | SlotState::Finished { .. },
                Desired::Idle,
            ) => idle,
            (SlotState::Executing { .. }, Desired::Executing(action, task)) => {
                SlotState::Cancelling {
                    told: false,
                    then: Some((action, task)),
                }
            }
            (SlotState::Cancelling { told, .. }, Desired::Executing(action, task)) => {
                SlotState::Cancelling {
                    told,
                    then: Some((action, task)),
                }
            }
            (
                SlotState::Idle(_) | SlotState::Starting { .. } | SlotState::Finished { .. },
                Desired::Executing(action, task),
            ) => SlotState::Starting { action, task },
        };
    }

    /// The call failed, or nobody could be called. `random` spreads the slots of a farm.
    pub fn failed(&mut self, now: Instant, random: u64) {
        let Some(call) = self.call.take() else { return };
        if call.kind == ReportKind::Leaving {
            // The scheduler forgets a silent worker by itself.
            self.drain = DrainState::Left;
            return;
        }
        let most = match &self.state {
            SlotState::Executing { .. } | SlotState::Finished { .. } => MAXIMUM_BACKOFF_OF_BUSY,
            _ => MAXIMUM_BACKOFF,
        };
        let longest = INITIAL_BACKOFF
            .saturating_mul(1 << self.failures.min(16))
            .min(most);
        self.failures = self.failures.saturating_add(1);
        let spread = (longest / 2).as_nanos() as u64;
        self.not_before = now + longest / 2 + Duration::from_nanos(random % spread.max(1));
    }

    /// The scheduler still has the call before that this slot has dropped. Whether a call that was to say that the slot
    /// leaves is made again; others fail.
    pub fn already_synchronizing(&mut self, now: Instant) -> bool {
        let retries = self.leaving_retries;
        let is_leaving = |call: &mut PendingCall| call.kind == ReportKind::Leaving;
        if retries >= MAXIMUM_LEAVING_RETRIES || self.call.take_if(is_leaving).is_none() {
            return false;
        }
        self.leave_at = now + LEAVING_RETRY_DELAY * (1 << retries);
        self.leaving_retries += 1;
        true
    }

    /// The call failed, since the scheduler does not take what it said. When that was a result, there
    /// is one that it may take instead; when even that has been refused, the result is given up, and
    /// the scheduler learns that nothing runs here.
    pub fn refused(&mut self, now: Instant, random: u64, smaller: impl FnOnce(R) -> R) {
        let completed = self.call.as_ref().map(|call| call.kind) == Some(ReportKind::Completed);
        self.failed(now, random);
        if completed
            && let SlotState::Finished {
                result, refusals, ..
            } = &mut self.state
        {
            *refusals += 1;
            if *refusals >= MAXIMUM_REFUSALS {
                self.state = SlotState::Idle(Readiness::Unknown {
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
        let idle = SlotState::Idle(Readiness::Unknown { not_before: now });
        let state = std::mem::replace(&mut self.state, SlotState::Idle(Readiness::Checking));
        self.state = match state {
            SlotState::Executing { action } => {
                // News is worth a call at once, even while the scheduler seems to be away.
                self.not_before = now;
                SlotState::Finished {
                    action,
                    result,
                    healthy,
                    refusals: 0,
                }
            }
            SlotState::Cancelling { then: None, .. } => idle,
            SlotState::Cancelling {
                then: Some((action, task)),
                ..
            } => SlotState::Starting { action, task },
            other => other,
        };
    }

    /// The readiness check returned; when it failed, the next one is after `pause`.
    pub fn readiness(&mut self, now: Instant, ready: bool, pause: Duration) {
        if let SlotState::Idle(readiness) = &mut self.state {
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
        if let DrainState::Serving = self.drain {
            self.drain = DrainState::Draining { deadline };
        }
    }
}

#[cfg(test)]
mod tests;
