//! Of bb_scheduler.toml: on workers of which size an action is executed.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Duration};

/// The defaults are what Buildbarn advises.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SizeClasses {
    /// Whether earlier executions count; without, the smallest size class first, then the largest.
    pub feedback_driven: bool,
    /// An action that failed so recently is executed on the largest size class at once.
    pub failure_cache_duration: Duration,
    /// How many executions are remembered for each size class of an action.
    pub history_size: usize,
    /// Whether size classes are chosen by how fast actions are on them; without, the smallest first.
    pub page_rank: bool,
    pub acceptable_execution_time_increase_exponent: f64,
    pub smaller_size_class_execution_timeout_multiplier: f64,
    pub minimum_execution_timeout: Duration,
    pub maximum_convergence_error: f64,
}

impl Default for SizeClasses {
    fn default() -> Self {
        SizeClasses {
            feedback_driven: false,
            failure_cache_duration: Duration::seconds(24 * 60 * 60),
            history_size: 32,
            page_rank: true,
            acceptable_execution_time_increase_exponent: 0.5,
            smaller_size_class_execution_timeout_multiplier: 1.5,
            minimum_execution_timeout: Duration::seconds(10),
            maximum_convergence_error: 0.002,
        }
    }
}

impl SizeClasses {
    pub(super) fn validate(&self, diagnostics: &mut Diagnostics) {
        let key = |name: &str| format!("scheduling.size_classes.{name}");
        diagnostics.require(
            (1..=1000).contains(&self.history_size),
            &key("history_size"),
            "it is how many executions are remembered, at least 1 and at most 1000; 32 is a good start",
        );
        diagnostics.require(
            (0.0..=1.0).contains(&self.acceptable_execution_time_increase_exponent),
            &key("acceptable_execution_time_increase_exponent"),
            "0 is for as fast as on the largest workers, 1 for as much slower as workers are smaller; write what is between, such as 0.5",
        );
        diagnostics.require(
            (1.0..=100.0).contains(&self.smaller_size_class_execution_timeout_multiplier),
            &key("smaller_size_class_execution_timeout_multiplier"),
            "an action is given so many times what is acceptable, so that it is at least 1; 1.5 is a good start",
        );
        diagnostics.require(
            self.minimum_execution_timeout.get() >= std::time::Duration::from_millis(1),
            &key("minimum_execution_timeout"),
            "no action would succeed on the smallest workers; 10s is a good start",
        );
        diagnostics.require(
            (1e-9..=0.1).contains(&self.maximum_convergence_error),
            &key("maximum_convergence_error"),
            "it is an error of probabilities, at most 0.1 and above 0; 0.002 is a good start",
        );
    }
}
