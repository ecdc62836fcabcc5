//! What waits for longest in each size-class queue, for those who watch the farm.

use std::collections::{BTreeMap, BTreeSet};

use prost_types::Timestamp;

use super::{
    Queue, SizeClassQueueKey,
    arena::{OperationNumber, QueueNumber},
};

/// Queued operations, oldest first, by the arrival of their tasks.
#[derive(Default)]
pub(super) struct QueuedByAge(BTreeMap<QueueNumber, BTreeSet<(u64, OperationNumber)>>);

impl<C, W: Clone> Queue<C, W> {
    pub(super) fn note_queued(&mut self, number: OperationNumber, is_queued: bool) {
        let task = &self.tasks[self.operations[number].task];
        let entry = (task.arrival, number);
        let of_queue = self.queued_by_age.0.entry(task.queue).or_default();
        match is_queued {
            true => {
                of_queue.insert(entry);
            }
            false => {
                let was_there = of_queue.remove(&entry);
                debug_assert!(was_there, "what is queued is in no order of age");
                if of_queue.is_empty() {
                    self.queued_by_age.0.remove(&task.queue);
                }
            }
        }
    }

    /// When that was queued which waits for longest; `None` when nothing waits.
    pub fn oldest_queued(&self, key: &SizeClassQueueKey) -> Option<Timestamp> {
        let number = self.find_queue(key).ok()?;
        let (_, operation) = self.queued_by_age.0.get(&number)?.first()?;
        let task = &self.tasks[self.operations[*operation].task];
        Some(task.action.queued_timestamp)
    }
}
