//! The scheduler over gRPC on loopback, with workers that do nothing but wait.
//!
//! usage: cargo bench --bench farm -- noop [actions|parked|fairness|priorities|restart|workers] [KEY=VALUE...]
//!
//! actions     count=50000 workers=64 in_flight=256   actions a second, delay until a worker has one
//! parked      workers=10000                          memory of workers that wait for work
//! fairness    long=2000 short=10 workers=20 milliseconds=1000
//!             how long ten actions wait beside another client's two thousand
//! priorities  count=400 workers=20 milliseconds=200  shares of three clients, against the formula
//! restart     workers=200 count=100000               kill -9 of a scheduler that has so many queued
//! workers     endpoint=grpc://HOST:PORT count=64 milliseconds=0 instance= platform=OSFamily=linux
//!             nothing but workers, of any scheduler that speaks Buildbarn's protocol, until it is
//!             killed: for load tests of such schedulers, which other programs then ask to execute

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bb_remote_execution::proto::reapi::{
    self, ExecuteRequest, ExecuteResponse, WaitExecutionRequest,
};
use prost::Message;
use tonic::{Request, metadata::MetadataValue};

use crate::{
    harness::{Client, digest_of, finished},
    soak::{Scheduler, linux, resident},
};
use workers::spawn_workers;
pub use workers::work;

mod workers;

/// Streams that share a connection.
const STREAMS: usize = 2_000;

pub fn run(arguments: &[String]) {
    let number = |key: &str, default: usize| crate::number(arguments, key, default);
    let wanted = arguments.first().map(String::as_str);
    let is = |name: &str| wanted.is_none_or(|wanted| wanted == name || wanted.contains('='));
    let text = |key: &str, default: &str| {
        let given = arguments
            .iter()
            .find_map(|text| text.strip_prefix(key)?.strip_prefix('='));
        given.unwrap_or(default).to_owned()
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        if wanted == Some("workers") {
            let (endpoint, instance) = (text("endpoint", ""), text("instance", ""));
            let place = Place {
                instance_name_prefix: instance,
                platform: platform(&text("platform", "OSFamily=linux")),
            };
            workers::only_workers(
                &endpoint,
                place,
                number("count", 64),
                number("milliseconds", 0),
            )
            .await;
        }
        if is("actions") {
            let workers = number("workers", 64);
            actions(number("count", 50_000), workers, number("in_flight", 256)).await;
        }
        if is("parked") {
            parked(number("workers", 10_000)).await;
        }
        if is("fairness") {
            let (long, short) = (number("long", 2_000), number("short", 10));
            fairness(
                long,
                short,
                number("workers", 20),
                number("milliseconds", 1_000),
            )
            .await;
        }
        if is("priorities") {
            let workers = number("workers", 20);
            priorities(number("count", 400), workers, number("milliseconds", 200)).await;
        }
        if is("restart") {
            restart(number("workers", 200), number("count", 100_000)).await;
        }
    });
}

/// What all that is in this process shares.
#[derive(Default)]
pub struct Shared {
    /// When actions were asked for, by hash.
    asked: Mutex<HashMap<String, Instant>>,
    /// From there until a worker had them.
    delays: Mutex<HashMap<String, Duration>>,
    /// How often each action was handed to a worker.
    executions: Mutex<HashMap<String, u32>>,
    completed: AtomicU64,
    /// Streams that have heard of their operations.
    attached: AtomicUsize,
    /// How long each action takes.
    milliseconds: AtomicU64,
}

impl Shared {
    fn handed(&self, hash: &str) {
        if let Some(asked) = self.asked.lock().unwrap().remove(hash) {
            let mut delays = self.delays.lock().unwrap();
            delays.insert(hash.to_owned(), asked.elapsed());
        }
        *self
            .executions
            .lock()
            .unwrap()
            .entry(hash.to_owned())
            .or_default() += 1;
    }
}

/// Which queue a worker serves.
#[derive(Clone)]
pub struct Place {
    instance_name_prefix: String,
    platform: reapi::Platform,
}

impl Default for Place {
    fn default() -> Self {
        Place {
            instance_name_prefix: String::new(),
            platform: linux(),
        }
    }
}

