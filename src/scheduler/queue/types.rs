//! What goes into the queue and comes out of it.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use prost::Message;
use prost_types::{Any, Timestamp};
use uuid::Uuid;

use crate::{
    config::scheduler::Scheduling,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    metadata::WorkerCall,
    proto::{self, reapi, rpc},
};

/// How long things may take; see `config::scheduler::Scheduling`.
#[derive(Clone, Debug)]
pub struct Settings {
    pub operation_with_no_waiters_timeout: Duration,
    pub busy_worker_interval: Duration,
    pub worker_silence_timeout: Duration,
    pub platform_queue_with_no_workers_timeout: Duration,
    pub worker_task_retry_count: u32,
    /// `None` where it is empty.
    pub default_platform: Option<Platform>,
}

impl From<&Scheduling> for Settings {
    fn from(config: &Scheduling) -> Self {
        let default_platform = Platform::from(&config.default_platform);
        Settings {
            operation_with_no_waiters_timeout: config.operation_with_no_waiters_timeout.get(),
            busy_worker_interval: config.busy_worker_synchronization_interval.get(),
            worker_silence_timeout: config.worker_with_no_synchronizations_timeout.get(),
            platform_queue_with_no_workers_timeout: config
                .platform_queue_with_no_workers_timeout
                .get(),
            worker_task_retry_count: config.worker_task_retry_count,
            default_platform: (!default_platform.is_empty()).then_some(default_platform),
        }
    }
}

/// Platform properties, strictly sorted by name, then value (REAPI: Platform).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Platform(Arc<[(String, String)]>);

/// The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "platform properties are not sorted by name, then value, without repetition: {0:?} comes before {1:?}"
)]
pub struct UnsortedPlatform(String, String);

impl Platform {
    pub fn parse(platform: Option<&reapi::Platform>) -> Result<Self, UnsortedPlatform> {
        let properties: Arc<[(String, String)]> = platform
            .iter()
            .flat_map(|platform| &platform.properties)
            .map(|property| (property.name.clone(), property.value.clone()))
            .collect();
        for (earlier, later) in properties.iter().zip(properties.iter().skip(1)) {
            if earlier >= later {
                let show = |(name, value): &(String, String)| {
                    crate::text::shorten(&format!("{name}={value}"))
                };
                return Err(UnsortedPlatform(show(earlier), show(later)));
            }
        }
        Ok(Platform(properties))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn properties(&self) -> &[(String, String)] {
        &self.0
    }
}

impl From<&BTreeMap<String, String>> for Platform {
    fn from(properties: &BTreeMap<String, String>) -> Self {
        Platform(
            properties
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
        )
    }
}

/// As in protobuf's JSON.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("{}");
        }
        f.write_str("{\"properties\":[")?;
        for (i, (name, value)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let (name, value) = (json(name), json(value));
            write!(f, "{comma}{{\"name\":{name},\"value\":{value}}}")?;
        }
        f.write_str("]}")
    }
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The labels that tell one worker slot from all others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerId(Arc<BTreeMap<String, String>>);

impl WorkerId {
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        WorkerId(Arc::new(labels))
    }

    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

/// A JSON object.
impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, (name, value)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", json(name), json(value))?;
        }
        f.write_str("}")
    }
}

/// Who calls as a worker: its labels, and the end of the connection that the call came by. A worker
/// that connects again has another one, and so has a second host of the same labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub id: WorkerId,
    /// An address, for people and for telling callers apart.
    pub peer: Arc<str>,
    /// Which of its calls this is; Buildbarn's workers do not say.
    pub call: Option<WorkerCall>,
}

/// Where a worker takes its work from: a size-class queue.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClassQueueKey {
    pub platform: Platform,
    pub prefix: InstanceName,
    pub size_class: u32,
}

/// Which client run asks (RequestMetadata.tool_invocation_id); empty when it does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Invocation(pub Arc<str>);

/// What a worker is handed.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedAction {
    pub instance: InstanceName,
    pub digest: Digest,
    /// With its timeout filled in.
    pub action: reapi::Action,
    pub auxiliary_metadata: Vec<Any>,
    pub queued_timestamp: Timestamp,
    /// RequestMetadata.target_id, for those who look at the queue.
    pub target_id: String,
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Request {
    pub action: Arc<QueuedAction>,
    pub platform: Platform,
    /// Lower is earlier (REAPI: ExecutionPolicy).
    pub priority: i32,
    pub invocation: Invocation,
}

