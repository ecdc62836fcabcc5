//! What is known of an action from earlier executions, and how that is used.

use std::{sync::Arc, time::Duration};

use super::{
    page_rank::{PageRank, Strategies},
    statistics::{Statistics, StatisticsKey, StatisticsUpdate},
};

/// How earlier executions are used.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedbackDriven {
    /// An action that failed so recently goes to the largest size class at once, where its failure
    /// is final.
    pub failure_cache_duration: Duration,
    /// How many executions are remembered for each size class.
    pub history_size: usize,
    /// `None`: the smallest size class first, as without feedback.
    pub page_rank: Option<PageRank>,
}

/// What is known of an action from earlier executions.
#[derive(Debug)]
pub(super) struct Feedback {
    pub parameters: Arc<FeedbackDriven>,
    pub key: StatisticsKey,
    pub statistics: Arc<Statistics>,
    pub failed_recently: bool,
}

impl Feedback {
    /// How the action is to be executed.
    pub(super) fn strategies(&self, size_classes: &[u32], timeout: Duration) -> Strategies {
        if self.failed_recently {
            return Strategies::default();
        }
        match &self.parameters.page_rank {
            Some(page_rank) => page_rank.strategies(&self.statistics, size_classes, timeout),
            None => Strategies::smallest_first(size_classes, timeout),
        }
    }

    /// An update that changes nothing yet.
    pub(super) fn update(&self) -> StatisticsUpdate {
        StatisticsUpdate::new(self.key.clone(), self.parameters.history_size)
    }

    /// The median of what it took, if that is below the timeout; else the timeout.
    pub(super) fn expected_duration(&self, size_class: u32, timeout: Duration) -> Duration {
        let median = self.statistics.outcomes(size_class).median();
        median.filter(|median| *median < timeout).unwrap_or(timeout)
    }
}
