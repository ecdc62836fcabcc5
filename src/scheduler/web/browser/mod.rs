//! The action browser: what is in the storage, under bb_browser's addresses, so that its links lead here.
//!
//! In the order to read it: this file finds out what an address is of; `read` gets it, and says what to do
//! when it is gone or is none; `fields` walks through large messages without decoding them. `action`,
//! `command`, `directory` and `file` show them, with `result` (of an execution), `log` (what it printed),
//! `tar` (to run it by hand, after `expansion` has counted what it comes to, and in its turn of `archives`)
//! and `compare` (why it was not a cache hit).
//!
//! 1. Every address asks for the grant `cas.read` in its instance before anything is read.
//! 2. What is read for a page is bounded: `SMALL` for messages that are decoded, `LARGE` for those that
//!    are walked through, a few of them at a time.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

use super::{Pages, format::encode, layout, protection};
use crate::{
    config::grants::Permission,
    daemon::PageAccess,
    digest::{Digest, DigestFunction},
    instance::InstanceName,
};

mod action;
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

/// Bytes of a message that is decoded, and of one that is walked through.
const SMALL: u64 = 16 << 20;
const LARGE: u64 = 512 << 20;

/// Whose blobs they are, and which function made their digests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub instance: InstanceName,
    pub function: DigestFunction,
}

impl Place {
    /// Of a page about a blob.
    pub(super) fn address(&self, kind: &str, digest: &Digest) -> String {
        let mut address = String::from("/");
        for component in self.instance.components() {
            address.push_str(&encode(component));
            address.push('/');
        }
        format!(
            "{address}blobs/{}/{kind}/{}-{}/",
            self.function.name(),
            digest.hash_hex(),
            digest.size()
        )
    }

    /// Of a file's content, under its name.
    pub(super) fn file_address(&self, digest: &Digest, name: &str) -> String {
        format!("{}{}", self.address("file", digest), encode(name))
    }
}

/// What an address is of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct BlobAddress {
    place: Place,
    kind: String,
    digest: Digest,
    /// Behind the digest: names of files or directories.
    rest: Vec<String>,
}

/// `None` when it is an address of another kind.
fn parse(path: &str) -> Option<Result<BlobAddress, String>> {
    let segments: Vec<String> = path.split('/').skip(1).map(decode).collect::<Option<_>>()?;
    let at = segments.iter().position(|segment| segment == "blobs")?;
    let [_, function, kind, blob, rest @ ..] = segments.get(at..)? else {
        return None;
    };
    let instance = segments.get(..at)?.join("/");
    let parse = || -> Result<BlobAddress, String> {
        let instance = InstanceName::parse(&instance).map_err(|error| error.to_string())?;
        let function = DigestFunction::ALL
            .into_iter()
            .find(|known| known.name() == function.as_str())
            .ok_or_else(|| format!("\"{function}\" is no digest function"))?;
        let digest = parse_digest(function, blob)?;
        Ok(BlobAddress {
            place: Place { instance, function },
            kind: kind.clone(),
            digest,
            rest: rest
                .iter()
                .filter(|name| !name.is_empty())
                .cloned()
                .collect(),
        })
    };
    Some(parse())
}

/// A hash and a size, with a hyphen between them.
fn parse_digest(function: DigestFunction, text: &str) -> Result<Digest, String> {
    let parts = text.rsplit_once('-');
    let parts = parts.and_then(|(hash, size)| Some((hash, size.parse::<i64>().ok()?)));
    let (hash, size) = parts
        .ok_or_else(|| format!("\"{text}\" is no hash and size with a hyphen between them"))?;
    Digest::parse_parts(Some(function), hash, size).map_err(|error| error.to_string())
}

/// Percent-encoding taken away (RFC 3986, section 2.1).
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next())?, digit(rest.next())?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_bb_browser() {
        let hash = "a".repeat(64);
        let read = |path: &str| {
            parse(path).map(|parsed| {
                parsed.map(|address| {
                    let BlobAddress {
                        place,
                        kind,
                        digest,
                        rest,
                    } = address;
                    assert!(path.starts_with(&place.address(&kind, &digest)), "{path}");
                    (
                        place.instance.as_str().to_owned(),
                        kind,
                        digest.size(),
                        rest,
                    )
                })
            })
        };
        assert_eq!(
            read(&format!("/blobs/sha256/action/{hash}-12/")),
            Some(Ok((String::new(), "action".to_owned(), 12, vec![])))
        );
        assert_eq!(
            read(&format!("/a/b/blobs/sha256/tree/{hash}-12/x/%3Cy%3E/")),
            Some(Ok((
                "a/b".to_owned(),
                "tree".to_owned(),
                12,
                vec!["x".to_owned(), "<y>".to_owned()]
            )))
        );
        assert_eq!(parse("/operations"), None);
        assert_eq!(parse("/%zz/blobs"), None);
        for wrong in [
            format!("/blobs/sha255/action/{hash}-12/"),
            format!("/blobs/sha256/action/{hash}/"),
            format!("/blobs/sha1/action/{hash}-1/"),
            "/blobs/sha256/action/x-1/".to_owned(),
        ] {
            assert!(matches!(parse(&wrong), Some(Err(_))), "{wrong}");
        }
    }
}
