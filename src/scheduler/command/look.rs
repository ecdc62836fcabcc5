//! Commands that look: status, queues, workers, operations, why.

use serde::Serialize;

use super::{
    Pattern, StageName,
    calls::SchedulerCalls,
    rows::{
        OperationTableRow, QueueName, QueueRow, StatusRow, WorkerTableRow, labels, seconds_since,
        span,
    },
};
use crate::{
    daemon::{Cell, CommandError, Emphasis, Output, Table, bytes},
    proto::{
        control::{
            ExplainOperationRequest, GetStatusRequest, OperationExplanation,
            operation_explanation::Reason,
        },
        reapi::execution_stage::Value as StageValue,
    },
    text::plural,
};

async fn fetch_status(scheduler: &SchedulerCalls) -> Result<StatusRow, CommandError> {
    let status = scheduler.control().get_status(GetStatusRequest {}).await?;
    Ok(status.into_inner().into())
}

pub(super) async fn status(
    scheduler: &SchedulerCalls,
    output: &Output,
) -> Result<(), CommandError> {
    let status = fetch_status(scheduler).await?;
    if output.is_json() {
        output.json(&status);
        return Ok(());
    }
    let serving = match status.serving {
        true => Cell::new("serving", Emphasis::Good),
        false => Cell::new("stopping", Emphasis::Warning),
    };
    output.fact("State", serving);
    output.fact("Version", &status.version);
    output.fact("Started", status.started.as_deref().unwrap_or("-"));
    for (what, address) in &status.addresses {
        output.fact("Listens", format!("{what} on {address}"));
    }
    let slots = format!(
        "{}: {} executing, {} idle",
        plural(status.workers, "slot", "slots"),
        status.executing,
        status.idle
    );
    let slots = match status.workers {
        0 => Cell::new("none", Emphasis::Bad),
        _ => slots.into(),
    };
    output.fact("Workers", slots);
    let queued = match status.queued {
        0 => "nothing".to_owned(),
        queued => format!(
            "{}, the oldest for {}",
            plural(queued, "operation", "operations"),
            span(status.oldest_wait_seconds)
        ),
    };
    output.fact("Queued", queued);
    output.fact(
        "Since the start",
        format!(
            "{} of {}, {} completed",
            plural(status.operations, "operation", "operations"),
            plural(status.actions, "action", "actions"),
            status.completed
        ),
    );
    match &status.store {
        Some(store) => output.fact(
            "Store",
            format!(
                "{} of {} in {}, {}; {} free on its file system",
                bytes(store.used_bytes),
                bytes(store.maximum_bytes),
                store.directory,
                plural(store.entries, "entry", "entries"),
                bytes(store.free_bytes)
            ),
        ),
        None => output.fact("Store", "elsewhere"),
    }
    Ok(())
}

pub(super) async fn queues(
    scheduler: &SchedulerCalls,
    output: &Output,
) -> Result<(), CommandError> {
    let queues = fetch_status(scheduler).await?.queues;
    if output.is_json() {
        output.json(&queues);
        return Ok(());
    }
    if queues.is_empty() {
        output.line("There are no platform queues: no worker has called, and none is predeclared.");
        return Ok(());
    }
    let mut table = Table::new([
        "PLATFORM…",
        "INSTANCE…",
        "SIZE",
        "WORKERS",
        "EXECUTING",
        "IDLE",
        "DRAINS",
        "QUEUED",
        "OLDEST",
    ]);
    for queue in &queues {
        table.row([
            queue.name.platform_text().into(),
            queue.name.instance.as_str().into(),
            queue.name.size_class.into(),
            workers_cell(queue),
            queue.executing.into(),
            queue.idle.into(),
            queue.drains.into(),
            queue.queued.into(),
            span(queue.oldest_wait_seconds).into(),
        ]);
    }
    output.table(&table);
    Ok(())
}

fn workers_cell(queue: &QueueRow) -> Cell {
    match (queue.workers, queue.queued) {
        (0, 0) => Cell::new(0, Emphasis::Warning),
        (0, _) => Cell::new(0, Emphasis::Bad),
        (workers, _) => workers.into(),
    }
}

pub(super) async fn workers(
    scheduler: &SchedulerCalls,
    output: &Output,
    pattern: Option<&Pattern>,
) -> Result<(), CommandError> {
    let mut rows: Vec<WorkerTableRow> = Vec::new();
    let terminating = scheduler.terminating_workers().await?;
    for name in scheduler.queues().await? {
        let queue = QueueName::from(&name);
        let workers = scheduler.workers(&name).await?.into_iter();
        let meant = workers.filter(|worker| pattern.is_none_or(|p| p.matches(&worker.id)));
        rows.extend(meant.map(|worker| {
            let terminating = terminating.contains(&worker.id);
            WorkerTableRow::new(worker, terminating, queue.clone())
        }));
    }
    if rows.is_empty() && pattern.is_some() {
        return Err(no_such_worker());
    }
    if output.is_json() {
        output.json(&rows);
        return Ok(());
    }
    if rows.is_empty() {
        output.line("There are no workers.");
        return Ok(());
    }
    let mut table = Table::new(["WORKER…", "STATE", "QUEUE…", "TARGET…", "OPERATION"]);
    for row in &rows {
        table.row([
            labels(&row.labels).into(),
            row.state_cell(),
            row.queue.text().into(),
            row.target.as_deref().unwrap_or("").into(),
            row.operation.as_deref().unwrap_or("").into(),
        ]);
    }
    output.table(&table);
    Ok(())
}

