//! Why an operation is where it is, in words.

use std::{fmt, time::Instant};

use uuid::Uuid;

use super::{Queue, TaskState, WorkerId};

/// Why an operation is where it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Explanation {
    Queued,
    Executing { worker: Option<WorkerId> },
    Completed,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Explanation::Queued => f.write_str("queued"),
            Explanation::Executing {
                worker: Some(worker),
            } => write!(f, "executing on {worker}"),
            Explanation::Executing { worker: None } => f.write_str("executing"),
            Explanation::Completed => f.write_str("completed"),
        }
    }
}

impl<C, W: Clone> Queue<C, W> {
    /// `None` when there is no such operation.
    pub fn explain(&self, _now: Instant, operation: Uuid) -> Option<Explanation> {
        let task = self.tasks.get(&self.operations.get(&operation)?.task)?;
        Some(match &task.state {
            TaskState::Queued { .. } => Explanation::Queued,
            TaskState::Executing(worker) => Explanation::Executing {
                worker: self.workers.get(worker).map(|worker| worker.id.clone()),
            },
            TaskState::Completed(_) => Explanation::Completed,
        })
    }
}
