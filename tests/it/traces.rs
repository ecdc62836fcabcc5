//! Traces of actions, as a collector sees what all three daemons send.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use bb_remote_execution::proto::{
    opentelemetry::{
        collector::trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
        common::v1::any_value::Value,
        trace::v1::Span,
    },
    reapi::ExecuteRequest,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::harness::{Daemon, Farm, Task, finished, free_address, is_ok, is_root, skip};

/// What came, by the daemon that sent it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut known = self.0.lock().unwrap();
        for group in request.into_inner().resource_spans {
            let attributes = group.resource.unwrap().attributes;
            let name = attributes.iter().find(|pair| pair.key == "service.name");
            let Some(Value::StringValue(name)) = name.unwrap().value.clone().unwrap().value else {
                panic!("{attributes:?}");
            };
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            known.extend(spans.map(|span| (name.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Collector, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("grpc://{}", listener.local_addr().unwrap());
        let collector = Collector::default();
        let service = TraceServiceServer::new(collector.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (collector, address)
    }

    /// The spans of a trace, once there are those that are named.
    async fn spans(&self, trace: &[u8], names: &[(&str, &str)]) -> Vec<(String, Span)> {
        for _ in 0..200 {
            let known = self.0.lock().unwrap().clone();
            let of_trace = known
                .into_iter()
                .filter(|(_, span)| *span.trace_id == *trace);
            let spans: Vec<(String, Span)> = of_trace.collect();
            let has = |&(daemon, name): &(&str, &str)| {
                spans
                    .iter()
                    .any(|(from, span)| from == daemon && span.name == name)
            };
            if names.iter().all(has) {
                return spans;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{:#?}", self.0.lock().unwrap());
    }
}

const CLIENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const NAMES: [(&str, &str); 9] = [
    (
        "bb_scheduler",
        "build.bazel.remote.execution.v2.Execution/Execute",
    ),
    ("bb_scheduler", "queued"),
    ("bb_scheduler", "action"),
    ("bb_worker", "fetch inputs"),
    ("bb_worker", "run command"),
    ("bb_worker", "upload outputs"),
    ("bb_worker", "execute"),
    ("bb_runner", "buildbarn.runner.Runner/Run"),
    // The storage.
    ("bb_scheduler", "google.bytestream.ByteStream/Write"),
];

#[tokio::test(flavor = "multi_thread")]
async fn an_action_is_one_trace_from_its_client_to_the_storage() {
    if !is_root() {
        return skip("a runner needs root");
    }
    let (collector, address) = Collector::start().await;
    let farm = Farm::start_traced(Path::new("/var/tmp"), 1, &address).await;
    let client = farm.client();
    let script = "head -c 9000000 /dev/urandom > large; exit 3";
    let task = Task::shell(script).outputs(&["large"]);
    let action = client.prepare(&task).await.unwrap();
    let execute = |headers: &[(&'static str, &str)]| {
        let mut request = Request::new(ExecuteRequest {
            action_digest: Some(action.clone()),
            skip_cache_lookup: true,
            ..Default::default()
        });
        for (name, value) in headers {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let mut execution = client.execution();
        async move {
            let mut stream = execution.execute(request).await.unwrap().into_inner();
            let mut name = String::new();
            while let Some(operation) = stream.message().await.unwrap() {
                operation.name.clone_into(&mut name);
                if let Some(response) = finished(&operation) {
                    assert_eq!(response.status.unwrap_or_default().code, 0);
                }
            }
            name
        }
    };
    execute(&[("traceparent", CLIENT)]).await;
    let trace = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes();
    let spans = collector.spans(&trace, &NAMES).await;
    let by_id: BTreeMap<&[u8], &(String, Span)> = spans
        .iter()
        .map(|known| (&*known.1.span_id, known))
        .collect();
    assert_eq!(
        by_id.len(),
        spans.len(),
        "two spans have one name: {spans:#?}"
    );
    let client_span = 0xb7ad_6b71_6920_3331_u64.to_be_bytes();
    for (daemon, span) in &spans {
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        let mut above = span;
        for _ in 0..10 {
            if *above.parent_span_id == client_span {
                break;
            }
            let parent = by_id.get(&*above.parent_span_id);
            above = &parent
                .unwrap_or_else(|| panic!("{daemon}: {} hangs nowhere", span.name))
                .1;
        }
    }
    let named = |name: &str| &spans.iter().find(|(_, span)| span.name == name).unwrap().1;
    let parent_of = |name: &str| {
        by_id
            .get(&*named(name).parent_span_id)
            .map(|known| &*known.1.name)
    };
    assert_eq!(parent_of("action"), None);
    assert_eq!(parent_of("queued"), Some("action"));
    assert_eq!(parent_of("execute"), Some("action"));
    assert_eq!(parent_of("run command"), Some("execute"));
    assert_eq!(
        parent_of("buildbarn.runner.Runner/Run"),
        Some("run command")
    );
    assert_eq!(
        parent_of("google.bytestream.ByteStream/Write"),
        Some("execute")
    );
    let codes = &named("run command").attributes;
    let code = codes.iter().find(|pair| pair.key == "process.exit.code");
    let code = code.unwrap().value.clone().unwrap().value;
    assert_eq!(code, Some(Value::IntValue(3)));

    // A client that says no is obeyed; one that says nothing has the operation's UUID as its trace.
    let silent = CLIENT.replace("-01", "-00").replace("0af7", "0af8");
    execute(&[("traceparent", &silent)]).await;
    let name = execute(&[]).await;
    let uuid = name
        .split('/')
        .find_map(|part| uuid::Uuid::try_parse(part).ok());
    let uuid = uuid.or_else(|| uuid::Uuid::try_parse(name.get(..36)?).ok());
    let trace = uuid.unwrap_or_else(|| panic!("{name:?}")).into_bytes();
    collector.spans(&trace, &NAMES[1..]).await;
    let other = 0x0af8_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes();
    let known = collector.0.lock().unwrap().clone();
    assert!(known.iter().all(|(_, span)| *span.trace_id != other));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_actions_nothing() {
    if !is_root() {
        return skip("a runner needs root");
    }
    // Nobody listens there any more.
    let address = format!("grpc://{}", free_address());
    let mut farm = Farm::start_traced(Path::new("/var/tmp"), 1, &address).await;
    for _ in 0..5 {
        assert!(is_ok(&farm.client().run(&Task::shell("true")).await));
    }
    farm.terminate(Daemon::Worker, Duration::from_secs(20));
}
