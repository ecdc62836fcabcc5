//! What commands show of what a scheduler tells: rows with the keys that scripts rely on.
//!
//! Keys are added, and neither removed nor given another meaning; bb_scheduler(8) has them all, as a test
//! sees to.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime},
};

use prost_types::{Any, Timestamp};
use serde::Serialize;

use crate::{
    daemon::{Cell, Emphasis},
    proto::{
        self, auth,
        buildqueuestate::{self as wire, operation_state::Stage},
        control, reapi,
    },
};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Property {
    pub name: String,
    pub value: String,
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// Which size-class queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct QueueName {
    /// Of instance names, the prefix that its workers announced.
    pub instance: String,
    pub platform: Vec<Property>,
    pub size_class: u32,
}

impl From<&wire::SizeClassQueueName> for QueueName {
    fn from(name: &wire::SizeClassQueueName) -> Self {
        let of = name.platform_queue_name.clone().unwrap_or_default();
        QueueName {
            instance: of.instance_name_prefix,
            platform: properties(of.platform.as_ref()),
            size_class: name.size_class,
        }
    }
}

impl QueueName {
    pub(super) fn platform_text(&self) -> String {
        match self.platform.as_slice() {
            [] => "any".to_owned(),
            properties => {
                let texts: Vec<String> = properties.iter().map(Property::to_string).collect();
                texts.join(" ")
            }
        }
    }

    /// For a sentence.
    pub(super) fn text(&self) -> String {
        let mut text = self.platform_text();
        if !self.instance.is_empty() {
            text += &format!(", instance {}", self.instance);
        }
        if self.size_class > 0 {
            text += &format!(", size class {}", self.size_class);
        }
        text
    }
}

pub(super) fn properties(platform: Option<&reapi::Platform>) -> Vec<Property> {
    let properties = platform.into_iter().flat_map(|found| &found.properties);
    let properties = properties.map(|property| Property {
        name: property.name.clone(),
        value: property.value.clone(),
    });
    properties.collect()
}

#[derive(Debug, Serialize)]
pub(super) struct StatusRow {
    pub version: String,
    pub started: Option<String>,
    pub serving: bool,
    pub addresses: BTreeMap<String, String>,
    pub workers: u64,
    pub executing: u64,
    pub idle: u64,
    pub queued: u64,
    pub oldest_wait_seconds: Option<f64>,
    pub operations: u64,
    pub actions: u64,
    pub completed: u64,
    pub queues: Vec<QueueRow>,
    pub store: Option<StoreRow>,
}

