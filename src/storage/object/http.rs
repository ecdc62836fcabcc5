//! HTTP/1.1 for object stores' clients (RFC 9112), over our own connections and TLS.
//!
//! 1. Every call ends: an answer that does not begin in time is an error, and so is a body that pauses.
//! 2. A refusal is a [`HttpRefusal`], with what the server says of it.

use std::{
    error::Error as StdError,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{StatusCode, Uri};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connected, Connection as HttpConnection},
    },
    rt::{TokioExecutor, TokioIo},
};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
        HttpResponse, HttpResponseBody, HttpService,
    },
};
use tokio::time::{Instant, Sleep};
use tonic::async_trait;
use tower::Service;

use crate::{
    config::Endpoint,
    daemon::{self, Credentials},
    text::shorten,
};

/// Bytes of what a server says of a refusal.
const LARGEST_REFUSAL: usize = 64 << 10;

/// A connection that nothing was asked of is kept for so long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The slowest that a body may travel, beside the time for an answer.
const MINIMUM_RATE: u64 = 64 << 10;

/// A client of HTTP servers. Cheap to clone.
#[derive(Clone)]
pub(super) struct HttpTransport {
    client: legacy::Client<Dialer, HttpRequestBody>,
    timeout: Duration,
}

impl fmt::Debug for HttpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpTransport").finish_non_exhaustive()
    }
}

impl HttpTransport {
    /// `timeout` is how long a server may be silent.
    pub(super) fn new(credentials: Credentials, timeout: Duration) -> Self {
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .build(Dialer { credentials });
        HttpTransport { client, timeout }
    }
}

impl HttpConnector for HttpTransport {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for HttpTransport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let size = request.body().content_length() as u64;
        let limit = self.timeout + Duration::from_secs(size / MINIMUM_RATE);
        let answer = tokio::time::timeout(limit, self.client.request(request)).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(failed(&error)),
            Err(_) => return Err(Silence::of(limit)),
        };
        let (parts, body) = answer.into_parts();
        let body = TimedBody::new(body, self.timeout);
        if !parts.status.is_success() {
            return Err(HttpRefusal::read(parts.status, body).await);
        }
        let body = HttpResponseBody::new(body);
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// What a server said that refused a call.
#[derive(Debug)]
pub(super) struct HttpRefusal {
    pub status: StatusCode,
    /// Its own code for it, such as NoSuchBucket; empty where it gives none.
    pub code: String,
    pub message: String,
}

impl HttpRefusal {
    async fn read(status: StatusCode, body: TimedBody) -> HttpError {
        let body = Limited::new(body, LARGEST_REFUSAL).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let text = String::from_utf8_lossy(&body);
        let find = |names: &[&str]| names.iter().find_map(|name| element(&text, name));
        let refusal = HttpRefusal {
            status,
            code: find(&["Code", "code", "error"]).unwrap_or_default(),
            message: find(&["Message", "message", "error_description"])
                .unwrap_or_else(|| shorten(&text).to_string()),
        };
        HttpError::new(HttpErrorKind::Unknown, refusal)
    }
}

impl fmt::Display for HttpRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it answered {}", self.status)?;
        for text in [&self.code, &self.message] {
            if !text.is_empty() {
                write!(f, ": {text}")?;
            }
        }
        Ok(())
    }
}

impl StdError for HttpRefusal {}

/// What an element of XML, or a string of JSON, has in it.
fn element(text: &str, name: &str) -> Option<String> {
    let between = |start: &str, end: &str| {
        let (_, rest) = text.split_once(start)?;
        let (value, _) = rest.split_once(end)?;
        Some(shorten(value.trim()).to_string())
    };
    between(&format!("<{name}>"), &format!("</{name}>"))
        .or_else(|| between(&format!("\"{name}\": \""), "\""))
        .or_else(|| between(&format!("\"{name}\":\""), "\""))
}

/// A server that was silent for too long.
#[derive(Debug)]
struct Silence(Duration);

impl Silence {
    fn of(limit: Duration) -> HttpError {
        HttpError::new(HttpErrorKind::Timeout, Silence(limit))
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it was silent for {} seconds", self.0.as_secs_f64())
    }
}

impl StdError for Silence {}

/// Text of an error that has no other.
#[derive(Debug)]
struct Told(String);

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Told {}

/// hyper's texts leave out the cause.
fn failed(error: &legacy::Error) -> HttpError {
    let kind = match error.is_connect() {
        true => HttpErrorKind::Connect,
        false => HttpErrorKind::Interrupted,
    };
    HttpError::new(kind, Told(causes(error)))
}

fn causes(error: &(dyn StdError + 'static)) -> String {
    let all = std::iter::successors(Some(error), |error| (*error).source());
    let last = all.last().map(ToString::to_string);
    last.unwrap_or_default()
}

/// A body that is an error when it pauses for too long.
struct TimedBody {
    body: Incoming,
    timeout: Duration,
    pause: Pin<Box<Sleep>>,
    is_waiting: bool,
}

impl TimedBody {
    fn new(body: Incoming, timeout: Duration) -> Self {
        TimedBody {
            body,
            timeout,
            pause: Box::pin(tokio::time::sleep(timeout)),
            is_waiting: false,
        }
    }
}

impl Body for TimedBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            this.is_waiting = false;
            let told = |error: hyper::Error| {
                HttpError::new(HttpErrorKind::Interrupted, Told(causes(&error)))
            };
            return Poll::Ready(frame.map(|frame| frame.map_err(told)));
        }
        // Time that its reader takes is not the server's.
        if !this.is_waiting {
            this.is_waiting = true;
            this.pause.as_mut().reset(Instant::now() + this.timeout);
        }
        ready!(this.pause.as_mut().poll(context));
        Poll::Ready(Some(Err(Silence::of(this.timeout))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// Connects to where a URI is.
#[derive(Clone)]
struct Dialer {
    credentials: Credentials,
}

/// A connection as hyper takes it.
struct Dialled(TokioIo<daemon::Connection>);

impl Service<Uri> for Dialer {
    type Response = Dialled;
    type Error = Box<dyn StdError + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Dialled, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let credentials = self.credentials.clone();
        Box::pin(async move {
            let is_tls = uri.scheme_str() == Some("https");
            let host = uri.host().unwrap_or_default();
            let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
            let authority = format!("{host}:{port}");
            let endpoint = match is_tls {
                true => Endpoint::Tls(authority),
                false => Endpoint::Tcp(authority),
            };
            let connection = daemon::dial(&endpoint, &credentials).await.map_err(Told)?;
            Ok(Dialled(TokioIo::new(connection)))
        })
    }
}

impl HttpConnection for Dialled {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Dialled {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for Dialled {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, data)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_of_a_refusal_is_found_in_xml_and_in_json() {
        let xml = "<?xml version=\"1.0\"?><Error><Code>NoSuchBucket</Code><Message>It is not there</Message></Error>";
        assert_eq!(element(xml, "Code").unwrap(), "NoSuchBucket");
        assert_eq!(element(xml, "Message").unwrap(), "It is not there");
        let json = "{\"error\": \"invalid_grant\", \"error_description\":\"expired\"}";
        assert_eq!(element(json, "error").unwrap(), "invalid_grant");
        assert_eq!(element(json, "error_description").unwrap(), "expired");
        assert_eq!(element("nothing", "Code"), None);
    }
}
