//! What is known of an action before it is queued.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    feedback::{Feedback, FeedbackDriven},
    page_rank::PageRank,
    selector::Selector,
    statistics::{Statistics, StatisticsKey},
};
use crate::{
    config::size_classes::SizeClasses, digest::DigestFunction, instance::InstanceName, proto::reapi,
};

/// How size classes are chosen, as the configuration says.
#[derive(Clone, Debug, Default)]
pub enum Analyzer {
    /// The smallest size class first, and once more on the largest after any failure. Nothing is
    /// remembered.
    #[default]
    Fallback,
    /// By what earlier executions of the same command on the same platform came to.
    FeedbackDriven(Arc<FeedbackDriven>),
}

impl From<&SizeClasses> for Analyzer {
    fn from(config: &SizeClasses) -> Self {
        if !config.feedback_driven {
            return Analyzer::Fallback;
        }
        let page_rank = config.page_rank.then(|| PageRank {
            acceptable_execution_time_increase_exponent: config
                .acceptable_execution_time_increase_exponent,
            smaller_size_class_execution_timeout_multiplier: config
                .smaller_size_class_execution_timeout_multiplier,
            minimum_execution_timeout: config.minimum_execution_timeout.get(),
            maximum_convergence_error: config.maximum_convergence_error,
        });
        Analyzer::FeedbackDriven(Arc::new(FeedbackDriven {
            failure_cache_duration: config.failure_cache_duration.get(),
            history_size: config.history_size,
            page_rank,
        }))
    }
}

impl Analyzer {
    /// Which statistics are to be read before the selector is made; `None` when none are needed.
    pub fn statistics_key(
        &self,
        instance: &InstanceName,
        function: DigestFunction,
        action: &reapi::Action,
    ) -> Option<StatisticsKey> {
        match self {
            Analyzer::Fallback => None,
            Analyzer::FeedbackDriven(_) => Some(StatisticsKey::new(instance, function, action)),
        }
    }

    /// The selector of an action that may take as long as `timeout`. Statistics are those that
    /// `statistics_key` asked for: without them nothing is known of the action, and nothing will be
    /// remembered of it.
    pub fn selector(
        &self,
        timeout: Duration,
        statistics: Option<(StatisticsKey, Arc<Statistics>)>,
        now: SystemTime,
    ) -> Selector {
        let feedback = match (self, statistics) {
            (Analyzer::FeedbackDriven(parameters), Some((key, statistics))) => {
                let failed_recently =
                    statistics.failed_within(parameters.failure_cache_duration, now);
                Some(Arc::new(Feedback {
                    parameters: parameters.clone(),
                    key,
                    statistics,
                    failed_recently,
                }))
            }
            (Analyzer::Fallback | Analyzer::FeedbackDriven(_), _) => None,
        };
        Selector::new(timeout, feedback)
    }
}
