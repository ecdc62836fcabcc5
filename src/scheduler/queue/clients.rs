//! What clients want: to execute, to wait, to leave.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use uuid::Uuid;

use super::{
    EncodedResponse, ExecuteRefusal, ForeignAction, KillRefusal, NoWorkers, Operation, Progress,
    Queue, QueuedAction, ReportedDigest, Request, SizeClassQueueKey, Task, TaskNumber, TaskState,
    Timer, UnknownOperation, UnknownQueue, WorkerNumber, WorkerState,
};
use crate::{proto::rpc, text::shorten};

/// How many platform queues a refusal lists.
const LISTED_QUEUES: usize = 5;

/// A stream that waits for an operation, from this progress on. To be ended with `detach`.
#[derive(Debug)]
pub struct AttachedWaiter<W> {
    pub operation: Uuid,
    pub action: Arc<QueuedAction>,
    pub watch: W,
    pub progress: Progress,
}

impl<C, W: Clone> Queue<C, W> {
    /// Queues an action, or joins its task that is under way. The request's name and `watch` are used
    /// where there is nothing to join.
    pub fn execute(
        &mut self,
        now: Instant,
        request: Request,
        watch: W,
    ) -> Result<AttachedWaiter<W>, ExecuteRefusal> {
        Ok(self.queue_or_join(now, request, watch)?)
    }

    /// The client's operation ends at once with CANCELLED.
    pub fn cancel(&mut self, now: Instant, operation: Uuid) -> Result<(), UnknownOperation> {
        let response = EncodedResponse::failure(
            rpc::Code::Cancelled,
            "The operation was cancelled".to_owned(),
        );
        self.kill_operation(now, operation, Arc::new(response))
    }

    /// All who wait for the operation's task get this response, unless it is completed.
    pub fn kill_operation(
        &mut self,
        now: Instant,
        operation: Uuid,
        response: Arc<EncodedResponse>,
    ) -> Result<(), UnknownOperation> {
        let operation = self.operations.get(&operation).ok_or(UnknownOperation)?;
        let task = operation.task;
        let found = self.tasks.get(&task);
        if found.is_some_and(|task| !matches!(task.state, TaskState::Completed(_))) {
            self.complete(now, task, response);
        }
        Ok(())
    }

    /// All that is queued in a size-class queue without workers gets this response.
    pub fn kill_queued(
        &mut self,
        now: Instant,
        key: &SizeClassQueueKey,
        response: Arc<EncodedResponse>,
    ) -> Result<(), KillRefusal> {
        let queue = self
            .queues
            .values()
            .find(|queue| *queue.key == *key)
            .ok_or(UnknownQueue)?;
        if !queue.workers.is_empty() {
            return Err(KillRefusal::HasWorkers);
        }
        let tasks: Vec<TaskNumber> = queue.queued_tasks.iter().collect();
        for task in tasks {
            self.complete(now, task, response.clone());
        }
        Ok(())
    }

    fn queue_or_join(
        &mut self,
        now: Instant,
        request: Request,
        watch: W,
    ) -> Result<AttachedWaiter<W>, NoWorkers> {
        let operation = request.name;
        let action = &request.action;
        let cacheable = !action.do_not_cache;
        let key = (action.instance.clone(), action.digest);
        if cacheable && let Some(task) = self.in_flight.get(&key).copied() {
            let name = self.join(task, operation, &request);
            self.reposition(task);
            return self
                .attach(name)
                .ok_or_else(|| self.no_workers(now, &request));
        }
        let queue = self
            .route(&request.platform, &action.instance)
            .or_else(|| {
                let default = self.settings.default_platform.as_ref()?;
                let asks_for_none = request.platform.is_empty();
                asks_for_none
                    .then(|| self.route(default, &action.instance))
                    .flatten()
            })
            .ok_or_else(|| self.no_workers(now, &request))?;
        let queue_key = match self.queues.get(&queue) {
            Some(queue) => queue.key.clone(),
            None => return Err(self.no_workers(now, &request)),
        };
        let arrival = self.number();
        let number = TaskNumber(arrival);
        self.totals.tasks += 1;
        let suffix = action.instance.strip_prefix(&queue_key.prefix);
        self.tasks.insert(
            number,
            Task {
                action: action.clone(),
                key: queue_key,
                suffix: suffix.unwrap_or_else(crate::instance::InstanceName::empty),
                arrival,
                retries: 0,
                operations: BTreeMap::new(),
                state: TaskState::Queued {
                    queue,
                    position: super::Position {
                        priority: request.priority,
                        arrival,
                    },
                },
                version: 0,
                watch,
            },
        );
        let name = self.join(number, operation, &request);
        let foreign = ForeignAction {
            queue,
            instance: action.instance.clone(),
            digest: ReportedDigest::from(&action.digest),
        };
        if cacheable {
            self.in_flight.insert(key, number);
        }
        if !cacheable {
            self.enqueue(now, number, queue);
        } else if let Some(outcome) = self.take_unclaimed(&foreign) {
            self.complete(now, number, outcome);
        } else if let Some(foreign_worker) = self.foreign_worker(&foreign) {
            // It runs the action already.
            self.foreign_actions.remove(&(foreign, foreign_worker));
            self.assign(now, number, foreign_worker, None);
        } else {
            self.enqueue(now, number, queue);
        }
        self.attach(name)
            .ok_or_else(|| self.no_workers(now, &request))
    }

