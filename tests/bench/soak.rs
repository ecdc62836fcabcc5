//! The scheduler under load for long: workers that do nothing, clients that check every answer, and
//! connections that come and go.
//!
//! usage: cargo bench --bench farm -- soak COUNT [KEY=VALUE...]
//!
//! storage=embedded   or `scheduler`, a second bb_scheduler, or an endpoint (grpc://127.0.0.1:8980)
//! churn=yes          hosts and clients lose their connections; `no` leaves them alone
//! workers=64 clients=4 in_flight=64
//!
//! 1. Every Execute is counted by how it ended. Whatever is not OK, and was not ours to break, is
//!    printed; so is an action that has no result within `STUCK`.
//! 2. A result is that of the action that was asked for.
//! 3. At the end the scheduler holds nothing, and says how all that came to it has ended.
//!
//! Exits with 1 when one of these does not hold.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon::{self, Channel},
    proto::{
        reapi::{self, ActionResult, ExecuteRequest, ExecuteResponse, WaitExecutionRequest},
        remoteworker::{
            CurrentState, SynchronizeRequest, current_state, current_state::executing,
            desired_state, operation_queue_client::OperationQueueClient,
        },
    },
};
use prost::Message;

use crate::harness::{Client, digest_of, finished, parts::Random};

mod scheduler;

pub use scheduler::{Scheduler, resident, resident_kib};

/// The longest time between an Execute and its result.
const STUCK: Duration = Duration::from_secs(120);
/// Slots that share a connection, as those of one host do.
const SLOTS: usize = 16;
/// Actions that are uploaded at once.
const BATCH: usize = 1000;

