//! Which workers get no new work: those that match a drain, and those that were told to terminate.

use std::{ops::Bound, time::Instant};

use prost_types::Timestamp;

use super::{
    DrainRefusal, Effect, Queue, SizeClassQueueKey, TaskState, UnknownQueue, WorkerId,
    WorkerPattern, WorkerState,
    arena::{QueueNumber, WorkerNumber},
    schedule::AssignedFrom,
};

/// Workers that are looked at under one lock.
const LOOKED_AT_ONCE: usize = 256;

/// Where `Queue::terminate` goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextWorker(usize);

/// Workers of one size-class queue that get no new work.
#[derive(Clone, Debug, PartialEq)]
pub struct Drain {
    pub key: SizeClassQueueKey,
    pub pattern: WorkerPattern,
    /// When it was added.
    pub created: Timestamp,
}

/// A worker that was told to terminate while it executed something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecutingWorker(WorkerNumber);

impl<C, W: Clone> Queue<C, W> {
    /// Workers that match take no new work, as soon as `apply_drains` has gone through all workers; those
    /// of a queue that is not there yet, when they come. Adding one that is there changes nothing.
    pub fn add_drain(&mut self, drain: Drain) -> Result<(), DrainRefusal> {
        let limit = self.settings.limits.drains;
        let key = (drain.key, drain.pattern);
        if self.drains.contains_key(&key) {
            return Ok(());
        }
        if self.drains.len() >= limit {
            return Err(DrainRefusal::TooMany { limit });
        }
        self.drains.insert(key, drain.created);
        self.tell_drains();
        Ok(())
    }

    /// Workers that match take work again, as soon as `apply_drains` has gone through all workers. Removing
    /// one that is not there changes nothing.
    pub fn remove_drain(
        &mut self,
        key: &SizeClassQueueKey,
        pattern: &WorkerPattern,
    ) -> Result<(), UnknownQueue> {
        let queue = self.find_queue(key);
        let removed = self.drains.remove(&(key.clone(), pattern.clone()));
        if removed.is_some() {
            self.tell_drains();
            return Ok(());
        }
        queue.map(|_| ())
    }

    /// Of one size-class queue, in the order of their patterns.
    pub fn drains(&self, key: &SizeClassQueueKey) -> Result<Vec<Drain>, UnknownQueue> {
        let drains: Vec<Drain> = self.drains_of(key).collect();
        // They outlive their queue.
        match drains.is_empty() {
            true => self.find_queue(key).map(|_| drains),
            false => Ok(drains),
        }
    }

    /// The size-class queues that have drains, whether they are there now or not.
    pub fn drained_queues(&self) -> Vec<SizeClassQueueKey> {
        let mut keys: Vec<_> = self.drains.keys().map(|(key, _)| key.clone()).collect();
        keys.dedup();
        keys
    }

    pub(super) fn drains_of(&self, key: &SizeClassQueueKey) -> impl Iterator<Item = Drain> {
        let from = (key.clone(), WorkerPattern::default());
        let key = key.clone();
        self.drains
            .range(from..)
            .take_while(move |((of, _), _)| *of == key)
            .map(|((key, pattern), created)| Drain {
                key: key.clone(),
                pattern: pattern.clone(),
                created: *created,
            })
    }

    /// Workers that match take no new work for as long as they are known. Some of them are told at once:
    /// those that execute something are added to `executing`, and for the rest this is to be called again.
    pub fn terminate(
        &mut self,
        now: Instant,
        pattern: &WorkerPattern,
        from: NextWorker,
        executing: &mut Vec<ExecutingWorker>,
    ) -> Option<NextWorker> {
        let (places, next) = self.workers.piece(from.0, LOOKED_AT_ONCE);
        for number in places {
            if !pattern.matches(&self.workers[number].id) {
                continue;
            }
            let drained = self.workers[number].drained;
            self.set_willingness(now, number, drained, true);
            if self.workers[number].is_busy() {
                executing.push(ExecutingWorker(number));
            }
        }
        next.map(NextWorker)
    }

