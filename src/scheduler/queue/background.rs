//! Background learning: an action is executed again on a smaller size class, for nobody but us.

use std::{sync::Arc, time::Instant};

use prost::Name;
use prost_types::Any;
use uuid::Uuid;

use super::{
    InvocationKey, InvocationKeys, Queue, QueuedAction, Request, Task, TaskState,
    arena::PlatformQueueNumber,
};
use crate::{
    proto::buildqueuestate::BackgroundLearning,
    scheduler::size_class::{Selection, Selector},
};

impl<C, W: Clone> Queue<C, W> {
    pub(super) fn learn_in_background(
        &mut self,
        now: Instant,
        platform_queue: PlatformQueueNumber,
        mut action: Arc<QueuedAction>,
        selector: Selector,
        selection: Selection,
    ) {
        let platform = &self.platform_queues[platform_queue];
        if platform.background_queued >= platform.maximum_queued_background_operations {
            selection.learner.abandoned();
            return;
        }
        let key = InvocationKey::new(&Any {
            type_url: BackgroundLearning::type_url(),
            value: Vec::new(),
        });
        let queue = platform.sizes[selection.index].1;
        let priority = platform.background_priority;
        let arrival = self.number();
        // Its result is for nobody.
        Arc::make_mut(&mut action).do_not_cache = true;
        let key_of_queue = self.queues[queue].key.clone();
        let suffix = action.instance.strip_prefix(&key_of_queue.prefix);
        self.totals.tasks += 1;
        let task = self.tasks.insert(Task {
            action: action.clone(),
            key: key_of_queue,
            queue,
            suffix: suffix.unwrap_or_else(crate::instance::InstanceName::empty),
            arrival,
            retries: 0,
            lost: Vec::new(),
            operations: Vec::with_capacity(1),
            timeout: selection.timeout,
            expected_duration: selection.expected_duration,
            learner: Some(selection.learner),
            selector: selector.clone(),
            background: true,
            skips_cache_lookup: true,
            state: TaskState::Fresh,
            version: 0,
        });
        let request = Request {
            // Unlike those of clients, which are random.
            name: Uuid::from_u64_pair(self.settings.first_attempt, arrival),
            resumes: false,
            action,
            platform: Default::default(),
            selector,
            priority,
            invocation: InvocationKeys::new([key]),
            skip_cache_lookup: true,
        };
        self.insert_operation(task, &request, None);
        self.schedule(now, task);
    }
}
