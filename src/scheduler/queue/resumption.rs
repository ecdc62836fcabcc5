//! Operations of the scheduler before this one that no worker has reported yet.
//!
//! Just after the start, a worker that executes such an operation may not have called yet: handing it to
//! another worker would execute it twice. So it waits outside of the tree until `worker_report_timeout`
//! after the start, and is adopted or scheduled by then. Operations of this scheduler never wait here.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    EncodedResponse, Queue, TaskState, Timer,
    arena::{Number, QueueNumber, TaskNumber},
    timers::Deadline,
};

#[derive(Default)]
pub(super) struct AwaitedReports {
    tasks: BTreeSet<(QueueNumber, TaskNumber)>,
    /// While there are any.
    deadline: Deadline,
}

impl AwaitedReports {
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    pub(super) fn contains(&self, queue: QueueNumber, task: TaskNumber) -> bool {
        self.tasks.contains(&(queue, task))
    }

    pub(super) fn deadline(&self) -> Deadline {
        self.deadline
    }
}

impl<C, W: Clone> Queue<C, W> {
    fn reports_end(&self) -> Instant {
        self.started + self.settings.worker_report_timeout
    }

    /// Whether a worker may yet say that it executes what the scheduler before this one gave it.
    pub(super) fn may_be_reported(&self, now: Instant) -> bool {
        now < self.reports_end()
    }

    /// A task that is in no tree waits for a worker's report.
    pub(super) fn await_report(&mut self, now: Instant, task: TaskNumber) {
        let end = self.reports_end();
        self.advance(now, task, TaskState::AwaitingReport);
        let awaited = &mut self.awaited_reports;
        awaited.tasks.insert((self.tasks[task].queue, task));
        self.timers
            .set(&mut awaited.deadline, Timer::AwaitedReports, end);
    }

    /// Takes a task that waits for a report out, to be put somewhere else at once.
    pub(super) fn withdraw_awaiting(&mut self, task: TaskNumber) {
        let awaited = &mut self.awaited_reports;
        awaited.tasks.remove(&(self.tasks[task].queue, task));
        if awaited.tasks.is_empty() {
            self.timers
                .clear(&mut awaited.deadline, Timer::AwaitedReports);
        }
    }

    /// One of those that nobody reported in time; the next one at once after other verbs.
    pub(super) fn expire_awaited_report(&mut self, now: Instant) {
        self.awaited_reports.deadline = None;
        let Some((_, task)) = self.awaited_reports.tasks.pop_first() else {
            return;
        };
        if !self.awaited_reports.tasks.is_empty() {
            self.timers.set(
                &mut self.awaited_reports.deadline,
                Timer::AwaitedReports,
                now,
            );
        }
        self.schedule(now, task);
    }

    /// Ends at most so many of those of a size-class queue; says how many.
    pub(super) fn end_awaiting(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        response: &Arc<EncodedResponse>,
        most: usize,
    ) -> usize {
        let first = (queue, TaskNumber::new(0, 0));
        let of_queue = self.awaited_reports.tasks.range(first..);
        let tasks: Vec<_> = of_queue
            .take_while(|(other, _)| *other == queue)
            .take(most)
            .map(|(_, task)| *task)
            .collect();
        for task in &tasks {
            self.complete(now, *task, response.clone());
        }
        tasks.len()
    }

    pub(super) fn time_for_reports(&self, now: Instant) -> Duration {
        self.reports_end().saturating_duration_since(now)
    }
}
