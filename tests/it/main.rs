//! One binary for all integration tests, so that there is one link.

#![expect(
    unsafe_code,
    reason = "attempts to escape use system calls as they are"
)]
#![expect(unreachable_pub, reason = "nobody imports from a test program")]

#[path = "../harness/mod.rs"]
mod harness;

mod access;
mod architecture;
mod bad_input;
mod configurations;
mod conformance;
mod connections;
mod dashboards;
mod disk_share;
mod documents;
mod escape;
mod fairness;
mod farm;
mod hostile;
mod intruder;
mod metrics;
mod object_storage;
mod packages;
mod runner;
mod scheduler;
mod server;
mod simulation;
mod storage;
mod tls;
mod tokens;
mod traces;
mod web;
mod wire;
mod worker;
