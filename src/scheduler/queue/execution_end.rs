//! How the execution of a task ends: with a worker's result, or without one, so that it is executed again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Effect, EncodedResponse, Instruction, Queue, WorkerId, WorkerState,
    arena::{QueueNumber, TaskNumber, WorkerNumber},
    schedule::AssignedFrom,
};
use crate::proto::rpc;

impl<C, W: Clone> Queue<C, W> {
    /// A worker does not do what we gave it: once more there, but not for ever. `None` when the worker
    /// is free.
    pub(super) fn reassign(
        &mut self,
        now: Instant,
        worker: WorkerNumber,
        task: TaskNumber,
    ) -> Option<Instruction> {
        if self.blame(now, worker, task) {
            return None;
        }
        self.withdraw(now, task);
        Some(self.assign(now, task, worker, None, AssignedFrom::Nowhere))
    }

    /// A worker that stops has not begun what we gave it: another one does it.
    pub(super) fn take_back(&mut self, now: Instant, worker: WorkerNumber) {
        let WorkerState::Executing { task, .. } = self.workers[worker].state else {
            unreachable!("a worker gives nothing back");
        };
        if !self.blame(now, worker, task) {
            self.withdraw(now, task);
            self.schedule(now, task);
        }
    }

    /// Counts that a worker came back without its task's result; `true` when the task is ended for it.
    fn blame(&mut self, now: Instant, worker: WorkerNumber, number: TaskNumber) -> bool {
        let task = &mut self.tasks[number];
        if task.retries < self.settings.worker_task_retry_count {
            task.retries += 1;
            return false;
        }
        let attempts = task.retries.saturating_add(1);
        let id = self.workers[worker].id.clone();
        self.fail(
            now,
            number,
            rpc::Code::Internal,
            format!(
                "The action was handed out {attempts} times, and each time the worker came back without a result, last worker {id}; the action may crash the worker"
            ),
        );
        true
    }

    /// Whether a result says that the worker, its host or what these need is at fault, rather than the
    /// action, and the action may be executed once more. Of a storage that is unavailable, the first
    /// worker has tried for as long as that may help, and the second one tells whether it is the first one's way to it.
    pub(super) fn is_worker_fault(&self, number: TaskNumber, outcome: &EncodedResponse) -> bool {
        let task = &self.tasks[number];
        let most = match outcome.is_fault_of_storage {
            true => self.settings.lost_worker_retry_count.min(1),
            false => self.settings.lost_worker_retry_count,
        };
        outcome.code == rpc::Code::Unavailable as i32
            && !task.background
            && (task.lost().len() as u64) < u64::from(most)
    }

    /// A worker that executes is gone or has failed, or another process has its place: what it executes
    /// is queued again, but not for ever. It is idle afterwards.
    pub(super) fn lose_worker(&mut self, now: Instant, worker: WorkerNumber) {
        let WorkerState::Executing { task: number, .. } = self.workers[worker].state else {
            unreachable!("a worker that executes nothing is lost with it");
        };
        let id = self.workers[worker].id.clone();
        self.tasks[number].lose(id.clone());
        let lost = self.tasks[number].lost();
        let again = lost.len() as u64 <= u64::from(self.settings.lost_worker_retry_count);
        if again && !self.tasks[number].background {
            self.withdraw(now, number);
            self.schedule(now, number);
            return;
        }
        let mut message = format!("Worker {id} disappeared while task was executing");
        if lost.len() > 1 {
            let before: Vec<String> = lost[..lost.len() - 1]
                .iter()
                .map(WorkerId::to_string)
                .collect();
            message += &format!(
                "; so did, before it, {}. It was executed again {} times, which is the limit scheduling.lost_worker_retry_count",
                before.join(", "),
                before.len()
            );
        }
        self.fail(now, number, rpc::Code::Unavailable, message);
    }

    /// A worker brings the result of a task: it is the clients', or the largest size class is to try.
    pub(super) fn finish(
        &mut self,
        now: Instant,
        number: TaskNumber,
        outcome: Arc<EncodedResponse>,
    ) {
        let queue = self.tasks[number].queue;
        let platform_queue = self.queues[queue].platform_queue;
        let platform = &self.platform_queues[platform_queue];
        let (sizes, is_largest) = (platform.size_classes(), platform.is_largest(queue));
        let succeeded = outcome.code == rpc::Code::Ok as i32 && outcome.exit_code == 0;
        let timed_out = outcome.code == rpc::Code::DeadlineExceeded as i32;
        let background = self.tasks[number].background;
        let Some(learner) = self.tasks[number].learner.take() else {
            if succeeded || is_largest {
                return self.complete(now, number, outcome);
            }
            // It was adopted on a smaller size class than it would have been given.
            let largest = platform.sizes[sizes.len() - 1].1;
            let timeout = self.tasks[number].selector.timeout();
            return self.retry(now, number, largest, timeout, timeout);
        };
        let completion = match succeeded {
            true => learner.succeeded(outcome.duration, &sizes),
            false => learner.failed(timed_out, &sizes),
        };
        if let Some(update) = completion.update {
            self.effects.push(Effect::Learned(update));
        }
        match completion.next {
            None => self.complete(now, number, outcome),
            Some(next) if succeeded => {
                let action = self.tasks[number].action.clone();
                let selector = self.tasks[number].selector.clone();
                self.complete(now, number, outcome);
                if !background {
                    self.learn_in_background(now, platform_queue, action, selector, next);
                }
            }
            Some(next) => {
                let target = self.platform_queues[platform_queue].sizes[next.index].1;
                self.tasks[number].learner = Some(next.learner);
                self.retry(now, number, target, next.timeout, next.expected_duration);
            }
        }
    }

    /// Once more, on this size class.
    fn retry(
        &mut self,
        now: Instant,
        number: TaskNumber,
        queue: QueueNumber,
        timeout: Duration,
        expected_duration: Duration,
    ) {
        self.withdraw(now, number);
        self.move_to(number, queue);
        let task = &mut self.tasks[number];
        task.timeout = timeout;
        task.expected_milliseconds = super::schedule::milliseconds(expected_duration);
        self.schedule(now, number);
    }
}
