//! Tells the journal which workers come and go, and systemd what the scheduler is doing.
//!
//! The slots of one worker differ in their label `thread` only; a line is about all of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    queue::{Queue, SizeClassQueueKey, WorkerId},
    shared_queue::SharedQueue,
};
use crate::daemon::{Lifecycle, message_id};

/// The label by which slots differ, as with Buildbarn's worker.
const SLOT_LABEL: &str = "thread";
/// Workers that are looked at under one lock.
const WORKERS_PER_LOCK: usize = 1_000;
const LOG_INTERVAL: Duration = Duration::from_secs(2);

/// Slots of each worker, by where it takes its work from and its labels without `SLOT_LABEL`.
type SlotsByWorker = BTreeMap<(Arc<SizeClassQueueKey>, WorkerId), usize>;

/// What is in the queue at one time.
#[derive(Clone, Debug, Default)]
struct WorkerOverview {
    workers: SlotsByWorker,
    executing: usize,
    queued: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Appeared(usize),
    Gone,
}

impl WorkerOverview {
    /// The queue is looked at piece by piece, so that nobody waits for long.
    fn of(queue: &SharedQueue) -> Self {
        let mut view = WorkerOverview::default();
        let queues = queue.look(Queue::platform_queues);
        for row in queues.iter().flat_map(|queue| &queue.size_classes) {
            view.queued += row.root.queued_directly + row.root.queued_indirectly;
            view.executing += row.root.executing_workers;
            let mut last = None;
            while let Some(ids) =
                queue.look(|queue| queue.worker_ids(&row.key, last.as_ref(), WORKERS_PER_LOCK))
            {
                for worker in &ids {
                    let mut labels = worker.labels().clone();
                    labels.remove(SLOT_LABEL);
                    let worker = (row.key.clone(), WorkerId::new(labels));
                    *view.workers.entry(worker).or_default() += 1;
                }
                last = ids.last().cloned();
            }
        }
        view
    }

    fn line(&self, serving: &str, stopping: bool) -> String {
        let slots: usize = self.workers.values().sum();
        let start = match (stopping, slots) {
            (true, _) => "stopping; workers go on with what they execute: ".to_owned(),
            (false, 0) => "no workers; ".to_owned(),
            (false, _) => String::new(),
        };
        format!(
            "{start}{} executing, {} queued, {slots} slots of {} workers; {serving}",
            self.executing,
            self.queued,
            self.workers.len()
        )
    }
}

/// What became of workers between two looks.
fn changes(
    before: &SlotsByWorker,
    now: &SlotsByWorker,
) -> Vec<((Arc<SizeClassQueueKey>, WorkerId), Change)> {
    let gone = before
        .keys()
        .filter(|worker| !now.contains_key(*worker))
        .map(|worker| (worker.clone(), Change::Gone));
    let appeared = now
        .iter()
        .filter(|(worker, _)| !before.contains_key(*worker))
        .map(|(worker, slots)| (worker.clone(), Change::Appeared(*slots)));
    gone.chain(appeared).collect()
}

fn log_change(key: &SizeClassQueueKey, worker: &WorkerId, change: &Change) {
    let (instance, size_class) = (key.prefix.as_str(), key.size_class);
    let platform = key.platform.to_string();
    match change {
        Change::Appeared(slots) => {
            tracing::info!(%worker, slots, instance, platform, size_class, "a worker appeared");
        }
        Change::Gone => {
            tracing::warn!(
                message_id = message_id::WORKER_GONE,
                %worker, instance, platform, size_class,
                "a worker is gone: it was silent for scheduling.worker_with_no_synchronizations_timeout"
            );
        }
    }
}

/// Never returns. `serving` says where.
pub(super) async fn run(queue: &SharedQueue, lifecycle: &Lifecycle, serving: &str) {
    let mut before = WorkerOverview::default();
    let mut last = String::new();
    loop {
        let now = WorkerOverview::of(queue);
        for ((key, worker), change) in changes(&before.workers, &now.workers) {
            log_change(&key, &worker, &change);
        }
        let line = now.line(serving, lifecycle.stopping().is_cancelled());
        if line != last {
            lifecycle.status(&line);
            last = line;
        }
        before = now;
        tokio::time::sleep(LOG_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{instance::InstanceName, scheduler::queue::Platform};

    #[test]
    fn a_worker_appears_with_its_first_slot_and_is_gone_with_its_last() {
        let key = Arc::new(SizeClassQueueKey {
            platform: Platform::parse(None).unwrap(),
            prefix: InstanceName::parse("").unwrap(),
            size_class: 0,
        });
        let worker = |name: &str| {
            let labels = [("hostname".to_owned(), name.to_owned())];
            (key.clone(), WorkerId::new(labels.into()))
        };
        let none = SlotsByWorker::new();
        let one = SlotsByWorker::from([(worker("a"), 2)]);
        let two = SlotsByWorker::from([(worker("a"), 1), (worker("b"), 8)]);
        assert_eq!(changes(&none, &one), [(worker("a"), Change::Appeared(2))]);
        assert_eq!(changes(&one, &two), [(worker("b"), Change::Appeared(8))]);
        assert_eq!(changes(&two, &one), [(worker("b"), Change::Gone)]);
        assert_eq!(changes(&one, &one), []);
        let view = WorkerOverview {
            workers: two,
            executing: 3,
            queued: 4,
        };
        assert_eq!(
            view.line("on x", false),
            "3 executing, 4 queued, 9 slots of 2 workers; on x"
        );
        assert!(
            WorkerOverview::default()
                .line("on x", false)
                .starts_with("no workers; ")
        );
        assert!(view.line("on x", true).starts_with("stopping; "));
    }
}
