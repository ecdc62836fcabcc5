//! What all pages have in common: their frame, navigation, lists of labels, and pages that refuse.

use std::collections::BTreeMap;

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use maud::{DOCTYPE, Markup, html};

use super::format::name;

/// Where a page belongs in the navigation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Overview,
    Queues,
    Workers,
    Operations,
    None,
}

/// The parts of the navigation: where, and what it is called.
const SECTIONS: [(Section, &str, &str); 4] = [
    (Section::Overview, "/", "Farm"),
    (Section::Queues, "/queues", "Queues"),
    (Section::Workers, "/workers", "Workers"),
    (Section::Operations, "/operations", "Operations"),
];

/// How often a page without script is loaded again, in seconds.
const RELOAD_SECONDS: u32 = 15;

/// One page.
pub(super) struct Page<'a> {
    pub section: Section,
    pub title: &'a str,
    /// What it shows goes on changing.
    pub is_live: bool,
    pub content: Markup,
}

impl Page<'_> {
    fn markup(&self) -> Markup {
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) " · build farm" }
                    link rel="stylesheet" href="/assets/style.css";
                    link rel="icon" href="/assets/icon.svg" type="image/svg+xml";
                    script src="/assets/script.js" defer {}
                    @if self.is_live {
                        noscript { meta http-equiv="refresh" content=(RELOAD_SECONDS); }
                    }
                }
                body data-live[self.is_live] {
                    a.skip href="#content" { "Skip to the content" }
                    header {
                        a.brand href="/" { "Build farm" }
                        nav aria-label="Pages" {
                            ul {
                                @for (section, path, title) in SECTIONS {
                                    li {
                                        a href=(path) aria-current=[(section == self.section).then_some("page")] {
                                            (title)
                                        }
                                    }
                                }
                            }
                        }
                        p.live hidden role="status" {}
                    }
                    main #content tabindex="-1" { (self.content) }
                    footer { p { "bb_scheduler " (env!("CARGO_PKG_VERSION")) } }
                }
            }
        }
    }
}

impl IntoResponse for Page<'_> {
    fn into_response(self) -> Response {
        self.markup().into_response()
    }
}

/// A page that says what is wrong, and what to do.
pub(super) fn refusal(status: StatusCode, title: &str, text: &str) -> Response {
    let page = Page {
        section: Section::None,
        title,
        is_live: false,
        content: html! {
            h1 { (title) }
            p { (name(text)) }
        },
    };
    (status, page).into_response()
}

/// What is asked for is none of the pages.
pub(super) fn not_found(path: &str) -> Response {
    let text = format!("There is no page {}.", crate::text::shorten(path));
    refusal(StatusCode::NOT_FOUND, "No such page", &text)
}

/// Platform properties, one after the other.
pub(super) fn properties(properties: &[(String, String)]) -> Markup {
    html! {
        @if properties.is_empty() { span.quiet { "no platform properties" } }
        @for (number, (property, value)) in properties.iter().enumerate() {
            @if number > 0 { " " }
            span.label { (name(property)) "=" (name(value)) }
        }
    }
}

/// A table that scrolls by itself where it is wider than the page: cells of its head, and its rows.
pub(super) fn table(label: &str, class: Option<&str>, head: Markup, rows: Markup) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label=(label) {
            table class=[class] {
                thead { tr { (head) } }
                tbody { (rows) }
            }
        }
    }
}

/// Labels of workers, one after the other.
pub(super) fn labels(labels: &BTreeMap<String, String>) -> Markup {
    html! {
        @if labels.is_empty() { span.quiet { "all workers" } }
        @for (number, (label, value)) in labels.iter().enumerate() {
            @if number > 0 { " " }
            span.label { (name(label)) "=" (name(value)) }
        }
    }
}
