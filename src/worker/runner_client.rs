//! Whether there is a runner, ready or not.

use std::time::Duration;

use tonic::Status;

use crate::{
    daemon::Channel,
    proto::runner::{CheckReadinessRequest, runner_client::RunnerClient},
};

/// How long a runner that was lost may take to be there again.
const RUNNER_RETURN_TIMEOUT: Duration = Duration::from_secs(10);
const RUNNER_RETURN_INTERVAL: Duration = Duration::from_millis(100);

/// Waits for an answer, whatever it is.
pub(super) async fn answers(runner: &RunnerClient<Channel>) -> bool {
    let deadline = tokio::time::Instant::now() + RUNNER_RETURN_TIMEOUT;
    while tokio::time::Instant::now() < deadline {
        let mut client = runner.clone();
        let check = client.check_readiness(CheckReadinessRequest::default());
        match tokio::time::timeout_at(deadline, check).await {
            Ok(Ok(_)) => return true,
            Ok(Err(status)) if is_answer(&status) => return true,
            // Nobody is there.
            Ok(Err(_)) => tokio::time::sleep(RUNNER_RETURN_INTERVAL).await,
            Err(_) => return false,
        }
    }
    false
}

/// Whether a status is the peer's own, rather than what became of the connection.
pub(super) fn is_answer(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
}

/// Whether a call failed before anything of it had left this process, so that it is safe to make it
/// again. tonic says so of one for which there was no connection (`ConnectError`), and hyper of a
/// request that it gives up with its connection (`Error::is_canceled`); of one that was on its way it
/// says something else, and a peer's own status has no source.
pub(super) fn was_never_sent(status: &Status) -> bool {
    let mut error = std::error::Error::source(status);
    while let Some(cause) = error {
        if cause.is::<tonic::ConnectError>() {
            return true;
        }
        if let Some(error) = cause.downcast_ref::<hyper::Error>() {
            return error.is_canceled();
        }
        error = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_was_sent_whatever_it_says() {
        let status = Status::cancelled("operation was canceled");
        assert!(is_answer(&status));
        assert!(!was_never_sent(&status));
    }
}
