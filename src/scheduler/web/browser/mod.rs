//! The action browser: what is in the storage, under bb_browser's addresses, so that its links lead here.
//!
//! In the order to read it: `address` says what an address is of; `read` gets it, and says what to do
//! when it is gone or is none; `fields` walks through large messages without decoding them. `action`,
//! `command`, `directory` and `file` show them, with `result` (of an execution), `log` (what it printed),
//! `tar` (to run it by hand, after `expansion` has counted what it comes to, and in its turn of `archives`)
//! and `compare` (why it was not a cache hit).
//!
//! 1. Every address asks for the grant `cas.read` in its instance before anything is read.
//! 2. What is read for a page is bounded (`read`): `SMALL` for messages that are decoded, `LARGE` for those that
//!    are walked through, a few of them at a time.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

pub(super) use self::address::Place;
use self::address::{BlobAddress, decode, parse};
use super::{Pages, layout, protection};
use crate::{config::grants::Permission, daemon::PageAccess};

mod action;
mod address;
pub(super) mod archives;
mod command;
mod compare;
mod directory;
mod expansion;
mod fields;
mod file;
pub(super) mod log;
mod read;
pub(super) mod result;
mod tar;

/// Every address that is no other page's.
pub(super) async fn page(State(pages): State<Arc<Pages>>, request: Request) -> Response {
    let Some(access) = request.extensions().get::<PageAccess>().cloned() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let path = request.uri().path();
    let query = request.uri().query().unwrap_or_default();
    let Some(parsed) = parse(path) else {
        return match access.may_somewhere(Permission::See) {
            true => layout::not_found(path),
            false => protection::forbidden(&access, Permission::See),
        };
    };
    let address = match parsed {
        Ok(address) => address,
        Err(reason) => {
            if !access.may_somewhere(Permission::CasRead) {
                return protection::forbidden(&access, Permission::CasRead);
            }
            return layout::refusal(StatusCode::BAD_REQUEST, "No such blob", &reason);
        }
    };
    let instance = &address.place.instance;
    if !access.may(Permission::CasRead, instance) {
        let text = access.refusal(Permission::CasRead, Some(instance));
        return layout::refusal(StatusCode::FORBIDDEN, "Not allowed", &text);
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let parameter = |name: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let mut of_name = pairs.filter(|(found, _)| *found == name);
        of_name
            .next()
            .and_then(|(_, value)| decode(&value.replace('+', " ")))
    };
    let BlobAddress {
        place,
        kind,
        digest,
        rest,
    } = &address;
    let shown = match (kind.as_str(), parameter("format").as_deref()) {
        ("action", Some("tar")) => {
            return tar::of_action(&pages, place, digest, access.caller()).await;
        }
        ("action", _) => match parameter("with") {
            Some(other) if !other.is_empty() => compare::page(&pages, place, digest, &other).await,
            _ => action::page(&pages, place, digest).await,
        },
        ("historical_execute_response", _) => action::historical(&pages, place, digest).await,
        ("command", Some("sh")) => return command::script(&pages, place, digest).await,
        ("command", _) => command::page(&pages, place, digest).await,
        ("directory", Some("tar")) => {
            return tar::of_directory(&pages, place, digest, access.caller()).await;
        }
        ("directory", _) => {
            directory::page(&pages, place, digest, parameter("from").as_deref()).await
        }
        ("tree", _) => {
            directory::tree(&pages, place, digest, rest, parameter("from").as_deref()).await
        }
        ("file", Some("view")) => file::page(&pages, place, digest, rest).await,
        ("file", _) => return file::download(&pages, place, digest, rest).await,
        ("previous_execution_stats", _) => action::statistics(&pages, place, digest).await,
        _ => return layout::not_found(path),
    };
    match shown {
        Ok(page) => page.into_response(),
        Err(problem) => problem.page(place, digest),
    }
}
