//! What people do by a page: drain, terminate, kill. Each form asks for it once more.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use maud::{Markup, html};
use parking_lot::Mutex;
use serde::Deserialize;
use uuid::Uuid;

use super::{
    Pages, layout,
    protection::Confirmed,
    queue_key::{QueueQuery, read_pattern},
};
use crate::{
    proto,
    scheduler::queue::{
        Drain, EncodedResponse, KILLED, SizeClassQueueKey, WorkerId, WorkerPattern, WorkerSight,
    },
};

/// Who has drained what, since the start.
#[derive(Default)]
pub(in crate::scheduler) struct Drainers(
    Mutex<BTreeMap<(SizeClassQueueKey, WorkerPattern), String>>,
);

/// Drains whose author is known.
const MOST_DRAINERS: usize = 10_000;

impl Drainers {
    /// Empty when it is not known.
    pub(super) fn of(&self, key: &SizeClassQueueKey, pattern: &WorkerPattern) -> String {
        let known = self.0.lock();
        let by = known.get(&(key.clone(), pattern.clone()));
        by.cloned().unwrap_or_default()
    }

    /// Who has drained a worker.
    pub(super) fn of_worker(&self, key: &SizeClassQueueKey, worker: &WorkerId) -> Option<String> {
        let known = self.0.lock();
        let first = (key.clone(), WorkerPattern::default());
        let of_queue = known.range(first..).take_while(|((of, _), _)| of == key);
        let mut matching = of_queue.filter(|((_, pattern), _)| pattern.matches(worker));
        matching.next().map(|(_, by)| by.clone())
    }

    fn set(&self, key: SizeClassQueueKey, pattern: WorkerPattern, by: Option<String>) {
        let mut known = self.0.lock();
        match by {
            Some(by) if known.len() < MOST_DRAINERS => {
                known.entry((key, pattern)).or_insert(by);
            }
            Some(_) => {}
            None => {
                known.remove(&(key, pattern));
            }
        }
    }
}

#[derive(Deserialize)]
pub(super) struct WorkersForm {
    #[serde(flatten)]
    queue: QueueQuery,
    /// Labels that a worker must have: a JSON object.
    workers: String,
}

fn no_pattern() -> Response {
    let text = "Which workers are meant is said by a JSON object of their labels, such as \
                {\"hostname\": \"build7\"}. Nothing was done.";
    layout::refusal(StatusCode::BAD_REQUEST, "No such workers", text)
}

fn no_queue() -> Response {
    let text = "There is no such queue. Nothing was done.";
    layout::refusal(StatusCode::NOT_FOUND, "No such queue", text)
}

pub(super) async fn drain(
    State(pages): State<Arc<Pages>>,
    sent: Confirmed<WorkersForm>,
) -> Response {
    let Some(pattern) = read_pattern(&sent.form.workers) else {
        return no_pattern();
    };
    let Some(key) = sent.form.queue.key() else {
        return no_queue();
    };
    let added = pages.queue.add_drain(Drain {
        key: key.clone(),
        pattern: pattern.clone(),
        created: proto::timestamp(SystemTime::now()),
    });
    if let Err(refusal) = added {
        return layout::refusal(StatusCode::CONFLICT, "Not drained", &refusal.to_string());
    }
    tracing::info!(
        workers = %pattern,
        instance = key.prefix.as_str(),
        platform = %key.platform,
        by = sent.by,
        "workers are drained"
    );
    pages.drainers.set(key, pattern, Some(sent.by));
    kept(&pages, &sent.form.queue).await
}

pub(super) async fn undrain(
    State(pages): State<Arc<Pages>>,
    sent: Confirmed<WorkersForm>,
) -> Response {
    let Some(pattern) = read_pattern(&sent.form.workers) else {
        return no_pattern();
    };
    let Some(key) = sent.form.queue.key() else {
        return no_queue();
    };
    if pages.queue.remove_drain(&key, &pattern).is_err() {
        return no_queue();
    }
    tracing::info!(
        workers = %pattern,
        instance = key.prefix.as_str(),
        platform = %key.platform,
        by = sent.by,
        "workers are drained no longer"
    );
    pages.drainers.set(key, pattern, None);
    kept(&pages, &sent.form.queue).await
}

/// Back to the queue, when what is drained would outlive the scheduler.
async fn kept(pages: &Pages, queue: &QueueQuery) -> Response {
    match pages.drains.write(&pages.queue).await {
        Ok(()) => Redirect::to(&format!("/queue?{}#drains", queue.encoded())).into_response(),
        Err(error) => {
            tracing::warn!("{error}");
            let text = format!("It is done, but would not outlive the scheduler: {error}");
            layout::refusal(StatusCode::INTERNAL_SERVER_ERROR, "Not kept", &text)
        }
    }
}