/// NAME=VALUE, separated by commas.
fn platform(text: &str) -> reapi::Platform {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let mut properties: Vec<_> = pairs
        .map(|(name, value)| reapi::platform::Property {
            name: name.to_owned(),
            value: value.to_owned(),
        })
        .collect();
    properties.sort_by(|a, b| (&a.name, &a.value).cmp(&(&b.name, &b.value)));
    reapi::Platform { properties }
}

pub async fn upload(client: &Client, name: &str, count: usize) -> Vec<reapi::Digest> {
    let mut digests = Vec::with_capacity(count);
    let numbers: Vec<usize> = (0..count).collect();
    for numbers in numbers.chunks(1_000) {
        let actions = numbers.iter().map(|number| {
            let action = reapi::Action {
                salt: format!("{name}-{number}").into_bytes().into(),
                platform: Some(linux()),
                ..Default::default()
            };
            action.encode_to_vec()
        });
        let actions: Vec<_> = actions.collect();
        digests.extend(actions.iter().map(|action| digest_of(action)));
        client.upload_many(actions).await;
    }
    digests
}

/// Executes, and asks again by name whenever the stream ends early, as clients do.
pub async fn execute(
    client: &Client,
    invocation: &str,
    priority: i32,
    digest: &reapi::Digest,
    shared: &Shared,
) {
    shared
        .asked
        .lock()
        .unwrap()
        .insert(digest.hash.clone(), Instant::now());
    let metadata = reapi::RequestMetadata {
        tool_invocation_id: invocation.to_owned(),
        ..Default::default()
    };
    let metadata = MetadataValue::from_bytes(&metadata.encode_to_vec());
    let mut name = None;
    loop {
        let stream = async {
            let mut stream = match name.clone() {
                None => {
                    let mut request = Request::new(ExecuteRequest {
                        action_digest: Some(digest.clone()),
                        skip_cache_lookup: true,
                        execution_policy: Some(reapi::ExecutionPolicy { priority }),
                        ..Default::default()
                    });
                    let key = "build.bazel.remote.execution.v2.requestmetadata-bin";
                    request.metadata_mut().insert_bin(key, metadata.clone());
                    client.execution().execute(request).await?
                }
                Some(name) => {
                    let request = WaitExecutionRequest { name };
                    client.execution().wait_execution(request).await?
                }
            }
            .into_inner();
            let mut is_first = true;
            while let Some(operation) = stream.message().await? {
                if std::mem::take(&mut is_first) {
                    shared.attached.fetch_add(1, Ordering::Relaxed);
                }
                name = Some(operation.name.clone());
                if let Some(response) = finished(&operation) {
                    return Ok(response);
                }
            }
            Err(tonic::Status::unavailable("the stream ended"))
        };
        let ended: Result<ExecuteResponse, tonic::Status> = stream.await;
        match ended {
            Ok(response)
                if response
                    .status
                    .as_ref()
                    .is_none_or(|status| status.code == 0) =>
            {
                assert_eq!(response.message, digest.hash, "a result of another action");
                return;
            }
            Ok(response) => panic!("{:?}", response.status),
            Err(status) if status.code() == tonic::Code::NotFound => name = None,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// In clock ticks of user and system, which are hundredths of seconds.
pub fn processor_time(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = fields.split(' ').collect();
    let of = |field: usize| fields[field].parse::<f64>().unwrap();
    (of(11) + of(12)) / 100.0
}

async fn wait_for_workers(scheduler: &Scheduler, shared: &Shared) {
    let client = Client::connect(&scheduler.clients);
    let first = upload(&client, "first", 1).await;
    execute(&client, "", 0, &first[0], shared).await;
    shared.delays.lock().unwrap().clear();
}

fn at(sorted: &[Duration], share: f64) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        count => sorted[((count - 1) as f64 * share) as usize].as_secs_f64() * 1e3,
    }
}

fn sorted(delays: impl IntoIterator<Item = Duration>) -> Vec<Duration> {
    let mut delays: Vec<Duration> = delays.into_iter().collect();
    delays.sort_unstable();
    delays
}

async fn actions(count: usize, workers: usize, in_flight: usize) {
    let scheduler = Scheduler::start(None);
    let shared = Arc::new(Shared::default());
    let tasks = spawn_workers(&scheduler, workers, &shared);
    wait_for_workers(&scheduler, &shared).await;
    let client = Client::connect(&scheduler.clients);
    let digests = Arc::new(upload(&client, "actions", count).await);
    for (in_flight, what) in [
        (workers / 2, "fewer clients than workers"),
        (in_flight, "more"),
    ] {
        let next = Arc::new(AtomicUsize::new(0));
        let (begin, before) = (Instant::now(), processor_time(scheduler.child.id()));
        let clients: Vec<_> = (0..in_flight)
            .map(|number| {
                let (next, digests) = (next.clone(), digests.clone());
                let (client, shared) = (client.clone(), shared.clone());
                tokio::spawn(async move {
                    let invocation = format!("invocation-{}", number % 8);
                    while let Some(digest) = digests.get(next.fetch_add(1, Ordering::Relaxed)) {
                        execute(&client, &invocation, 0, digest, &shared).await;
                    }
                })
            })
            .collect();
        for client in clients {
            client.await.unwrap();
        }
        let seconds = begin.elapsed().as_secs_f64();
        let processor = processor_time(scheduler.child.id()) - before;
        let delays = sorted(
            shared
                .delays
                .lock()
                .unwrap()
                .drain()
                .map(|(_, delay)| delay),
        );
        println!(
            "{what} ({in_flight}, {workers}): {:.0} actions a second; from Execute to assignment median {:.2} ms, 99 % {:.2} ms; {:.0} µs of the scheduler's processor for each action",
            count as f64 / seconds,
            at(&delays, 0.5),
            at(&delays, 0.99),
            processor / count as f64 * 1e6,
        );
    }
    for task in tasks {
        task.abort();
    }
}

async fn parked(workers: usize) {
    let scheduler = Scheduler::start(None);
    let shared = Arc::new(Shared::default());
    let few = spawn_workers(&scheduler, 1, &shared);
    wait_for_workers(&scheduler, &shared).await;
    let before = resident(scheduler.child.id(), "VmRSS:");
    let tasks = spawn_workers(&scheduler, workers, &shared);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let after = resident(scheduler.child.id(), "VmRSS:");
    println!(
        "{workers} parked workers: {before} MiB without, {after} MiB with them, {:.1} KiB each",
        (after - before) as f64 * 1024.0 / workers as f64
    );
    for task in few.into_iter().chain(tasks) {
        task.abort();
    }
}

/// Executes all at once; each in a task of its own.
fn build(
    scheduler: &Scheduler,
    invocation: &'static str,
    priority: i32,
    digests: &[reapi::Digest],
    shared: &Arc<Shared>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let mut client = Client::connect(&scheduler.clients);
    let mut tasks = Vec::with_capacity(digests.len());
    for (number, digest) in digests.iter().enumerate() {
        if number % STREAMS == 0 {
            client = Client::connect(&scheduler.clients);
        }
        let (client, digest, shared) = (client.clone(), digest.clone(), shared.clone());
        tasks.push(tokio::spawn(async move {
            execute(&client, invocation, priority, &digest, &shared).await;
        }));
    }
    tasks
}

async fn fairness(long: usize, short: usize, workers: usize, milliseconds: usize) {
    let scheduler = Scheduler::start(None);
    let shared = Arc::new(Shared::default());
    let tasks = spawn_workers(&scheduler, workers, &shared);
    wait_for_workers(&scheduler, &shared).await;
    shared
        .milliseconds
        .store(milliseconds as u64, Ordering::Relaxed);
    let client = Client::connect(&scheduler.clients);
    let theirs = upload(&client, "long", long).await;
    let ours = upload(&client, "short", short).await;
    let first = build(&scheduler, "long", 0, &theirs, &shared);
    tokio::time::sleep(Duration::from_secs(3)).await;
    for client in build(&scheduler, "short", 0, &ours, &shared) {
        client.await.unwrap();
    }
    let delays = shared.delays.lock().unwrap().clone();
    let delays = sorted(ours.iter().map(|digest| delays[&digest.hash]));
    println!(
        "fairness: {short} actions of {milliseconds} ms beside {long} of another client on {workers} workers: wait median {:.0} ms, worst {:.0} ms; {} of the others were done by then",
        at(&delays, 0.5),
        at(&delays, 1.0),
        shared.completed.load(Ordering::Relaxed) - short as u64 - 1,
    );
    for task in first.into_iter().chain(tasks) {
        task.abort();
    }
}

/// Shares are those by which (executing + 1) × 2^(priority / 100) is equal for all.
async fn priorities(count: usize, workers: usize, milliseconds: usize) {
    let scheduler = Scheduler::start(None);
    let shared = Arc::new(Shared::default());
    let tasks = spawn_workers(&scheduler, workers, &shared);
    wait_for_workers(&scheduler, &shared).await;
    shared
        .milliseconds
        .store(milliseconds as u64, Ordering::Relaxed);
    let client = Client::connect(&scheduler.clients);
    let invocations = [("urgent", -100), ("usual", 0), ("patient", 100)];
    let mut all = Vec::new();
    let mut digests = Vec::new();
    for (invocation, priority) in invocations {
        let uploaded = upload(&client, invocation, count).await;
        digests.push((invocation, priority, uploaded));
    }
    for (invocation, priority, digests) in &digests {
        all.extend(build(&scheduler, invocation, *priority, digests, &shared));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let counts = || {
        let executions = shared.executions.lock().unwrap();
        digests
            .iter()
            .map(|(_, _, digests)| {
                let done = digests
                    .iter()
                    .filter(|digest| executions.contains_key(&digest.hash));
                done.count()
            })
            .collect::<Vec<_>>()
    };
    let before = counts();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let done: Vec<f64> = counts()
        .iter()
        .zip(before)
        .map(|(after, before)| (after - before) as f64)
        .collect();
    let exhausted = counts().contains(&count);
    let weights: Vec<f64> = invocations
        .iter()
        .map(|(_, priority)| 2_f64.powf(-f64::from(*priority) / 100.0))
        .collect();
    // (executing + 1) = share × weight, and all workers are busy.
    let slots = workers as f64 + invocations.len() as f64;
    for ((invocation, priority), (done_here, weight)) in
        invocations.iter().zip(done.iter().zip(&weights))
    {
        let expected = slots * weight / weights.iter().sum::<f64>() - 1.0;
        println!(
            "priorities: {invocation} ({priority}): {:.1} % of executions, by the formula {:.1} %{}",
            done_here / done.iter().sum::<f64>() * 100.0,
            expected / workers as f64 * 100.0,
            if exhausted { " (exhausted)" } else { "" },
        );
    }
    for task in all.into_iter().chain(tasks) {
        task.abort();
    }
}

async fn restart(workers: usize, count: usize) {
    let mut scheduler = Scheduler::start(None);
    let shared = Arc::new(Shared::default());
    let tasks = spawn_workers(&scheduler, workers, &shared);
    wait_for_workers(&scheduler, &shared).await;
    // Longer than all of it takes.
    shared.milliseconds.store(600_000, Ordering::Relaxed);
    let client = Client::connect(&scheduler.clients);
    let digests = upload(&client, "restart", count + workers).await;
    let begin = Instant::now();
    let clients = build(&scheduler, "restart", 0, &digests, &shared);
    let attached = wait_for_streams(&shared, count + workers).await;
    println!(
        "restart: {attached} operations after {:.1} s; scheduler {} MiB",
        begin.elapsed().as_secs_f64(),
        resident(scheduler.child.id(), "VmRSS:"),
    );
    shared.attached.store(0, Ordering::Relaxed);
    scheduler.kill_and_start();
    let begin = Instant::now();
    let attached = wait_for_streams(&shared, count + workers).await;
    let seconds = begin.elapsed().as_secs_f64();
    // Workers that were handed something else would have it by now.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let executions = shared.executions.lock().unwrap();
    let twice = executions.values().filter(|count| **count > 1).count();
    println!(
        "restart: after kill -9, {attached} operations are taken up in {seconds:.1} s; {} actions were handed out to {workers} workers, {twice} of them twice; scheduler {} MiB",
        executions.len() - 1,
        resident(scheduler.child.id(), "VmRSS:"),
    );
    drop(executions);
    for task in clients.into_iter().chain(tasks) {
        task.abort();
    }
}

/// Waits until so many streams have heard of their operations, for ten minutes; how many have then.
async fn wait_for_streams(shared: &Shared, count: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(600);
    loop {
        let attached = shared.attached.load(Ordering::Relaxed);
        if attached >= count || Instant::now() > deadline {
            return attached;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
