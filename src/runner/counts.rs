//! What became of the actions that a runner was given, since its start.

use crate::daemon::Counter;

#[derive(Debug, Default)]
pub(super) struct RunCounts {
    pub started: Counter,
    /// Their first process ended.
    pub ended: Counter,
    /// Before or while they ran: at a timeout, at a cancellation, or when the runner stopped.
    pub stopped: Counter,
    /// They used more memory than their limit.
    pub out_of_memory: Counter,
    /// Not run, or killed by somebody else.
    pub failed: Counter,
}

impl RunCounts {
    pub(super) fn rows(&self) -> [(&'static str, u64); 4] {
        [
            ("Ended", self.ended.get()),
            ("Stopped", self.stopped.get()),
            ("OutOfMemory", self.out_of_memory.get()),
            ("Failed", self.failed.get()),
        ]
    }
}
