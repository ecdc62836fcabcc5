//! What a worker tells Prometheus: what Buildbarn's does, by its names, and of its cache, its input roots and
//! its disks.

use std::{fmt, sync::Arc};

use super::{
    execute::Executor,
    execution_metrics::ExecutionMetrics,
    inputs::{WorkerBuildDirectory, file_cache::FileCache},
    status_line::StatusLine,
};
use crate::daemon::{self, Exposition, Metrics};

/// What a worker's numbers are taken from.
#[derive(Clone)]
pub(super) struct WorkerSources {
    pub executions: Arc<ExecutionMetrics>,
    pub cache: Arc<FileCache>,
    pub build_directory: Arc<WorkerBuildDirectory>,
    pub executors: Vec<Arc<Executor>>,
    pub status_line: Arc<StatusLine>,
}

/// All that a worker tells.
pub(super) fn metrics(sources: WorkerSources) -> Metrics {
    Metrics::new().with(move |exposition| {
        sources.executions.expose(exposition)?;
        sources.expose(exposition)
    })
}

impl WorkerSources {
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
        let (roots, stashed) = self.build_directory.idle_counts();
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
        let counts = self.build_directory.lay_out_counts();
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
                &counts.created_files,
            ),
        ] {
            let count = count.load(std::sync::atomic::Ordering::Relaxed);
            exposition.counter(&format!("bb_worker_{name}"), help, count)?;
        }
        let disks = [
            ("cache", self.cache.path()),
            ("build", self.build_directory.path()),
        ];
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
        let (roots, stashed) = self.build_directory.idle_counts();
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
                "build_directory": self.build_directory.path(),
                "build_directory_free_bytes": free(self.build_directory.path()),
            },
        })
    }
}
