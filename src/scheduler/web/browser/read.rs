//! Reading what a page shows, and what to say when it cannot be.

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use maud::html;
use prost::Message;

use super::Place;
use crate::{
    digest::Digest,
    scheduler::web::{
        Pages,
        format::name,
        layout::{Page, Section},
    },
    storage,
};

/// Bytes of a message that is decoded, and of one that is walked through.
pub(super) const SMALL: u64 = 16 << 20;
pub(super) const LARGE: u64 = 512 << 20;

/// Why something cannot be shown.
#[derive(Debug)]
pub(super) enum Problem {
    /// It is not in the storage.
    Missing,
    /// It is no message of this kind.
    Malformed { kind: &'static str, error: String },
    /// It is larger than a page can take.
    TooLarge { limit: u64 },
    /// The storage failed.
    Failed(String),
    /// The path below it leads nowhere.
    NoSuchPath,
    /// Its archive would have too much in it.
    NoArchive(String),
    /// As many archives are being written as there may be.
    Busy,
}

impl From<storage::Error> for Problem {
    fn from(error: storage::Error) -> Self {
        match error {
            storage::Error::Missing(_) => Problem::Missing,
            storage::Error::TooLarge { limit, .. } => Problem::TooLarge { limit },
            other => Problem::Failed(other.to_string()),
        }
    }
}

impl Problem {
    /// A page that says so, and what to do.
    pub(super) fn page(&self, place: &Place, digest: &Digest) -> Response {
        let (status, title, advice) = match self {
            Problem::Missing => (
                StatusCode::NOT_FOUND,
                "Not in the storage",
                "It has been evicted since it was used last, or was never uploaded. Build again: clients \
                 upload what is missing. If this happens often, the storage is too small \
                 (storage.embedded.maximum_size in bb_scheduler.toml).",
            ),
            Problem::Malformed { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "Not what the address says",
                "The blob is there, but is none of this kind. The address may be of another kind of blob; \
                 its bytes can be downloaded.",
            ),
            Problem::TooLarge { .. } => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "Too large for a page",
                "It can be downloaded.",
            ),
            Problem::Failed(_) => (
                StatusCode::BAD_GATEWAY,
                "The storage failed",
                "Try again; the journal of bb_scheduler and of the storage say more.",
            ),
            Problem::NoSuchPath => (
                StatusCode::NOT_FOUND,
                "No such directory",
                "The tree has no directory of this path.",
            ),
            Problem::NoArchive(_) => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "Too much for an archive",
                "Nothing was written. Its parts can be looked at, and downloaded one by one.",
            ),
            Problem::Busy => (
                StatusCode::SERVICE_UNAVAILABLE,
                "Too many archives at a time",
                "As many archives are being written as there may be at a time, of all or of yours. Try again \
                 when one of them has ended.",
            ),
        };
        let is_there = matches!(self, Problem::Malformed { .. } | Problem::TooLarge { .. });
        let content = html! {
            h1 { (title) }
            p { (advice) }
            dl.facts {
                div { dt { "Hash" } dd { code { (digest.hash_hex()) } } }
                div { dt { "Size" } dd { (super::super::format::size(digest.size())) } }
                div { dt { "Instance name" } dd { (name(place.instance.as_str())) } }
                @match self {
                    Problem::Malformed { kind, error } => {
                        div { dt { "No " (kind) } dd { (name(error)) } }
                    }
                    Problem::TooLarge { limit } => {
                        div { dt { "Largest that is shown" } dd { (super::super::format::size(*limit)) } }
                    }
                    Problem::Failed(error) => { div { dt { "Error" } dd { (name(error)) } } }
                    Problem::NoArchive(reason) => { div { dt { "Reason" } dd { (reason) } } }
                    Problem::Missing | Problem::NoSuchPath | Problem::Busy => {}
                }
            }
            @if is_there {
                p { a href=(place.file_address(digest, "blob")) { "Download the blob" } }
            }
        };
        let page = Page {
            section: Section::None,
            title,
            is_live: false,
            content,
        };
        (status, page).into_response()
    }
}

/// A message that is decoded as a whole.
pub(super) async fn message<M: Message + Default>(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    kind: &'static str,
) -> Result<M, Problem> {
    let data = bytes(pages, place, digest, SMALL).await?;
    M::decode(data).map_err(|error| Problem::Malformed {
        kind,
        error: error.to_string(),
    })
}

/// A whole blob.
pub(super) async fn bytes(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    limit: u64,
) -> Result<Bytes, Problem> {
    if digest.size() > limit {
        // One that is not there is missing, whatever size its address claims.
        let digests = [*digest];
        let missing = pages
            .storage
            .find_missing(&place.instance, &digests)
            .await?;
        return Err(match missing.is_empty() {
            true => Problem::TooLarge { limit },
            false => Problem::Missing,
        });
    }
    Ok(pages.storage.read(&place.instance, digest, limit).await?)
}

/// Whole blobs, of at most `limit` bytes each, in the order given.
pub(super) async fn many(
    pages: &Pages,
    place: &Place,
    digests: &[Digest],
    limit: u64,
) -> Result<Vec<Bytes>, Problem> {
    let read = pages.storage.read_many(&place.instance, digests, limit);
    let blobs = read.await.into_iter();
    Ok(blobs.collect::<Result<_, storage::Error>>()?)
}

/// Some bytes of a blob; fewer at its end.
pub(super) async fn part(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    start: u64,
    end: u64,
) -> Result<Vec<u8>, Problem> {
    use futures::StreamExt;
    let end = end.min(digest.size());
    let mut pieces = pages
        .storage
        .stream(&place.instance, digest, start, end)
        .await?;
    let mut found = Vec::new();
    while let Some(piece) = pieces.next().await {
        found.extend_from_slice(&piece?);
    }
    Ok(found)
}
