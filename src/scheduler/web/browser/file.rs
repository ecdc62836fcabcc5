//! The content of a blob: downloaded, or a part of it on a page.

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use maud::html;

use super::{Place, log, read::Problem};
use crate::{
    digest::Digest,
    scheduler::web::{
        Pages,
        format::{encode, name, size},
        layout::{Page, Section},
    },
};

/// The bytes, as a file that no browser shows by itself.
pub(super) async fn download(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    rest: &[String],
) -> Response {
    let name = rest.last().map_or("blob", String::as_str);
    let found = pages
        .storage
        .find_missing(&place.instance, &[*digest])
        .await;
    match found {
        Err(error) => return Problem::from(error).page(place, digest),
        Ok(missing) if !missing.is_empty() => return Problem::Missing.page(place, digest),
        Ok(_) => {}
    }
    let stream = pages
        .storage
        .stream(&place.instance, digest, 0, digest.size())
        .await;
    match stream {
        Err(error) => Problem::from(error).page(place, digest),
        Ok(stream) => {
            let disposition = format!("attachment; filename*=UTF-8''{}", encode(name));
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
                (header::CONTENT_DISPOSITION, disposition),
                (header::CONTENT_LENGTH, digest.size().to_string()),
                (
                    header::CONTENT_SECURITY_POLICY,
                    "sandbox; default-src 'none'".to_owned(),
                ),
            ];
            (StatusCode::OK, headers, Body::from_stream(stream)).into_response()
        }
    }
}

/// A part of it as text.
pub(super) async fn page(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    rest: &[String],
) -> Result<Page<'static>, Problem> {
    let file = rest.last().map_or("blob", String::as_str);
    let shown = log::of_blob(pages, place, digest, file).await?;
    let content = html! {
        h1 { (name(file)) }
        dl.facts {
            div { dt { "Size" } dd { (size(digest.size())) } }
            div { dt { "Hash" } dd { code { (digest.hash_hex()) } } }
        }
        (shown)
    };
    Ok(Page {
        section: Section::None,
        title: "File",
        is_live: false,
        content,
    })
}
