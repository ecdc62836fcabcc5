//! What became of the actions that a runner was given, since its start.

use crate::daemon::Counter;

/// Numbers of actions. Every action that is over is counted in one of `ended`, `stopped` and `failed`.
#[derive(Debug, Default)]
pub(super) struct RunCounts {
    /// Actions that were begun.
    pub started: Counter,
    /// Actions whose command ended, however it did.
    pub ended: Counter,
    /// Actions that were cancelled before or while they ran: at a timeout, when their call ended, or when the runner
    /// stopped.
    pub stopped: Counter,
    /// Actions that have ended, and had used more memory than their limit.
    pub out_of_memory: Counter,
    /// Actions that could not be run, or were killed by somebody else.
    pub failed: Counter,
}

impl RunCounts {
    /// Those that are over, by the label `outcome` of the metric.
    pub(super) fn rows(&self) -> [(&'static str, u64); 4] {
        [
            ("Ended", self.ended.get()),
            ("Stopped", self.stopped.get()),
            ("OutOfMemory", self.out_of_memory.get()),
            ("Failed", self.failed.get()),
        ]
    }
}
