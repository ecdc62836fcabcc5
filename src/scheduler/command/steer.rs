//! Commands that change something: drain, undrain, terminate, kill.

use super::{
    Pattern, QueueFilter,
    calls::Scheduler,
    look::no_such_worker,
    rows::{DrainRow, QueueName, labels, rfc3339},
};
use crate::{
    daemon::{CommandError, Output, Table},
    proto::{
        self,
        buildqueuestate::{
            AddOrRemoveDrainRequest, KillOperationsRequest, ListDrainsRequest, SizeClassQueueName,
            TerminateWorkersRequest, kill_operations_request,
        },
        rpc,
    },
};

/// The drains that are, with the queues that they are of.
async fn drains(
    scheduler: &Scheduler,
    filter: &QueueFilter,
) -> Result<Vec<(SizeClassQueueName, DrainRow)>, CommandError> {
    let mut rows = Vec::new();
    for name in scheduler.drained_queues().await? {
        let queue = QueueName::from(&name);
        if !filter.admits(&queue) {
            continue;
        }
        let request = ListDrainsRequest {
            size_class_queue_name: Some(name.clone()),
        };
        let listed = scheduler.state().list_drains(request).await?.into_inner();
        rows.extend(listed.drains.into_iter().map(|drain| {
            let row = DrainRow {
                pattern: drain.worker_id_pattern,
                queue: queue.clone(),
                created: drain.created_timestamp.as_ref().and_then(rfc3339),
            };
            (name.clone(), row)
        }));
    }
    Ok(rows)
}

/// In every queue that is admitted and has a worker with these labels.
pub(super) async fn drain(
    scheduler: &Scheduler,
    output: &Output,
    pattern: &Pattern,
    filter: &QueueFilter,
) -> Result<(), CommandError> {
    let mut rows = Vec::new();
    let mut trouble = None;
    for name in scheduler.queues().await? {
        let queue = QueueName::from(&name);
        if !filter.admits(&queue) {
            continue;
        }
        let workers = scheduler.workers(&name).await?;
        let meant = workers.iter().filter(|worker| pattern.matches(&worker.id));
        let slots = meant.count();
        if slots == 0 {
            continue;
        }
        let request = AddOrRemoveDrainRequest {
            size_class_queue_name: Some(name),
            worker_id_pattern: pattern.0.clone(),
        };
        // One queue's trouble is no reason to leave the others' workers undrained.
        if let Err(status) = scheduler.state().add_drain(request).await {
            trouble.get_or_insert(status);
            continue;
        }
        if !output.is_json() {
            output.line(&format!(
                "Drained {slots} slots of {} ({}).",
                labels(&pattern.0),
                queue.text()
            ));
        }
        rows.push(DrainRow {
            pattern: pattern.0.clone(),
            queue,
            created: None,
        });
    }
    if let Some(status) = trouble {
        return Err(status.into());
    }
    if rows.is_empty() {
        return Err(no_such_worker());
    }
    if output.is_json() {
        output.json(&rows);
    }
    Ok(())
}

pub(super) async fn undrain(
    scheduler: &Scheduler,
    output: &Output,
    pattern: Option<&Pattern>,
    all: bool,
    filter: &QueueFilter,
) -> Result<(), CommandError> {
    let mut drains = drains(scheduler, filter).await?;
    if pattern.is_none() && !all {
        let rows: Vec<DrainRow> = drains.into_iter().map(|(_, row)| row).collect();
        list(output, &rows);
        return Ok(());
    }
    drains.retain(|(_, row)| pattern.is_none_or(|pattern| row.pattern == pattern.0));
    if drains.is_empty() {
        return Err(CommandError::NotFound(
            "there is no such drain; \"bb_scheduler undrain\" lists them".to_owned(),
        ));
    }
    for (name, row) in &drains {
        let request = AddOrRemoveDrainRequest {
            size_class_queue_name: Some(name.clone()),
            worker_id_pattern: row.pattern.clone(),
        };
        scheduler.state().remove_drain(request).await?;
        if !output.is_json() {
            output.line(&format!(
                "{} take work again ({}).",
                labels(&row.pattern),
                row.queue.text()
            ));
        }
    }
    if output.is_json() {
        let rows: Vec<&DrainRow> = drains.iter().map(|(_, row)| row).collect();
        output.json(&rows);
    }
    Ok(())
}

