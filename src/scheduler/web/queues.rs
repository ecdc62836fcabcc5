//! Platform queues, and one of them: its invocations as a tree with their shares, and what is queued.

use std::sync::Arc;

use axum::{
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use maud::{Markup, html};
use serde::Deserialize;

use super::{
    Pages,
    format::{count, encode, name},
    layout::{self, Page, Section, properties},
    operations::table as operations_table,
    protection::MaySee,
    queue_key::{QueueQuery, describe_invocation, read_invocation, write_invocation},
    steering,
};
use crate::scheduler::{
    queue::{
        Drain, InvocationKey, InvocationKeys, Load, OperationRow, QueueLoad, SizeClassQueueKey,
    },
    shared_queue::SharedQueue,
};

/// Rows of a page, and those that are looked at under one lock.
const ROWS: usize = 100;
const ROWS_PER_LOCK: usize = 25;
/// Invocations of one level, and levels, that a page shows.
const SIBLINGS: usize = 50;
const LEVELS: usize = 3;
/// Operations of one invocation that a page shows.
const OPERATIONS: usize = 50;
const DRAINS: usize = 100;

/// The first queues after one.
pub(super) fn first(
    queue: &SharedQueue,
    after: Option<SizeClassQueueKey>,
    rows: usize,
) -> Vec<QueueLoad> {
    let mut found: Vec<QueueLoad> = Vec::new();
    let mut last = after;
    while found.len() < rows {
        let wanted = ROWS_PER_LOCK.min(rows - found.len());
        let piece = queue.look(|queue| queue.queue_loads(last.as_ref(), wanted));
        let Some(end) = piece.last() else { break };
        last = Some((*end.key).clone());
        found.extend(piece);
    }
    found
}

pub(super) async fn list(
    _: MaySee,
    State(pages): State<Arc<Pages>>,
    Query(query): Query<QueueQuery>,
) -> Page<'static> {
    // An address without a platform is the first page's.
    let after = (!query.platform.is_empty()).then(|| query.key()).flatten();
    let rows = first(&pages.queue, after.clone(), ROWS);
    let next = (rows.len() == ROWS).then(|| rows.last()).flatten();
    let content = html! {
        h1 { "Platform queues" }
        p.lead {
            "An action waits in the queue of its instance name, its platform and its size class, for a "
            "worker that offers just that platform."
        }
        (table(&rows))
        nav.pager aria-label="Further queues" {
            @if after.is_some() { a href="/queues" { "First queues" } }
            @if let Some(last) = next {
                a rel="next" href={ "/queues?" (QueueQuery::of(&last.key).encoded()) } { "Next queues" }
            }
        }
    };
    Page {
        section: Section::Queues,
        title: "Platform queues",
        is_live: true,
        content,
    }
}

/// How a queue is called in text.
pub(super) fn describe(key: &SizeClassQueueKey) -> Markup {
    html! {
        (properties(key.platform.properties()))
        @if !key.prefix.is_empty() { " in instance " code { (name(key.prefix.as_str())) } }
        @if key.size_class != 0 { ", size class " (key.size_class) }
    }
}

pub(super) fn table(rows: &[QueueLoad]) -> Markup {
    html! {
        @if rows.is_empty() {
            p.empty { "There are no platform queues: no worker has ever come, and none is predeclared." }
        } @else {
            (layout::table("Platform queues", None, html! {
                th scope="col" { "Platform" }
                th scope="col" { "Instance name" }
                th.number scope="col" { "Size class" }
                th.number scope="col" { "Queued" }
                th.number scope="col" { "Executing" }
                th.number scope="col" { "Workers" }
                th scope="col" { "State" }
            }, html! {
                @for row in rows {
                    tr {
                        th scope="row" {
                            a href={ "/queue?" (QueueQuery::of(&row.key).encoded()) } {
                                (properties(row.key.platform.properties()))
                            }
                        }
                        td { (name(row.key.prefix.as_str())) }
                        td.number { (row.key.size_class) }
                        td.number { (count(row.load.queued as u64)) }
                        td.number { (count(row.load.executing as u64)) }
                        td.number { (count(row.workers as u64)) }
                        td { (state(row)) }
                    }
                }
            }))
        }
    }
}

fn state(row: &QueueLoad) -> Markup {
    html! {
        @if row.workers == 0 {
            span.badge.bad[row.load.queued > 0].warn[row.load.queued == 0] { "no workers" }
        } @else if row.load.queued > 0 {
            span.badge.warn { "all busy" }
        } @else {
            span.badge.good { "serving" }
        }
    }
}

#[derive(Deserialize)]
pub(super) struct OneQuery {
    #[serde(default)]
    invocation: String,
    #[serde(flatten)]
    queue: QueueQuery,
}

/// A node of the tree, and how deep it is.
struct InvocationTreeNode {
    level: usize,
    keys: Vec<InvocationKey>,
    load: Load,
    /// There are more beside it than are shown.
    is_cut: bool,
}

fn add_children(
    queue: &SharedQueue,
    key: &SizeClassQueueKey,
    parent: &[InvocationKey],
    level: usize,
    nodes: &mut Vec<InvocationTreeNode>,
) {
    let keys = InvocationKeys::new(parent.iter().cloned());
    let children = queue.look(|queue| queue.invocation_loads(key, &keys, None, SIBLINGS + 1));
    let Ok(children) = children else {
        return;
    };
    let is_cut = children.len() > SIBLINGS;
    for (place, (child, load)) in children.into_iter().take(SIBLINGS).enumerate() {
        let mut keys = parent.to_vec();
        keys.push(child);
        let deeper = keys.clone();
        nodes.push(InvocationTreeNode {
            level,
            keys,
            load,
            is_cut: is_cut && place + 1 == SIBLINGS,
        });
        if level + 1 < LEVELS && nodes.len() < SIBLINGS * LEVELS {
            add_children(queue, key, &deeper, level + 1, nodes);
        }
    }
}

