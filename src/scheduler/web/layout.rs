//! What all pages have in common: their frame, navigation, and pages that refuse.

use axum::{
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use maud::{DOCTYPE, Markup, html};

use super::protection::MaySee;

/// Where a page belongs in the navigation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Overview,
    None,
}

/// The parts of the navigation: where, and what it is called.
const SECTIONS: [(Section, &str, &str); 1] = [(Section::Overview, "/", "Farm")];

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
                    link rel="icon" href="data:,";
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
                                @for (section, path, name) in SECTIONS {
                                    li {
                                        a href=(path) aria-current=[(section == self.section).then_some("page")] {
                                            (name)
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
            p { (super::format::name(text)) }
        },
    };
    (status, page).into_response()
}

/// What is asked for is none of the pages.
pub(super) async fn not_found(_: MaySee, uri: Uri) -> Response {
    let text = format!("There is no page {}.", crate::text::shorten(uri.path()));
    refusal(StatusCode::NOT_FOUND, "No such page", &text)
}
