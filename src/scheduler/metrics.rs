//! What a scheduler tells Prometheus: what Buildbarn's does, by its names, and the gauges that it leaves
//! out, for people and for what starts hosts.
//!
//! Each size-class queue that has counts of its own has series of its own, and all others have them together,
//! with `others` as their platform.

use std::{collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

use super::{
    queue::{ExecutionResult, InvocationCounts, QueueStatistics, SizeClassQueueKey},
    shared_queue::SharedQueue,
};
use crate::{
    daemon::{Exposition, Labels, Metrics, failure_code},
    proto,
    storage::{Backend, embedded::InstanceUsage},
};

/// Characters of a platform in a label.
const LONGEST_PLATFORM: usize = 200;
/// Instance names with limits of their own that have series.
const MOST_INSTANCE_LIMITS: usize = 100;

/// What is in one queue, or in several, now.
#[derive(Clone, Copy, Debug, Default)]
struct Gauges {
    queues: u64,
    workers: u64,
    executing: u64,
    idle: u64,
    drains: u64,
    queued: u64,
    oldest_wait: f64,
}

/// All that a scheduler tells.
pub(super) fn metrics(queue: &Arc<SharedQueue>, storage: &Backend) -> Metrics {
    let (queue, storage) = (queue.clone(), storage.clone());
    Metrics::new()
        .with(move |exposition| expose_queue(&queue, exposition))
        .with(move |exposition| expose_store(&storage, exposition))
}

fn labels_of(key: Option<&SizeClassQueueKey>) -> Labels {
    let (instance, platform, size_class) = match key {
        Some(key) => (
            key.prefix.as_str().to_owned(),
            bounded(key.platform.to_string()),
            key.size_class.to_string(),
        ),
        None => (String::new(), "others".to_owned(), String::new()),
    };
    vec![
        ("instance_name_prefix", instance),
        ("platform", platform),
        ("size_class", size_class),
    ]
}

/// What was cut is still told from what begins alike.
fn bounded(text: String) -> String {
    if text.chars().count() <= LONGEST_PLATFORM {
        return text;
    }
    let start: String = text.chars().take(LONGEST_PLATFORM).collect();
    format!("{start}…{:08x}", crc32fast::hash(text.as_bytes()))
}

fn with(mut labels: Labels, name: &'static str, value: impl Into<String>) -> Labels {
    labels.push((name, value.into()));
    labels
}

fn expose_queue(queue: &SharedQueue, exposition: &mut Exposition<'_>) -> fmt::Result {
    let (rows, statistics) = queue.look(|queue| {
        let rows: Vec<_> = queue
            .platform_queues()
            .into_iter()
            .flat_map(|row| row.size_classes)
            .map(|row| {
                let oldest = queue.oldest_queued(&row.key);
                (row, oldest)
            })
            .collect();
        (rows, queue.statistics())
    });
    let now = SystemTime::now();
    let counted: BTreeMap<Option<Arc<SizeClassQueueKey>>, QueueStatistics> =
        statistics.into_iter().collect();
    let mut gauges: BTreeMap<Option<Arc<SizeClassQueueKey>>, Gauges> = BTreeMap::new();
    // Queues with workers come first, so that these have series of their own from the start.
    for (row, oldest) in rows {
        let key = Some(row.key.clone()).filter(|key| counted.contains_key(&Some(key.clone())));
        let of = gauges.entry(key).or_default();
        let oldest = oldest.and_then(|oldest| proto::system_time(&oldest));
        let wait = oldest.and_then(|oldest| now.duration_since(oldest).ok());
        of.queues += 1;
        of.workers += row.workers as u64;
        of.executing += row.root.executing_workers as u64;
        of.idle += row.root.idle_synchronizing_workers as u64;
        of.drains += row.drains as u64;
        of.queued += (row.root.queued_directly + row.root.queued_indirectly) as u64;
        of.oldest_wait = of
            .oldest_wait
            .max(wait.map_or(0.0, |wait| wait.as_secs_f64()));
    }
    let mut gauge = |name: &str, help: &str, value: fn(&Gauges) -> f64| {
        let rows = gauges
            .iter()
            .map(|(key, gauges)| (labels_of(key.as_deref()), value(gauges)));
        exposition.gauges(name, help, rows)
    };
    gauge("bb_scheduler_queues", "Size-class queues", |of| {
        of.queues as f64
    })?;
    gauge("bb_scheduler_workers", "Slots of workers", |of| {
        of.workers as f64
    })?;
    gauge(
        "bb_scheduler_executing_workers",
        "Slots that execute an action",
        |of| of.executing as f64,
    )?;
    gauge(
        "bb_scheduler_idle_workers",
        "Slots that wait for an action",
        |of| of.idle as f64,
    )?;
    gauge("bb_scheduler_drains", "Drains that are set", |of| {
        of.drains as f64
    })?;
    gauge(
        "bb_scheduler_queued_operations",
        "Operations that wait for a worker",
        |of| of.queued as f64,
    )?;
    gauge(
        "bb_scheduler_oldest_queued_seconds",
        "For how long the operation waits that waits for longest; 0 when none does",
        |of| of.oldest_wait,
    )?;
    gauge(
        "bb_scheduler_wanted_workers",
        "Slots with which all that is queued and executing could be executed at once",
        |of| (of.queued + of.executing) as f64,
    )?;
    expose_statistics(&counted, exposition)
}

fn expose_statistics(
    counted: &BTreeMap<Option<Arc<SizeClassQueueKey>>, QueueStatistics>,
    exposition: &mut Exposition<'_>,
) -> fmt::Result {
    const PREFIX: &str = "buildbarn_builder_in_memory_build_queue";
    let each = || {
        counted
            .iter()
            .map(|(key, statistics)| (labels_of(key.as_deref()), statistics))
    };
    exposition.counters(
        &format!("{PREFIX}_tasks_scheduled"),
        "Tasks that came, by whether they found a worker at once",
        each().flat_map(|(labels, of)| {
            [("Worker", of.assigned_at_once), ("Queue", of.queued)]
                .into_iter()
                .flat_map(move |(assignment, counts)| {
                    let labels = with(labels.clone(), "assignment", assignment);
                    let row =
                        |value: &str, count| (with(labels.clone(), "do_not_cache", value), count);
                    [
                        row("false", counts.cacheable),
                        row("true", counts.not_cacheable),
                    ]
                })
        }),
    )?;
    exposition.counters(
        &format!("{PREFIX}_in_flight_deduplications"),
        "Executions of cacheable actions, by whether one of the same action was there",
        each().flat_map(|(labels, of)| {
            [
                (
                    with(labels.clone(), "outcome", "SameInvocation"),
                    of.joined_own,
                ),
                (
                    with(labels.clone(), "outcome", "OtherInvocation"),
                    of.joined_others,
                ),
                (
                    with(labels, "outcome", "New"),
                    of.assigned_at_once.cacheable + of.queued.cacheable,
                ),
            ]
        }),
    )?;
    exposition.counters(
        &format!("{PREFIX}_workers_created"),
        "Slots of workers that came",
        each().map(|(labels, of)| (labels, of.workers_created)),
    )?;
    exposition.counters(
        &format!("{PREFIX}_workers_terminating"),
        "Slots of workers that were told to end",
        each().map(|(labels, of)| (labels, of.workers_terminating)),
    )?;
    exposition.counters(
        &format!("{PREFIX}_workers_removed"),
        "Slots of workers that fell silent, by what they did",
        each().flat_map(|(labels, of)| {
            [
                (
                    with(labels.clone(), "state", "Idle"),
                    of.idle_workers_removed,
                ),
                (
                    with(labels, "state", "Executing"),
                    of.executing_workers_removed,
                ),
            ]
        }),
    )?;
    exposition.durations(
        &format!("{PREFIX}_tasks_queued_duration_seconds"),
        "How long tasks were queued before they were executed",
        each().map(|(labels, of)| (labels, of.queued_durations.clone())),
    )?;
    exposition.durations(
        &format!("{PREFIX}_tasks_executing_duration_seconds"),
        "How long tasks were executed, by how that ended",
        each().flat_map(|(labels, of)| by_result(labels, &of.executing_durations)),
    )?;
    exposition.counts(
        &format!("{PREFIX}_tasks_executing_retries"),
        "How often workers came back without a task's result, by how its execution ended",
        each().flat_map(|(labels, of)| by_result(labels, &of.executing_retries)),
    )?;
    exposition.durations(
        &format!("{PREFIX}_tasks_completed_duration_seconds"),
        "How long the results of tasks were held for their clients",
        each().map(|(labels, of)| (labels, of.completed_durations.clone())),
    )?;
    exposition.counts(
        &format!("{PREFIX}_worker_invocation_stickiness_retained"),
        "At how many levels workers that were given a task stayed with the invocation of the one before",
        each().map(|(labels, of)| (labels, of.stickiness_retained.clone())),
    )?;
    for (name, help, value) in [
        (
            "created",
            "Invocations that came",
            (|of| of.created) as fn(&InvocationCounts) -> u64,
        ),
        (
            "activated",
            "Times that the first operation of an invocation was queued or executed",
            |of| of.activated,
        ),
        (
            "deactivated",
            "Times that no operation of an invocation was queued or executed any more",
            |of| of.deactivated,
        ),
        (
            "removed",
            "Invocations that nobody works for any more",
            |of| of.removed,
        ),
    ] {
        let rows = each().flat_map(|(labels, of)| {
            of.invocations
                .iter()
                .enumerate()
                .map(move |(depth, counts)| {
                    (
                        with(labels.clone(), "depth", depth.to_string()),
                        value(counts),
                    )
                })
        });
        exposition.counters(&format!("{PREFIX}_invocations_{name}"), help, rows)?;
    }
    Ok(())
}

/// Rows with how executions ended.
fn by_result<T: Clone>(
    labels: Labels,
    rows: &BTreeMap<(ExecutionResult, i32), T>,
) -> impl Iterator<Item = (Labels, T)> {
    rows.iter().map(move |((result, code), value)| {
        let labels = with(labels.clone(), "result", result.name());
        (
            with(labels, "grpc_code", failure_code(*code)),
            value.clone(),
        )
    })
}

fn expose_store(storage: &Backend, exposition: &mut Exposition<'_>) -> fmt::Result {
    let Some(store) = storage.embedded() else {
        return Ok(());
    };
    let usage = store.usage();
    for (name, help, value) in [
        (
            "used_bytes",
            "Bytes that the embedded store has on disk",
            usage.used,
        ),
        (
            "maximum_bytes",
            "storage.embedded.maximum_size",
            usage.maximum,
        ),
        (
            "free_bytes",
            "Free on the file system of the embedded store",
            usage.free,
        ),
        (
            "entries",
            "Blobs and action results of the embedded store",
            usage.entries as u64,
        ),
    ] {
        exposition.gauge(&format!("bb_storage_{name}"), help, value as f64)?;
    }
    for (name, help, value) in [
        (
            "used_bytes",
            "Bytes of the embedded store that uploads with instance names of a limit of their own take",
            (|of| of.used) as fn(&InstanceUsage) -> u64,
        ),
        ("maximum_bytes", "storage.embedded.instance_limits", |of| {
            of.maximum
        }),
    ] {
        let rows = usage.instances.iter().take(MOST_INSTANCE_LIMITS);
        let rows = rows.map(|of| {
            let prefix = bounded(of.prefix.to_string());
            (vec![("instance_name_prefix", prefix)], value(of) as f64)
        });
        exposition.gauges(&format!("bb_storage_instance_{name}"), help, rows)?;
    }
    let counts = store.counts();
    exposition.counters(
        "bb_storage_lookups",
        "Blobs that the embedded store was asked for, by whether it had them",
        [
            (vec![("result", "Hit".to_owned())], counts.hits.get()),
            (vec![("result", "Miss".to_owned())], counts.misses.get()),
        ],
    )?;
    exposition.counter(
        "bb_storage_written_bytes",
        "Bytes of blobs and results that were stored",
        counts.written.get(),
    )?;
    exposition.counter(
        "bb_storage_evicted_entries",
        "Blobs and results that made room for others",
        counts.evicted.get(),
    )?;
    match store.retention() {
        // Nothing had to go yet.
        None => Ok(()),
        Some(age) => exposition.gauge(
            "bb_storage_retention_seconds",
            "For how long what was evicted last had not been used",
            age.as_secs_f64(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::scheduler::Config, scheduler::statistics_store::StatisticsStore,
        storage::InitialSizeClassCache,
    };

    /// Each has a worker, and so counts of its own as far as there is room.
    #[tokio::test]
    async fn ten_thousand_platforms_make_no_more_series_than_a_hundred() {
        let count = async |platforms: usize| {
            let sections: String = (0..platforms)
                .map(|number| {
                    format!(
                        "[[predeclared_platform_queues]]\ninstance_name_prefix = \"i{number}\"\n\
                         platform = {{ number = \"{number}\" }}\n"
                    )
                })
                .collect();
            let config: Config = toml::from_str(&sections).unwrap();
            let store = tempfile::tempdir().unwrap();
            let storage = crate::storage::embedded::Store::open(store.path(), 64 << 20).unwrap();
            let storage = Backend::Embedded(Arc::new(storage));
            let statistics = StatisticsStore::new(InitialSizeClassCache::open(
                &config.storage.initial_size_class_cache,
                &storage,
                &Default::default(),
            ));
            let queue = SharedQueue::new((&config).into(), &statistics);
            queue.count_worker_in_each_queue();
            let text = metrics(&queue, &storage).render();
            text.lines()
                .filter(|line| line.contains("platform="))
                .count()
        };
        let (hundred, all) = (count(101).await, count(10_000).await);
        assert!(hundred > 100 && all <= hundred, "{hundred} {all}");
    }

    #[test]
    fn platforms_of_any_length_are_told_apart_in_labels_of_a_few_hundred_bytes() {
        let long = |end: &str| bounded("x".repeat(10_000) + end);
        assert_eq!(bounded("[]".to_owned()), "[]");
        assert_ne!(long("a"), long("b"));
        assert!(long("a").chars().count() < 220);
    }
}
