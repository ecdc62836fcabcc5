//! Tells the thread of a Run that it must end, whether it waits for a descriptor or for a future.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio_util::sync::CancellationToken;

/// Whether one Run is cancelled; all clones know it at once.
#[derive(Clone, Debug)]
pub(super) struct RunCancellation {
    event: Arc<OwnedFd>,
    token: CancellationToken,
}

impl RunCancellation {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(RunCancellation {
            event: Arc::new(event),
            token: CancellationToken::new(),
        })
    }

    /// Cancels the Run, for good.
    pub(super) fn cancel(&self) {
        self.token.cancel();
        // Fails only when it was signalled 2^64 times.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }

    /// Waits at most this long for the cancellation; whether it came.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&*self.event, PollFlags::IN)];
        matches!(poll(&mut fds, timeout.as_ref()), Ok(1..))
    }

    /// What the future gives, or `None` when the Run is cancelled first. Blocks this thread, which is one
    /// of the runtime's that may block.
    pub(super) fn block_on<F: Future>(&self, future: F) -> Option<F::Output> {
        tokio::runtime::Handle::current().block_on(self.token.run_until_cancelled(future))
    }
}

/// A descriptor that is readable from the cancellation on.
impl AsFd for RunCancellation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
