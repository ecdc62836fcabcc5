//! The rules of the API, and asking a server about each.
//!
//! To read in this order: `rule` is what a rule is; `server` the server that is asked, with the calls
//! that rules are made of; `capabilities`, `cas`, `chunks`, `batches`, `tree`, `byte_stream`,
//! `compression`, `action_cache` and `execution` have the rules; `report` is what is told of them.

use std::time::{Duration, Instant};

use bb_remote_execution::config::{Endpoint, tls::ClientTls};

use self::{
    report::{Report, Row},
    rule::{Rule, Stop},
    server::Server,
};

mod action_cache;
mod batches;
mod byte_stream;
mod capabilities;
mod cas;
mod chunks;
mod compression;
mod execution;
pub mod report;
mod rule;
mod server;
mod tree;

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub endpoint: Endpoint,
    /// Where Execution is, if not there.
    pub execution: Option<Endpoint>,
    pub instance: String,
    pub platform: Vec<(String, String)>,
    pub shell: String,
    pub headers: Vec<(String, String)>,
    pub tls: ClientTls,
    /// How long a rule may take.
    pub timeout: Duration,
    /// Only rules that have this in their section or text.
    pub only: String,
}

impl Options {
    /// With nothing but an endpoint.
    #[allow(
        dead_code,
        clippy::allow_attributes,
        reason = "the program has a command line"
    )]
    pub fn of(endpoint: Endpoint) -> Self {
        Options {
            endpoint,
            execution: None,
            instance: String::new(),
            platform: Vec::new(),
            shell: "/bin/sh".to_owned(),
            headers: Vec::new(),
            tls: ClientTls::default(),
            timeout: Duration::from_secs(60),
            only: String::new(),
        }
    }
}

/// Asks about every rule. The error says why the server could not be asked.
pub async fn run(options: &Options) -> Result<Report, String> {
    let server = Server::connect(options).await?;
    let all = [
        capabilities::RULES,
        cas::RULES,
        chunks::RULES,
        batches::RULES,
        tree::RULES,
        byte_stream::RULES,
        compression::RULES,
        action_cache::RULES,
        execution::streams::RULES,
        execution::inputs::RULES,
        execution::outputs::RULES,
    ];
    let asked =
        |rule: &&Rule| rule.section.contains(&options.only) || rule.text.contains(&options.only);
    let mut rows = Vec::new();
    for rule in all.into_iter().flatten().filter(asked) {
        let begin = Instant::now();
        let outcome = tokio::time::timeout(options.timeout, (rule.check)(&server)).await;
        let outcome = outcome.unwrap_or_else(|_| {
            let seconds = options.timeout.as_secs();
            Err(Stop::Fail(format!("it took longer than {seconds} seconds")))
        });
        rows.push(Row {
            rule,
            outcome,
            took: begin.elapsed(),
        });
    }
    Ok(Report {
        server: options.endpoint.to_string(),
        rows,
    })
}
