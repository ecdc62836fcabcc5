//! Where a source of metrics writes what it has to tell, by prometheus-client.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{Counts, Durations};

/// Names of labels, and their values.
pub type Labels = Vec<(&'static str, String)>;

/// Where a source writes what it has to tell. What has no rows is left out.
pub struct Exposition<'a>(pub(super) DescriptorEncoder<'a>);

impl Exposition<'_> {
    /// What goes up and down.
    pub fn gauges(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let mut rows = rows.into_iter().peekable();
        if rows.peek().is_none() {
            return Ok(());
        }
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// One without labels.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.gauges(name, help, [(Labels::new(), value)])
    }

    /// What only grows; `_total` is added to the name.
    pub fn counters(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let mut rows = rows.into_iter().peekable();
        if rows.peek().is_none() {
            return Ok(());
        }
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            metric
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    /// One without labels.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [(Labels::new(), value)])
    }

    /// How long things took; those that never happened are left out.
    pub fn durations(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, Durations)>,
    ) -> fmt::Result {
        let rows = rows
            .into_iter()
            .map(|(labels, of)| (labels, of.sum().as_secs_f64(), of.count(), of.buckets()));
        self.histograms(name, help, rows)
    }

    /// Small numbers; those that never happened are left out.
    pub fn counts(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, Counts)>,
    ) -> fmt::Result {
        let rows = rows
            .into_iter()
            .map(|(labels, of)| (labels, of.sum() as f64, of.count(), of.buckets()));
        self.histograms(name, help, rows)
    }

    /// Labels, sum, count and buckets of each.
    fn histograms(
        &mut self,
        name: &str,
        help: &str,
        rows: impl Iterator<Item = (Labels, f64, u64, Vec<(f64, u64)>)>,
    ) -> fmt::Result {
        let mut rows = rows.filter(|(_, _, count, _)| *count > 0).peekable();
        if rows.peek().is_none() {
            return Ok(());
        }
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, sum, count, buckets) in rows {
            metric
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}
