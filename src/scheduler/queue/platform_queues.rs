//! Platform queues and their size-class queues: how they come, and how they go with what is in them.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use super::{
    EncodedResponse, NoWorkers, PlatformQueue, Queue, Refusal, Request, SizeClassQueue,
    SizeClassQueueKey, Timer, UnknownQueue,
    arena::{InvocationNumber, Number, PlatformQueueNumber, QueueNumber},
};
use crate::{proto::rpc, text::shorten};

/// How many queued tasks end under one lock.
const ENDED_AT_ONCE: usize = 64;
/// How many platform queues a refusal lists.
const LISTED_QUEUES: usize = 5;
/// Among how many platform queues the nearest ones are looked for.
const COMPARED_QUEUES: usize = 500;

impl<C, W: Clone> Queue<C, W> {
    pub(super) fn declare_platform_queues(&mut self) {
        for declared in self.settings.predeclared_queues.clone() {
            let key = |size_class| SizeClassQueueKey {
                platform: declared.platform.clone(),
                prefix: declared.prefix.clone(),
                size_class,
            };
            let Some(largest) = declared.size_classes.iter().copied().max() else {
                continue;
            };
            if self.find_platform_queue(&key(0)).is_some() {
                continue;
            }
            let number = self.insert_platform_queue(
                &key(0),
                PlatformQueue {
                    prefix: declared.prefix.clone(),
                    platform: declared.platform.clone(),
                    sizes: Vec::new(),
                    largest_predeclared: Some(largest),
                    stickiness_limits: declared.stickiness_limits.clone().into(),
                    maximum_queued_background_operations: declared
                        .maximum_queued_background_learning_operations,
                    background_priority: declared.background_learning_operation_priority,
                    background_queued: 0,
                },
            );
            for size_class in &declared.size_classes {
                if !self.platform_queues[number]
                    .size_classes()
                    .contains(size_class)
                {
                    self.insert_queue(number, &key(*size_class), true);
                }
            }
        }
    }

    pub(super) fn find_platform_queue(
        &self,
        key: &SizeClassQueueKey,
    ) -> Option<PlatformQueueNumber> {
        self.platforms.get(&key.platform)?.get(&key.prefix).copied()
    }

    pub(super) fn find_queue(&self, key: &SizeClassQueueKey) -> Result<QueueNumber, UnknownQueue> {
        let platform_queue = self.find_platform_queue(key).ok_or(UnknownQueue)?;
        let mut sizes = self.platform_queues[platform_queue].sizes.iter();
        let found = sizes.find(|(size, _)| *size == key.size_class);
        found.map(|(_, queue)| *queue).ok_or(UnknownQueue)
    }

    fn insert_platform_queue(
        &mut self,
        key: &SizeClassQueueKey,
        platform_queue: PlatformQueue,
    ) -> PlatformQueueNumber {
        self.platform_queues_made += 1;
        let number = self.platform_queues.insert(platform_queue);
        let prefixes = self.platforms.entry(key.platform.clone()).or_default();
        prefixes.insert(key.prefix.clone(), number);
        number
    }

    fn insert_queue(
        &mut self,
        platform_queue: PlatformQueueNumber,
        key: &SizeClassQueueKey,
        predeclared: bool,
    ) -> QueueNumber {
        let key = Arc::new(key.clone());
        let size_class = key.size_class;
        let number = self.queues.insert(SizeClassQueue {
            key,
            platform_queue,
            predeclared,
            // Set below: the root names its queue.
            root: InvocationNumber::new(u32::MAX, u32::MAX),
            workers: BTreeMap::new(),
            deadline: None,
            mean_duration: None,
            killing: None,
        });
        self.queues[number].root = self.invocations.insert_root(number);
        let sizes = &mut self.platform_queues[platform_queue].sizes;
        let at = sizes.partition_point(|(size, _)| *size < size_class);
        sizes.insert(at, (size_class, number));
        number
    }

    /// The queue that a worker is of, which it may make.
    pub(super) fn queue_of_worker(
        &mut self,
        key: &SizeClassQueueKey,
    ) -> Result<QueueNumber, Refusal> {
        if let Ok(queue) = self.find_queue(key) {
            return Ok(queue);
        }
        let offered = key.size_class;
        if let Some(number) = self.find_platform_queue(key) {
            let found = &self.platform_queues[number];
            let smallest = found.sizes.first().map_or(0, |(size, _)| *size);
            // Several need an order of sizes that the administrator declares.
            let allowed = found.largest_predeclared.filter(|largest| {
                let sizes_are_used = smallest > 0 || found.sizes.len() > 1;
                offered > 0 && sizes_are_used && offered <= *largest
            });
            if allowed.is_none() {
                let known = found.largest_predeclared.unwrap_or(smallest);
                return Err(Refusal::SizeClass { known, offered });
            }
            return Ok(self.insert_queue(number, key, false));
        }
        let limit = self.settings.limits.platform_queues;
        if self.platform_queues.len() >= limit {
            return Err(Refusal::TooMany {
                what: "platform queues",
                key: "platform_queues",
                limit,
            });
        }
        let stickiness_limits = self.settings.stickiness_limits.clone().into();
        let number = self.insert_platform_queue(
            key,
            PlatformQueue {
                prefix: key.prefix.clone(),
                platform: key.platform.clone(),
                sizes: Vec::new(),
                largest_predeclared: None,
                stickiness_limits,
                maximum_queued_background_operations: 0,
                background_priority: 0,
                background_queued: 0,
            },
        );
        Ok(self.insert_queue(number, key, false))
    }

