//! Workers: what they do and since when, and whether they are drained.

use std::{sync::Arc, time::Instant};

use axum::extract::{Query, State};
use maud::{Markup, html};
use serde::Deserialize;

use super::{
    Pages,
    format::{duration, encode, name, size},
    layout::{self, Page, Section, labels},
    protection::MaySee,
    queue_key::QueueQuery,
    queues, steering,
};
use crate::scheduler::queue::{SizeClassQueueKey, WorkerId, WorkerSight, WorkerSightActivity};

/// Rows of a page, and those that are looked at under one lock.
const ROWS: usize = 200;
const ROWS_PER_LOCK: usize = 50;

#[derive(Deserialize)]
pub(super) struct WorkersQuery {
    #[serde(flatten)]
    queue: QueueQuery,
    /// Of the last worker of the page before: the JSON of its labels.
    #[serde(default)]
    after: String,
    /// Of all queues, beginning with this one.
    #[serde(default)]
    all: String,
}

/// Workers, of one queue or from one on, and whether there are more.
fn collect(
    pages: &Pages,
    key: Option<SizeClassQueueKey>,
    after: Option<WorkerId>,
    is_of_all: bool,
) -> (Vec<WorkerSight>, Instant) {
    let mut rows: Vec<WorkerSight> = Vec::new();
    let (mut key, mut after) = (key, after);
    let mut now = Instant::now();
    if key.is_none() {
        key = queues::first(&pages.queue, None, 1)
            .first()
            .map(|first| (*first.key).clone());
    }
    while let Some(current) = &key {
        let piece = pages.queue.look_now(|queue, time| {
            now = time;
            queue.worker_sights(time, current, after.as_ref(), ROWS_PER_LOCK)
        });
        match piece.last() {
            Some(last) => after = Some(last.id.clone()),
            None if is_of_all => {
                after = None;
                key = queues::first(&pages.queue, Some(current.clone()), 1)
                    .first()
                    .map(|next| (*next.key).clone());
            }
            None => break,
        }
        rows.extend(piece);
        if rows.len() >= ROWS {
            break;
        }
    }
    (rows, now)
}

pub(super) async fn list(
    see: MaySee,
    State(pages): State<Arc<Pages>>,
    Query(query): Query<WorkersQuery>,
) -> Page<'static> {
    let wanted = query.queue;
    let key = (!wanted.platform.is_empty())
        .then(|| wanted.key())
        .flatten();
    let is_of_all = key.is_none() || query.all == "1";
    let after = serde_json::from_str(&query.after).ok().map(WorkerId::new);
    let is_first = after.is_none();
    let (rows, now) = collect(&pages, key.clone(), after, is_of_all);
    let next = (rows.len() >= ROWS).then(|| rows.last()).flatten();
    let content = html! {
        h1 {
            "Workers"
            @if let Some(key) = key.filter(|_| !is_of_all) { " of " (queues::describe(&key)) }
        }
        p.lead { "One row for each slot: a worker has as many as it executes actions at a time." }
        @if rows.is_empty() {
            p.empty { "There are no workers here." }
        } @else {
            (table(&pages, &see, &rows, now))
        }
        nav.pager aria-label="Further workers" {
            @if !is_first { a href="/workers" { "First workers" } }
            @if let Some(last) = next {
                a rel="next" href={
                    "/workers?" (QueueQuery::of(&last.key).encoded()) "&after=" (encode(&last.id.to_string()))
                    @if is_of_all { "&all=1" }
                } { "Next workers" }
            }
        }
    };
    Page {
        section: Section::Workers,
        title: "Workers",
        is_live: true,
        content,
    }
}

fn table(pages: &Pages, see: &MaySee, rows: &[WorkerSight], now: Instant) -> Markup {
    html! {
        (layout::table("Workers", None, html! {
            th scope="col" { "Worker" }
            th scope="col" { "Does" }
            th.number scope="col" { "For" }
            th scope="col" { "State" }
            th scope="col" { "Host" }
            @if see.may_steer() { th scope="col" { "Act" } }
        }, html! {
            @for row in rows {
                tr {
                    th scope="row" { (labels(row.id.labels())) }
                    (activity(row, now))
                    td { (state(pages, row)) }
                    td { (host(pages, row)) }
                    @if see.may_steer() {
                        td { (steering::worker_forms(pages, row)) }
                    }
                }
            }
        }))
    }
}

fn activity(row: &WorkerSight, now: Instant) -> Markup {
    html! {
        @match &row.activity {
            WorkerSightActivity::Idle => { td { span.quiet { "waits" } } td {} }
            WorkerSightActivity::Foreign => {
                td { "an action of the scheduler before this one" } td {}
            }
            WorkerSightActivity::Executing { since, operation } => {
                td {
                    @match operation {
                        Some(operation) => {
                            @let target = operation.action.target_id();
                            a href={ "/operations/" (operation.name) } {
                                @if target.is_empty() { (operation.action.digest.hash_hex()) }
                                @else { (name(&target)) }
                            }
                        }
                        None => "an action that nobody waits for"
                    }
                }
                td.number { (duration(now.saturating_duration_since(*since))) }
            }
        }
    }
}

/// Where it is, and what its worker says of itself.
fn host(pages: &Pages, row: &WorkerSight) -> Markup {
    let state = pages
        .live
        .state_of(&(row.key.prefix.as_str().to_owned(), row.id.to_string()));
    html! {
        (name(&row.peer))
        @if let Some(state) = state {
            br;
            span.quiet {
                "bb_worker " (name(&state.version))
                @if state.disk_size_bytes > 0 {
                    ", " (size(state.disk_free_bytes)) " of " (size(state.disk_size_bytes)) " free"
                }
            }
        }
    }
}

fn state(pages: &Pages, row: &WorkerSight) -> Markup {
    let by = row
        .drained
        .then(|| pages.drainers.of_worker(&row.key, &row.id));
    html! {
        @if row.silent { span.badge.bad { "silent" } " " }
        @if row.terminating { span.badge.warn { "terminating" } " " }
        @if let Some(by) = by {
            span.badge.warn { "drained" }
            @if let Some(by) = by { " by " (name(&by)) }
        }
        @if !row.silent && !row.terminating && !row.drained { span.badge.good { "serving" } }
    }
}
