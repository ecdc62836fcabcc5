//! One operation: why it is where it is, its timeline, and what it prints.

use std::{sync::Arc, time::SystemTime};

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use maud::{Markup, html};
use prost::Message;
use uuid::Uuid;

use super::{
    Pages,
    browser::{Place, log, result},
    format::{duration, name, size, timestamp},
    layout::{self, Page, Section},
    operations,
    protection::MaySee,
    queue_key::QueueQuery,
    queues, steering,
};
use crate::{
    config::grants::Permission,
    digest::Digest,
    proto::{self, live_output::Output, reapi},
    scheduler::{
        live_output::{LARGEST_PIECE, Wanted},
        queue::{OperationRow, Stage},
    },
};

pub(super) async fn page(
    see: MaySee,
    State(pages): State<Arc<Pages>>,
    Path(text): Path<String>,
) -> Response {
    let wanted = text.parse::<Uuid>().ok();
    let found = wanted.and_then(|wanted| pages.queue.look(|queue| queue.operation(wanted)));
    let Some(row) = found else {
        let text = "There is no such operation, or no longer: completed ones are forgotten some time after \
                    the last client has asked for them. Its action can be looked at by its digest.";
        return layout::refusal(StatusCode::NOT_FOUND, "No such operation", text);
    };
    let content = show(&pages, &see, &row).await;
    let page = Page {
        section: Section::Operations,
        title: "Operation",
        is_live: !matches!(row.stage, Stage::Completed(_)),
        content,
    };
    page.into_response()
}

async fn show(pages: &Pages, see: &MaySee, row: &OperationRow) -> Markup {
    let metadata = row.action.request_metadata();
    let place = Place {
        instance: row.action.instance.clone(),
        function: row.action.digest.function(),
    };
    let may_read = see.0.may(Permission::CasRead, &row.action.instance);
    let response = match &row.stage {
        Stage::Completed(outcome) => reapi::ExecuteResponse::decode(&*outcome.response).ok(),
        Stage::Queued | Stage::Executing => None,
    };
    let explanation = pages.queue.explain(row.name);
    let is_running = response.is_none();
    html! {
        h1 {
            @if metadata.target_id.is_empty() { "Operation" } @else { (name(&metadata.target_id)) }
            " " (operations::stage(&row.stage))
        }
        @if is_running {
            @if let Some(explanation) = explanation {
                section.why aria-label="Why" {
                    h2 { "Why" }
                    p { (name(&explanation.to_string())) }
                }
            }
        }
        dl.facts {
            div { dt { "Operation" } dd { code { (row.name) } } }
            div { dt { "Action" } dd { a href=(place.address("action", &row.action.digest)) {
                code { (short(&row.action.digest)) }
            } } }
            @if !metadata.action_mnemonic.is_empty() {
                div { dt { "Mnemonic" } dd { (name(&metadata.action_mnemonic)) } }
            }
            div { dt { "Queue" } dd {
                a href={ "/queue?" (QueueQuery::of(&row.key).encoded()) } { (queues::describe(&row.key)) }
            } }
            @if !row.invocation.as_slice().is_empty() {
                div { dt { "Invocation" } dd { (queues::crumbs(row.invocation.as_slice())) } }
            }
            div { dt { "Priority" } dd { (row.priority) } }
            div { dt { "Queued" } dd { (timestamp(&row.action.queued_timestamp)) } }
            @if let Some(worker) = &row.worker {
                div { dt { "Worker" } dd { (layout::labels(worker.labels())) } }
            }
            @if is_running {
                div { dt { "Waits and runs for" } dd { (since(&row.action.queued_timestamp)) } }
            }
        }
        @if is_running && see.may_steer() { (steering::kill_form(pages, row.name)) }
        @match response {
            Some(response) => (result::show(pages, &place, &response, may_read).await),
            None => {
                @if matches!(row.stage, Stage::Executing) {
                    (live_output(pages, row, may_read).await)
                }
            }
        }
    }
}

async fn live_output(pages: &Pages, row: &OperationRow, may_read: bool) -> Markup {
    let Some(worker) = row.live_slot() else {
        return html! {};
    };
    if !may_read {
        return html! { p.empty { "You may not read what it prints (cas.read)." } };
    }
    let mut shown = Vec::new();
    for (output, title) in [
        (Output::Stdout, "Standard output"),
        (Output::Stderr, "Standard error"),
    ] {
        let wanted = Wanted {
            output,
            offset: -i64::from(LARGEST_PIECE),
            size: LARGEST_PIECE,
        };
        let asked = pages.live.ask(&worker, &row.action.digest, wanted);
        let Some(answer) = asked.await else {
            return html! {
                p.empty { "What it prints can be read when it has ended: its worker does not tell it before." }
            };
        };
        shown.push((title, answer));
    }
    html! {
        @for (title, answer) in shown {
            h2 { (title) }
            @if answer.size == 0 { p.empty { "Nothing yet." } } @else {
                p.quiet {
                    (size(answer.size)) " so far"
                    @if answer.offset > 0 { ", of which the end is shown" }
                }
                (log::frame(title, &log::coloured(&answer.data)))
            }
        }
    }
}

fn since(time: &prost_types::Timestamp) -> String {
    let begun = proto::system_time(time);
    let passed = begun.and_then(|begun| SystemTime::now().duration_since(begun).ok());
    passed.map(duration).unwrap_or_default()
}

pub(super) fn short(digest: &Digest) -> String {
    let hash = digest.hash_hex();
    format!("{}…", hash.get(..16).unwrap_or_default())
}
