//! What this daemon did for actions, as spans of traces (OpenTelemetry), sent to a collector by OTLP over gRPC.
//!
//! 1. Without `traces.endpoint` nothing is recorded, and looking costs one atomic load.
//! 2. Recording never waits: spans that do not fit into the buffer are counted and lost.
//! 3. Identifiers are the protocol's, not a library's: a worker's spans hang below the one that its scheduler
//!    names in desired_state.Executing.w3c_trace_context. So spans are recorded when they are over, from
//!    the times that the daemons note anyway, and OpenTelemetry's SDK, which makes identifiers when spans
//!    begin, would have nothing to do.
//!
//! To read in this order: this file; `span`, what is recorded; `exporter`, which sends it.

mod exporter;
mod span;

use exporter::{RECORDER, Recorder};
pub use exporter::{SpanCounts, TraceExporter};
pub use span::{Attribute, Span};

/// Whether spans are recorded.
pub fn is_on() -> bool {
    RECORDER.get().is_some()
}

/// How many spans were sent and lost; `None` where none is recorded.
pub fn counts() -> Option<SpanCounts> {
    RECORDER.get().map(Recorder::counts)
}

/// A name for a new span.
pub fn new_span() -> u64 {
    fastrand::u64(1..)
}

/// Has a span sent, unless nothing is recorded.
pub fn record(span: Span) {
    if let Some(recorder) = RECORDER.get()
        && span.context.is_sampled
    {
        recorder.record(span::encode(span));
    }
}
