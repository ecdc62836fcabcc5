//! Commands that change something: drain, undrain, terminate, kill.

use std::time::{Duration, Instant};

use tonic::{Code, Request};

use super::{
    Pattern, QueueFilter,
    calls::SchedulerCalls,
    look::no_such_worker,
    rows::{DrainRow, QueueName, labels, rfc3339},
};
use crate::{
    daemon::{CommandError, Output, Table, Unhurried},
    proto::{
        self,
        buildqueuestate::{
            AddOrRemoveDrainRequest, KillOperationsRequest, ListDrainsRequest, SizeClassQueueName,
            TerminateWorkersRequest, kill_operations_request,
        },
    },
    scheduler::queue::KILLED,
    text::plural,
};

/// How long the next scheduler may take to answer.
const RESTART_TIMEOUT: Duration = Duration::from_secs(120);
/// How long workers may take to call it, then.
const RECONNECTION_TIMEOUT: Duration = Duration::from_secs(15);

/// The drains that are, with the queues that they are of.
async fn drains(
    scheduler: &SchedulerCalls,
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

/// In every queue that is admitted and has a worker with these labels; or, `ahead` of them, in every one.
pub(super) async fn drain(
    scheduler: &SchedulerCalls,
    output: &Output,
    pattern: &Pattern,
    ahead: bool,
    filter: &QueueFilter,
) -> Result<(), CommandError> {
    let mut rows = Vec::new();
    let mut trouble = None;
    let before = drains(scheduler, filter).await?;
    let mut queues = scheduler.queues().await?;
    queues.retain(|name| filter.admits(&QueueName::from(name)));
    if queues.is_empty() && ahead {
        queues.push(filter.queue()?);
    }
    for name in queues {
        let queue = QueueName::from(&name);
        let workers = scheduler.workers(&name).await?;
        let meant = workers.iter().filter(|worker| pattern.matches(&worker.id));
        let slots = meant.count();
        if slots == 0 && !ahead {
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
        let drained = before
            .iter()
            .map(|(_, row)| row)
            .find(|row| row.queue == queue && row.pattern == pattern.0);
        let created = drained.and_then(|row| row.created.clone());
        if !output.is_json() {
            let slots = plural(slots as u64, "slot", "slots");
            let (labels, queue) = (labels(&pattern.0), queue.text());
            output.line(&match (drained, &created) {
                (None, _) => format!("Drained {slots} of {labels} ({queue})."),
                (Some(_), None) => format!("{labels} was drained already: {slots} ({queue})."),
                (Some(_), Some(since)) => {
                    format!("{labels} was drained already, since {since}: {slots} ({queue}).")
                }
            });
        }
        rows.push(DrainRow {
            pattern: pattern.0.clone(),
            queue,
            created,
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
    scheduler: &SchedulerCalls,
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

/// Slots of workers with these labels.
async fn slots_of(scheduler: &SchedulerCalls, pattern: &Pattern) -> Result<u64, CommandError> {
    let mut slots = 0;
    for name in scheduler.queues().await? {
        let workers = scheduler.workers(&name).await?;
        let meant = workers.iter().filter(|worker| pattern.matches(&worker.id));
        slots += meant.count() as u64;
    }
    Ok(slots)
}

/// Returns when what the workers executed has ended, whether the scheduler is restarted meanwhile or not.
pub(super) async fn terminate(
    scheduler: &SchedulerCalls,
    output: &Output,
    pattern: Pattern,
) -> Result<(), CommandError> {
    let slots = slots_of(scheduler, &pattern).await?;
    if slots == 0 {
        return Err(no_such_worker());
    }
    let shown = labels(&pattern.0);
    let say = |text: &str| {
        if !output.is_json() {
            output.line(text);
        }
    };
    say(&format!(
        "Waiting until {} of {shown} have ended what they execute.",
        plural(slots, "slot", "slots")
    ));
    loop {
        let mut request = Request::new(TerminateWorkersRequest {
            worker_id_pattern: pattern.0.clone(),
        });
        request.extensions_mut().insert(Unhurried);
        match scheduler.state().terminate_workers(request).await {
            Ok(_) => break,
            // A scheduler that was started again knows nothing of what the one before was told.
            Err(status) if status.code() == Code::Unavailable => {
                say(
                    "The scheduler is gone; asking the next one as soon as these workers have called it.",
                );
                await_workers(scheduler, &pattern, slots, status.into()).await?;
            }
            Err(status) => return Err(status.into()),
        }
    }
    match output.is_json() {
        true => output.json(&serde_json::json!({ "terminated": slots })),
        false => output.line(&format!("{shown} execute nothing, and can be stopped.")),
    }
    Ok(())
}

/// Returns as soon as a scheduler answers that as many slots have called, or some time after that at which
/// all that are there have. `lost` is why there is none now.
async fn await_workers(
    scheduler: &SchedulerCalls,
    pattern: &Pattern,
    slots: u64,
    lost: CommandError,
) -> Result<(), CommandError> {
    let begin = Instant::now();
    let mut answered: Option<Instant> = None;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        match slots_of(scheduler, pattern).await {
            Ok(known) if known >= slots => return Ok(()),
            Ok(_) => {
                let answered = answered.get_or_insert_with(Instant::now);
                if answered.elapsed() > RECONNECTION_TIMEOUT {
                    return Ok(());
                }
            }
            Err(CommandError::Unavailable(_)) if begin.elapsed() < RESTART_TIMEOUT => {}
            Err(CommandError::Unavailable(_)) => return Err(lost),
            Err(error) => return Err(error),
        }
    }
}

async fn kill_matching(
    scheduler: &SchedulerCalls,
    r#type: kill_operations_request::filter::Type,
    reason: &str,
) -> Result<(), CommandError> {
    let request = KillOperationsRequest {
        filter: Some(kill_operations_request::Filter {
            r#type: Some(r#type),
        }),
        status: Some(proto::status(KILLED, reason)),
    };
    scheduler.state().kill_operations(request).await?;
    Ok(())
}

/// One operation, and all others of its action.
pub(super) async fn kill(
    scheduler: &SchedulerCalls,
    output: &Output,
    name: String,
    reason: String,
) -> Result<(), CommandError> {
    let told = scheduler
        .kill_operation(name.clone(), reason.clone())
        .await?;
    let (names, count) = match told {
        Some(killed) => (killed.operation_names, killed.total),
        None => {
            let by_name = kill_operations_request::filter::Type::OperationName(name.clone());
            kill_matching(scheduler, by_name, &reason).await?;
            (vec![name.clone()], 1)
        }
    };
    if output.is_json() {
        output.json(&serde_json::json!({ "killed": names }));
        return Ok(());
    }
    output.line(&match count {
        0 => format!("{name} had ended already."),
        1 => format!("Killed {name}."),
        count => format!("Killed {name} and what else waited for its action: {count} operations."),
    });
    Ok(())
}

/// What is queued in queues that have no workers.
pub(super) async fn kill_queued(
    scheduler: &SchedulerCalls,
    output: &Output,
    reason: &str,
    filter: &QueueFilter,
) -> Result<(), CommandError> {
    use kill_operations_request::filter::Type;
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
            let of_queue = Type::SizeClassQueueWithoutWorkers(name);
            kill_matching(scheduler, of_queue, reason).await?;
            if !output.is_json() {
                let count = u64::from(queued.direct) + u64::from(queued.indirect);
                let count = plural(count, "operation", "operations");
                output.line(&format!("Killed {count} of {}.", queue.text()));
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