/// How a task ended: an ExecuteResponse, encoded once for all who wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedResponse {
    pub response: Vec<u8>,
    /// Of the response's status.
    pub code: i32,
    /// Who says so: ExecutedActionMetadata.worker.
    pub worker: String,
}

impl EncodedResponse {
    pub fn new(response: &reapi::ExecuteResponse) -> Self {
        let result = response.result.as_ref();
        let metadata = result.and_then(|result| result.execution_metadata.as_ref());
        EncodedResponse {
            response: response.encode_to_vec(),
            code: response.status.as_ref().map_or(0, |status| status.code),
            worker: metadata.map_or_else(String::new, |metadata| metadata.worker.clone()),
        }
    }

    pub fn failure(code: rpc::Code, message: String) -> Self {
        EncodedResponse::new(&reapi::ExecuteResponse {
            status: Some(proto::status(code, message)),
            ..Default::default()
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    Queued,
    Executing,
    Completed(Arc<EncodedResponse>),
}

/// What those who wait for a task see. A higher version is later news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub version: u64,
    pub stage: Stage,
}

/// What a worker says that it does.
#[derive(Clone, Debug)]
pub enum WorkerActivity {
    Idle,
    Executing(ReportedAction),
    Completed(ReportedAction, Arc<EncodedResponse>),
}

/// The action of a worker's report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedAction {
    pub digest: ReportedDigest,
    /// `None` when the worker does not say whose blobs it works with: Buildbarn's protocol has no
    /// field for it, and its scheduler forgets such actions when it restarts.
    pub instance: Option<InstanceName>,
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
    /// All that it may stand for.
    pub fn candidates(&self) -> impl Iterator<Item = Digest> {
        let blake3 = (self.0.function() == DigestFunction::Sha256)
            .then(|| Digest::new(DigestFunction::Blake3, self.0.hash_bytes(), self.0.size()));
        std::iter::once(self.0).chain(blake3)
    }
}

impl From<&Digest> for ReportedDigest {
    fn from(digest: &Digest) -> Self {
        ReportedDigest(match digest.function() {
            DigestFunction::Blake3 => {
                Digest::new(DigestFunction::Sha256, digest.hash_bytes(), digest.size())
            }
            _ => *digest,
        })
    }
}

/// What a worker is to do next.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    pub desired: DesiredWorkerState,
    /// When it is to call again, from now.
    pub next: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub enum DesiredWorkerState {
    Unchanged,
    Idle,
    Execute {
        action: Arc<QueuedAction>,
        /// The rest of the instance name, beyond the worker's prefix.
        suffix: InstanceName,
        /// One of those that wait for the task.
        operation: Uuid,
    },
}

/// Why an action cannot be queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("No workers exist for instance name prefix {instance:?} platform {platform}; {known}")]
pub struct NoWorkers {
    pub instance: String,
    pub platform: Platform,
    /// The scheduler is young, and the workers may yet come.
    pub transient: bool,
    /// Which ones there are.
    pub known: String,
}

/// Why a worker's call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "A worker with the same worker ID is already synchronizing with the scheduler: {id}; it calls from {holder}, and this call comes from {caller}"
    )]
    AlreadySynchronizing {
        id: WorkerId,
        holder: Arc<str>,
        caller: Arc<str>,
        /// Not told before.
        news: bool,
    },
    #[error(
        "A worker with the same worker ID executes an action: {id}; it calls from {holder}, and this call comes from {caller}. Two hosts, or two workers of one host, must not have equal labels: change worker_id of one of them. If it is the same worker that was started again, it is let in as soon as its former calls are overdue"
    )]
    Executing {
        id: WorkerId,
        holder: Arc<str>,
        caller: Arc<str>,
        /// Not told before.
        news: bool,
    },
    #[error(
        "Workers of size class {known} exist for this instance name prefix and platform; a worker of size class {offered} cannot join them"
    )]
    SizeClass { known: u32, offered: u32 },
}
