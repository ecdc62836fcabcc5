//! The farm at a glance.

use std::sync::Arc;

use axum::extract::State;
use maud::{Markup, html};

use super::{
    Pages,
    chart::chart,
    format::count,
    history::{self, KEPT, Sample},
    layout::{Page, Section},
    protection::MaySee,
    queues,
};

/// Queues of the first page.
const QUEUES: usize = 12;

pub(super) async fn page(_: MaySee, State(pages): State<Arc<Pages>>) -> Page<'static> {
    let counts = history::now(&pages.queue);
    let samples = pages.history.samples();
    let sum = |of: fn(&Sample) -> u64| samples.iter().map(of).sum::<u64>();
    let (failed, completed) = (sum(|sample| sample.failed), sum(|sample| sample.completed));
    let (hits, lookups) = (sum(|sample| sample.hits), sum(|sample| sample.lookups));
    let executing = counts.executing_workers as u64;
    let idle = (counts.workers as u64).saturating_sub(executing);
    let gauge = |of: fn(&Sample) -> usize| values(&samples, move |sample| Some(of(sample) as f64));
    let rows = queues::first(&pages.queue, None, QUEUES + 1);
    let shown = rows.get(..QUEUES).unwrap_or(&rows);
    let content = html! {
        h1 { "The farm at a glance" }
        div.tiles {
            (tile("Queued", &count(counts.queued as u64), "operations that wait for a worker", &gauge(|sample| sample.queued)))
            (tile("Executing", &count(executing), "worker slots that run an action", &gauge(|sample| sample.executing)))
            (tile("Idle", &count(idle), "worker slots that wait for one", &gauge(|sample| sample.idle)))
            (tile("Failed", &count(failed), &format!("of {} actions in the last hour", count(completed)),
                &values(&samples, |sample| Some(sample.failed as f64))))
            (tile("Cache hits", &rate(hits, lookups), &format!("of {} look-ups in the last hour", count(lookups)),
                &values(&samples, |sample| (sample.lookups > 0).then(|| sample.hits as f64 / sample.lookups as f64))))
        }
        h2 { "Platform queues" }
        (queues::table(shown))
        @if rows.len() > QUEUES {
            nav.pager aria-label="Further queues" { a href="/queues" { "All queues" } }
        }
    };
    Page {
        section: Section::Overview,
        title: "Farm",
        is_live: true,
        content,
    }
}
fn values(samples: &[Sample], of: impl Fn(&Sample) -> Option<f64>) -> Vec<Option<f64>> {
    samples.iter().map(of).collect()
}

fn rate(hits: u64, lookups: u64) -> String {
    match lookups {
        0 => "–".to_owned(),
        _ => format!("{:.0} %", hits as f64 * 100.0 / lookups as f64),
    }
}

fn tile(title: &str, value: &str, about: &str, values: &[Option<f64>]) -> Markup {
    let known = values.iter().flatten();
    let most = known.fold(1.0, |most: f64, value| most.max(*value));
    let label = format!("{title} in the last hour, now {value}");
    html! {
        section.tile aria-label=(title) {
            h2 { (title) }
            p.value { (value) }
            p.about { (about) }
            (chart(&label, values, KEPT, most))
        }
    }
}