pub fn run(arguments: &[String]) {
    let Some(count) = arguments.first().and_then(|text| text.parse().ok()) else {
        println!("soak: not without a count, see tests/bench/soak.rs");
        return;
    };
    let value = |key: &str, default: &str| {
        let given = arguments
            .iter()
            .find_map(|text| text.strip_prefix(key)?.strip_prefix('='));
        given.unwrap_or(default).to_owned()
    };
    let number = |key: &str, default: &str| value(key, default).parse::<usize>().unwrap();
    let plan = Plan {
        count,
        storage: value("storage", "embedded"),
        churn: value("churn", "yes") == "yes",
        workers: number("workers", "64"),
        clients: number("clients", "4"),
        in_flight: number("in_flight", "64"),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let clean = runtime.block_on(soak(plan));
    if !clean {
        std::process::exit(1);
    }
}

struct Plan {
    count: u64,
    storage: String,
    churn: bool,
    workers: usize,
    clients: usize,
    in_flight: usize,
}

/// What happened, by name.
#[derive(Default)]
struct Tally {
    counts: Mutex<BTreeMap<String, u64>>,
    /// Actions whose result was received.
    done: AtomicU64,
    unexplained: AtomicU64,
}

impl Tally {
    fn add(&self, what: impl Into<String>) {
        *self.counts.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    /// Nothing that this program did explains it.
    fn find(&self, what: &str, detail: impl std::fmt::Display) {
        let before = self.unexplained.fetch_add(1, Ordering::Relaxed);
        if before < 200 {
            println!("UNEXPLAINED {what}: {detail}");
        }
        self.add(format!("UNEXPLAINED {what}"));
    }
}

async fn soak(plan: Plan) -> bool {
    let plan = Arc::new(plan);
    let second = (plan.storage == "scheduler").then(|| Scheduler::start(None));
    let endpoint = match (&second, plan.storage.as_str()) {
        (Some(second), _) => Some(format!("grpc://{}", second.clients)),
        (None, "embedded") => None,
        (None, endpoint) => Some(endpoint.to_owned()),
    };
    let scheduler = Scheduler::start(endpoint.as_deref());
    let tally = Arc::new(Tally::default());
    let over = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let hosts: Vec<_> = (0..plan.workers.div_ceil(SLOTS))
        .map(|host| {
            let slots = SLOTS.min(plan.workers - host * SLOTS);
            let (tally, plan) = (tally.clone(), plan.clone());
            tokio::spawn(serve(host, slots, scheduler.workers.clone(), plan, tally))
        })
        .collect();
    let storage = endpoint
        .as_deref()
        .unwrap_or("")
        .trim_start_matches("grpc://");
    let storage = if storage.is_empty() {
        &scheduler.clients
    } else {
        storage
    };
    let (sender, actions) = tokio::sync::mpsc::channel::<reapi::Digest>(BATCH);
    let actions = Arc::new(tokio::sync::Mutex::new(actions));
    let feeding = tokio::spawn(feed(Client::connect(storage), plan.count, sender));
    let mut clients = Vec::new();
    for client in 0..plan.clients {
        let link = Arc::new(Link::new(&scheduler.clients));
        if plan.churn {
            let (link, over) = (link.clone(), over.clone());
            tokio::spawn(async move {
                let mut random = Random(client as u64 + 1000);
                while !over.load(Ordering::Relaxed) {
                    tokio::time::sleep(random.up_to(20_000)).await;
                    link.cut();
                }
            });
        }
        for driver in 0..plan.in_flight {
            let random = Random((client * plan.in_flight + driver) as u64);
            clients.push(tokio::spawn(drive(
                link.clone(),
                actions.clone(),
                plan.clone(),
                tally.clone(),
                random,
            )));
        }
    }
    let progress = {
        let (tally, count) = (tally.clone(), plan.count);
        let pid = scheduler.child.id();
        tokio::spawn(async move {
            let mut before = 0;
            loop {
                tokio::time::sleep(Duration::from_secs(30)).await;
                let done = tally.done.load(Ordering::Relaxed);
                println!(
                    "{:>6} s: {done} of {count} actions, {} /s, {} unexplained, scheduler {} MiB",
                    began.elapsed().as_secs(),
                    (done - before) / 30,
                    tally.unexplained.load(Ordering::Relaxed),
                    resident(pid, "VmRSS:"),
                );
                before = done;
            }
        })
    };
    feeding.await.unwrap();
    for client in clients {
        client.await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    let elapsed = began.elapsed();
    progress.abort();
    // Until the last operation without waiters is forgotten.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let memory = [
        resident(scheduler.child.id(), "VmRSS:"),
        resident(scheduler.child.id(), "VmHWM:"),
    ];
    for host in hosts {
        host.abort();
        let _ = host.await;
    }
    let log = scheduler.stop();
    println!(
        "{} actions in {:.0} s, {:.0} /s, storage {}, churn {}; scheduler {} MiB, at most {} MiB",
        plan.count,
        elapsed.as_secs_f64(),
        plan.count as f64 / elapsed.as_secs_f64(),
        plan.storage,
        plan.churn,
        memory[0],
        memory[1],
    );
    for (what, count) in &*tally.counts.lock().unwrap() {
        println!("{count:>9} {what}");
    }
    let of = |key: &str| -> Option<u64> {
        let (_, rest) = log.rsplit_once(key)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let counts = [of(" actions="), of(" completed=")];
    if counts[0].is_none() || counts[0] != counts[1] || of(" queued=") != Some(0) {
        tally.find("counts of the scheduler", format!("{counts:?}"));
    }
    println!("what the scheduler wrote:");
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| !line.contains("handed to"))
        .collect();
    for line in lines.iter().skip(lines.len().saturating_sub(30)) {
        println!("  {line}");
    }
    tally.unexplained.load(Ordering::Relaxed) == 0
}

/// Uploads the actions that the clients then execute.
async fn feed(client: Client, count: u64, sender: tokio::sync::mpsc::Sender<reapi::Digest>) {
    let salt = Random(u64::from(std::process::id())).next();
    let mut made = 0;
    while made < count {
        let batch: Vec<Vec<u8>> = (made..count.min(made + BATCH as u64))
            .map(|number| {
                let action = reapi::Action {
                    do_not_cache: number % 2 == 0,
                    salt: format!("{salt}-{number}").into_bytes().into(),
                    platform: Some(linux()),
                    ..Default::default()
                };
                action.encode_to_vec()
            })
            .collect();
        let digests: Vec<_> = batch.iter().map(|action| digest_of(action)).collect();
        made += batch.len() as u64;
        client.upload_many(batch).await;
        for digest in digests {
            if sender.send(digest).await.is_err() {
                return;
            }
        }
    }
}

pub fn linux() -> reapi::Platform {
    reapi::Platform {
        properties: vec![reapi::platform::Property {
            name: "OSFamily".to_owned(),
            value: "linux".to_owned(),
        }],
    }
}

struct Link {
    address: String,
    current: Mutex<Client>,
    /// How often it was cut.
    cuts: AtomicU32,
    cut: tokio::sync::Notify,
}

impl Link {
    fn new(address: &str) -> Link {
        Link {
            address: address.to_owned(),
            current: Mutex::new(Client::connect(address)),
            cuts: AtomicU32::new(0),
            cut: tokio::sync::Notify::new(),
        }
    }

    fn cut(&self) {
        *self.current.lock().unwrap() = Client::connect(&self.address);
        self.cuts.fetch_add(1, Ordering::Relaxed);
        self.cut.notify_waiters();
    }

    fn client(&self) -> Client {
        self.current.lock().unwrap().clone()
    }
}

enum End {
    Response(Box<ExecuteResponse>),
    Failed(tonic::Status),
    /// We left, or were cut off.
    Left,
}

async fn drive(
    link: Arc<Link>,
    actions: Arc<tokio::sync::Mutex<tokio::sync::mpsc::Receiver<reapi::Digest>>>,
    plan: Arc<Plan>,
    tally: Arc<Tally>,
    mut random: Random,
) {
    loop {
        let Some(action) = actions.lock().await.recv().await else {
            return;
        };
        let mut name: Option<String> = None;
        let began = Instant::now();
        loop {
            let patience = (plan.churn && random.chance(3)).then(|| random.up_to(20));
            let asked = if name.is_some() {
                "WaitExecution"
            } else {
                "Execute"
            };
            let end = ask(&link, &action, &mut name, patience).await;
            match end {
                End::Response(response) => {
                    let status = response.status.unwrap_or_default();
                    if status.code == 0 && response.message == action.hash {
                        tally.add(format!("{asked}: a result"));
                        break;
                    }
                    let vanished = status.message.contains("disappeared while");
                    if status.code == 0 {
                        tally.find("a result of another action", &response.message);
                    } else if plan.churn && vanished {
                        tally.add(format!("{asked}: a worker disappeared"));
                        name = None;
                        continue;
                    } else {
                        tally.find("a status", format!("{} {}", status.code, status.message));
                    }
                    break;
                }
                End::Failed(status) if name.is_some() && status.code() == tonic::Code::NotFound => {
                    // After `operation_with_no_waiters_timeout` this is right.
                    tally.add(format!("{asked}: the operation is gone"));
                    name = None;
                }
                End::Failed(status) => {
                    let text = format!("{:?} {}", status.code(), status.message());
                    // Until the first worker has called.
                    if text.contains("No workers exist") {
                        tally.add("Execute: no workers yet");
                    } else {
                        tally.find(&format!("{asked} failed"), format!("{text} {status:?}"));
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                End::Left => {
                    tally.add(format!("{asked}: left early"));
                    if random.chance(50) {
                        name = None;
                    }
                }
            }
            if began.elapsed() > STUCK {
                tally.find(
                    "no result",
                    format!("{} of operation {name:?}", action.hash),
                );
                break;
            }
        }
        tally.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// One stream, until its end, or until `patience` is over.
async fn ask(
    link: &Link,
    action: &reapi::Digest,
    name: &mut Option<String>,
    patience: Option<Duration>,
) -> End {
    let cuts = link.cuts.load(Ordering::Relaxed);
    let cut = link.cut.notified();
    let client = link.client();
    let stream = async {
        let mut stream = match name.clone() {
            None => {
                let request = ExecuteRequest {
                    action_digest: Some(action.clone()),
                    skip_cache_lookup: true,
                    ..Default::default()
                };
                client.execution().execute(request).await?
            }
            Some(name) => {
                let request = WaitExecutionRequest { name };
                client.execution().wait_execution(request).await?
            }
        }
        .into_inner();
        while let Some(operation) = stream.message().await? {
            *name = Some(operation.name.clone());
            if let Some(response) = finished(&operation) {
                return Ok(response);
            }
        }
        Err(tonic::Status::unknown("the stream ended before the action"))
    };
    let ended = tokio::select! {
        ended = stream => ended,
        () = cut => return End::Left,
        () = tokio::time::sleep(patience.unwrap_or(STUCK)) => return match patience {
            Some(_) => End::Left,
            None => End::Failed(tonic::Status::deadline_exceeded("nothing for too long")),
        },
    };
    match ended {
        Ok(response) => End::Response(Box::new(response)),
        Err(_) if link.cuts.load(Ordering::Relaxed) != cuts => End::Left,
        Err(status) => End::Failed(status),
    }
}

/// A host's slots, which lose their connection together.
async fn serve(host: usize, slots: usize, address: String, plan: Arc<Plan>, tally: Arc<Tally>) {
    let endpoint: Endpoint = format!("grpc://{address}").parse().unwrap();
    let mut random = Random(host as u64 + 1);
    loop {
        let channel = daemon::connect(&endpoint);
        let mut running = tokio::task::JoinSet::new();
        for slot in 0..slots {
            let random = Random(random.next());
            let name = format!("{host}/{slot}");
            running.spawn(work(
                name,
                channel.clone(),
                plan.clone(),
                tally.clone(),
                random,
            ));
        }
        drop(channel);
        if !plan.churn {
            while running.join_next().await.is_some() {}
            return;
        }
        tokio::time::sleep(random.up_to(30_000)).await;
        running.shutdown().await;
        tally.add("a host lost its connection");
    }
}

/// One slot: completes whatever it is handed.
async fn work(
    name: String,
    channel: Channel,
    plan: Arc<Plan>,
    tally: Arc<Tally>,
    mut random: Random,
) {
    use current_state::WorkerState;
    let mut client = OperationQueueClient::new(channel);
    let executing = |digest: &reapi::Digest, state| {
        WorkerState::Executing(current_state::Executing {
            action_digest: Some(digest.clone()),
            execution_state: Some(state),
        })
    };
    let mut state = WorkerState::Idle(());
    loop {
        let request = SynchronizeRequest {
            worker_id: [("slot".to_owned(), name.clone())].into(),
            platform: Some(linux()),
            current_state: Some(CurrentState {
                worker_state: Some(state.clone()),
            }),
            ..Default::default()
        };
        let answer = match client.synchronize(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let text = status.message();
                if plan.churn && text.contains("already synchronizing") {
                    tally.add("Synchronize: its call before is still held");
                } else if plan.churn && text.contains("executes an action") {
                    tally.add("Synchronize: the connection that it lost still has its action");
                } else {
                    tally.find("Synchronize failed", format!("{status:?}"));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        state = match answer.desired_state.and_then(|state| state.worker_state) {
            None | Some(desired_state::WorkerState::Idle(())) => WorkerState::Idle(()),
            Some(desired_state::WorkerState::Executing(task)) => {
                let digest = task.action_digest.unwrap_or_default();
                if plan.churn && random.chance(2) {
                    tokio::time::sleep(random.up_to(50)).await;
                }
                let response = ExecuteResponse {
                    message: digest.hash.clone(),
                    result: Some(ActionResult::default()),
                    ..Default::default()
                };
                executing(&digest, executing::ExecutionState::Completed(response))
            }
        };
    }
}
