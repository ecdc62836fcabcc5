//! Why an operation is where it is, in words.

use std::{
    fmt,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{
    Queue, Task, TaskState, WorkerId, WorkerState,
    arena::{OperationNumber, QueueNumber},
};

/// More than so many that are before it are not counted.
const COUNTED: usize = 1_000;

/// Why an operation is where it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Explanation {
    Queued(QueuedExplanation),
    /// The scheduler has restarted, and the worker that executes it may not have called yet.
    AwaitingReport {
        /// For so long.
        rest: Duration,
    },
    Executing {
        worker: WorkerId,
        /// For so long.
        elapsed: Duration,
        /// Workers that were lost with it before.
        lost: usize,
    },
    Completed,
}

#[derive(Clone, Debug, PartialEq)]
pub struct QueuedExplanation {
    /// Those of its own invocation that go first; `COUNTED` at most.
    pub before_it: usize,
    pub more_before_it: bool,
    pub priority: i32,
    /// Of each level, outermost first: invocations that are served before the one that it is in.
    pub invocations_before: Vec<usize>,
    /// Of the workers that it waits for; 0 where they have none.
    pub size_class: u32,
    /// All that is queued for workers of this kind.
    pub queued: usize,
    pub workers: MatchingWorkers,
    /// How long it waits most likely; `None` when no worker takes work, or none has executed anything.
    pub expected_wait: Option<Duration>,
    /// Workers that were lost with it before.
    pub lost: usize,
}

/// Workers of the operation's size-class queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MatchingWorkers {
    pub all: usize,
    pub executing: usize,
    /// Drained, or told to terminate.
    pub drained: usize,
    /// In no call although one is due.
    pub overdue: usize,
}

fn plural(count: usize, one: &str, many: &str) -> String {
    crate::text::plural(count as u64, one, many)
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Explanation::Queued(queued) => queued.fmt(f),
            Explanation::Executing {
                worker,
                elapsed,
                lost,
            } => {
                write!(f, "executing on {worker} for {} s", elapsed.as_secs())?;
                match lost {
                    0 => Ok(()),
                    lost => write!(
                        f,
                        ", after {}",
                        plural(*lost, "worker was lost", "workers were lost")
                    ),
                }
            }
            Explanation::AwaitingReport { rest } => write!(
                f,
                "taken up again after a restart of the scheduler: for {} s more a worker may say that it executes it",
                rest.as_secs_f64().ceil()
            ),
            Explanation::Completed => f.write_str("completed"),
        }
    }
}

impl fmt::Display for QueuedExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.more_before_it {
            "more than "
        } else {
            ""
        };
        write!(
            f,
            "queued: {more}{} before it in its invocation, at priority {}",
            plural(self.before_it, "operation", "operations"),
            self.priority
        )?;
        let before: usize = self.invocations_before.iter().sum();
        if before > 0 {
            write!(
                f,
                "; {} served before its own, as fewer workers execute for them, or they are more urgent or were served longer ago",
                plural(before, "invocation is", "invocations are")
            )?;
        }
        write!(f, "; {} queued in all", self.queued)?;
        let MatchingWorkers {
            all,
            executing,
            drained,
            overdue,
        } = self.workers;
        if all == 0 {
            f.write_str("; no workers of its platform")?;
            if self.size_class != 0 {
                write!(f, " and size class {}", self.size_class)?;
            }
            f.write_str(" are there now")?;
        } else {
            write!(
                f,
                "; {}: {executing} executing, {drained} drained, {overdue} silent",
                plural(all, "worker matches", "workers match")
            )?;
        }
        if self.lost > 0 {
            write!(
                f,
                "; {} with it",
                plural(self.lost, "worker was lost", "workers were lost")
            )?;
        }
        match self.expected_wait {
            Some(wait) => write!(f, "; about {} s to wait", wait.as_secs()),
            None if all > drained => {
                f.write_str("; how long it waits is known when one of them has executed something")
            }
            None => f.write_str("; it waits until a worker takes work"),
        }
    }
}

impl<C, W: Clone> Queue<C, W> {
    /// `None` when there is no such operation.
    pub fn explain(&self, now: Instant, operation: Uuid) -> Option<Explanation> {
        let number = self.names.get(operation)?;
        let task = &self.tasks[self.operations[number].task];
        Some(match &task.state {
            TaskState::Fresh | TaskState::Queued => {
                Explanation::Queued(self.explain_queued(now, number, task))
            }
            TaskState::AwaitingReport => Explanation::AwaitingReport {
                rest: self.time_for_reports(now),
            },
            TaskState::Executing { worker, since, .. } => Explanation::Executing {
                worker: self.workers[*worker].id.clone(),
                elapsed: now.saturating_duration_since(*since),
                lost: task.lost().len(),
            },
            TaskState::Completed(_) => Explanation::Completed,
        })
    }

    fn explain_queued(
        &self,
        now: Instant,
        number: OperationNumber,
        task: &Task,
    ) -> QueuedExplanation {
        let node = self.node_of(number);
        let position = self.position(number);
        let queued = &self.invocations.get(node).queued;
        let before_it = queued.range(..position).take(COUNTED + 1).count();
        let root = self.queues[task.queue].root;
        let mut above = root;
        let mut invocations_before = Vec::new();
        for child in self.invocations.path(node) {
            let ready = self.invocations.get(above).ready_children();
            let before = ready.take(COUNTED).take_while(|other| *other != child);
            invocations_before.push(before.count());
            above = child;
        }
        let workers = self.matching_workers(now, task.queue);
        let willing = workers.all - workers.drained;
        let siblings = self
            .invocations
            .get(root)
            .ready_children()
            .take(COUNTED)
            .count()
            .max(1);
        let ahead = before_it
            .saturating_mul(siblings)
            .min(self.invocations.get(root).queued_in_all);
        let mean = self.queues[task.queue].mean_duration;
        QueuedExplanation {
            before_it: before_it.min(COUNTED),
            more_before_it: before_it > COUNTED,
            priority: self.operations[number].priority,
            invocations_before,
            size_class: self.queues[task.queue].key.size_class,
            queued: self.invocations.get(root).queued_in_all,
            workers,
            expected_wait: mean.filter(|_| willing > 0).map(|mean| {
                let rounds = ahead / willing + 1;
                let rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
                mean.saturating_mul(rounds)
            }),
            lost: task.lost().len(),
        }
    }

    /// Of the first `COUNTED` workers, all others being as they are.
    fn matching_workers(&self, now: Instant, queue: QueueNumber) -> MatchingWorkers {
        let queue = &self.queues[queue];
        let mut counts = MatchingWorkers {
            all: queue.workers.len(),
            executing: self.invocations.get(queue.root).executing.len(),
            ..Default::default()
        };
        for number in queue.workers.values().take(COUNTED) {
            let worker = &self.workers[*number];
            let held = matches!(worker.state, WorkerState::IdleSynchronizing { .. });
            counts.drained += usize::from(!worker.takes_work());
            counts.overdue += usize::from(!held && worker.overdue < now);
        }
        counts
    }
}
