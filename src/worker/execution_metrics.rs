//! How long the stages of actions took, by how these ended: Buildbarn's metric, by its name.

use std::{fmt, time::Duration};

use prost_types::Timestamp;

use crate::{
    daemon::{Exposition, Histogram, Labels, failure_code},
    proto::{self, reapi::ExecuteResponse},
};

/// Buildbarn's words.
const STAGES: [&str; 3] = ["FetchingInputs", "Running", "UploadingOutputs"];
const RESULTS: [&str; 3] = ["Success", "NonZeroExitCode", "Failure"];
/// OK to UNAUTHENTICATED.
const CODES: usize = 17;

/// How long the stages of actions took, by how these ended.
#[derive(Debug)]
pub struct ExecutionMetrics(Vec<[Histogram; STAGES.len()]>);

impl Default for ExecutionMetrics {
    fn default() -> Self {
        let each = (0..RESULTS.len() * CODES).map(|_| Default::default());
        ExecutionMetrics(each.collect())
    }
}

impl ExecutionMetrics {
    /// An action has ended.
    pub fn executed(&self, response: &ExecuteResponse) {
        let result = response.result.as_ref();
        let code = response.status.as_ref().map_or(0, |status| status.code);
        let outcome = match (code, result.map_or(0, |result| result.exit_code)) {
            (0, 0) => 0,
            (0, _) => 1,
            _ => 2,
        };
        let code = usize::try_from(code).unwrap_or(2).min(CODES - 1);
        let Some(metadata) = result.and_then(|result| result.execution_metadata.as_ref()) else {
            return;
        };
        let spans = [
            (
                &metadata.input_fetch_start_timestamp,
                &metadata.input_fetch_completed_timestamp,
            ),
            (
                &metadata.execution_start_timestamp,
                &metadata.execution_completed_timestamp,
            ),
            (
                &metadata.output_upload_start_timestamp,
                &metadata.output_upload_completed_timestamp,
            ),
        ];
        let histograms = &self.0[outcome * CODES + code];
        for ((start, end), histogram) in spans.into_iter().zip(histograms) {
            if let Some(duration) = between(start, end) {
                histogram.observe(duration);
            }
        }
    }

    pub(super) fn expose(&self, exposition: &mut Exposition<'_>) -> fmt::Result {
        let rows = self.0.iter().enumerate().flat_map(|(number, histograms)| {
            let (outcome, code) = (number / CODES, number % CODES);
            STAGES
                .iter()
                .zip(histograms)
                .map(move |(stage, histogram)| {
                    let labels: Labels = vec![
                        ("result", RESULTS[outcome].to_owned()),
                        ("grpc_code", failure_code(code as i32).to_owned()),
                        ("stage", (*stage).to_owned()),
                    ];
                    (labels, histogram.read())
                })
        });
        exposition.durations(
            "buildbarn_builder_build_executor_duration_seconds",
            "How long each stage of an action took",
            rows,
        )
    }
}

fn between(start: &Option<Timestamp>, end: &Option<Timestamp>) -> Option<Duration> {
    let start = proto::system_time(start.as_ref()?)?;
    let end = proto::system_time(end.as_ref()?)?;
    end.duration_since(start).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        daemon::Metrics,
        proto::{reapi, rpc},
    };

    #[test]
    fn stages_are_counted_by_how_the_action_ended() {
        let metrics = ExecutionMetrics::default();
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        let response = |code, exit_code| ExecuteResponse {
            status: Some(proto::status(code, "")),
            result: Some(reapi::ActionResult {
                exit_code,
                execution_metadata: Some(reapi::ExecutedActionMetadata {
                    input_fetch_start_timestamp: at(100),
                    input_fetch_completed_timestamp: at(101),
                    execution_start_timestamp: at(101),
                    execution_completed_timestamp: at(104),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        metrics.executed(&response(rpc::Code::Ok, 0));
        metrics.executed(&response(rpc::Code::Ok, 1));
        metrics.executed(&response(rpc::Code::Unavailable, 0));
        let metrics = Arc::new(metrics);
        let text = Metrics::new()
            .with(move |exposition| metrics.expose(exposition))
            .render();
        let name = "buildbarn_builder_build_executor_duration_seconds";
        for labels in [
            "result=\"Success\",grpc_code=\"\",stage=\"Running\"",
            "result=\"NonZeroExitCode\",grpc_code=\"\",stage=\"FetchingInputs\"",
            "result=\"Failure\",grpc_code=\"Unavailable\",stage=\"Running\"",
        ] {
            assert!(
                text.contains(&format!("{name}_count{{{labels}}} 1\n")),
                "{text}"
            );
        }
        assert!(!text.contains("UploadingOutputs"));
    }
}
