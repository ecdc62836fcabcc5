//! The queue's own time, which stands still while the scheduler does.
//!
//! A process can be stopped: by SIGSTOP, with its virtual machine, by a host that swaps. Whatever was
//! said to it meanwhile lies unread in its sockets, so that it knows nothing of that time, and can
//! hold nobody to a deadline in it. After a pause everybody has as long as was left before it, in
//! which the calls that wait are read.
//!
//! The shell looks at the clock at least every `TICK`. More time between two looks than `TICK` and
//! what an overloaded host explains is a pause.

use std::time::{Duration, Instant};

/// How often the shell looks at the clock, at least.
pub const TICK: Duration = Duration::from_secs(1);

/// So late a busy host may let the shell look.
const LOOK_DELAY_TOLERANCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Clock {
    /// The last look.
    last: Instant,
    /// All pauses together.
    paused: Duration,
}

impl Clock {
    pub fn new(now: Instant) -> Self {
        Clock {
            last: now,
            paused: Duration::ZERO,
        }
    }

    /// The queue's time, and the pause that just ended, if there was one.
    pub fn look(&mut self, now: Instant) -> (Instant, Option<Duration>) {
        let gap = now.saturating_duration_since(self.last);
        self.last = self.last.max(now);
        let pause = (gap > TICK + LOOK_DELAY_TOLERANCE).then_some(gap);
        self.paused += pause.unwrap_or_default();
        (self.last - self.paused, pause)
    }

    /// When it is this time for the queue, unless there is a pause before.
    pub fn real(&self, at: Instant) -> Instant {
        at + self.paused
    }
}