pub(super) fn no_such_worker() -> CommandError {
    CommandError::NotFound(
        "no worker has these labels; \"bb_scheduler workers\" lists them".to_owned(),
    )
}

pub(super) async fn operations(
    scheduler: &SchedulerCalls,
    output: &Output,
    stage: Option<StageName>,
    limit: usize,
) -> Result<(), CommandError> {
    let stage = stage.map(|stage| match stage {
        StageName::Queued => StageValue::Queued,
        StageName::Executing => StageValue::Executing,
        StageName::Completed => StageValue::Completed,
    });
    let limit = if limit == 0 { usize::MAX } else { limit };
    let (operations, total) = scheduler.oldest_operations(stage, limit).await?;
    let rows: Vec<OperationTableRow> = operations
        .into_iter()
        .map(OperationTableRow::from)
        .collect();
    if output.is_json() {
        output.json(&rows);
        return Ok(());
    }
    if rows.is_empty() {
        output.line("There are no such operations.");
        return Ok(());
    }
    let mut table = Table::new(["STAGE", "AGE", "TARGET…", "INVOCATION…", "OPERATION"]);
    for row in &rows {
        table.row([
            row.stage_cell(),
            span(row.age_seconds).into(),
            row.target.as_str().into(),
            row.invocation.join(" ").into(),
            row.name.as_str().into(),
        ]);
    }
    output.table(&table);
    output.line(&match rows.len() < total {
        true => format!(
            "{} of {total}, oldest first; --limit 0 shows all.",
            rows.len()
        ),
        false => format!(
            "{}, oldest first.",
            plural(total as u64, "operation", "operations")
        ),
    });
    Ok(())
}

/// The keys of `why`.
#[derive(Serialize)]
struct Why {
    #[serde(flatten)]
    operation: OperationTableRow,
    why: String,
    operations_before: Option<u64>,
    invocations_before: Option<Vec<u64>>,
    matching_workers: Option<u64>,
    executing_workers: Option<u64>,
    drained_workers: Option<u64>,
    silent_workers: Option<u64>,
    expected_wait_seconds: Option<i64>,
    worker: Option<std::collections::BTreeMap<String, String>>,
    executing_seconds: Option<i64>,
    lost_workers: Option<u64>,
}

pub(super) async fn why(
    scheduler: &SchedulerCalls,
    output: &Output,
    operation_name: String,
) -> Result<(), CommandError> {
    let request = ExplainOperationRequest { operation_name };
    let explained = scheduler.control().explain_operation(request).await?;
    let OperationExplanation {
        text,
        operation,
        reason,
    } = explained.into_inner();
    let operation = operation.unwrap_or_default();
    let queued_for = seconds_since(operation.queued_timestamp.as_ref());
    let (queued, executing) = match reason {
        Some(Reason::Queued(queued)) => (Some(queued), None),
        Some(Reason::Executing(executing)) => (None, Some(executing)),
        None => (None, None),
    };
    let lost = queued.as_ref().map(|queued| queued.lost_workers);
    let lost = lost.or(executing.as_ref().map(|executing| executing.lost_workers));
    let queued = queued.as_ref();
    let why = Why {
        operation: operation.into(),
        why: text,
        operations_before: queued.map(|queued| queued.operations_before),
        invocations_before: queued.map(|queued| queued.invocations_before.clone()),
        matching_workers: queued.map(|queued| queued.workers),
        executing_workers: queued.map(|queued| queued.executing_workers),
        drained_workers: queued.map(|queued| queued.drained_workers),
        silent_workers: queued.map(|queued| queued.silent_workers),
        expected_wait_seconds: queued
            .and_then(|queued| queued.expected_wait.as_ref())
            .map(|wait| wait.seconds),
        executing_seconds: executing
            .as_ref()
            .and_then(|executing| executing.elapsed.as_ref())
            .map(|elapsed| elapsed.seconds),
        worker: executing.map(|executing| executing.worker_id),
        lost_workers: lost,
    };
    if output.is_json() {
        output.json(&why);
        return Ok(());
    }
    let row = &why.operation;
    output.fact("Operation", &row.name);
    output.fact("Target", &row.target);
    output.fact("Action", &row.action);
    output.fact("Invocation", row.invocation.join(" "));
    output.fact("Queued", format!("{} ago", span(queued_for)));
    output.fact("Stage", row.stage_cell());
    if let Some(worker) = &why.worker {
        output.fact("Worker", labels(worker));
    }
    match &row.message {
        Some(message) => output.fact("Why", message),
        None => output.fact("Why", &why.why),
    }
    Ok(())
}