#[derive(Debug, Serialize)]
pub(super) struct QueueRow {
    #[serde(flatten)]
    pub name: QueueName,
    pub workers: u64,
    pub executing: u64,
    pub idle: u64,
    pub drains: u64,
    pub queued: u64,
    pub oldest_wait_seconds: Option<f64>,
    pub wanted_workers: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct StoreRow {
    pub directory: String,
    pub used_bytes: u64,
    pub maximum_bytes: u64,
    pub free_bytes: u64,
    pub entries: u64,
    /// Of those that have limits of their own.
    pub instances: Vec<InstanceRow>,
}

/// What some instance names take of the store.
#[derive(Debug, Serialize)]
pub(super) struct InstanceRow {
    pub instance_name_prefix: String,
    pub used_bytes: u64,
    pub maximum_bytes: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct WorkerTableRow {
    pub labels: BTreeMap<String, String>,
    #[serde(flatten)]
    pub queue: QueueName,
    pub state: &'static str,
    /// It takes nothing new.
    pub drained: bool,
    /// It was told to terminate, which is why it takes nothing new.
    pub terminating: bool,
    /// What it executes.
    pub operation: Option<String>,
    pub action: Option<String>,
    pub target: Option<String>,
    /// When it is believed to be gone, unless it calls before.
    pub removal: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct OperationTableRow {
    pub name: String,
    pub stage: &'static str,
    pub instance: String,
    pub action: String,
    pub target: String,
    pub invocation: Vec<String>,
    pub priority: i32,
    pub queued: Option<String>,
    pub age_seconds: Option<f64>,
    /// Of a completed one.
    pub exit_code: Option<i32>,
    pub code: Option<&'static str>,
    pub message: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct DrainRow {
    pub pattern: BTreeMap<String, String>,
    #[serde(flatten)]
    pub queue: QueueName,
    pub created: Option<String>,
}

impl From<control::SchedulerStatus> for StatusRow {
    fn from(status: control::SchedulerStatus) -> Self {
        StatusRow {
            started: status.start_time.as_ref().and_then(rfc3339),
            serving: status.serving,
            addresses: status.addresses,
            workers: status.workers,
            executing: status.executing_workers,
            idle: status.idle_workers,
            queued: status.queued_operations,
            oldest_wait_seconds: seconds_since(status.oldest_queued_timestamp.as_ref()),
            operations: status.operations,
            actions: status.actions,
            completed: status.completed_actions,
            queues: status.queues.iter().map(QueueRow::from).collect(),
            store: status.store.map(StoreRow::from),
            version: status.version,
        }
    }
}

impl From<&control::SizeClassQueueStatus> for QueueRow {
    fn from(queue: &control::SizeClassQueueStatus) -> Self {
        QueueRow {
            name: queue.name.as_ref().map_or_else(
                || QueueName::from(&wire::SizeClassQueueName::default()),
                QueueName::from,
            ),
            workers: queue.workers,
            executing: queue.executing_workers,
            idle: queue.idle_workers,
            drains: queue.drains,
            queued: queue.queued_operations,
            oldest_wait_seconds: seconds_since(queue.oldest_queued_timestamp.as_ref()),
            wanted_workers: queue.wanted_workers,
        }
    }
}

impl From<control::StoreUsage> for StoreRow {
    fn from(usage: control::StoreUsage) -> Self {
        StoreRow {
            directory: usage.directory,
            used_bytes: usage.used_bytes,
            maximum_bytes: usage.maximum_bytes,
            free_bytes: usage.free_bytes,
            entries: usage.entries,
            instances: usage
                .instances
                .into_iter()
                .map(|of| InstanceRow {
                    instance_name_prefix: of.instance_name_prefix,
                    used_bytes: of.used_bytes,
                    maximum_bytes: of.maximum_bytes,
                })
                .collect(),
        }
    }
}

impl WorkerTableRow {
    pub(super) fn new(worker: wire::WorkerState, terminating: bool, queue: QueueName) -> Self {
        let operation = worker.current_operation;
        WorkerTableRow {
            labels: worker.id,
            queue,
            state: match (&operation, &worker.timeout) {
                (Some(_), _) => "executing",
                (None, None) => "idle",
                (None, Some(_)) => "silent",
            },
            drained: worker.drained,
            terminating,
            action: operation
                .as_ref()
                .map(|operation| digest(operation.action_digest.as_ref())),
            target: operation
                .as_ref()
                .map(|operation| operation.target_id.clone()),
            operation: operation.map(|operation| operation.name),
            removal: worker.timeout.as_ref().and_then(rfc3339),
        }
    }

    pub(super) fn state_cell(&self) -> Cell {
        if self.terminating {
            return Cell::new("terminating", Emphasis::Warning);
        }
        match (self.drained, self.state) {
            (true, "executing") => Cell::new("draining", Emphasis::Warning),
            (true, _) => Cell::new("drained", Emphasis::Warning),
            (false, "silent") => Cell::new("silent", Emphasis::Bad),
            (false, state) => Cell::new(state, Emphasis::Good),
        }
    }
}

/// Labels on one line.
pub(super) fn labels(labels: &BTreeMap<String, String>) -> String {
    match labels.is_empty() {
        true => "all workers".to_owned(),
        false => {
            let labels: Vec<String> = labels
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            labels.join(",")
        }
    }
}

impl From<wire::OperationState> for OperationTableRow {
    fn from(operation: wire::OperationState) -> Self {
        let invocation = operation.invocation_name.unwrap_or_default();
        let queue = invocation.size_class_queue_name.unwrap_or_default();
        let prefix = queue
            .platform_queue_name
            .unwrap_or_default()
            .instance_name_prefix;
        let names = [prefix.as_str(), operation.instance_name_suffix.as_str()];
        let names: Vec<&str> = names.into_iter().filter(|name| !name.is_empty()).collect();
        let response = match &operation.stage {
            Some(Stage::Completed(response)) => Some(response),
            _ => None,
        };
        let status = response.and_then(|response| response.status.clone());
        let status = status.unwrap_or_default();
        OperationTableRow {
            stage: match &operation.stage {
                Some(Stage::Completed(_)) => "completed",
                Some(Stage::Executing(())) => "executing",
                Some(Stage::Queued(())) | None => "queued",
            },
            instance: names.join("/"),
            action: digest(operation.action_digest.as_ref()),
            target: operation.target_id,
            invocation: invocation.ids.iter().map(invocation_key).collect(),
            priority: operation.priority,
            queued: operation.queued_timestamp.as_ref().and_then(rfc3339),
            age_seconds: seconds_since(operation.queued_timestamp.as_ref()),
            exit_code: response
                .and_then(|response| response.result.as_ref())
                .map(|result| result.exit_code),
            code: response.map(|_| code_name(status.code)),
            message: response
                .map(|_| status.message)
                .filter(|text| !text.is_empty()),
            name: operation.name,
        }
    }
}

impl OperationTableRow {
    pub(super) fn stage_cell(&self) -> Cell {
        match (self.stage, self.code, self.exit_code) {
            ("completed", Some("OK"), Some(0)) => Cell::new("completed", Emphasis::Good),
            ("completed", Some("OK"), Some(code)) => {
                Cell::new(format!("exit {code}"), Emphasis::Warning)
            }
            ("completed", Some(code), _) => Cell::new(code, Emphasis::Bad),
            (stage, ..) => stage.into(),
        }
    }
}

fn code_name(code: i32) -> &'static str {
    let code = proto::rpc::Code::try_from(code).unwrap_or(proto::rpc::Code::Unknown);
    code.as_str_name()
}

/// HASH/SIZE, as clients write it.
pub(super) fn digest(digest: Option<&reapi::Digest>) -> String {
    digest.map_or_else(String::new, |digest| {
        format!("{}/{}", digest.hash, digest.size_bytes)
    })
}

/// Whose actions share at one level: what a client said of itself, or who it is.
pub(super) fn invocation_key(key: &Any) -> String {
    if let Some(metadata) = proto::unpack::<reapi::RequestMetadata>(key) {
        let said = [
            ("tool_invocation_id", &metadata.tool_invocation_id),
            (
                "correlated_invocations_id",
                &metadata.correlated_invocations_id,
            ),
            ("action_id", &metadata.action_id),
            ("action_mnemonic", &metadata.action_mnemonic),
            ("target_id", &metadata.target_id),
            ("configuration_id", &metadata.configuration_id),
        ];
        let said = said.into_iter().filter(|(_, value)| !value.is_empty());
        let said: Vec<String> = said
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        return match said.is_empty() {
            true => "unnamed".to_owned(),
            false => said.join(","),
        };
    }
    if let Some(user) = proto::unpack::<auth::AuthenticationMetadata>(key) {
        let public = user.public.and_then(|value| value.kind);
        return match public {
            Some(prost_types::value::Kind::StringValue(name)) => format!("user={name}"),
            Some(_) => "user".to_owned(),
            None => "nobody".to_owned(),
        };
    }
    let name = key.type_url.rsplit('/').next().unwrap_or_default();
    name.rsplit('.').next().unwrap_or_default().to_owned()
}

pub(super) fn rfc3339(time: &Timestamp) -> Option<String> {
    let time = proto::system_time(time)?;
    Some(humantime::format_rfc3339_millis(time).to_string())
}

pub(super) fn seconds_since(time: Option<&Timestamp>) -> Option<f64> {
    let time = proto::system_time(time?)?;
    let elapsed = SystemTime::now().duration_since(time).unwrap_or_default();
    Some((elapsed.as_secs_f64() * 1000.0).round() / 1000.0)
}

pub(super) fn span(seconds: Option<f64>) -> String {
    let span = |seconds| crate::daemon::span(Duration::from_secs_f64(seconds));
    seconds.map_or_else(|| "-".to_owned(), span)
}
