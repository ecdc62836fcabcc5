//! What workers say, and what they are told.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use super::{EncodedResponse, QueuedAction, platform::json};
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::{Attempt, WorkerCall},
};

/// The labels that tell one worker slot from all others. They are in the order of their JSON, as
/// BuildQueueState lists them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerId {
    json: Arc<str>,
    labels: Arc<BTreeMap<String, String>>,
}

impl WorkerId {
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        WorkerId {
            json: json_object(&labels).into(),
            labels: Arc::new(labels),
        }
    }

    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }
}

/// A JSON object.
impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.json)
    }
}

fn json_object(labels: &BTreeMap<String, String>) -> String {
    let members: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{}:{}", json(name), json(value)))
        .collect();
    format!("{{{}}}", members.join(","))
}

/// Labels that a worker must have to be meant; none mean all workers.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerPattern(BTreeMap<String, String>);

impl WorkerPattern {
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        WorkerPattern(labels)
    }

    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    pub fn matches(&self, worker: &WorkerId) -> bool {
        let has = |(name, value)| worker.labels.get(name) == Some(value);
        self.0.iter().all(has)
    }
}

/// A JSON object.
impl fmt::Display for WorkerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&json_object(&self.0))
    }
}

/// Who calls as a worker: its labels, and the end of the connection that the call came by. A worker
/// that connects again has another one, and so has a second host of the same labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerCaller {
    pub id: WorkerId,
    /// An address, for people and for telling callers apart.
    pub peer: Arc<str>,
    /// Which of its calls this is; Buildbarn's workers do not say. Numbered ones may be held while the
    /// worker executes.
    pub call: Option<WorkerCall>,
}

/// What a worker says that it does.
#[derive(Clone, Debug)]
pub enum WorkerActivity {
    Idle,
    Executing(ReportedAction),
    Completed(ReportedAction, Arc<EncodedResponse>),
}

impl WorkerActivity {
    /// What the worker reports, where it says nothing but the digest of it, as Buildbarn's do.
    pub(super) fn bare_digest(&self) -> Option<ReportedDigest> {
        match self {
            WorkerActivity::Idle => None,
            WorkerActivity::Executing(action) | WorkerActivity::Completed(action, _) => {
                let bare = action.attempt.is_none() && action.instance.is_none();
                bare.then_some(action.digest)
            }
        }
    }
}

/// The action of a worker's report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedAction {
    pub digest: ReportedDigest,
    /// `None` when the worker does not say whose blobs it works with: Buildbarn's protocol has no
    /// field for it, and its scheduler forgets such actions when it restarts.
    pub instance: Option<InstanceName>,
    /// `None` when the worker does not say: Buildbarn's protocol has no field for it. Then who
    /// reports, and the digest, decide.
    pub attempt: Option<Attempt>,
}

impl ReportedAction {
    /// Whether both are of one execution, as far as they say.
    pub fn is(&self, other: &ReportedAction) -> bool {
        self.digest == other.digest
            && self.instance == other.instance
            && self.attempt == other.attempt
    }
}

#[derive(Clone, Debug)]
pub struct WorkerReport {
    pub activity: WorkerActivity,
    /// It stops, or is unwell.
    pub prefer_being_idle: bool,
}

/// An action digest as workers report it: they do not name its function, so that those of equal
/// length are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReportedDigest(Digest);

impl ReportedDigest {
    pub(super) fn is(&self, digest: &Digest) -> bool {
        *self == ReportedDigest::from(digest)
    }

    /// All that it may stand for.
    pub fn candidates(&self) -> impl Iterator<Item = Digest> {
        let digest = self.0;
        DigestFunction::ALL
            .into_iter()
            .filter(move |function| function.told_by_length() == digest.function())
            .map(move |function| Digest::new(function, digest.hash_bytes(), digest.size()))
    }
}

impl From<&Digest> for ReportedDigest {
    fn from(digest: &Digest) -> Self {
        let told = digest.function().told_by_length();
        ReportedDigest(Digest::new(told, digest.hash_bytes(), digest.size()))
    }
}

/// One of the calls of all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CallNumber(pub u64);

/// What a worker is to do next.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    pub desired: DesiredWorkerState,
    /// When it is to call again, from now.
    pub next: Duration,
}

impl Instruction {
    pub(super) const GO_IDLE: Instruction = Instruction {
        desired: DesiredWorkerState::Idle,
        next: Duration::ZERO,
    };

    pub(super) const GO_ON: Instruction = Instruction {
        desired: DesiredWorkerState::Unchanged,
        next: Duration::ZERO,
    };
}

#[derive(Clone, Debug, PartialEq)]
pub enum DesiredWorkerState {
    Unchanged,
    Idle,
    Execute {
        action: Arc<QueuedAction>,
        /// The rest of the instance name, beyond the worker's prefix.
        suffix: InstanceName,
        attempt: Attempt,
        /// The worker's, no longer than the action's own.
        timeout: Duration,
    },
}