    /// Its last worker has gone.
    pub(super) fn expect_workers(&mut self, now: Instant, number: QueueNumber) {
        let queue = &mut self.queues[number];
        if !queue.predeclared {
            let end = now + self.settings.platform_queue_with_no_workers_timeout;
            self.timers
                .set(&mut queue.deadline, Timer::Queue(number), end);
        }
    }

    pub(super) fn expire_queue(&mut self, now: Instant, number: QueueNumber) {
        if self.queues[number].killing.is_some() {
            return self.kill_piece(now, number);
        }
        let response = Arc::new(EncodedResponse::failure(
            rpc::Code::Unavailable,
            "Workers for this instance name, platform and size class disappeared while task was queued".to_owned(),
        ));
        if !self.end_queued(now, number, &response) {
            let queue = &mut self.queues[number];
            self.timers
                .set(&mut queue.deadline, Timer::Queue(number), now);
            return;
        }
        let queue = self.queues.remove(number);
        self.invocations.release(queue.root);
        let platform_queue = &mut self.platform_queues[queue.platform_queue];
        platform_queue.sizes.retain(|(_, other)| *other != number);
        if platform_queue.sizes.is_empty() {
            self.platform_queues.remove(queue.platform_queue);
            if let Some(prefixes) = self.platforms.get_mut(&queue.key.platform) {
                prefixes.remove(&queue.key.prefix);
                if prefixes.is_empty() {
                    self.platforms.remove(&queue.key.platform);
                }
            }
        }
    }

    /// Ends some of what is to be killed; the rest at once after other calls.
    pub(super) fn kill_piece(&mut self, now: Instant, number: QueueNumber) {
        let queue = &mut self.queues[number];
        let Some(response) = queue.killing.clone() else {
            return;
        };
        if !queue.workers.is_empty() {
            queue.killing = None;
            return;
        }
        let ended = self.end_queued(now, number, &response);
        let queue = &mut self.queues[number];
        if ended {
            queue.killing = None;
            self.timers.clear(&mut queue.deadline, Timer::Queue(number));
            self.expect_workers(now, number);
        } else {
            self.timers
                .set(&mut queue.deadline, Timer::Queue(number), now);
        }
    }

    /// Some of what is queued gets this response; `true` when nothing is left.
    fn end_queued(
        &mut self,
        now: Instant,
        queue: QueueNumber,
        response: &Arc<EncodedResponse>,
    ) -> bool {
        let ended = self.end_awaiting(now, queue, response, ENDED_AT_ONCE);
        for _ in ended..ENDED_AT_ONCE {
            let Some(operation) = self.invocations.pick(self.queues[queue].root, &[]) else {
                return true;
            };
            let task = self.operations[operation].task;
            let response = match self.tasks[task].lost() {
                [] => response.clone(),
                lost => Arc::new(response.after_lost(lost)),
            };
            self.complete(now, task, response);
        }
        ended < ENDED_AT_ONCE && self.invocations.get(self.queues[queue].root).queued_in_all == 0
    }

    pub(super) fn no_workers(&self, now: Instant, request: &Request) -> NoWorkers {
        let all = self.platforms.iter().flat_map(|(platform, prefixes)| {
            let prefixes = prefixes.keys();
            prefixes.map(move |prefix| (platform, prefix))
        });
        let mut compared: Vec<_> = all
            .take(COMPARED_QUEUES)
            .map(|(platform, prefix)| {
                let differing = platform.differences(&request.platform);
                let fits = request.action.instance.strip_prefix(prefix).is_some();
                let distance = differing.len() + usize::from(!fits);
                (distance, prefix, platform, differing, fits)
            })
            .collect();
        // Nearest first.
        compared.sort_by_key(|(distance, ..)| *distance);
        let listed: Vec<String> = compared
            .into_iter()
            .take(LISTED_QUEUES)
            .map(|(_, prefix, platform, differing, fits)| {
                let name = format!("{:?} {}", prefix.as_str(), shorten(&platform.to_string()));
                match differing.is_empty() || !fits {
                    true => name,
                    false => {
                        let differing = shorten(&differing.join(", "));
                        format!("{name} (which differs in {differing})")
                    }
                }
            })
            .collect();
        let more = self.platform_queues.len() - listed.len();
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
