//! Sends spans in batches, from a buffer of bounded size.
//!
//! 1. A batch that the collector does not take is tried again a few times while the buffer fills, and is
//!    lost then: a collector that is away costs no action anything.
//! 2. At its end a daemon sends what it has, for a short time.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::span::{Attribute, attribute};
use crate::{
    config::traces::Traces,
    daemon::{self, Channel, Credentials, Failure, Lifecycle, LogRateLimit},
    proto::opentelemetry::{
        collector::trace::v1::{
            ExportTraceServiceRequest, trace_service_client::TraceServiceClient,
        },
        resource::v1::Resource,
        trace::v1::{ResourceSpans, ScopeSpans, Span},
    },
};

/// Spans that wait to be sent, of about 0.5 KiB each.
const BUFFERED_SPANS: usize = 8192;
/// Spans of one call.
const BATCH: usize = 512;
/// How long spans wait for others.
const BATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often those are looked for; the buffer has room for what comes meanwhile.
const BUFFER_CHECK_INTERVAL: Duration = Duration::from_millis(100);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Before the second try, and twice as long before each other one.
const FIRST_RETRY_DELAY: Duration = Duration::from_millis(500);
const TRIES: u32 = 5;
/// For what is left when the daemon ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

static LOSSES: LogRateLimit = LogRateLimit::new(1, Duration::from_secs(60));

/// Of the process: there is one daemon in it.
pub(super) static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Where spans are recorded.
pub(super) struct Recorder {
    sender: mpsc::Sender<Span>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    lost: AtomicU64,
}

/// What became of the spans that were recorded.
#[derive(Clone, Copy, Debug)]
pub struct SpanCounts {
    /// The collector has them.
    pub sent: u64,
    /// The buffer was full, or the collector did not take them.
    pub lost: u64,
}

impl Recorder {
    pub(super) fn record(&self, span: Span) {
        if self.sender.try_send(span).is_err() {
            self.counters.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn counts(&self) -> SpanCounts {
        SpanCounts {
            sent: self.counters.sent.load(Ordering::Relaxed),
            lost: self.counters.lost.load(Ordering::Relaxed),
        }
    }
}

/// Sends spans for as long as the daemon lives.
#[derive(Default)]
pub struct TraceExporter(Option<(CancellationToken, JoinHandle<()>)>);

impl TraceExporter {
    /// Records spans from now on, if there is a collector; within a runtime. `service` is the daemon's name.
    pub fn start(
        service: &'static str,
        config: &Traces,
        lifecycle: &Lifecycle,
    ) -> Result<Self, Failure> {
        let Some(endpoint) = &config.endpoint.0 else {
            return Ok(TraceExporter(None));
        };
        let credentials = Credentials::open("traces.tls", &config.tls, lifecycle)?
            .with_headers(config.call_headers(), Some(lifecycle))?;
        let (sender, receiver) = mpsc::channel(BUFFERED_SPANS);
        let counters = Arc::new(Counters::default());
        let recorder = Recorder {
            sender,
            counters: counters.clone(),
        };
        if RECORDER.set(recorder).is_err() {
            // Another daemon in this process, as in tests, records for both.
            return Ok(TraceExporter(None));
        }
        let ending = CancellationToken::new();
        let sending = Sending {
            client: TraceServiceClient::new(daemon::connect_with(endpoint, &credentials)),
            endpoint: endpoint.to_string(),
            resource: resource(service),
            counters,
        };
        let task = tokio::spawn(sending.run(receiver, ending.clone()));
        Ok(TraceExporter(Some((ending, task))))
    }

    /// Sends what is left, and ends.
    pub async fn flush(self) {
        if let Some((ending, task)) = self.0 {
            ending.cancel();
            // What a collector that is away does not take within this is lost.
            let _ = tokio::time::timeout(FLUSH_TIMEOUT, task).await;
        }
    }
}

/// Who sends them (OpenTelemetry, Resource Semantic Conventions).
fn resource(service: &str) -> Resource {
    let host = nix::unistd::gethostname().ok();
    let host = host.and_then(|name| name.into_string().ok());
    let pairs = [
        ("service.namespace", "bb-remote-execution".to_owned()),
        ("service.name", service.to_owned()),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("host.name", host.unwrap_or_default()),
    ];
    Resource {
        attributes: pairs
            .into_iter()
            .map(|(key, value)| attribute(key, Attribute::Text(value)))
            .collect(),
    }
}

struct Sending {
    client: TraceServiceClient<Channel>,
    endpoint: String,
    resource: Resource,
    counters: Arc<Counters>,
}

impl Sending {
    async fn run(mut self, mut receiver: mpsc::Receiver<Span>, ending: CancellationToken) {
        while !ending.is_cancelled() {
            let mut batch = Vec::new();
            tokio::select! {
                _ = receiver.recv_many(&mut batch, BATCH) => {}
                () = ending.cancelled() => break,
            }
            // Others may come soon. They are looked for now and then: each one that is waited for wakes this task.
            let begun = Instant::now();
            while batch.len() < BATCH && begun.elapsed() < BATCH_INTERVAL {
                tokio::select! {
                    () = tokio::time::sleep(BUFFER_CHECK_INTERVAL) => {}
                    () = ending.cancelled() => break,
                }
                if !receiver.is_empty() {
                    let room = BATCH - batch.len();
                    receiver.recv_many(&mut batch, room).await;
                }
            }
            self.send(batch).await;
        }
        while !receiver.is_empty() {
            let mut batch = Vec::new();
            receiver.recv_many(&mut batch, BATCH).await;
            self.send(batch).await;
        }
    }

    async fn send(&mut self, spans: Vec<Span>) {
        let number = spans.len() as u64;
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans { spans }],
            }],
        };
        let mut pause = FIRST_RETRY_DELAY;
        let mut reason = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            let mut call = tonic::Request::new(request.clone());
            call.set_timeout(CALL_TIMEOUT);
            match tokio::time::timeout(CALL_TIMEOUT, self.client.export(call)).await {
                Ok(Ok(answer)) => {
                    let partial = answer.into_inner().partial_success.unwrap_or_default();
                    let refused = u64::try_from(partial.rejected_spans)
                        .unwrap_or(0)
                        .min(number);
                    self.counters
                        .sent
                        .fetch_add(number - refused, Ordering::Relaxed);
                    if refused > 0 {
                        self.lose(refused, &partial.error_message);
                    }
                    return;
                }
                Ok(Err(status)) => {
                    status.message().clone_into(&mut reason);
                    // OTLP, "Failures": others are not to be tried again.
                    if !matches!(
                        status.code(),
                        Code::Unavailable
                            | Code::Cancelled
                            | Code::DeadlineExceeded
                            | Code::Aborted
                            | Code::OutOfRange
                            | Code::DataLoss
                            | Code::ResourceExhausted
                    ) {
                        break;
                    }
                }
                Err(_) => "it does not answer".clone_into(&mut reason),
            }
        }
        self.lose(number, &reason);
    }

    fn lose(&self, spans: u64, reason: &str) {
        self.counters.lost.fetch_add(spans, Ordering::Relaxed);
        if let Some(withheld) = LOSSES.admit(Instant::now()) {
            tracing::warn!(
                endpoint = self.endpoint,
                spans,
                error = reason,
                lines_withheld = withheld,
                "the collector of traces (traces.endpoint) does not take spans, which are lost; actions go on"
            );
        }
    }
}
