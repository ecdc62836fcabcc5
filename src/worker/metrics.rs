//! What a worker tells Prometheus: what Buildbarn's does, by its names, and of its cache, its input roots and
//! its disks.

use std::{fmt, sync::Arc, time::Duration};

use prost_types::Timestamp;

use super::{
    execute::Executor,
    inputs::{RootStore, file_cache::FileCache},
    status_line::StatusLine,
};
use crate::{
    daemon::{self, Exposition, Histogram, Labels, Metrics},
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

    fn expose(&self, exposition: &mut Exposition<'_>) -> fmt::Result {
        let rows = self.0.iter().enumerate().flat_map(|(number, histograms)| {
            let (outcome, code) = (number / CODES, number % CODES);
            STAGES
                .iter()
                .zip(histograms)
                .map(move |(stage, histogram)| {
                    let code = tonic::Code::from_i32(code as i32);
                    let labels: Labels = vec![
                        ("result", RESULTS[outcome].to_owned()),
                        ("grpc_code", format!("{code:?}")),
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

/// What a worker's numbers are taken from.
#[derive(Clone)]
pub(super) struct Sources {
    pub executions: Arc<ExecutionMetrics>,
    pub cache: Arc<FileCache>,
    pub store: Arc<RootStore>,
    pub executors: Vec<Arc<Executor>>,
    pub status_line: Arc<StatusLine>,
}

/// All that a worker tells.
pub(super) fn metrics(sources: Sources) -> Metrics {
    Metrics::new().with(move |exposition| {
        sources.executions.expose(exposition)?;
        sources.expose(exposition)
    })
}

impl Sources {
    fn expose(&self, exposition: &mut Exposition<'_>) -> fmt::Result {
        let (slots, running) = self.status_line.slots();
        exposition.gauge(
            "bb_worker_slots",
            "Actions that may run at a time",
            slots as f64,
        )?;
        exposition.gauge(
            "bb_worker_running_actions",
            "Actions that run",
            running as f64,
        )?;
        let serving = self.readiness().is_ok();
        exposition.gauge(
            "bb_worker_serving",
            "1 when runner, scheduler and storage answer, and the worker takes actions; else 0",
            f64::from(u8::from(serving)),
        )?;
        let out = |executor: &&Arc<Executor>| executor.availability.trouble().is_some();
        let out_of_service = self.executors.iter().filter(out).count();
        exposition.gauge(
            "bb_worker_runners_out_of_service",
            "Runners that are given no actions, as several failed in a row for which these are not to blame",
            out_of_service as f64,
        )?;
        let (files, bytes) = self.cache.usage();
        exposition.gauge("bb_worker_cache_files", "Files in the cache", files as f64)?;
        exposition.gauge("bb_worker_cache_bytes", "Their bytes", bytes as f64)?;
        let uses = self.cache.uses();
        exposition.counters(
            "bb_worker_cache_lookups",
            "Input files, by whether the cache had them",
            [
                (vec![("result", "Hit".to_owned())], uses.hits.get()),
                (vec![("result", "Miss".to_owned())], uses.misses.get()),
            ],
        )?;
        exposition.counter(
            "bb_worker_cache_fetched_bytes",
            "Bytes of input files that had to be fetched",
            uses.fetched_bytes.get(),
        )?;
        let (roots, stashed) = self.store.kept();
        exposition.gauge(
            "bb_worker_kept_roots",
            "Input roots that are kept",
            roots as f64,
        )?;
        exposition.gauge(
            "bb_worker_stashed_subtrees",
            "Subtrees that are kept",
            stashed as f64,
        )?;
        let counts = self.store.counts();
        for (name, help, count) in [
            ("input_roots", "Input roots that were made", &counts.roots),
            (
                "input_entries",
                "Files and directories of input roots",
                &counts.entries,
            ),
            (
                "input_links",
                "Files that had to be made for them",
                &counts.links,
            ),
        ] {
            let count = count.load(std::sync::atomic::Ordering::Relaxed);
            exposition.counter(&format!("bb_worker_{name}"), help, count)?;
        }
        let disks = [("cache", self.cache.path()), ("build", self.store.path())];
        let spaces: Vec<_> = disks
            .into_iter()
            .filter_map(|(name, path)| Some((name, daemon::disk::space(path)?)))
            .collect();
        let rows = |value: fn(&daemon::disk::DiskSpace) -> u64| {
            let row = move |(name, space): &(&str, daemon::disk::DiskSpace)| {
                (vec![("directory", (*name).to_owned())], value(space) as f64)
            };
            spaces.iter().map(row).collect::<Vec<_>>()
        };
        exposition.gauges(
            "bb_worker_disk_free_bytes",
            "Free on the file system of the directory",
            rows(|space| space.available),
        )?;
        exposition.gauges(
            "bb_worker_disk_size_bytes",
            "Size of the file system of the directory",
            rows(|space| space.total),
        )
    }

    /// Whether the worker serves; else why not.
    pub(super) fn readiness(&self) -> Result<(), String> {
        self.status_line.readiness()?;
        let mut troubles = self.executors.iter().map(|of| of.availability.trouble());
        match troubles.clone().all(|trouble| trouble.is_some()) {
            true => troubles.find_map(|trouble| trouble).map_or(Ok(()), Err),
            false => Ok(()),
        }
    }

    /// For `bb_worker status` and `bb_worker cache`.
    pub(super) fn status(&self, stopping: bool) -> serde_json::Value {
        let (slots, running) = self.status_line.slots();
        let readiness = self.readiness();
        let troubles = self
            .executors
            .iter()
            .filter_map(|of| of.availability.trouble());
        let (files, bytes) = self.cache.usage();
        let uses = self.cache.uses();
        let (roots, stashed) = self.store.kept();
        let free = |path| daemon::disk::space(path).map(|space| space.available);
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "line": self.status_line.line(stopping),
            "serving": readiness.is_ok() && !stopping,
            "not_serving_because": readiness.err(),
            "scheduler": self.status_line.scheduler(),
            "slots": slots,
            "running": running,
            "out_of_service": troubles.collect::<Vec<_>>(),
            "workers": self.executors.iter().flat_map(|of| &of.workers).collect::<Vec<_>>(),
            "cache": {
                "directory": self.cache.path(),
                "files": files,
                "bytes": bytes,
                "maximum_bytes": self.cache.limits().bytes,
                "maximum_files": self.cache.limits().files,
                "free_bytes": free(self.cache.path()),
                "hits": uses.hits.get(),
                "misses": uses.misses.get(),
                "fetched_bytes": uses.fetched_bytes.get(),
                "kept_roots": roots,
                "stashed_subtrees": stashed,
                "build_directory": self.store.path(),
                "build_directory_free_bytes": free(self.store.path()),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{reapi, rpc};

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
            "result=\"Success\",grpc_code=\"Ok\",stage=\"Running\"",
            "result=\"NonZeroExitCode\",grpc_code=\"Ok\",stage=\"FetchingInputs\"",
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