fn list(output: &Output, rows: &[DrainRow]) {
    if output.is_json() {
        output.json(&rows);
        return;
    }
    if rows.is_empty() {
        output.line("No workers are drained.");
        return;
    }
    let mut table = Table::new(["WORKERS…", "PLATFORM…", "INSTANCE…", "SIZE", "SINCE"]);
    for row in rows {
        table.row([
            labels(&row.pattern).into(),
            row.queue.platform_text().into(),
            row.queue.instance.as_str().into(),
            row.queue.size_class.into(),
            row.created.as_deref().unwrap_or("-").into(),
        ]);
    }
    output.table(&table);
}

/// Returns when what the workers executed has ended.
pub(super) async fn terminate(
    scheduler: &Scheduler,
    output: &Output,
    pattern: Pattern,
) -> Result<(), CommandError> {
    let mut slots = 0;
    for name in scheduler.queues().await? {
        let workers = scheduler.workers(&name).await?;
        let meant = workers.iter().filter(|worker| pattern.matches(&worker.id));
        slots += meant.count();
    }
    if slots == 0 {
        return Err(no_such_worker());
    }
    let shown = labels(&pattern.0);
    if !output.is_json() {
        output.line(&format!(
            "Waiting until {slots} slots of {shown} have ended what they execute."
        ));
    }
    let request = TerminateWorkersRequest {
        worker_id_pattern: pattern.0,
    };
    scheduler.state().terminate_workers(request).await?;
    match output.is_json() {
        true => output.json(&serde_json::json!({ "terminated": slots })),
        false => output.line(&format!("{shown} execute nothing, and can be stopped.")),
    }
    Ok(())
}

/// One operation, or, without a name, what is queued in queues that have no workers.
pub(super) async fn kill(
    scheduler: &Scheduler,
    output: &Output,
    name: Option<String>,
    reason: &str,
    filter: &QueueFilter,
) -> Result<(), CommandError> {
    use kill_operations_request::{Filter, filter::Type};
    let kill = async |r#type: Type| {
        let request = KillOperationsRequest {
            filter: Some(Filter {
                r#type: Some(r#type),
            }),
            // Unlike ABORTED, CANCELLED and others, no client takes it for a reason to try again.
            status: Some(proto::status(rpc::Code::PermissionDenied, reason)),
        };
        scheduler.state().kill_operations(request).await
    };
    if let Some(name) = name {
        kill(Type::OperationName(name.clone())).await?;
        match output.is_json() {
            true => output.json(&serde_json::json!({ "killed": [name] })),
            false => output.line(&format!("Killed {name}.")),
        }
        return Ok(());
    }
    let mut killed = Vec::new();
    let platform_queues = scheduler.state().list_platform_queues(()).await?;
    for platform_queue in platform_queues.into_inner().platform_queues {
        for size in platform_queue.size_class_queues {
            let name = SizeClassQueueName {
                platform_queue_name: platform_queue.name.clone(),
                size_class: size.size_class,
            };
            let queue = QueueName::from(&name);
            let root = size.root_invocation.unwrap_or_default();
            let queued = root.queued_operations_count.unwrap_or_default();
            let is_empty = queued.direct + queued.indirect == 0;
            if size.workers_count > 0 || is_empty || !filter.admits(&queue) {
                continue;
            }
            kill(Type::SizeClassQueueWithoutWorkers(name)).await?;
            if !output.is_json() {
                let count = queued.direct + queued.indirect;
                output.line(&format!("Killed {count} operations of {}.", queue.text()));
            }
            killed.push(queue);
        }
    }
    if output.is_json() {
        output.json(&killed);
    }
    match killed.is_empty() {
        true => Err(CommandError::NotFound(
            "nothing is queued where there are no workers".to_owned(),
        )),
        false => Ok(()),
    }
}
