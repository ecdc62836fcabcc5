//! A section `[traces]`: where a daemon sends the spans that it records of actions (OpenTelemetry, OTLP over
//! gRPC), and which actions the scheduler has recorded.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), bb_worker.toml(5) and bb_runner.toml(5), as a test sees to"
)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    Diagnostics, Endpoint, OptionalEndpoint,
    call_headers::{CallHeaders, MetadataHeader},
    tls::ClientTls,
};

/// Of workers and runners, which record what their schedulers decided on.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Traces {
    /// Of opentelemetry.proto.collector.trace.v1.TraceService.
    pub endpoint: OptionalEndpoint,
    pub tls: ClientTls,
    /// A file with a token that the collector knows this daemon by; empty for none.
    pub authorization_file: PathBuf,
    pub add_metadata: Vec<MetadataHeader>,
}

/// Of schedulers.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerTraces {
    /// Of opentelemetry.proto.collector.trace.v1.TraceService.
    pub endpoint: OptionalEndpoint,
    /// Of actions whose client says nothing of it, from 0 to 1.
    pub sample_ratio: f64,
    pub tls: ClientTls,
    pub authorization_file: PathBuf,
    pub add_metadata: Vec<MetadataHeader>,
}

impl Default for SchedulerTraces {
    fn default() -> Self {
        SchedulerTraces {
            endpoint: OptionalEndpoint::default(),
            sample_ratio: 1.0,
            tls: ClientTls::default(),
            authorization_file: PathBuf::new(),
            add_metadata: Vec::new(),
        }
    }
}

impl Traces {
    /// What the collector is shown in each call.
    pub fn call_headers(&self) -> CallHeaders<'_> {
        CallHeaders {
            keys: ["traces.add_metadata", "traces.authorization_file"],
            add_metadata: &self.add_metadata,
            authorization_file: &self.authorization_file,
        }
    }

    /// What no host is needed to find wrong.
    pub fn validate(&self, diagnostics: &mut Diagnostics) {
        let endpoints: Vec<&Endpoint> = self.endpoint.0.iter().collect();
        self.tls.validate("traces.tls", &endpoints, diagnostics);
        self.call_headers().validate(diagnostics);
    }
}

impl SchedulerTraces {
    /// Where they are sent.
    pub fn exported(&self) -> Traces {
        Traces {
            endpoint: self.endpoint.clone(),
            tls: self.tls.clone(),
            authorization_file: self.authorization_file.clone(),
            add_metadata: self.add_metadata.clone(),
        }
    }

    /// What no host is needed to find wrong.
    pub fn validate(&self, diagnostics: &mut Diagnostics) {
        self.exported().validate(diagnostics);
        diagnostics.require(
            (0.0..=1.0).contains(&self.sample_ratio),
            "traces.sample_ratio",
            "it is a part of all actions, from 0.0 for none to 1.0 for all",
        );
    }
}
