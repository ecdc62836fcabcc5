//! On workers of which size an action is executed, PURE.
//!
//! Workers of one platform may be of several *size classes*: numbers that grow with what a worker has
//! of processors and memory. Small workers are cheap, so that an action belongs on the smallest that
//! it is not much slower on. What its command needs is seen from what earlier executions came to.
//!
//! In the order to read it: an [`Analyzer`] looks at an action and makes a [`Selector`]. When the
//! action is queued, the selector is told which size classes there are, and makes a [`Selection`]: a
//! size class, a timeout, and a [`Learner`]. That one is told how the execution ended, and says
//! whether there is another one, and what is to be remembered of it: a [`StatisticsUpdate`], which
//! whoever keeps [`Statistics`] applies. `page_rank` computes how likely each size class is to be
//! chosen, from the `outcomes` of executions on each pair of them.
//!
//! 1. A learner is told of the end of its execution once; it is consumed by that.
//! 2. An action fails for its client only after it has failed on the largest size class that there
//!    was when its last execution was selected.
//! 3. With equal statistics, size classes and random number, the selection is equal.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod analyzer;
mod feedback;
mod learner;
mod outcomes;
mod page_rank;
mod selector;
mod statistics;
#[cfg(test)]
mod tests;

pub use analyzer::Analyzer;
pub use feedback::FeedbackDriven;
pub use learner::{Completion, Learner, Selection};
pub use page_rank::PageRank;
pub use selector::Selector;
pub use statistics::{
    PreviousExecution, Statistics, StatisticsError, StatisticsKey, StatisticsUpdate,
};
