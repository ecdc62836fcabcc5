//! The queue as all calls share it: lock, decide, unlock, tell. What operators ask for is in `operators`.

mod operators;

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::queue::{
    AttachedWaiter, Clock, Drain, Effect, ExecuteRefusal, HeldCall, Instruction, Platform,
    Progress, Queue, Refusal, Request, Settings, SizeClassQueueKey, Stage, SynchronizeAnswer, TICK,
    UnknownOperation, WorkerCaller, WorkerReport,
};
use super::{completion_log::log_completion, statistics_store::StatisticsStore};
use crate::{
    daemon::{CallConnection, message_id},
    instance::InstanceName,
};

/// Operations that are looked at under one lock.
pub(super) const OPERATIONS_PER_LOCK: usize = 256;

type Held = oneshot::Sender<Instruction>;
type Watch = watch::Sender<Progress>;

pub(super) struct SharedQueue {
    state: Mutex<QueueAndClock>,
    /// The next deadline is sooner than the one slept for.
    sooner: Notify,
    /// How often a verb found something that cannot be.
    broken_invariants: AtomicU64,
    /// So many platform queues there have been: workers of another platform have come.
    platform_queues: watch::Sender<u64>,
    /// Those to keep for the next scheduler, with their version.
    drains: watch::Sender<(u64, Vec<Drain>)>,
    /// Not kept from being closed by calls that outlive the scheduler.
    statistics: Weak<StatisticsStore>,
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
    stream: Option<WaitingStream>,
}

/// The stream of a waiter.
struct WaitingStream {
    connection: CallConnection,
    /// A client that ends its stream and keeps its connection wants no result (Ctrl-C), unless it waits again
    /// within this time, as those do whose call has reached its deadline.
    ended_call_timeout: Duration,
    /// Streams are ended by the scheduler when it stops.
    stopping: CancellationToken,
}

impl WaitingStream {
    /// Nobody but the client can have ended it, if it has ended.
    fn is_client_there(&self) -> bool {
        self.connection.is_open() && !self.stopping.is_cancelled()
    }
}

/// A worker's call that is held; the queue forgets it when this is dropped before it is answered.
struct HeldCallGuard<'a> {
    shared: &'a SharedQueue,
    held: Option<HeldCall>,
}

impl SharedQueue {
    pub(super) fn new(mut settings: Settings, statistics: &Arc<StatisticsStore>) -> Arc<Self> {
        let now = Instant::now();
        settings.first_attempt = fastrand::u64(..);
        Arc::new(SharedQueue {
            state: Mutex::new(QueueAndClock {
                queue: Queue::new(settings, now),
                clock: Clock::new(now),
                alarm: None,
            }),
            sooner: Notify::new(),
            broken_invariants: AtomicU64::new(0),
            platform_queues: watch::Sender::new(0),
            drains: watch::Sender::new((0, Vec::new())),
            statistics: Arc::downgrade(statistics),
        })
    }