    /// Whether it has not ended yet what it executed.
    pub fn is_executing(&self, worker: ExecutingWorker) -> bool {
        let worker = self.workers.get(worker.0);
        // One that was started again is to terminate no longer.
        worker.is_some_and(|worker| worker.terminating && worker.is_busy())
    }

    /// Some workers that were told to terminate, from there on; and where to go on.
    pub fn terminating_workers(&self, from: NextWorker) -> (Vec<WorkerId>, Option<NextWorker>) {
        let (places, next) = self.workers.piece(from.0, LOOKED_AT_ONCE);
        let workers = places.into_iter().map(|number| &self.workers[number]);
        let terminating = workers.filter(|worker| worker.terminating);
        let ids = terminating.map(|worker| worker.id.clone()).collect();
        (ids, next.map(NextWorker))
    }

    pub(super) fn is_drained(&self, queue: QueueNumber, worker: &WorkerId) -> bool {
        let key = self.queues[queue].key.clone();
        self.drains_of(&key)
            .any(|drain| drain.pattern.matches(worker))
    }

    /// Has some workers of a size-class queue take work or not, by its drains as they are now. To be called
    /// again with what it returns, after each change.
    pub fn apply_drains(
        &mut self,
        now: Instant,
        key: &SizeClassQueueKey,
        after: Option<&WorkerId>,
    ) -> Option<WorkerId> {
        // A queue that is gone has no workers.
        let queue = self.find_queue(key).ok()?;
        let patterns: Vec<WorkerPattern> = self.drains_of(key).map(|drain| drain.pattern).collect();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let workers = &self.queues[queue].workers;
        let rest = workers.range::<WorkerId, _>((from, Bound::Unbounded));
        let piece: Vec<WorkerNumber> = rest
            .take(LOOKED_AT_ONCE)
            .map(|(_, number)| *number)
            .collect();
        for number in piece.iter().copied() {
            let worker = &self.workers[number];
            let drained = patterns.iter().any(|pattern| pattern.matches(&worker.id));
            if drained != worker.drained {
                let terminating = worker.terminating;
                self.set_willingness(now, number, drained, terminating);
            }
        }
        let last = piece.last().filter(|_| piece.len() == LOOKED_AT_ONCE);
        last.map(|number| self.workers[*number].id.clone())
    }

    /// A worker that waits takes work at once when it may again.
    fn set_willingness(
        &mut self,
        now: Instant,
        number: WorkerNumber,
        drained: bool,
        terminating: bool,
    ) {
        let worker = &mut self.workers[number];
        let before = worker.takes_work();
        let told = terminating && !worker.terminating;
        (worker.drained, worker.terminating) = (drained, terminating);
        let after = worker.takes_work();
        if told {
            let queue = worker.queue;
            self.count_worker_terminating(queue);
        }
        let worker = &self.workers[number];
        let WorkerState::IdleSynchronizing { number: call, .. } = worker.state else {
            return;
        };
        match (before, after) {
            (true, false) => self.invocations.remove_idle(worker.last, call),
            (false, true) => {
                self.invocations.insert_idle(worker.last, call, number);
                if let Some(task) = self.pick(now, number)
                    && let Some((held, call)) = self.take_call(now, number)
                {
                    debug_assert!(matches!(self.tasks[task].state, TaskState::Queued));
                    let instruction =
                        self.assign(now, task, number, Some(held), AssignedFrom::Tree);
                    self.effects.push(Effect::Answer { call, instruction });
                }
            }
            _ => {}
        }
    }

    fn tell_drains(&mut self) {
        self.drains_version += 1;
        let drains = self.drains.iter().map(|((key, pattern), created)| Drain {
            key: key.clone(),
            pattern: pattern.clone(),
            created: *created,
        });
        self.effects.push(Effect::KeepDrains {
            version: self.drains_version,
            drains: drains.collect(),
        });
    }
}
