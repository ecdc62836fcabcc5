//! Which workers get no new work: those that match a drain, and those that were told to terminate.

use std::time::Instant;

use prost_types::Timestamp;

use super::{
    DrainRefusal, Effect, Queue, SizeClassQueueKey, UnknownQueue, WorkerPattern, WorkerState,
};

/// Workers of one size-class queue that get no new work.
#[derive(Clone, Debug, PartialEq)]
pub struct Drain {
    pub key: SizeClassQueueKey,
    pub pattern: WorkerPattern,
    /// When it was added.
    pub created: Timestamp,
}

/// Something that ends when the operation that is told by `watch` has a higher version.
#[derive(Clone, Debug)]
pub struct ExecutingWorker<W> {
    pub watch: W,
    pub version: u64,
}

impl<C, W: Clone> Queue<C, W> {
    /// Workers that match take no new work from now on. Adding one that is there changes nothing.
    pub fn add_drain(&mut self, _now: Instant, drain: Drain) -> Result<(), DrainRefusal> {
        if !self.queues.values().any(|queue| *queue.key == drain.key) {
            return Err(UnknownQueue.into());
        }
        let limit = self.settings.limits.drains;
        let key = (drain.key.clone(), drain.pattern.clone());
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

    /// Workers that match take work again. Removing one that is not there changes nothing.
    pub fn remove_drain(
        &mut self,
        _now: Instant,
        key: &SizeClassQueueKey,
        pattern: &WorkerPattern,
    ) -> Result<(), UnknownQueue> {
        let removed = self.drains.remove(&(key.clone(), pattern.clone()));
        if removed.is_none() && !self.queues.values().any(|queue| *queue.key == *key) {
            return Err(UnknownQueue);
        }
        if removed.is_some() {
            self.tell_drains();
        }
        Ok(())
    }

    /// Of one size-class queue, in the order of their patterns' JSON.
    pub fn drains(&self, key: &SizeClassQueueKey) -> Result<Vec<Drain>, UnknownQueue> {
        if !self.queues.values().any(|queue| *queue.key == *key) {
            return Err(UnknownQueue);
        }
        Ok(self
            .all_drains()
            .filter(|drain| drain.key == *key)
            .collect())
    }

    /// Workers that match take no new work for as long as they are known. Returns what they execute
    /// now.
    pub fn terminate(
        &mut self,
        _now: Instant,
        _pattern: &WorkerPattern,
    ) -> Vec<ExecutingWorker<W>> {
        let executing = self
            .workers
            .values()
            .filter_map(|worker| match worker.state {
                WorkerState::Executing { task, .. } => self.tasks.get(&task),
                _ => None,
            });
        executing
            .map(|task| ExecutingWorker {
                watch: task.watch.clone(),
                version: task.version,
            })
            .collect()
    }

    fn all_drains(&self) -> impl Iterator<Item = Drain> {
        self.drains.iter().map(|((key, pattern), created)| Drain {
            key: key.clone(),
            pattern: pattern.clone(),
            created: *created,
        })
    }

    fn tell_drains(&mut self) {
        self.drains_version += 1;
        self.effects.push(Effect::KeepDrains {
            version: self.drains_version,
            drains: self.all_drains().collect(),
        });
    }
}