pub(super) async fn terminate(
    State(pages): State<Arc<Pages>>,
    sent: Confirmed<WorkersForm>,
) -> Response {
    let Some(pattern) = read_pattern(&sent.form.workers) else {
        return no_pattern();
    };
    tracing::info!(
        workers = %pattern,
        by = sent.by,
        "workers are to terminate when they have done what they execute"
    );
    let queue = pages.queue.clone();
    // Nobody waits for what they execute now.
    tokio::spawn(async move { queue.terminate_workers(&pattern).await });
    Redirect::to(&format!("/workers?{}", sent.form.queue.encoded())).into_response()
}

#[derive(Deserialize)]
pub(super) struct KillForm {
    #[serde(default)]
    reason: String,
}

pub(super) async fn kill(
    State(pages): State<Arc<Pages>>,
    Path(operation): Path<Uuid>,
    sent: Confirmed<KillForm>,
) -> Response {
    let reason: String = sent.form.reason.trim().chars().take(200).collect();
    let message = match reason.is_empty() {
        true => format!("killed by {}, on the scheduler's pages", sent.by),
        false => format!("killed by {}, on the scheduler's pages: {reason}", sent.by),
    };
    let response = Arc::new(EncodedResponse::failure(KILLED, message));
    match pages.queue.kill_operation(operation, response) {
        Ok((_, operations)) => {
            tracing::info!(%operation, operations, by = sent.by, reason, "an operation was killed");
            Redirect::to(&format!("/operations/{operation}")).into_response()
        }
        Err(_) => {
            let text = "There is no such operation any more. Nothing was done.";
            layout::refusal(StatusCode::NOT_FOUND, "No such operation", text)
        }
    }
}

/// What opens a form, which asks once more.
fn confirmed(summary: &str, id: &str, action: &str, pages: &Pages, fields: &Markup) -> Markup {
    html! {
        details.confirm id=(id) {
            summary { (summary) }
            form method="post" action=(action) {
                input type="hidden" name="token" value=(pages.protection.token());
                (fields)
            }
        }
    }
}

fn queue_fields(queue: &QueueQuery) -> Markup {
    html! {
        input type="hidden" name="instance" value=(queue.instance);
        input type="hidden" name="platform" value=(queue.platform);
        input type="hidden" name="size" value=(queue.size);
    }
}

fn id_of(verb: &str, text: &str) -> String {
    let digest = crate::digest::DigestFunction::Sha256.digest_of(text.as_bytes());
    format!("{verb}-{}", digest.hash_hex().get(..16).unwrap_or_default())
}

pub(super) fn kill_form(pages: &Pages, operation: Uuid) -> Markup {
    let fields = html! {
        p {
            "The action is stopped, and all of its clients are told that it was killed "
            "(PERMISSION_DENIED, which none takes for a reason to try again)."
        }
        label { "Reason, for its clients " input name="reason" maxlength="200" autocomplete="off"; }
        button.danger { "Kill this operation" }
    };
    let action = format!("/operations/{operation}/kill");
    confirmed("Kill…", "kill", &action, pages, &fields)
}

pub(super) fn drain_form(pages: &Pages, queue: &QueueQuery) -> Markup {
    let fields = html! {
        (queue_fields(queue))
        p { "Workers with these labels finish what they execute, and get no new work; {} means all." }
        label { "Labels, as JSON "
            input name="workers" value="{}" required autocomplete="off" spellcheck="false";
        }
        button.danger { "Drain these workers" }
    };
    confirmed("Drain workers…", "drain", "/workers/drain", pages, &fields)
}

pub(super) fn undrain_form(pages: &Pages, queue: &QueueQuery, pattern: &WorkerPattern) -> Markup {
    let text = pattern.to_string();
    let fields = html! {
        (queue_fields(queue))
        input type="hidden" name="workers" value=(text);
        p { "They get work again." }
        button { "Drain no longer" }
    };
    let id = id_of("undrain", &text);
    confirmed("Undrain…", &id, "/workers/undrain", pages, &fields)
}

/// Of one worker in a table.
pub(super) fn worker_forms(pages: &Pages, row: &WorkerSight) -> Markup {
    let queue = QueueQuery::of(&row.key);
    // All slots of a worker: they differ by this label alone.
    let mut labels = row.id.labels().clone();
    labels.remove("thread");
    let text = WorkerPattern::new(labels).to_string();
    let own = row.id.to_string();
    let fields = |button: &str, about: &str| {
        html! {
            (queue_fields(&queue))
            input type="hidden" name="workers" value=(text);
            p { (about) }
            button.danger { (button) }
        }
    };
    let drain = fields(
        "Drain this worker",
        "All its slots finish what they execute, and get no new work until they are drained no longer.",
    );
    let terminate = fields(
        "Terminate this worker",
        "All its slots finish what they execute, and get no new work, so that it can be stopped.",
    );
    html! {
        @if !row.drained {
            (confirmed("Drain…", &id_of("drain", &own), "/workers/drain", pages, &drain))
        } @else {
            a href={ "/queue?" (queue.encoded()) "#drains" } { "Undrain" }
        }
        (confirmed("Terminate…", &id_of("terminate", &own), "/workers/terminate", pages, &terminate))
    }
}
