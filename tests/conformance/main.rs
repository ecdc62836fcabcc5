//! Asks a server of the Remote Execution API (REAPI) v2 whether it keeps the API's rules, one by one, and
//! prints what became of each.
//!
//! usage: cargo test --test conformance -- ENDPOINT [OPTION...]   (--help lists the options)
//!
//! Any server will do: nothing here knows one. It may be in use by others: all content is random, so
//! that nobody else's blobs, results or actions are met; nothing is deleted; one call is under way at
//! a time, but where a rule is about two; no blob is larger than 8 MiB, and all of them together are
//! some 100 MiB.
//!
//! Exit status: 0 when no rule failed that a server MUST keep, 1 when one did, 2 when the server could
//! not be asked.

#![expect(unreachable_pub, reason = "nobody imports from a test program")]

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use bb_remote_execution::config::{Endpoint, tls::ClientTls};
use clap::Parser;

mod suite;

/// Checks a server of the Remote Execution API v2 against the API's rules.
#[derive(Parser)]
#[command(name = "conformance")]
struct CommandLine {
    /// grpc://HOST:PORT, grpcs://HOST:PORT for TLS, or unix:/PATH
    endpoint: Endpoint,
    /// Where Execution is, if not there
    #[arg(long, value_name = "ENDPOINT")]
    execution: Option<Endpoint>,
    /// The instance name of all requests
    #[arg(long, value_name = "NAME", default_value = "")]
    instance: String,
    /// A platform property of all actions; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair::<'='>)]
    platform: Vec<(String, String)>,
    /// A shell of POSIX on the workers
    #[arg(long, value_name = "PATH", default_value = "/bin/sh")]
    shell: String,
    /// A header of all calls, such as "authorization: Bearer TOKEN"; may be repeated
    #[arg(long, value_name = "NAME: VALUE", value_parser = pair::<':'>)]
    header: Vec<(String, String)>,
    /// Certificates of authorities to trust in place of this host's, in PEM
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This client's certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Option<PathBuf>,
    /// The key of this client's certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// What the server's certificate is for, if not for the endpoint's host
    #[arg(long, value_name = "HOST", default_value = "")]
    server_name: String,
    /// Seconds that a rule may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// Only rules whose section or text has this in it
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Where to write the results as JUnit's XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

fn pair<const SEPARATOR: char>(text: &str) -> Result<(String, String), String> {
    match text.split_once(SEPARATOR) {
        Some((name, value)) => Ok((name.trim().to_owned(), value.trim().to_owned())),
        None => Err(format!("it has no {SEPARATOR:?}")),
    }
}

fn main() -> ExitCode {
    let line = CommandLine::parse();
    let options = suite::Options {
        endpoint: line.endpoint,
        execution: line.execution,
        instance: line.instance,
        platform: line.platform,
        shell: line.shell,
        headers: line.header,
        tls: ClientTls {
            ca: line.ca.unwrap_or_default(),
            certificate: line.certificate.unwrap_or_default(),
            key: line.key.unwrap_or_default(),
            server_name: line.server_name,
        },
        timeout: Duration::from_secs(line.timeout),
        only: line.only,
    };
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    let report = match runtime.block_on(suite::run(&options)) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("conformance: {error}");
            return ExitCode::from(2);
        }
    };
    print!("{}", report.table());
    if let Some(path) = line.junit
        && let Err(error) = fs::write(&path, report.junit())
    {
        eprintln!("conformance: could not write {}: {error}", path.display());
        return ExitCode::from(2);
    }
    match report.is_conformant() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
