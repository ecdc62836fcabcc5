//! Actions without inputs or outputs through the whole stack: what the farm itself costs.
//!
//! usage: cargo bench --bench farm -- actions [COUNT]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use bb_remote_execution::proto::reapi::ExecutedActionMetadata;

use crate::harness::{Client, Daemon, Farm, Task, is_ok, is_root};

pub fn run(arguments: &[String]) {
    if !is_root() {
        return;
    }
    let count: usize = arguments
        .first()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2000);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        for place in ["/var/tmp", "/dev/shm"] {
            measure(Path::new(place), count).await;
        }
    });
}

async fn measure(place: &Path, count: usize) {
    let mut farm = Farm::start(place, 2, "").await;
    println!(
        "no-input actions, 2 slots, directories in {}",
        place.display()
    );
    println!(
        "{:>9} {:>10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "in flight", "actions/s", "p50 ms", "p99 ms", "queue", "fetch", "run", "upload"
    );
    let client = farm.client();
    for in_flight in [1, 8, 64] {
        // Warm up, and have the blobs there: the round trip measured is Execute's alone.
        let total = if in_flight == 1 { count / 4 } else { count };
        let mut actions = Vec::new();
        for i in 0..total + 50 {
            let mut task = Task::new(&["/bin/true"]);
            task.command.environment_variables[0].value = format!("{in_flight}-{i}");
            actions.push(client.prepare(&task).await.unwrap());
        }
        let measured = actions.split_off(50);
        drive(&client, actions, in_flight).await;
        let began = Instant::now();
        let mut samples = drive(&client, measured, in_flight).await;
        let elapsed = began.elapsed();
        samples.sort_by_key(|sample| sample.round_trip);
        let at = |p: usize| samples[(samples.len() * p / 100).min(samples.len() - 1)].round_trip;
        let median = |part: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(part).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!(
            "{in_flight:>9} {:>10.0} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2}",
            samples.len() as f64 / elapsed.as_secs_f64(),
            milliseconds(at(50)),
            milliseconds(at(99)),
            median(|sample| sample.queue),
            median(|sample| sample.fetch),
            median(|sample| sample.run),
            median(|sample| sample.upload),
        );
    }
    for daemon in [Daemon::Scheduler, Daemon::Worker, Daemon::Runner] {
        println!(
            "peak memory of {daemon:?}: {:.1} MiB",
            farm.peak_memory(daemon) as f64 / (1 << 20) as f64
        );
    }
}

struct Sample {
    round_trip: Duration,
    queue: f64,
    fetch: f64,
    run: f64,
    upload: f64,
}

async fn drive(
    client: &Client,
    actions: Vec<bb_remote_execution::proto::reapi::Digest>,
    in_flight: usize,
) -> Vec<Sample> {
    let queue = std::sync::Arc::new(std::sync::Mutex::new(actions.into_iter()));
    let mut drivers = Vec::new();
    for _ in 0..in_flight {
        let (client, queue) = (client.clone(), queue.clone());
        drivers.push(tokio::spawn(async move {
            let mut samples = Vec::new();
            loop {
                let Some(action) = queue.lock().unwrap().next() else {
                    return samples;
                };
                let began = Instant::now();
                let response = client.execute(action).await.unwrap();
                let round_trip = began.elapsed();
                assert!(is_ok(&response), "{response:?}");
                let metadata = response.result.unwrap().execution_metadata.unwrap();
                samples.push(split(round_trip, &metadata));
            }
        }));
    }
    let mut samples = Vec::new();
    for driver in drivers {
        samples.extend(driver.await.unwrap());
    }
    samples
}

fn split(round_trip: Duration, metadata: &ExecutedActionMetadata) -> Sample {
    let at = |moment: &Option<prost_types::Timestamp>| {
        moment.as_ref().map_or(0.0, |moment| {
            moment.seconds as f64 * 1e3 + f64::from(moment.nanos) / 1e6
        })
    };
    Sample {
        round_trip,
        queue: at(&metadata.worker_start_timestamp) - at(&metadata.queued_timestamp),
        fetch: at(&metadata.input_fetch_completed_timestamp)
            - at(&metadata.input_fetch_start_timestamp),
        run: at(&metadata.execution_completed_timestamp) - at(&metadata.execution_start_timestamp),
        upload: at(&metadata.output_upload_completed_timestamp)
            - at(&metadata.output_upload_start_timestamp),
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
