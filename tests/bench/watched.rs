//! What it costs to be watched: the same actions of two farms in turns, of which nobody looks at one, while the
//! other sends traces of every action, has its metrics fetched each second, and ten pages open.
//!
//! usage: cargo bench --bench farm -- watched [rounds=7] [actions=1000]
//!
//! The collector and whoever fetches are in this process, so that the daemons' processor time is theirs alone;
//! actions a second have both.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bb_remote_execution::proto::{
    opentelemetry::collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    reapi::Digest,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::{
    harness::{Client, Daemon, Farm, Task, is_ok, is_root},
    noop::processor_time,
};

const IN_FLIGHT: usize = 64;
const PAGES: usize = 10;
const DAEMONS: [Daemon; 3] = [Daemon::Scheduler, Daemon::Worker, Daemon::Runner];

/// Counts spans.
#[derive(Clone, Default)]
struct Collector(Arc<AtomicU64>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let groups = request.into_inner().resource_spans;
        let scopes = groups.iter().flat_map(|group| &group.scope_spans);
        let spans: usize = scopes.map(|scope| scope.spans.len()).sum();
        self.0.fetch_add(spans as u64, Ordering::Relaxed);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

pub fn run(arguments: &[String]) {
    if !is_root() {
        return;
    }
    let number = |key: &str, default: usize| crate::number(arguments, key, default);
    let (rounds, actions) = (number("rounds", 7), number("actions", 1000));
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(measure(rounds, actions));
}

async fn measure(rounds: usize, actions: usize) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("grpc://{}", listener.local_addr().unwrap());
    let collector = Collector::default();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let place = Path::new("/dev/shm");
    let mut farms = [
        Farm::start(place, 2, "").await,
        Farm::start_traced(place, 2, &address).await,
    ];
    let fetched = Arc::new(AtomicU64::new(0));
    let mut figures: [Vec<[f64; 2]>; 2] = Default::default();
    for round in 0..rounds {
        for (at, farm) in farms.iter_mut().enumerate() {
            let digests = prepare(&farm.client(), round, actions).await;
            let watching = (at == 1).then(|| watch(farm, &fetched));
            let pids = DAEMONS.map(|daemon| farm.pid(daemon));
            let before: f64 = pids.iter().map(|pid| processor_time(*pid)).sum();
            let began = Instant::now();
            drive(&farm.client(), digests).await;
            let took = began.elapsed().as_secs_f64();
            let after: f64 = pids.iter().map(|pid| processor_time(*pid)).sum();
            if let Some(stop) = watching {
                stop.store(true, Ordering::Relaxed);
            }
            figures[at].push([
                actions as f64 / took,
                (after - before) * 1e6 / actions as f64,
            ]);
        }
    }
    println!(
        "{rounds} rounds of {actions} actions in turns, {IN_FLIGHT} in flight; {} spans came, {} pages and metrics were fetched",
        collector.0.load(Ordering::Relaxed),
        fetched.load(Ordering::Relaxed)
    );
    for (what, of) in [
        ("actions/s", 0),
        ("us of the daemons' processors for one", 1),
    ] {
        let median = |values: &[[f64; 2]]| {
            let mut values: Vec<f64> = values.iter().map(|value| value[of]).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let ratios: Vec<[f64; 2]> = figures[0]
            .iter()
            .zip(&figures[1])
            .map(|(off, on)| [on[0] / off[0], on[1] / off[1]])
            .collect();
        println!(
            "{what:40} unwatched {:8.0}  watched {:8.0}  median of the pairs' ratios {:.3}",
            median(&figures[0]),
            median(&figures[1]),
            median(&ratios)
        );
    }
}

async fn prepare(client: &Client, round: usize, count: usize) -> Vec<Digest> {
    let mut digests = Vec::new();
    for number in 0..count {
        let mut task = Task::new(&["/bin/true"]);
        task.command.environment_variables[0].value = format!("{round}-{number}");
        digests.push(client.prepare(&task).await.unwrap());
    }
    digests
}

async fn drive(client: &Client, digests: Vec<Digest>) {
    let (next, digests) = (Arc::new(AtomicUsize::new(0)), Arc::new(digests));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let (client, next, digests) = (client.clone(), next.clone(), digests.clone());
        tasks.spawn(async move {
            while let Some(digest) = digests.get(next.fetch_add(1, Ordering::Relaxed)) {
                let response = client.execute(digest.clone()).await.unwrap();
                assert!(is_ok(&response), "{response:?}");
            }
        });
    }
    tasks.join_all().await;
}

/// Fetches what people and Prometheus fetch, until it is told to stop.
fn watch(farm: &Farm, fetched: &Arc<AtomicU64>) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let pages = farm.pages();
    let authority = pages
        .strip_prefix("http://")
        .unwrap_or_else(|| panic!("{pages}"))
        .trim_end_matches('/')
        .to_owned();
    let sockets =
        ["worker", "runner"].map(|daemon| farm.path().join(format!("run-{daemon}/metrics.sock")));
    let every = move |pause: Duration, fetch: Box<dyn Fn() + Send>| {
        let (stop, fetched) = (stop.clone(), fetched.clone());
        let handle = stop.clone();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                fetch();
                fetched.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(pause);
            }
        });
        handle
    };
    let second = Duration::from_secs(1);
    for socket in sockets {
        every(
            second,
            Box::new(move || get(UnixStream::connect(&socket).unwrap(), "/metrics")),
        );
    }
    let of_scheduler = authority.clone();
    let stop = every(
        second,
        Box::new(move || get(TcpStream::connect(&of_scheduler).unwrap(), "/metrics")),
    );
    for number in 0..PAGES {
        let authority = authority.clone();
        let path = ["/", "/operations", "/workers", "/queues"][number % 4];
        // As often as a page reloads itself.
        every(
            5 * second,
            Box::new(move || get(TcpStream::connect(&authority).unwrap(), path)),
        );
    }
    stop
}

fn get(mut stream: impl Read + Write, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{path}");
}
