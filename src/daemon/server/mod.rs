//! Serving gRPC on a listener: bounded in memory, in descriptors and in time, whatever callers do.
//!
//! 1. Memory that callers can make a server keep is counted in budgets: what they send, what they ask for,
//!    their calls and their connections. `budget` says how they are shared among callers, `caller` who
//!    these are.
//! 2. Connections are fewer than the descriptors that the process may have, so that files and other
//!    listeners have theirs. The one that has been idle for longest gives way to a new one; where one caller
//!    has more than its share of them, one of its own.
//! 3. Whatever a status says fits into everybody's headers (`status`).
//!
//! To read in this order: `limits` has what a listener grants; `accept` accepts connections,
//! `open_connections` has those that are open; `opening` is how one begins, `connection` whose it is then,
//! and `grpc` serves it; `call` is one call on it, `response_body` what that answers, `access` whether it
//! is allowed; `services` are what is called. `pages` serves a browser's connection.
//!
//! tonic's own server could not keep (1) and (2): none of its connections can be told to go away, or be
//! cut, by itself.

use std::time::Duration;

use axum::Router;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use self::open_connections::Protocol;
use super::{Failure, listen::Listener};

mod accept;
mod access;
mod budget;
mod call;
mod caller;
mod connection;
mod grpc;
mod limits;
mod open_connections;
mod opening;
mod pages;
mod rate;
mod response_body;
mod services;
mod status;

pub use access::{Access, PageAccess, Policy, client_address, client_name, warn_grants};
pub use budget::BudgetReservation;
pub use call::RequestReservation;
pub use connection::CallConnection;
pub use limits::{PageLimits, ServerLimits};
pub use pages::PageOrigin;
pub use response_body::{ResponseBudget, with_reservation};
pub use services::Services;

/// Serves until `stopping`, then gives calls that are under way `drain` to finish.
pub async fn serve(
    listener: Listener,
    routes: Routes,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    serve_within(listener, routes, ServerLimits::default(), stopping, drain).await
}

/// As `serve`, with limits of the caller's choice.
pub async fn serve_within(
    listener: Listener,
    routes: Routes,
    limits: ServerLimits,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    let protocol = Protocol::Grpc(routes.prepare());
    accept::accept_and_drain(listener, protocol, limits, stopping, drain).await;
    Ok(())
}

/// Serves pages until `stopping`, then gives requests that are under way `drain` to finish.
pub async fn serve_pages(
    listener: Listener,
    router: Router,
    limits: PageLimits,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    let protocol = Protocol::Pages(router);
    accept::accept_and_drain(listener, protocol, limits.into(), stopping, drain).await;
    Ok(())
}