pub(super) async fn one(
    see: MaySee,
    State(pages): State<Arc<Pages>>,
    Query(query): Query<OneQuery>,
) -> Response {
    let wanted = query.queue;
    let keys = read_invocation(&query.invocation);
    let found = wanted.key().zip(keys).and_then(|(key, keys)| {
        let load = pages.queue.look(|queue| queue.queue_load(&key))?;
        Some((key, keys, load))
    });
    let Some((key, keys, row)) = found else {
        let text = "There is no such queue, or no longer. A queue that is not predeclared goes some time \
                    after its last worker.";
        return layout::refusal(StatusCode::NOT_FOUND, "No such queue", text);
    };
    let mut nodes = Vec::new();
    add_children(&pages.queue, &key, &[], 0, &mut nodes);
    let queued = pages
        .queue
        .look(|queue| queue.queued_operations(&key, &keys, None, OPERATIONS));
    let (queued, all): (Vec<OperationRow>, usize) =
        queued.map_or((Vec::new(), 0), |page| (page.rows, page.total));
    let drains = pages.queue.look(|queue| queue.drains(&key));
    let mut drains = drains.unwrap_or_default();
    drains.truncate(DRAINS);
    let address = format!("/queue?{}", wanted.encoded());
    let content = html! {
        h1 { "Queue of " (describe(&key)) }
        dl.facts {
            div { dt { "Queued" } dd { (count(row.load.queued as u64)) } }
            div { dt { "Executing" } dd { (count(row.load.executing as u64)) } }
            div { dt { "Waiting workers" } dd { (count(row.load.idle as u64)) } }
            div { dt { "Workers" } dd {
                a href={ "/workers?" (wanted.encoded()) } { (count(row.workers as u64)) }
            } }
            div { dt { "State" } dd { (state(&row)) } }
        }
        h2 #invocations { "Invocations and their shares" }
        @if nodes.is_empty() {
            p.empty { "Nobody has anything queued or executing here." }
        } @else {
            (tree(&nodes, &row, &address))
        }
        h2 #queued { "Queued next" }
        @if keys.as_slice().is_empty() {
            @if all == 0 {
                p.empty { "Choose an invocation to see what it has queued." }
            }
        } @else {
            p {
                "Of " (crumbs(keys.as_slice())) ", in the order in which they are served. "
                a href=(address) { "Of all" }
            }
            @if all == 0 { p.empty { "It has nothing queued itself." } }
        }
        @if all > 0 {
            p { (count(all as u64)) " queued, of which " (queued.len()) " are shown." }
            (operations_table(&queued))
        }
        h2 #drains { "Drains" }
        (drain_table(&pages, &see, &wanted, &drains))
    };
    let page = Page {
        section: Section::Queues,
        title: "Queue",
        is_live: true,
        content,
    };
    page.into_response()
}

fn tree(nodes: &[InvocationTreeNode], row: &QueueLoad, address: &str) -> Markup {
    let share = |load: &Load| match row.load.executing {
        0 => 0.0,
        all => load.executing as f64 / all as f64,
    };
    html! {
        (layout::table("Invocations", Some("tree"), html! {
            th scope="col" { "Invocation" }
            th scope="col" { "Share of what executes" }
            th.number scope="col" { "Executing" }
            th.number scope="col" { "Queued" }
            th.number scope="col" { "Waiting workers" }
        }, html! {
            @for node in nodes {
                @let text = node.keys.last().map(describe_invocation).unwrap_or_default();
                tr {
                    th scope="row" class={ "level-" (node.level) } {
                        span.quiet { (text.0) " " }
                        a href={ (address) "&invocation=" (encode(&write_invocation(&node.keys))) "#queued" } {
                            (name(&text.1))
                        }
                        @if node.is_cut { " " span.badge.warn { "and more" } }
                    }
                    td {
                        meter min="0" max="1" value=(share(&node.load)) aria-label="Share of what executes" {}
                        " " (format!("{:.0} %", share(&node.load) * 100.0))
                    }
                    td.number { (count(node.load.executing as u64)) }
                    td.number { (count(node.load.queued as u64)) }
                    td.number { (count(node.load.idle as u64)) }
                }
            }
        }))
    }
}

/// Levels of an invocation, one after the other.
pub(super) fn crumbs(keys: &[InvocationKey]) -> Markup {
    html! {
        @for (level, key) in keys.iter().enumerate() {
            @let text = describe_invocation(key);
            @if level > 0 { " › " }
            span.quiet { (text.0) " " } (name(&text.1))
        }
    }
}

fn drain_table(pages: &Pages, see: &MaySee, wanted: &QueueQuery, drains: &[Drain]) -> Markup {
    html! {
        @if drains.is_empty() {
            p.empty { "No workers of this queue are drained." }
        } @else {
            (layout::table("Drains", None, html! {
                th scope="col" { "Workers" }
                th scope="col" { "Since" }
                th scope="col" { "By" }
                @if see.may_steer() { th scope="col" { "Act" } }
            }, html! {
                @for drain in drains {
                    tr {
                        th scope="row" { (layout::labels(drain.pattern.labels())) }
                        td { (super::format::timestamp(&drain.created)) }
                        td { (name(&pages.drainers.of(&drain.key, &drain.pattern))) }
                        @if see.may_steer() {
                            td { (steering::undrain_form(pages, wanted, &drain.pattern)) }
                        }
                    }
                }
            }))
        }
        @if see.may_steer() { (steering::drain_form(pages, wanted)) }
    }
}
