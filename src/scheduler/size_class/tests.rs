//! The laws of size classes, one by one.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    feedback::Feedback,
    outcomes::Outcomes,
    page_rank::{Placement, Strategies},
    *,
};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{iscc, reapi},
};
use PreviousExecution::{Failed, Succeeded, TimedOut};

mod fallback;
mod feedback_driven;
mod outcomes;
mod page_ranks;

const CLASSES: &[u32] = &[1, 2, 4, 8];
const MINUTE: Duration = Duration::from_secs(60);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn success(seconds: u64) -> PreviousExecution {
    Succeeded(Duration::from_secs(seconds))
}

/// The random number for a fraction of all of them.
fn random(fraction: f64) -> u64 {
    (fraction * u64::MAX as f64) as u64
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_620_242_374)
}

fn key() -> StatisticsKey {
    StatisticsKey::new(
        &InstanceName::empty(),
        DigestFunction::Sha256,
        &reapi::Action::default(),
    )
}

fn statistics(size_classes: &[(u32, &[PreviousExecution])]) -> Statistics {
    let mut statistics = Statistics::default();
    for (size_class, executions) in size_classes {
        let executions = executions.iter().map(|execution| (*size_class, *execution));
        statistics.apply(
            &StatisticsUpdate {
                executions: executions.collect(),
                ..StatisticsUpdate::new(key(), 100)
            },
            now(),
        );
    }
    statistics
}

fn page_rank(exponent: f64) -> PageRank {
    PageRank {
        acceptable_execution_time_increase_exponent: exponent,
        smaller_size_class_execution_timeout_multiplier: 1.5,
        minimum_execution_timeout: seconds(5),
        maximum_convergence_error: 0.001,
    }
}

fn feedback_driven(page_rank: Option<PageRank>) -> Analyzer {
    Analyzer::FeedbackDriven(Arc::new(FeedbackDriven {
        failure_cache_duration: seconds(24 * 60 * 60),
        history_size: 5,
        page_rank,
    }))
}

fn selector(analyzer: &Analyzer, statistics: &Statistics) -> Selector {
    analyzer.selector(
        30 * MINUTE,
        Some((key(), Arc::new(statistics.clone()))),
        now(),
    )
}

/// What is known after an update.
fn updated(statistics: &Statistics, update: Option<StatisticsUpdate>) -> Statistics {
    let mut statistics = statistics.clone();
    statistics.apply(&update.unwrap(), now());
    statistics
}

#[test]
fn a_selector_is_small() {
    assert!(size_of::<Selector>() <= 32);
    assert!(size_of::<Learner>() <= 112);
    assert!(size_of::<Feedback>() <= 256);
}
