//! What clients want: to execute, to wait, to leave.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use uuid::Uuid;

use super::{
    ForeignAction, NoWorkers, Operation, Progress, Queue, ReportedDigest, Request, Task,
    TaskNumber, TaskState, Timer, Work, WorkerNumber, WorkerState,
};
use crate::{proto::rpc, text::shorten};

/// How many platform queues a refusal lists.
const LISTED: usize = 5;

/// A stream that waits for an operation, from this progress on. To be ended with `detach`.
#[derive(Debug)]
pub struct Attached<W> {
    pub operation: Uuid,
    pub work: Arc<Work>,
    pub watch: W,
    pub progress: Progress,
}

impl<C, W: Clone> Queue<C, W> {
    /// Queues an action, or joins its task that is under way. `operation` is a fresh name; it and
    /// `watch` are used where there is nothing to join.
    pub fn execute(
        &mut self,
        now: Instant,
        operation: Uuid,
        request: Request,
        watch: W,
    ) -> Result<Attached<W>, NoWorkers> {
        let work = &request.work;
        let cacheable = !work.action.do_not_cache;
        let key = (work.instance.clone(), work.digest);
        if cacheable && let Some(task) = self.in_flight.get(&key).copied() {
            let name = self.join(task, operation, &request);
            self.reposition(task);
            return self
                .attach(name)
                .ok_or_else(|| self.no_workers(now, &request));
        }
        let queue = self
            .route(&request.platform, &work.instance)
            .or_else(|| {
                let default = self.settings.default_platform.as_ref()?;
                let asks_for_none = request.platform.is_empty();
                asks_for_none
                    .then(|| self.route(default, &work.instance))
                    .flatten()
            })
            .ok_or_else(|| self.no_workers(now, &request))?;
        let place = match self.queues.get(&queue) {
            Some(queue) => queue.place.clone(),
            None => return Err(self.no_workers(now, &request)),
        };
        let arrival = self.number();
        let number = TaskNumber(arrival);
        self.totals.tasks += 1;
        let suffix = work.instance.strip_prefix(&place.prefix);
        self.tasks.insert(
            number,
            Task {
                work: work.clone(),
                place,
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
            instance: work.instance.clone(),
            digest: ReportedDigest::from(&work.digest),
        };
        if cacheable {
            self.in_flight.insert(key, number);
        }
        if !cacheable {
            self.enqueue(now, number, queue);
        } else if let Some(outcome) = self.claim(&foreign) {
            self.complete(now, number, outcome);
        } else if let Some(stranger) = self.stranger(&foreign) {
            // It runs the action already.
            self.strangers.remove(&(foreign, stranger));
            self.assign(now, number, stranger, None);
        } else {
            self.enqueue(now, number, queue);
        }
        self.attach(name)
            .ok_or_else(|| self.no_workers(now, &request))
    }

    /// One more stream for an operation that exists.
    pub fn wait(&mut self, operation: Uuid) -> Option<Attached<W>> {
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

    fn attach(&self, operation: Uuid) -> Option<Attached<W>> {
        let task = self.tasks.get(&self.operations.get(&operation)?.task)?;
        Some(Attached {
            operation,
            work: task.work.clone(),
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

    fn claim(&mut self, action: &ForeignAction) -> Option<Arc<super::Outcome>> {
        let outcome = self.unclaimed.remove(action)?;
        self.timers.clear(&Timer::Unclaimed(action.clone()));
        Some(outcome)
    }

    fn stranger(&self, action: &ForeignAction) -> Option<WorkerNumber> {
        let from = (action.clone(), WorkerNumber(0));
        let (found, worker) = self.strangers.range(from..).next()?;
        let state = &self.workers.get(worker)?.state;
        (found == action && matches!(state, WorkerState::Stranger { .. })).then_some(*worker)
    }

    fn no_workers(&self, now: Instant, request: &Request) -> NoWorkers {
        let places = self.queues.values().map(|queue| {
            format!(
                "{:?} {}",
                queue.place.prefix.as_str(),
                shorten(&queue.place.platform.to_string())
            )
        });
        let listed: Vec<String> = places.take(LISTED).collect();
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
            instance: request.work.instance.as_str().to_owned(),
            platform: request.platform.clone(),
            transient: age < self.settings.platform_queue_with_no_workers_timeout,
            known,
        }
    }
}
