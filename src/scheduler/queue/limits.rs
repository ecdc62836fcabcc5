//! How much may be queued: in all, for each instance name, and for each outermost invocation key.

use std::{collections::BTreeMap, time::Duration};

use super::{InvocationKey, Queue, QueueFull, Request, arena::OperationNumber};
use crate::instance::InstanceName;

/// When a client whose operation is refused is to try again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Queued operations.
#[derive(Default)]
pub(super) struct QueuedCounts {
    pub all: usize,
    pub by_instance_name: BTreeMap<InstanceName, usize>,
    pub by_invocation: BTreeMap<InvocationKey, usize>,
}

fn add<K: Ord + Clone>(counts: &mut BTreeMap<K, usize>, key: &K, more: bool) {
    match (counts.get_mut(key), more) {
        (Some(count), true) => *count += 1,
        (Some(count), false) if *count > 1 => *count -= 1,
        (Some(_), false) => drop(counts.remove(key)),
        (None, true) => drop(counts.insert(key.clone(), 1)),
        (None, false) => debug_assert!(false, "what is queued is miscounted"),
    }
}

impl<C, W: Clone> Queue<C, W> {
    pub(super) fn count_queued(&mut self, number: OperationNumber, more: bool) {
        match more {
            true => self.queued.all += 1,
            false => self.queued.all -= 1,
        }
        self.note_queued(number, more);
        let operation = &self.operations[number];
        let task = &self.tasks[operation.task];
        add(
            &mut self.queued.by_instance_name,
            &task.action.instance,
            more,
        );
        if let super::OperationPlace::Invocation(node) = operation.place
            && let Some(outermost) = self.invocations.get(node).keys.as_slice().first()
        {
            add(&mut self.queued.by_invocation, outermost, more);
        }
        if task.background {
            let queue = &self.queues[task.queue];
            let platform_queue = &mut self.platform_queues[queue.platform_queue];
            match more {
                true => platform_queue.background_queued += 1,
                false => platform_queue.background_queued -= 1,
            }
        }
    }

    /// Whether one more operation may be queued. Those that join a task or find an idle worker are
    /// asked for, too: what is at its limit has none.
    pub(super) fn admit_operation(&self, request: &Request) -> Result<(), QueueFull> {
        let limits = &self.settings.limits;
        let full = |scope: String, key, limit| QueueFull {
            scope,
            what: "operations queued",
            key,
            limit,
            retry_after: RETRY_AFTER,
        };
        let limit = limits.queued_operations;
        if self.queued.all + self.awaited_reports.len() >= limit {
            return Err(full("The scheduler".to_owned(), "queued_operations", limit));
        }
        let limit = limits.action_bytes;
        if self.action_bytes + request.action.size() > limit {
            return Err(QueueFull {
                what: "bytes of actions",
                ..full("The scheduler".to_owned(), "actions_size", limit)
            });
        }
        let instance = &request.action.instance;
        let limit = limits.queued_operations_per_instance_name;
        if self
            .queued
            .by_instance_name
            .get(instance)
            .is_some_and(|n| *n >= limit)
        {
            return Err(full(
                format!("Instance name {:?}", instance.as_str()),
                "queued_operations_per_instance_name",
                limit,
            ));
        }
        let limit = limits.queued_operations_per_invocation;
        let outermost = request.invocation.as_slice().first();
        if outermost
            .and_then(|key| self.queued.by_invocation.get(key))
            .is_some_and(|n| *n >= limit)
        {
            return Err(full(
                "The outermost invocation".to_owned(),
                "queued_operations_per_invocation",
                limit,
            ));
        }
        Ok(())
    }
}
