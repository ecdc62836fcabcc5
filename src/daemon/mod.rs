//! What the three daemons share, in the order to read it:
//!
//! - `cli`: flags and commands, and the main function;
//! - `command`: commands that ask a daemon that runs, with `output`: tables for people, JSON for scripts;
//! - `check`: the command `check`, with `check_report`, `owner` (who has an address or a lock),
//!   `systemd_unit` (what units say) and `disk` (what fits); `failure`: why a daemon cannot start;
//! - `lifecycle`: ready, status and stop; `signals`, which ask for a stop or a `reload`;
//! - `health`: whether the daemon works, for systemd's watchdog;
//! - `logging`: sentences with fields for the journal or standard error, and each action's span; with
//!   `message_id`, what people are alerted of;
//! - `process` and `memory`: its name, exit code and limits, and memory that it gives back;
//! - `metrics`: numbers for Prometheus, which workers and runners tell by `observation`;
//! - `reloadable`: files that are read again when they change;
//! - `listen`: sockets, of systemd's or of its own, with `peer`, and `control`: those that it works without;
//! - `tls`: certificates, of listeners and of clients; `tokens`, of callers; `call_headers`: what our
//!   clients show in each call; `secrets`: what else files have that nobody else may see;
//! - `server`: gRPC and pages on listeners, bounded;
//! - `client`: channels to gRPC peers; `dial`: connections to other servers.

#![warn(missing_docs)]

mod batched_writes;
mod call_headers;
mod check;
mod check_report;
mod cli;
mod client;
mod command;
mod connector;
mod control;
mod dial;
pub mod disk;
mod failure;
mod health;
mod lifecycle;
mod listen;
mod logging;
mod memory;
pub mod message_id;
mod metrics;
mod observation;
mod output;
mod owner;
mod peer;
mod process;
mod reload;
mod reloadable;
mod secrets;
mod server;
mod signals;
mod systemd_unit;
mod tls;
mod tokens;
pub mod traces;

pub use check::{Installation, SHIPPED_STOP_TIMEOUT};
pub use check_report::CheckReport;
pub use cli::main;
pub use client::{AnsweredChannel, Channel, Unhurried, connect, connect_with};
pub use command::{CommandChannel, CommandError, CommandOptions};
pub use control::{control_grants, control_permissions, listen_if_possible, observation_listeners};
pub use dial::{Connection, dial};
pub use failure::Failure;
pub use health::Heartbeat;
pub use lifecycle::Lifecycle;
pub use listen::{Listener, SocketPermissions, listen};
pub use logging::{LogRateLimit, action_span, spawn_blocking};
pub use metrics::{
    Counter, Counts, DURATION_BOUNDS, Durations, Exposition, Histogram, Labels, Metrics,
    failure_code,
};
pub use observation::{Observation, serve_observation};
pub use output::{Cell, Emphasis, Output, Table, age, bytes, span};
pub use peer::Peer;
pub use process::{Program, boot_id, hostname, raise_file_limit};
pub use secrets::check_secrets;
pub use server::{
    Access, BudgetReservation, CallConnection, PageAccess, PageLimits, PageOrigin, Policy,
    RequestReservation, ResponseBudget, ServerLimits, Services, client_address, client_name, serve,
    serve_pages, serve_within, warn_grants, with_reservation,
};
pub use tls::{
    Credentials, PeerCertificate, ServerTls, check_client, check_headers, check_server, server_tls,
    warn_client, warn_server,
};
pub use tokens::Tokens;
