//! Who may ask for a page, and what a browser is told to forbid.
//!
//! 1. A page that shows something asks `MaySee` first; what changes something asks `Confirmed`, which
//!    wants the grant `steer`, a form of this site, and its token.
//! 2. A request by a name that is not this host's is refused, so that no other site can have its own
//!    name lead here (DNS rebinding). Over TLS the certificate sees to that.
//! 3. A request that changes something comes from a page of this site, as far as the browser says where
//!    it comes from (Fetch Metadata; RFC 6454), and has the cookie that only this site's requests have
//!    (SameSite=Strict), with the token that only its pages know.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Form,
    extract::{FromRequest, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, de::DeserializeOwned};

use super::{Pages, layout};
use crate::{
    config::grants::Permission,
    daemon::{PageAccess, PageOrigin},
};

/// What is kept for the checks.
pub(in crate::scheduler) struct Protection {
    /// In every form, and in a cookie.
    token: String,
    /// Names that this host is called by, beside its addresses.
    hosts: Vec<String>,
}

/// Browsers send a host's cookies to all of its ports, where other farms may be: each has a name of its own.
fn cookie_name(authority: &str) -> String {
    const NAME: &str = "bb_scheduler_form";
    match authority.strip_prefix(host_of(authority)) {
        Some(port) if port.len() > 1 => format!("{NAME}_{}", port.trim_start_matches(':')),
        _ => NAME.to_owned(),
    }
}

/// No script and no style but this site's; nothing is loaded from elsewhere, and nobody shows these
/// pages in theirs.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

impl Protection {
    /// `url` is what people reach the pages by; `hostname` this host's name.
    pub(in crate::scheduler) fn new(url: &str, hostname: &str) -> Self {
        let short = hostname.split('.').next().unwrap_or(hostname);
        let hosts = ["localhost", hostname, short, host_of_url(url)];
        Protection {
            token: format!("{:032x}", uuid::Uuid::new_v4().as_u128()),
            hosts: hosts
                .iter()
                .filter(|host| !host.is_empty())
                .map(|host| host.to_ascii_lowercase())
                .collect(),
        }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    fn knows(&self, authority: &str) -> bool {
        let host = host_of(authority).to_ascii_lowercase();
        let address = host.trim_start_matches('[').trim_end_matches(']');
        address.parse::<IpAddr>().is_ok()
            || host.ends_with(".localhost")
            || self.hosts.contains(&host)
    }
}

fn host_of_url(url: &str) -> &str {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    host_of(rest.split('/').next().unwrap_or_default())
}

/// An authority without its port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// What the request is for: HTTP/2 has the authority elsewhere.
fn authority(headers: &HeaderMap, uri: &Uri) -> String {
    let header = headers.get(header::HOST);
    let header = header.and_then(|host| host.to_str().ok());
    let uri = uri.authority().map(|name| name.as_str());
    uri.or(header).unwrap_or_default().to_owned()
}

/// The checks that all requests pass, and the headers that all answers have.
pub(super) async fn protect(
    State(pages): State<Arc<Pages>>,
    request: Request,
    next: Next,
) -> Response {
    let origin = request.extensions().get::<PageOrigin>().copied();
    let needs_no_name = origin.is_some_and(|from| from.is_encrypted || from.is_local_socket);
    let authority = authority(request.headers(), request.uri());
    let mut response = if !needs_no_name && !pages.protection.knows(&authority) {
        let text = format!(
            "The name \"{authority}\" is not one of this host's. Use its address or its own name, or set \
             web.url in bb_scheduler.toml."
        );
        layout::refusal(StatusCode::MISDIRECTED_REQUEST, "Another name", &text)
    } else if !matches!(*request.method(), Method::GET | Method::HEAD)
        && !is_of_this_site(request.headers(), &authority)
    {
        let text = "A page of another site has sent this. Nothing was done.";
        layout::refusal(StatusCode::FORBIDDEN, "Another site", text)
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    for (name, value) in [
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let is_secure = origin.is_some_and(|from| from.is_encrypted);
    let cookie = format!(
        "{}={}; Path=/; HttpOnly; SameSite=Strict{}",
        cookie_name(&authority),
        pages.protection.token,
        if is_secure { "; Secure" } else { "" }
    );
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        headers.insert(header::SET_COOKIE, cookie);
    }
    response
}

/// As far as the browser says. One that says nothing has the cookie to show.
fn is_of_this_site(headers: &HeaderMap, authority: &str) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let site = text("sec-fetch-site");
    let origin = text("origin");
    site.is_none_or(|site| site == "same-origin")
        && origin.is_none_or(|origin| {
            let sent_by = origin.split_once("://").map(|(_, name)| name);
            sent_by.is_some_and(|name| name.eq_ignore_ascii_case(authority))
        })
}

fn has_cookie(headers: &HeaderMap, name: &str, token: &str) -> bool {
    let cookies = headers.get_all(header::COOKIE).iter();
    let texts = cookies.filter_map(|value| value.to_str().ok());
    texts
        .flat_map(|text| text.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .any(|(found, value)| found == name && value == token)
}

/// Whoever has it may look at the farm.
pub(in crate::scheduler) struct MaySee(pub PageAccess);

fn access_of(parts: &Parts) -> Option<PageAccess> {
    parts.extensions.get::<PageAccess>().cloned()
}

/// It did not come by the server of pages.
fn unknown_caller() -> Response {
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}

/// A page that says that somebody may not do something.
pub(super) fn forbidden(access: &PageAccess, what: Permission) -> Response {
    let text = access.refusal(what, None);
    layout::refusal(StatusCode::FORBIDDEN, "Not allowed", &text)
}

impl<S: Sync> FromRequestParts<S> for MaySee {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let access = access_of(parts).ok_or_else(unknown_caller)?;
        match access.may_somewhere(Permission::See) {
            true => Ok(MaySee(access)),
            false => Err(forbidden(&access, Permission::See)),
        }
    }
}

impl MaySee {
    /// Whether buttons are shown.
    pub(super) fn may_steer(&self) -> bool {
        self.0.may_somewhere(Permission::Steer)
    }
}

/// A form that somebody has sent who may steer, from a page of ours.
pub(super) struct Confirmed<T> {
    pub form: T,
    pub by: String,
}

#[derive(Deserialize)]
struct WithToken<T> {
    #[serde(default)]
    token: String,
    #[serde(flatten)]
    form: T,
}

impl<T: DeserializeOwned> FromRequest<Arc<Pages>> for Confirmed<T> {
    type Rejection = Response;

