//! Background learning: an action is executed again on a smaller size class, for nobody but us.

use std::{sync::Arc, time::Instant};

use prost::Name;
use prost_types::Any;
use uuid::Uuid;

use super::{
    InvocationKey, InvocationKeys, Queue, QueuedAction, Request, arena::PlatformQueueNumber,
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
        // Its result is for nobody.
        Arc::make_mut(&mut action).do_not_cache = true;
        let task = self.insert_task(
            action.clone(),
            queue,
            selector.clone(),
            selection,
            true,
            true,
        );
        let request = Request {
            // Unlike those of clients, which are random.
            name: Uuid::from_u64_pair(self.settings.first_attempt, self.tasks[task].arrival),
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
