//! The pages: what there is in the farm, for people, and what they may do about it.
//!
//! In the order to read it: this file says which page is where; `protection` has who may ask, and what
//! browsers are told to forbid; `layout` is what pages have in common, and `format` how they write times,
//! sizes and names. `overview` is the first page, over the samples of `history`, drawn by `chart`. `queues`,
//! `workers`, `operations` and `operation` show the queue, with `queue_key` in their addresses; `steering`
//! changes it. `browser` shows what is in the storage.
//!
//! 1. Every page needs no script; with it, what is on the page is fetched again now and then.
//! 2. Whatever somebody else chose goes through `format::name` or maud's escapes: it is never markup,
//!    and cannot change how the text around it looks.
//! 3. The queue is looked at in pieces, and a page has at most so many rows.

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::header,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::sync::Semaphore;

mod browser;
mod chart;
mod format;
mod history;
mod layout;
mod operation;
mod operations;
mod overview;
mod protection;
mod queue_key;
mod queues;
mod steering;
#[cfg(test)]
mod tests;
mod workers;

use super::{drain_file::DrainFile, live_output::LiveOutput, metrics, shared_queue::SharedQueue};
use crate::{
    daemon::{self, Metrics},
    storage::{Backend, InitialSizeClassCache},
};
pub(super) use history::{CacheLookups, History};
pub(super) use protection::Protection;
use steering::Drainers;

/// What pages are made of.
pub(super) struct Pages {
    pub queue: Arc<SharedQueue>,
    pub drains: Arc<DrainFile>,
    pub storage: Backend,
    pub live: Arc<LiveOutput>,
    pub statistics: InitialSizeClassCache,
    pub history: Arc<History>,
    pub protection: Protection,
    pub metrics: Arc<Metrics>,
    drainers: Drainers,
    /// Searches among all operations at a time.
    searches: Semaphore,
    /// Large messages in memory at a time.
    large: Semaphore,
    archives: Arc<browser::archives::Archives>,
}

impl Pages {
    pub(super) fn new(
        queue: Arc<SharedQueue>,
        drains: Arc<DrainFile>,
        storage: Backend,
        live: Arc<LiveOutput>,
        statistics: InitialSizeClassCache,
        history: Arc<History>,
        protection: Protection,
    ) -> Self {
        Pages {
            metrics: Arc::new(metrics::metrics(&queue, &storage)),
            queue,
            drains,
            storage,
            live,
            statistics,
            history,
            protection,
            drainers: Drainers::default(),
            searches: Semaphore::new(4),
            large: Semaphore::new(2),
            archives: Arc::default(),
        }
    }
}

const STYLE: &str = include_str!("assets/style.css");
const SCRIPT: &str = include_str!("assets/script.js");
const ICON: &str = include_str!("assets/icon.svg");

/// A form has a few names in it.
const LARGEST_FORM: usize = 64 << 10;

pub(super) fn router(pages: Arc<Pages>) -> Router {
    Router::new()
        .route("/", get(overview::page))
        .route("/metrics", get(metrics))
        .route("/-/healthy", get(|| async { "healthy\n" }))
        .route("/-/ready", get(|| async { "ready\n" }))
        .route("/queues", get(queues::list))
        .route("/queue", get(queues::one))
        .route("/workers", get(workers::list))
        .route("/workers/drain", post(steering::drain))
        .route("/workers/undrain", post(steering::undrain))
        .route("/workers/terminate", post(steering::terminate))
        .route("/operations", get(operations::list))
        .route("/operations/{operation}", get(operation::page))
        .route("/operations/{operation}/kill", post(steering::kill))
        .route("/assets/style.css", get(|| asset("text/css", STYLE)))
        .route(
            "/assets/script.js",
            get(|| asset("text/javascript", SCRIPT)),
        )
        .route("/assets/icon.svg", get(|| asset("image/svg+xml", ICON)))
        .fallback(browser::page)
        .layer(DefaultBodyLimit::max(LARGEST_FORM))
        .layer(middleware::from_fn_with_state(
            pages.clone(),
            protection::protect,
        ))
        .with_state(pages)
}

/// What Prometheus fetches.
async fn metrics(_: protection::MaySee, State(pages): State<Arc<Pages>>) -> Response {
    let metrics = pages.metrics.clone();
    let rendered = daemon::spawn_blocking(move || metrics.render()).await;
    let headers = [(header::CONTENT_TYPE, Metrics::CONTENT_TYPE)];
    (headers, rendered.unwrap_or_default()).into_response()
}

/// A file that changes with the program only.
async fn asset(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (header::CACHE_CONTROL, "max-age=3600".to_owned()),
    ];
    (headers, content).into_response()
}
