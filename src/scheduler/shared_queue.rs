//! The queue as all calls share it: lock, decide, unlock, tell.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};
use uuid::Uuid;

use super::queue::{
    AttachedWaiter, Caller, Clock, Effect, HeldCall, Instruction, NoWorkers, Progress, Queue,
    Refusal, Request, Settings, SizeClassQueueKey, Stage, SynchronizeAnswer, TICK, WorkerReport,
};
type Held = oneshot::Sender<Instruction>;
type Watch = watch::Sender<Progress>;

pub(super) struct SharedQueue {
    state: Mutex<QueueAndClock>,
    /// The next deadline is sooner than the one slept for.
    sooner: Notify,
}

struct QueueAndClock {
    queue: Queue<Held, Watch>,
    clock: Clock,
    /// What `run_timers` sleeps for.
    alarm: Option<Instant>,
}

/// A stream's place among the waiters of an operation; leaves it when dropped.
pub(super) struct Waiter {
    shared: Arc<SharedQueue>,
    pub attached: AttachedWaiter<Watch>,
    pub news: watch::Receiver<Progress>,
}

/// A worker's call that is held; the queue forgets it when this is dropped before it is answered.
struct HeldCallGuard<'a> {
    shared: &'a SharedQueue,
    held: Option<HeldCall>,
}

impl SharedQueue {
    pub(super) fn new(settings: Settings) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(SharedQueue {
            state: Mutex::new(QueueAndClock {
                queue: Queue::new(settings, now),
                clock: Clock::new(now),
                alarm: None,
            }),
            sooner: Notify::new(),
        })
    }

    fn decide<T>(&self, verb: impl FnOnce(&mut Queue<Held, Watch>, Instant) -> T) -> T {
        let (result, effects, sooner, pause) = {
            let mut state = self.state.lock();
            // Read under the lock: what is decided later is not earlier.
            let (now, pause) = state.clock.look(Instant::now());
            let result = verb(&mut state.queue, now);
            let next = state.next_deadline();
            let sooner = match (next, state.alarm) {
                (Some(next), Some(alarm)) => next < alarm,
                (Some(_), None) => true,
                (None, _) => false,
            };
            if sooner {
                state.alarm = next;
            }
            (result, state.queue.effects(), sooner, pause)
        };
        if let Some(pause) = pause {
            tracing::warn!(
                seconds = pause.as_secs(),
                "this process stood still; deadlines of workers and clients are put off by as much"
            );
        }
        for effect in effects {
            match effect {
                // A call that is gone hangs up by itself.
                Effect::Answer { call, instruction } => drop(call.send(instruction)),
                // Two threads may tell in another order than they decided.
                Effect::Tell { watch, progress } => {
                    watch.send_if_modified(|current| {
                        let newer = progress.version > current.version;
                        if newer {
                            *current = progress;
                        }
                        newer
                    });
                }
            }
        }
        if sooner {
            self.sooner.notify_one();
        }
        result
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Queue<Held, Watch>) -> T) -> T {
        look(&self.state.lock().queue)
    }

    /// What became of all that came, for the log.
    pub(super) fn log_totals(&self) {
        let (totals, counts) = self.look(|queue| (queue.totals(), queue.counts()));
        tracing::info!(
            operations = totals.operations,
            actions = totals.tasks,
            completed = totals.completed,
            queued = counts.queued,
            "what was executed since the start"
        );
    }

    /// Returns as soon as nobody decides.
    pub(super) fn wait_for_lock(&self) {
        drop(self.state.lock());
    }

    /// Lets deadlines pass; never returns.
    pub(super) async fn run_timers(&self) {
        loop {
            let alarm = {
                let mut state = self.state.lock();
                let tick = Instant::now() + TICK;
                let alarm = state.next_deadline().map_or(tick, |next| next.min(tick));
                state.alarm = Some(alarm);
                alarm
            };
            tokio::select! {
                () = tokio::time::sleep_until(alarm.into()) => {}
                () = self.sooner.notified() => {}
            }
            self.decide(Queue::expire);
        }
    }

    pub(super) fn execute(self: &Arc<Self>, request: Request) -> Result<Waiter, NoWorkers> {
        let name = Uuid::new_v4();
        let (watch, _) = watch::channel(Progress {
            version: 0,
            stage: Stage::Queued,
        });
        let attached = self.decide(|queue, now| queue.execute(now, name, request, watch))?;
        Ok(self.waiter(attached))
    }

    /// `None` when there is no such operation.
    pub(super) fn wait(self: &Arc<Self>, operation: Uuid) -> Option<Waiter> {
        let attached = self.decide(|queue, _| queue.wait(operation))?;
        Some(self.waiter(attached))
    }

    fn waiter(self: &Arc<Self>, attached: AttachedWaiter<Watch>) -> Waiter {
        Waiter {
            shared: self.clone(),
            news: attached.watch.subscribe(),
            attached,
        }
    }

    /// One call of a worker, until it has an answer. `None` when `idle_wait` was cut short because
    /// the scheduler stops.
    pub(super) async fn synchronize(
        &self,
        key: &SizeClassQueueKey,
        caller: &Caller,
        report: WorkerReport,
        idle_wait: Duration,
        stopping: impl Future<Output = ()>,
    ) -> Result<Option<Instruction>, Refusal> {
        let (call, answer) = oneshot::channel();
        let decided =
            self.decide(|queue, now| queue.synchronize(now, key, caller, report, call, idle_wait))?;
        let mut guard = match decided {
            SynchronizeAnswer::Now(instruction) => return Ok(Some(instruction)),
            SynchronizeAnswer::Held(held) => HeldCallGuard {
                shared: self,
                held: Some(held),
            },
        };
        tokio::select! {
            biased;
            Ok(instruction) = answer => {
                guard.held = None;
                Ok(Some(instruction))
            }
            () = stopping => Ok(None),
        }
    }
}

impl QueueAndClock {
    fn next_deadline(&self) -> Option<Instant> {
        let next = self.queue.poll_timeout()?;
        Some(self.clock.real(next))
    }
}

impl Waiter {
    /// The newest that there is.
    pub(super) fn progress(&self) -> Progress {
        let news = self.news.borrow();
        match news.version > self.attached.progress.version {
            true => news.clone(),
            // Decided, but not told yet.
            false => self.attached.progress.clone(),
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let operation = self.attached.operation;
        self.shared
            .decide(|queue, now| queue.detach(now, operation));
    }
}

impl Drop for HeldCallGuard<'_> {
    fn drop(&mut self) {
        if let Some(held) = self.held {
            self.shared.decide(|queue, now| queue.drop_call(now, held));
        }
    }
}
