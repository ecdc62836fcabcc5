//! gRPC calls by method and code, by the names of go-grpc-prometheus, which Buildbarn's dashboards know.
//!
//! The methods are those of our protocols; whatever else is called counts as one unknown method.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use http::HeaderMap;
use prost::Message;
use prost_types::FileDescriptorSet;

use super::{Exposition, Histogram, Labels};
use crate::{
    daemon::traces::{self, Attribute, Span},
    metadata::TraceContext,
    proto,
};

/// OK to UNAUTHENTICATED (gRPC: status codes).
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];
const CANCELED: usize = 1;
const UNKNOWN: usize = 2;
/// Which are no fault of the caller's.
const SERVER_ERRORS: [usize; 6] = [UNKNOWN, 4, 12, 13, 14, 15];

/// Of one method.
#[derive(Default)]
struct MethodCalls {
    service: String,
    method: String,
    kind: &'static str,
    started: AtomicU64,
    handled: [AtomicU64; CODES.len()],
    durations: Histogram,
}

/// By path, `/package.Service/Method`.
static METHODS: LazyLock<BTreeMap<String, MethodCalls>> = LazyLock::new(|| {
    let mut methods = BTreeMap::new();
    for set in [
        proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        for file in FileDescriptorSet::decode(set).unwrap_or_default().file {
            for service in &file.service {
                for method in &service.method {
                    let service = format!("{}.{}", file.package(), service.name());
                    let path = format!("/{service}/{}", method.name());
                    let kind = match (method.client_streaming(), method.server_streaming()) {
                        (false, false) => "unary",
                        (true, false) => "client_stream",
                        (false, true) => "server_stream",
                        (true, true) => "bidi_stream",
                    };
                    let calls = MethodCalls {
                        service,
                        method: method.name().to_owned(),
                        kind,
                        ..Default::default()
                    };
                    methods.insert(path, calls);
                }
            }
        }
    }
    methods
});

static OTHERS: LazyLock<MethodCalls> = LazyLock::new(|| MethodCalls {
    service: "unknown".to_owned(),
    method: "unknown".to_owned(),
    kind: "unary",
    ..Default::default()
});

/// A call that is counted when it is over; one whose end nobody heard of was cancelled.
pub(in crate::daemon) struct CountedCall {
    method: &'static MethodCalls,
    began: Instant,
    code: usize,
    /// The caller's span, where it is recorded.
    trace: Option<TraceContext>,
}

impl CountedCall {
    /// A call of the method at this path, with these headers, begins.
    pub(in crate::daemon) fn begin(path: &str, headers: &HeaderMap) -> Self {
        let method = METHODS.get(path).unwrap_or(&OTHERS);
        method.started.fetch_add(1, Ordering::Relaxed);
        CountedCall {
            method,
            began: Instant::now(),
            code: CANCELED,
            trace: traces::is_on()
                .then(|| TraceContext::of(headers))
                .flatten()
                .filter(|trace| trace.is_sampled),
        }
    }

    /// Its status, where these headers or trailers have one.
    pub(in crate::daemon) fn note(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get("grpc-status") {
            let code = code.to_str().ok().and_then(|code| code.parse().ok());
            self.code = code.filter(|code| *code < CODES.len()).unwrap_or(UNKNOWN);
        }
    }
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        self.method.handled[self.code].fetch_add(1, Ordering::Relaxed);
        let took = self.began.elapsed();
        self.method.durations.observe(took);
        if let Some(caller) = self.trace {
            self.record_span(caller, took);
        }
    }
}

impl CountedCall {
    /// As OpenTelemetry's "Semantic Conventions for gRPC" names things.
    fn record_span(&self, caller: TraceContext, took: Duration) {
        let (service, method) = (&self.method.service, &self.method.method);
        let end = SystemTime::now();
        let is_error = SERVER_ERRORS.contains(&self.code);
        traces::record(Span {
            context: TraceContext {
                span: traces::new_span(),
                ..caller
            },
            parent: Some(caller.span),
            name: format!("{service}/{method}"),
            is_server: true,
            start: end.checked_sub(took).unwrap_or(end),
            end,
            attributes: vec![
                ("rpc.system", Attribute::Text("grpc".to_owned())),
                ("rpc.service", Attribute::Text(service.clone())),
                ("rpc.method", Attribute::Text(method.clone())),
                ("rpc.grpc.status_code", Attribute::Integer(self.code as i64)),
            ],
            error: is_error.then(|| CODES[self.code].to_owned()),
        });
    }
}

/// How an execution failed, as Buildbarn labels it (`grpc_code`): empty when it did not. Codes that are none
/// of gRPC's come from peers.
pub fn failure_code(code: i32) -> &'static str {
    match usize::try_from(code) {
        Ok(0) => "",
        Ok(code) => CODES.get(code).unwrap_or(&"Unknown"),
        Err(_) => "Unknown",
    }
}

fn called() -> impl Iterator<Item = &'static MethodCalls> {
    let all = METHODS.values().chain([&*OTHERS]);
    all.filter(|method| method.started.load(Ordering::Relaxed) > 0)
}

fn labels(method: &MethodCalls) -> Labels {
    vec![
        ("grpc_service", method.service.clone()),
        ("grpc_method", method.method.clone()),
        ("grpc_type", method.kind.to_owned()),
    ]
}

pub(super) fn expose(exposition: &mut Exposition<'_>) -> fmt::Result {
    exposition.counters(
        "grpc_server_started",
        "Calls that began",
        called().map(|method| (labels(method), method.started.load(Ordering::Relaxed))),
    )?;
    let handled = called().flat_map(|method| {
        let by_code = CODES.iter().zip(&method.handled);
        by_code.filter_map(|(code, count)| {
            let count = count.load(Ordering::Relaxed);
            let mut labels = labels(method);
            labels.push(("grpc_code", (*code).to_owned()));
            (count > 0).then_some((labels, count))
        })
    });
    exposition.counters(
        "grpc_server_handled",
        "Calls that ended, by how they did",
        handled,
    )?;
    exposition.durations(
        "grpc_server_handling_seconds",
        "How long calls took, until their last answer was handed to the connection",
        called().map(|method| (labels(method), method.durations.read())),
    )
}
