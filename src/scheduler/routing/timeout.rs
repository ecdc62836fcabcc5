//! For how long an action may run.

use std::time::Duration;

use crate::{config, proto};

/// The client must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Invalid execution timeout: {seconds} s and {nanos} ns is not between 0 s and {maximum}, which is \
     scheduling.maximum_execution_timeout of the scheduler; ask for less, or have it raised"
)]
pub struct InvalidTimeout {
    seconds: i64,
    nanos: i32,
    maximum: config::Duration,
}

/// What an action asks for (REAPI: Action.timeout), or the default. A timeout of zero is none: no client
/// means that its action shall not run.
pub fn execution_timeout(
    asked: Option<&prost_types::Duration>,
    scheduling: &config::scheduling::Scheduling,
) -> Result<Duration, InvalidTimeout> {
    let default = scheduling.default_execution_timeout.get();
    let maximum = scheduling.maximum_execution_timeout;
    let Some(asked) = asked else {
        return Ok(default);
    };
    match proto::duration(asked) {
        Some(Duration::ZERO) => Ok(default),
        Some(timeout) if timeout <= maximum.get() => Ok(timeout),
        _ => Err(InvalidTimeout {
            seconds: asked.seconds,
            nanos: asked.nanos,
            maximum,
        }),
    }
}