    async fn from_request(request: Request, pages: &Arc<Pages>) -> Result<Self, Response> {
        let (parts, body) = request.into_parts();
        let access = access_of(&parts).ok_or_else(unknown_caller)?;
        if !access.may_somewhere(Permission::Steer) {
            return Err(forbidden(&access, Permission::Steer));
        }
        let name = cookie_name(&authority(&parts.headers, &parts.uri));
        let has_cookie = has_cookie(&parts.headers, &name, pages.protection.token());
        let request = Request::from_parts(parts, body);
        let sent = Form::<WithToken<T>>::from_request(request, pages).await;
        let Form(sent) = sent
            .map_err(|error| layout::refusal(error.status(), "No such form", &error.body_text()))?;
        if !has_cookie || sent.token != pages.protection.token() {
            let text = "The form is of an earlier scheduler, or of another site. Nothing was done; load \
                        the page again, and send it once more.";
            return Err(layout::refusal(StatusCode::FORBIDDEN, "An old form", text));
        }
        Ok(Confirmed {
            form: sent.form,
            by: access.identity().name().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_known_by_its_addresses_and_names_and_by_no_other() {
        let protection = Protection::new("https://farm.example/bb/", "build1.example.org");
        for known in [
            "127.0.0.1:7982",
            "[::1]:7982",
            "10.1.2.3",
            "localhost:7982",
            "LOCALHOST",
            "build1",
            "build1.example.org:80",
            "farm.example",
        ] {
            assert!(protection.knows(known), "{known}");
        }
        for unknown in [
            "",
            "evil.example:7982",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            assert!(!protection.knows(unknown), "{unknown}");
        }
    }

    #[test]
    fn farms_at_two_ports_of_a_host_have_cookies_of_their_own() {
        assert_eq!(cookie_name("localhost:7982"), "bb_scheduler_form_7982");
        assert_eq!(cookie_name("[::1]:17982"), "bb_scheduler_form_17982");
        for without in ["farm.example", "farm.example:", "[::1]", ""] {
            assert_eq!(cookie_name(without), "bb_scheduler_form", "{without}");
        }
    }

    #[test]
    fn a_request_of_another_site_is_told_from_one_of_this() {
        let judge = |given: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in given {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            is_of_this_site(&headers, "localhost:7982")
        };
        assert!(judge(&[]));
        assert!(judge(&[
            ("sec-fetch-site", "same-origin"),
            ("origin", "http://localhost:7982")
        ]));
        for other in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("sec-fetch-site", "none"),
            ("origin", "null"),
            ("origin", "http://localhost:8080"),
            ("origin", "http://evil.example"),
        ] {
            assert!(!judge(&[other]), "{other:?}");
        }
    }
}
