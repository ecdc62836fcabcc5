//! All that a daemon has to tell, as OpenMetrics text, by prometheus-client.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    registry::Registry,
};

use super::{Exposition, calls};
use crate::daemon::traces;

type MetricsSource = Box<dyn Fn(&mut Exposition<'_>) -> fmt::Result + Send + Sync>;

/// All that a daemon has to tell.
#[derive(Debug)]
pub struct Metrics(Registry);

struct SourceCollector(MetricsSource);

impl fmt::Debug for SourceCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a source")
    }
}

impl Collector for SourceCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.0)(&mut Exposition(encoder))
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// Of what is rendered.
    pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

    /// What every daemon has: its process, and its gRPC calls.
    pub fn new() -> Self {
        Metrics(Registry::default())
            .with(process)
            .with(calls::expose)
            .with(spans)
    }

    /// With one more source.
    #[must_use]
    pub fn with(
        mut self,
        source: impl Fn(&mut Exposition<'_>) -> fmt::Result + Send + Sync + 'static,
    ) -> Self {
        let collector = SourceCollector(Box::new(source));
        self.0.register_collector(Box::new(collector));
        self
    }

    /// All of it, as it is now (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
    pub fn render(&self) -> String {
        let mut rendered = String::new();
        // Writing to a String does not fail.
        let _ = text::encode(&mut rendered, &self.0);
        rendered
    }
}

fn spans(exposition: &mut Exposition<'_>) -> fmt::Result {
    let Some(counts) = traces::counts() else {
        return Ok(());
    };
    let row = |result: &str, count| (vec![("result", result.to_owned())], count);
    exposition.counters(
        "bb_trace_spans",
        "Spans that were recorded, by what became of them",
        [row("Sent", counts.sent), row("Lost", counts.lost)],
    )
}

/// What the kernel says of this process, by the names that Prometheus's own libraries have.
fn process(exposition: &mut Exposition<'_>) -> fmt::Result {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    if let Some(pages) = pages {
        let pages: u64 = pages;
        let bytes = pages * rustix::param::page_size() as u64;
        let help = "Memory of the process that is in RAM";
        exposition.gauge("process_resident_memory_bytes", help, bytes as f64)?;
    }
    if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
        let help = "Descriptors that are open";
        exposition.gauge("process_open_fds", help, entries.count() as f64)?;
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if let Some(limit) = limit {
        let help = "Descriptors that may be open";
        exposition.gauge("process_max_fds", help, limit as f64)?;
    }
    exposition.gauges(
        "bb_build_info",
        "The version of the program",
        [(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)],
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::daemon::{Durations, Labels};

    #[test]
    fn what_a_source_tells_is_open_metrics_text() {
        let metrics = Metrics(Registry::default()).with(|exposition| {
            let mut durations = Durations::default();
            durations.observe(Duration::from_millis(1500));
            exposition.counters("a", "As", [(vec![("x", "q\"\\\n".to_owned())], 2)])?;
            exposition.gauge("b", "Bs", 1.5)?;
            exposition.gauges("none", "Nothing", [])?;
            exposition.durations("c", "Cs", [(Labels::new(), durations)])
        });
        let text = metrics.render();
        let start = "# HELP a As\n# TYPE a counter\na_total{x=\"q\\\"\\\\\\n\"} 2\n\
                     # HELP b Bs\n# TYPE b gauge\nb 1.5\n# HELP c Cs\n# TYPE c histogram\nc_sum 1.5\nc_count 1\n";
        assert!(text.starts_with(start), "{text}");
        assert!(
            text.contains("c_bucket{le=\"1.0\"} 0\n") && text.contains("c_bucket{le=\"+Inf\"} 1\n"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n") && !text.contains("none"));
    }
}
