//! Operations: what clients wait for.

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::{Query, State};
use maud::{Markup, html};
use serde::Deserialize;
use uuid::Uuid;

use super::{
    Pages,
    format::{encode, name, timestamp},
    layout::{self, Page, Section},
    protection::MaySee,
};
use crate::scheduler::{
    queue::{OperationFilter, OperationRow, Stage, StageKind},
    shared_queue::SharedQueue,
};

/// Rows of a page, those that are looked at under one lock, and for one page.
const ROWS: usize = 100;
const ROWS_PER_LOCK: usize = 256;
const MOST_SEEN: usize = 20_000;

#[derive(Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    stage: String,
    /// Part of a target, of an action's hash, or of an operation's name.
    #[serde(default)]
    find: String,
    #[serde(default)]
    after: Option<Uuid>,
}

/// Some of the operations that are looked for.
struct FoundRows {
    rows: Vec<OperationRow>,
    /// Where to go on; `None` at the end.
    next: Option<Uuid>,
    total: usize,
}

async fn search(
    queue: &SharedQueue,
    after: Option<Uuid>,
    filter: &OperationFilter,
    text: &str,
) -> FoundRows {
    let (_, total) = queue.look(|queue| queue.place_of(None));
    let mut found = FoundRows {
        rows: Vec::new(),
        next: None,
        total,
    };
    let mut last = after;
    let mut seen = 0;
    loop {
        let piece = queue.look(|queue| {
            queue
                .operations(last)
                .take(ROWS_PER_LOCK)
                .collect::<Vec<_>>()
        });
        let Some(end) = piece.last().map(|row| row.name) else {
            found.next = None;
            return found;
        };
        for row in piece {
            seen += 1;
            last = Some(row.name);
            if filter.admits(&row) && is_meant(&row, text) {
                found.rows.push(row);
                if found.rows.len() == ROWS {
                    found.next = last;
                    return found;
                }
            }
        }
        last = Some(end);
        if seen >= MOST_SEEN {
            found.next = last;
            return found;
        }
        tokio::task::yield_now().await;
    }
}

fn is_meant(row: &OperationRow, text: &str) -> bool {
    text.is_empty()
        || row.action.digest.hash_hex().contains(text)
        || row.name.to_string().contains(text)
        || row.action.target_id().contains(text)
}

pub(super) async fn list(
    _: MaySee,
    State(pages): State<Arc<Pages>>,
    Query(query): Query<ListQuery>,
) -> Page<'static> {
    let stages = [
        ("", "All stages", None),
        ("queued", "Queued", Some(StageKind::Queued)),
        ("executing", "Executing", Some(StageKind::Executing)),
        ("completed", "Completed", Some(StageKind::Completed)),
    ];
    let chosen = stages.iter().find(|(value, ..)| *value == query.stage);
    let filter = OperationFilter {
        stage: chosen.and_then(|(_, _, stage)| *stage),
        ..OperationFilter::default()
    };
    let text = query.find.trim();
    let permit = pages.searches.acquire().await;
    let found = search(&pages.queue, query.after, &filter, text).await;
    drop(permit);
    let is_filtered = filter.stage.is_some() || !text.is_empty();
    let further = |after: Uuid| {
        let find = encode(text);
        let stage = encode(&query.stage);
        format!("/operations?stage={stage}&find={find}&after={after}")
    };
    let content = html! {
        h1 { "Operations" }
        form.filters method="get" action="/operations" role="search" {
            label { "Stage "
                select name="stage" {
                    @for (value, label, _) in stages {
                        option value=(value) selected[value == query.stage] { (label) }
                    }
                }
            }
            label { "Target, action or operation "
                input type="search" name="find" value=(text) autocomplete="off" spellcheck="false";
            }
            button { "Find" }
        }
        p.lead {
            (super::format::count(found.total as u64)) " operations in all"
            @if is_filtered && found.next.is_some() && found.rows.len() < ROWS {
                "; the first " (super::format::count(MOST_SEEN as u64)) " were searched"
            }
            "."
        }
        @if found.rows.is_empty() {
            p.empty { "There are none" @if is_filtered { " that match" } "." }
        } @else {
            (table(&found.rows))
        }
        nav.pager aria-label="Further operations" {
            @if query.after.is_some() {
                a href={ "/operations?stage=" (encode(&query.stage)) "&find=" (encode(text)) } { "First operations" }
            }
            @if let Some(next) = found.next { a rel="next" href=(further(next)) { "Next operations" } }
        }
    };
    Page {
        section: Section::Operations,
        title: "Operations",
        is_live: true,
        content,
    }
}

/// What a stage is called, and how it looks.
pub(super) fn stage(stage: &Stage) -> Markup {
    html! {
        @match stage {
            Stage::Queued => span.badge.warn { "queued" },
            Stage::Executing => span.badge.live { "executing" },
            Stage::Completed(outcome) => {
                @if outcome.code != 0 { span.badge.bad { "failed" } }
                @else if outcome.exit_code != 0 { span.badge.bad { "exit code " (outcome.exit_code) } }
                @else { span.badge.good { "completed" } }
            }
        }
    }
}

pub(super) fn table(rows: &[OperationRow]) -> Markup {
    html! {
        (layout::table("Operations", None, html! {
            th scope="col" { "Operation" }
            th scope="col" { "Stage" }
            th scope="col" { "Action" }
            th scope="col" { "Queued" }
            th.number scope="col" { "Priority" }
            th scope="col" { "Worker" }
        }, html! {
            @for row in rows {
                @let metadata = row.action.request_metadata();
                tr {
                    th scope="row" {
                        a href={ "/operations/" (row.name) } {
                            @if metadata.target_id.is_empty() { (row.name) }
                            @else { (name(&metadata.target_id)) }
                        }
                        @if !metadata.action_mnemonic.is_empty() {
                            " " span.quiet { (name(&metadata.action_mnemonic)) }
                        }
                    }
                    td { (stage(&row.stage)) }
                    td { code { (row.action.digest.hash_hex().get(..12).unwrap_or_default()) "…" } }
                    td { (timestamp(&row.action.queued_timestamp)) }
                    td.number { (row.priority) }
                    td { (worker(row)) }
                }
            }
        }))
    }
}

fn worker(row: &OperationRow) -> Markup {
    let labels = |text: &str| serde_json::from_str::<BTreeMap<String, String>>(text).ok();
    html! {
        @match (&row.worker, &row.stage) {
            (Some(worker), _) => (super::layout::labels(worker.labels())),
            (None, Stage::Completed(outcome)) => {
                @match labels(&outcome.worker) {
                    Some(labels) => (super::layout::labels(&labels)),
                    None => (name(&outcome.worker))
                }
            }
            _ => {}
        }
    }
}
