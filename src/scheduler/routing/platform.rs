//! Platforms as they are compared: without the properties that are ignored, and with those that a
//! platform queue takes with any value, or with a smaller number.

use std::cmp::Ordering;

use super::super::queue::Platform;
use crate::{
    config::routing::{PlatformQueue, at_least_number, name_matches},
    instance::InstanceName,
};

/// Patterns of names of properties.
pub(super) struct IgnoredProperties(Vec<String>);

impl IgnoredProperties {
    pub(super) fn new(patterns: &[String]) -> Self {
        IgnoredProperties(patterns.to_vec())
    }

    pub(super) fn strip(&self, platform: &Platform) -> Platform {
        platform.without(|name| self.0.iter().any(|pattern| name_matches(pattern, name)))
    }
}

/// The platform queues that take more than just their own platform.
pub(super) struct QueueMatches(Vec<QueueMatch>);

struct QueueMatch {
    prefix: InstanceName,
    platform: Platform,
    any_value: Vec<String>,
    at_least: Vec<(String, f64)>,
    /// What must be equal.
    rest: Platform,
}

impl QueueMatches {
    pub(super) fn new(queues: &[PlatformQueue]) -> Self {
        let queues = queues
            .iter()
            .filter(|queue| !queue.any_value.is_empty() || !queue.at_least.is_empty());
        QueueMatches(queues.filter_map(QueueMatch::new).collect())
    }

    /// Platforms of the queues that take an action: those of the longest prefix first, among them those
    /// that have the least of what is compared by number.
    pub(super) fn of(&self, instance: &InstanceName, asked: &Platform) -> Vec<Platform> {
        let mut found: Vec<&QueueMatch> = self
            .0
            .iter()
            .filter(|queue| instance.strip_prefix(&queue.prefix).is_some() && queue.takes(asked))
            .collect();
        found.sort_by(|a, b| a.order(b));
        found
            .into_iter()
            .map(|queue| queue.platform.clone())
            .collect()
    }
}

impl QueueMatch {
    fn new(queue: &PlatformQueue) -> Option<Self> {
        let platform = Platform::from(&queue.platform);
        let at_least = queue.at_least.iter().map(|name| {
            let number = at_least_number(queue.platform.get(name)?)?;
            Some((name.clone(), number))
        });
        let mut found = QueueMatch {
            // The configuration's check refuses others.
            prefix: InstanceName::parse(&queue.instance_name_prefix).ok()?,
            any_value: queue.any_value.clone(),
            at_least: at_least.collect::<Option<_>>()?,
            rest: Platform::default(),
            platform,
        };
        found.rest = found.compared_exactly(&found.platform);
        Some(found)
    }

    fn compared_exactly(&self, platform: &Platform) -> Platform {
        platform.without(|name| {
            self.any_value.iter().any(|any| any == name)
                || self.at_least.iter().any(|(number, _)| number == name)
        })
    }

    fn takes(&self, asked: &Platform) -> bool {
        let enough = |(name, value): &(String, String)| {
            let has = self.at_least.iter().find(|(number, _)| number == name);
            has.is_none_or(|(_, has)| at_least_number(value).is_some_and(|wants| wants <= *has))
        };
        self.compared_exactly(asked) == self.rest && asked.properties().iter().all(enough)
    }

    fn order(&self, other: &Self) -> Ordering {
        let depth = |queue: &Self| queue.prefix.components().count();
        let numbers = |queue: &Self| {
            queue
                .at_least
                .iter()
                .map(|(_, number)| *number)
                .sum::<f64>()
        };
        depth(other)
            .cmp(&depth(self))
            .then(numbers(self).total_cmp(&numbers(other)))
    }
}
