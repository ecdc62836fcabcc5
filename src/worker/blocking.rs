//! Work on the file system goes to threads that may wait for it.

use tokio::runtime::Handle;

use super::fault::Fault;
use crate::daemon;

/// Runs `work` on a thread that may block. `what` reads as "could not WHAT", should it panic.
pub(super) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Fault> {
    daemon::spawn_blocking(work)
        .await
        .map_err(|error| Fault::Internal(format!("could not {what}: {error}")))
}

/// Runs `work` without waiting for it; at once where there is no runtime.
pub(super) fn in_background(work: impl FnOnce() + Send + 'static) {
    match Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(work)),
        Err(_) => work(),
    }
}
