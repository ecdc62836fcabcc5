//! The order in which tasks are handed out, as those who look at the queue see it.

use super::*;

/// What a free worker has to choose from.
pub struct Waiting {
    /// By the time of the tasks, which tells them apart.
    tasks: BTreeMap<i64, WaitingTask>,
    /// Workers that execute for each client, but for the one that chooses.
    executing: BTreeMap<InvocationKey, BTreeSet<WorkerId>>,
}

struct WaitingTask {
    /// The most urgent of its operations.
    priority: i32,
    /// With the priority of its operation.
    invocations: BTreeMap<InvocationKeys, i32>,
}

impl Waiting {
    pub fn has(&self, work: &QueuedAction) -> bool {
        self.tasks.contains_key(&work.queued_timestamp.seconds)
    }

    /// The least goes first: its use of workers, made less by the urgency of what it has queued.
    fn score(&self, client: &InvocationKey, priority: i32) -> f64 {
        let executing = self.executing.get(client).map_or(0, BTreeSet::len);
        (executing as f64 + 1.0) * (f64::from(priority) / 100.0).exp2()
    }
}

fn client(keys: &InvocationKeys) -> InvocationKey {
    keys.as_slice()[0].clone()
}

impl World {
    pub fn waiting(&self, key: &SizeClassQueueKey, worker: usize) -> Waiting {
        let mut waiting = Waiting {
            tasks: BTreeMap::new(),
            executing: BTreeMap::new(),
        };
        let chooses = &self.workers[worker].id;
        for row in self.queue.operations(None).filter(|row| *row.key == *key) {
            match (&row.stage, &row.worker) {
                // In nobody's line yet.
                (Stage::Queued, _) if self.awaits_report(row.name) => {}
                (Stage::Queued, _) => {
                    let time = row.action.queued_timestamp.seconds;
                    let task = waiting.tasks.entry(time).or_insert(WaitingTask {
                        priority: i32::MAX,
                        invocations: BTreeMap::new(),
                    });
                    task.priority = task.priority.min(row.priority);
                    // Of one invocation, too, a task may have several: one that was taken up by its
                    // name is never joined.
                    let priority = task.invocations.entry(row.invocation).or_insert(i32::MAX);
                    *priority = row.priority.min(*priority);
                }
                (Stage::Executing, Some(executes)) if executes != chooses => {
                    let of_client = waiting.executing.entry(client(&row.invocation));
                    of_client.or_default().insert(executes.clone());
                }
                _ => {}
            }
        }
        waiting
    }

    /// Just after a scheduler's start another worker may say that it executes it.
    fn awaits_report(&self, name: Uuid) -> bool {
        let why = self.queue.explain(self.now, name);
        matches!(why, Some(Explanation::AwaitingReport { .. }))
    }

    /// What was handed out was first in its invocation, and its client had the least use of workers.
    /// `rest` is what waits still, as the call may have ended what waited before it.
    pub fn check_order(&self, waited: &Waiting, rest: &Waiting, work: &QueuedAction) {
        let time = work.queued_timestamp.seconds;
        let Some(task) = waited.tasks.get(&time) else {
            return;
        };
        if rest.tasks.iter().any(|(other_time, other)| {
            (other.priority, *other_time) < (task.priority, time)
                && task.invocations.len() == 1
                && other.invocations.keys().eq(task.invocations.keys())
        }) {
            self.fail("a task was handed out before a more urgent one of its invocation");
        }
        let mut least = BTreeMap::<InvocationKey, f64>::new();
        for other in rest.tasks.values().chain([task]) {
            for (keys, priority) in &other.invocations {
                let score = rest.score(&client(keys), *priority);
                let found = least.entry(client(keys)).or_insert(score);
                *found = found.min(score);
            }
        }
        let of_task = task.invocations.keys().map(|keys| least[&client(keys)]);
        let of_task = of_task.fold(f64::INFINITY, f64::min);
        let of_all = least.values().copied().fold(f64::INFINITY, f64::min);
        if of_task > of_all * 1.000_001 {
            self.fail("a client that has more use of workers than another is served first");
        }
    }
}