    /// One more stream for an operation that exists.
    pub fn wait(&mut self, operation: Uuid) -> Option<AttachedWaiter<W>> {
        self.operations.get_mut(&operation)?.waiters += 1;
        self.timers.clear(&Timer::Operation(operation));
        self.attach(operation)
    }

    /// A stream ended, for whatever reason.
    pub fn detach(&mut self, now: Instant, operation: Uuid) {
        let Some(found) = self.operations.get_mut(&operation) else {
            return;
        };
        found.waiters = found.waiters.saturating_sub(1);
        if found.waiters == 0 {
            self.timers.set(
                Timer::Operation(operation),
                now + self.settings.operation_with_no_waiters_timeout,
            );
        }
    }

    /// The invocation's operation on a task, with one more waiter.
    fn join(&mut self, number: TaskNumber, fresh: Uuid, request: &Request) -> Uuid {
        let Some(task) = self.tasks.get_mut(&number) else {
            return fresh;
        };
        let name = *task
            .operations
            .entry(request.invocation.clone())
            .or_insert(fresh);
        let totals = &mut self.totals;
        let operation = self.operations.entry(name).or_insert_with(|| {
            totals.operations += 1;
            Operation {
                task: number,
                invocation: request.invocation.clone(),
                priority: request.priority,
                waiters: 0,
            }
        });
        operation.priority = operation.priority.min(request.priority);
        operation.waiters += 1;
        self.timers.clear(&Timer::Operation(name));
        name
    }

    fn attach(&self, operation: Uuid) -> Option<AttachedWaiter<W>> {
        let task = self.tasks.get(&self.operations.get(&operation)?.task)?;
        Some(AttachedWaiter {
            operation,
            action: task.action.clone(),
            watch: task.watch.clone(),
            progress: task.progress(),
        })
    }

    /// Nobody waits for it, and nobody came back in time.
    pub(super) fn drop_operation(&mut self, now: Instant, name: Uuid) {
        let Some(operation) = self.operations.remove(&name) else {
            return;
        };
        self.totals.operations_forgotten += 1;
        let number = operation.task;
        let Some(task) = self.tasks.get_mut(&number) else {
            return;
        };
        task.operations.remove(&operation.invocation);
        if !task.operations.is_empty() {
            self.reposition(number);
            return;
        }
        if !matches!(task.state, TaskState::Completed(_)) {
            self.fail(
                now,
                number,
                rpc::Code::Cancelled,
                "Task no longer has any waiting clients".to_owned(),
            );
        }
        if self.tasks.remove(&number).is_some() {
            self.totals.forgotten += 1;
        }
    }

    fn take_unclaimed(&mut self, action: &ForeignAction) -> Option<Arc<super::EncodedResponse>> {
        let outcome = self.unclaimed.remove(action)?;
        self.timers.clear(&Timer::Unclaimed(action.clone()));
        Some(outcome)
    }

    fn foreign_worker(&self, action: &ForeignAction) -> Option<WorkerNumber> {
        let from = (action.clone(), WorkerNumber(0));
        let (found, worker) = self.foreign_actions.range(from..).next()?;
        let state = &self.workers.get(worker)?.state;
        (found == action && matches!(state, WorkerState::ExecutingForeign { .. }))
            .then_some(*worker)
    }

    fn no_workers(&self, now: Instant, request: &Request) -> NoWorkers {
        let keys = self.queues.values().map(|queue| {
            format!(
                "{:?} {}",
                queue.key.prefix.as_str(),
                shorten(&queue.key.platform.to_string())
            )
        });
        let listed: Vec<String> = keys.take(LISTED_QUEUES).collect();
        let more = self.queues.len() - listed.len();
        let known = if listed.is_empty() {
            "no worker has called yet".to_owned()
        } else if more == 0 {
            format!("workers exist for {}", listed.join(", "))
        } else {
            format!("workers exist for {}, and {more} more", listed.join(", "))
        };
        let age = now.saturating_duration_since(self.started);
        NoWorkers {
            instance: request.action.instance.as_str().to_owned(),
            platform: request.platform.clone(),
            transient: age < self.settings.platform_queue_with_no_workers_timeout,
            known,
        }
    }
}
