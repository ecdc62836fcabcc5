//! Serving pages on a connection, by HTTP/1.1 and HTTP/2, to browsers and whatever else fetches them.
//!
//! 1. At most `PageLimits::connections` are open, shared among callers like those of gRPC; when all are, one
//!    on which nothing is asked for gives way.
//! 2. A connection on which no byte passes in either direction for `PageLimits::silence` is closed,
//!    whatever it waits for.
//! 3. Every request has a `PageAccess` and a `PageOrigin` among its extensions. What it asks for is its
//!    handler's to refuse.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};
use tower::Service;

use super::{
    call,
    connection::{CHECK_INTERVAL, ClientConnection, GOAWAY_GRACE},
    open_connections::OpenConnection,
    opening,
};
use crate::daemon::listen::AcceptedStream;

/// How a request came; in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOrigin {
    /// Over TLS, whose certificate names this host.
    pub is_encrypted: bool,
    /// Over a Unix socket, which no browser is lured to.
    pub is_local_socket: bool,
}

/// Until the connection is closed, or the server stops.
pub(super) async fn serve(open: &OpenConnection, connection: AcceptedStream, router: Router) {
    let (server, caller) = (&open.server, &open.client);
    let limits = &server.limits;
    let opening = opening::open_pages(connection, server.acceptor.as_ref());
    let Some((connection, certificate)) = open.open(opening).await else {
        return;
    };
    if !open.identify(certificate) {
        return;
    }
    let origin = PageOrigin {
        is_encrypted: server.acceptor.is_some() && connection.is_tcp(),
        is_local_socket: !connection.is_tcp(),
    };
    let service = {
        let caller = caller.clone();
        service_fn(move |request: Request<Incoming>| {
            let (caller, router) = (caller.clone(), router.clone());
            async move { Ok::<_, Infallible>(answer(&caller, router, origin, request).await) }
        })
    };
    let mut protocol = auto::Builder::new(TokioExecutor::new());
    protocol
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.handshake.max(Duration::from_secs(30)))
        .max_buf_size(64 << 10);
    protocol
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.calls_per_connection)
        .max_header_list_size(16 << 10)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let stream = TokioIo::new(AbortWhenSilent::new(connection, limits.idle));
    let mut serving = pin!(protocol.serve_connection(stream, service));
    // From when on it is cut, unless requests are under way.
    let mut leaving: Option<Instant> = None;
    loop {
        let now = tokio::select! {
            _ = serving.as_mut() => return,
            () = server.killed.cancelled() => return,
            () = server.stopping.cancelled(), if leaving.is_none() => Instant::now(),
            () = caller.evicted(), if leaving.is_none() => {
                if caller.idle().is_some_and(|(called, _)| !called) {
                    return;
                }
                Instant::now()
            }
            () = tokio::time::sleep(CHECK_INTERVAL.min(GOAWAY_GRACE)) => {
                let now = Instant::now();
                match leaving {
                    None if !caller.has_expired() => continue,
                    Some(end) if now >= end && caller.idle().is_some() => return,
                    None | Some(_) => now,
                }
            }
        };
        if leaving.is_none() {
            serving.as_mut().graceful_shutdown();
            leaving = Some(now + GOAWAY_GRACE);
        }
    }
}

/// The answer to one request of a connection.
async fn answer(
    caller: &Arc<ClientConnection>,
    mut router: Router,
    origin: PageOrigin,
    request: Request<Incoming>,
) -> Response<Body> {
    let begun = match caller.begin_call(&caller.accounts()) {
        Ok(begun) => begun,
        Err(_) => {
            let text = "as many requests are under way as there may be; ask again later";
            return refuse(StatusCode::SERVICE_UNAVAILABLE, text);
        }
    };
    let policy = &caller.policy;
    let known = caller.identity.get().cloned().unwrap_or_default();
    let authenticated = policy.authenticate(&known, &caller.token_turn, request.headers());
    let identity = match authenticated.await {
        Ok(identity) => identity,
        Err(status) => return refuse(StatusCode::UNAUTHORIZED, status.message()),
    };
    let owner = match call::begin(caller, &identity).await {
        Ok(owner) => owner,
        Err(status) => return refuse(StatusCode::TOO_MANY_REQUESTS, status.message()),
    };
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(origin);
    request
        .extensions_mut()
        .insert(policy.of_pages(&identity, &owner.caller.key));
    let Ok(answer) = router.call(request).await;
    // It is under way until its last byte was taken.
    let under_way = (begun, owner);
    answer.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _ = &under_way;
            frame
        }))
    })
}

fn refuse(status: StatusCode, text: &str) -> Response<Body> {
    let mut refusal = Response::new(Body::from(text.to_owned()));
    *refusal.status_mut() = status;
    refusal
}

/// A connection that fails when nothing passes for too long.
struct AbortWhenSilent {
    stream: AcceptedStream,
    limit: Duration,
    end: Pin<Box<Sleep>>,
}

impl AbortWhenSilent {
    fn new(stream: AcceptedStream, limit: Duration) -> Self {
        AbortWhenSilent {
            stream,
            limit,
            end: Box::pin(tokio::time::sleep(limit)),
        }
    }

    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        passed: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if passed.is_ready() {
            self.end.as_mut().reset(Instant::now() + self.limit);
        } else if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        passed
    }
}

impl AsyncRead for AbortWhenSilent {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let passed = Pin::new(&mut this.stream).poll_read(context, buffer);
        this.judge(context, passed)
    }
}

impl AsyncWrite for AbortWhenSilent {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let passed = Pin::new(&mut this.stream).poll_write(context, data);
        this.judge(context, passed)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let passed = Pin::new(&mut this.stream).poll_write_vectored(context, data);
        this.judge(context, passed)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
