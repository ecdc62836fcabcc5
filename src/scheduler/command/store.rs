//! `bb_scheduler store`: the embedded store.

use super::{ActionName, calls::SchedulerCalls, rows::StoreRow};
use crate::{
    daemon::{Cell, CommandError, Emphasis, Output, bytes},
    proto::control::{
        CheckStoreRequest, GetStoreUsageRequest, RemoveActionResultRequest, StoreCheck,
    },
};

pub(super) async fn usage(scheduler: &SchedulerCalls, output: &Output) -> Result<(), CommandError> {
    let usage = scheduler
        .control()
        .get_store_usage(GetStoreUsageRequest {})
        .await?;
    let usage = StoreRow::from(usage.into_inner());
    if output.is_json() {
        output.json(&usage);
        return Ok(());
    }
    output.fact("Directory", &usage.directory);
    output.fact("Used", part(usage.used_bytes, usage.maximum_bytes));
    output.fact("Entries", usage.entries);
    output.fact("Free on its disk", bytes(usage.free_bytes));
    for of in &usage.instances {
        let used = part(of.used_bytes, of.maximum_bytes);
        let whose = match of.instance_name_prefix.as_str() {
            "" => "of all other instance names".to_owned(),
            prefix => format!("of instance {prefix}"),
        };
        output.fact("Of that", format!("{used} {whose}"));
    }
    Ok(())
}

fn part(used: u64, maximum: u64) -> String {
    let percent = used * 100 / maximum.max(1);
    format!("{} of {} ({percent} %)", bytes(used), bytes(maximum))
}

pub(super) async fn check(scheduler: &SchedulerCalls, output: &Output) -> Result<(), CommandError> {
    let checking = scheduler
        .control()
        .check_store(CheckStoreRequest {})
        .await?;
    let mut stream = checking.into_inner();
    let mut last = StoreCheck::default();
    while let Some(progress) = stream.message().await? {
        last = progress;
    }
    if !last.done {
        return Err(CommandError::Unavailable(
            "the scheduler stopped before the check was done".to_owned(),
        ));
    }
    if output.is_json() {
        output.json(&serde_json::json!({
            "entries": last.entries,
            "bytes": last.bytes,
            "removed": last.removed_entries,
        }));
    } else {
        let emphasis = match last.removed_entries {
            0 => Emphasis::Good,
            _ => Emphasis::Bad,
        };
        output.fact(
            "Entries",
            format!("{}, {}", last.entries, bytes(last.bytes)),
        );
        output.fact("Damaged", Cell::new(last.removed_entries, emphasis));
    }
    match last.removed_entries {
        0 => Ok(()),
        removed => Err(CommandError::Failed(format!(
            "{removed} entries were damaged, and are removed: look at the disk and its memory; clients upload them again"
        ))),
    }
}

pub(super) async fn remove_result(
    scheduler: &SchedulerCalls,
    output: &Output,
    name: &ActionName,
    instance_name: String,
) -> Result<(), CommandError> {
    let request = RemoveActionResultRequest {
        instance_name,
        action_digest: Some(name.into()),
        digest_function: 0,
    };
    scheduler.control().remove_action_result(request).await?;
    match output.is_json() {
        true => output.json(&serde_json::json!({ "removed": name.hash })),
        false => output.line(&format!(
            "The result of {} is gone; the action is executed when a client asks for it next.",
            name.hash
        )),
    }
    Ok(())
}