    fn decide<T>(&self, verb: impl FnOnce(&mut Queue<Held, Watch>, Instant) -> T) -> T {
        self.try_decide(verb)
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A verb that panics has found an invariant broken. That is told, and what it had decided is done;
    /// whoever called fails, and all others go on.
    fn try_decide<T>(
        &self,
        verb: impl FnOnce(&mut Queue<Held, Watch>, Instant) -> T,
    ) -> std::thread::Result<T> {
        let (result, effects, sooner, pause) = {
            let mut state = self.state.lock();
            // Read under the lock: what is decided later is not earlier.
            let (now, pause) = state.clock.look(Instant::now());
            let verb = AssertUnwindSafe(|| verb(&mut state.queue, now));
            let result = std::panic::catch_unwind(verb);
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
        if let Err(panic) = &result {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let broken = self.broken_invariants.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::error!(
                message_id = message_id::BROKEN_INVARIANT,
                error = text.unwrap_or_default(),
                broken,
                "an invariant of the queue is broken; please report this"
            );
        }
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
                Effect::Learned(update) => {
                    if let Some(statistics) = self.statistics.upgrade() {
                        statistics.apply(update);
                    }
                }
                Effect::Abandoned {
                    operation,
                    action,
                    outcome,
                } => log_completion(operation, &action, &outcome, None),
                Effect::KeepDrains { version, drains } => {
                    self.drains.send_if_modified(|current| {
                        let newer = version > current.0;
                        if newer {
                            *current = (version, drains);
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

    #[cfg(test)]
    pub(super) fn count_worker_in_each_queue(&self) {
        self.state.lock().queue.count_worker_in_each_queue();
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
            // What failed was told; other deadlines pass all the same.
            let _ = self.try_decide(Queue::expire);
        }
    }

    pub(super) fn execute(self: &Arc<Self>, request: Request) -> Result<Waiter, ExecuteRefusal> {
        let (watch, _) = watch::channel(Progress {
            version: 0,
            stage: Stage::Queued,
        });
        let attached = self.decide(|queue, now| {
            // Somebody else may have taken it up meanwhile.
            let known = request.resumes.then(|| queue.wait(request.name)).flatten();
            known.map_or_else(|| queue.execute(now, request, watch), Ok)
        })?;
        Ok(self.waiter(attached))
    }

    /// As `execute`, on the first of these platforms that has a queue, which may get its first workers
    /// until then.
    pub(super) async fn execute_with_first_workers(
        self: &Arc<Self>,
        platforms: &[Platform],
        request: &mut Request,
        until: Instant,
    ) -> Result<Waiter, ExecuteRefusal> {
        loop {
            let mut platform_queues = self.platform_queues.subscribe();
            let best = self.first_served(platforms, &request.action.instance);
            request.platform = best.unwrap_or_default();
            let refusal = match self.execute(request.clone()) {
                Err(refusal @ ExecuteRefusal::NoWorkers(_)) => refusal,
                decided => return decided,
            };
            let news = tokio::time::timeout_at(until.into(), platform_queues.changed());
            if !matches!(news.await, Ok(Ok(()))) {
                return Err(refusal);
            }
        }
    }

    /// The first of these platforms that has a queue, or else the first one.
    fn first_served(&self, platforms: &[Platform], instance: &InstanceName) -> Option<Platform> {
        let first = platforms.first()?;
        if platforms.len() == 1 {
            return Some(first.clone());
        }
        let served = self.look(|queue| {
            let mut served = platforms.iter();
            served.find(|platform| queue.serves(platform, instance))
        });
        Some(served.unwrap_or(first).clone())
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
            stream: None,
        }
    }

    /// One call of a worker, until it has an answer. `None` when `idle_wait` was cut short because
    /// the scheduler stops.
    pub(super) async fn synchronize(
        &self,
        key: &SizeClassQueueKey,
        caller: &WorkerCaller,
        report: WorkerReport,
        idle_wait: Duration,
        stopping: impl Future<Output = ()>,
    ) -> Result<Option<Instruction>, Refusal> {
        let (call, answer) = oneshot::channel();
        let (decided, platform_queues) = self.decide(|queue, now| {
            let decided = queue.synchronize(now, key, caller, report, call, idle_wait);
            (decided, queue.platform_queues_made())
        });
        self.platform_queues.send_if_modified(|known| {
            let more = platform_queues > *known;
            *known = platform_queues.max(*known);
            more
        });
        let decided = decided?;
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
    /// With the queue's time, which deadlines are in.
    pub(super) fn look_now<T>(&self, look: impl FnOnce(&Queue<Held, Watch>, Instant) -> T) -> T {
        let mut state = self.state.lock();
        let (now, _) = state.clock.look(Instant::now());
        look(&state.queue, now)
    }

    /// `Queue::cancel_unknown`.
    pub(super) fn cancel_unknown(
        &self,
        platforms: &[Platform],
        mut request: Request,
    ) -> Result<(), ExecuteRefusal> {
        let best = self.first_served(platforms, &request.action.instance);
        request.platform = best.unwrap_or_default();
        let (watch, _) = watch::channel(Progress {
            version: 0,
            stage: Stage::Queued,
        });
        self.decide(|queue, now| queue.cancel_unknown(now, request, watch))
    }

    pub(super) fn cancel(&self, operation: Uuid) -> Result<(), UnknownOperation> {
        self.decide(|queue, now| queue.cancel(now, operation))
    }
}

impl QueueAndClock {
    fn next_deadline(&self) -> Option<Instant> {
        let next = self.queue.poll_timeout()?;
        Some(self.clock.real(next))
    }
}

impl Waiter {
    /// It waits for the client that called by this connection.
    pub(super) fn waits_for(
        &mut self,
        connection: CallConnection,
        ended_call_timeout: Duration,
        stopping: &CancellationToken,
    ) {
        self.stream = Some(WaitingStream {
            connection,
            ended_call_timeout,
            stopping: stopping.clone(),
        });
    }

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
        // It may be dropped because of a panic, which is told.
        let _ = self
            .shared
            .try_decide(|queue, now| queue.detach(now, operation));
        let is_completed = matches!(self.progress().stage, Stage::Completed(_));
        if let Some(stream) = self.stream.take()
            && !is_completed
            && stream.is_client_there()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let shared = self.shared.clone();
            runtime.spawn(async move {
                tokio::time::sleep(stream.ended_call_timeout).await;
                if stream.is_client_there() {
                    let _ = shared.try_decide(|queue, now| queue.give_up(now, operation));
                }
            });
        }
    }
}

impl Drop for HeldCallGuard<'_> {
    fn drop(&mut self) {
        if let Some(held) = self.held {
            let _ = self
                .shared
                .try_decide(|queue, now| queue.drop_call(now, held));
        }
    }
}
