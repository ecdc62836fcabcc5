//! Serving pages on a listener, by HTTP/1.1 and HTTP/2, to browsers and whatever else fetches them.
//!
//! 1. At most `PageLimits::connections` are open; when all are, one on which nothing is asked for gives
//!    way.
//! 2. A connection on which no byte passes in either direction for `PageLimits::silence` is closed,
//!    whatever it waits for.
//! 3. Every request has a `PageAccess` and a `PageOrigin` among its extensions. What it asks for is its
//!    handler's to refuse.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body};
use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use super::{
    access::{self, Policy},
    opening,
};
use crate::daemon::{
    Failure,
    listen::{AcceptedStream, Listener, Socket},
    tls::TlsAcceptor,
    tokens::TokenTurn,
};

/// What a listener for pages grants its callers.
#[derive(Clone, Debug)]
pub struct PageLimits {
    /// Connections that are open.
    pub connections: usize,
    /// Until TLS has begun, and for the head of a request.
    pub head: Duration,
    /// Without a byte in either direction.
    pub silence: Duration,
}

impl Default for PageLimits {
    fn default() -> Self {
        PageLimits {
            // A tenth of the descriptors that two other listeners have at least.
            connections: (super::connection_limit() / 8).clamp(8, 1500),
            head: Duration::from_secs(10),
            silence: Duration::from_secs(120),
        }
    }
}

/// How a request came; in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOrigin {
    /// Over TLS, whose certificate names this host.
    pub is_encrypted: bool,
    /// Over a Unix socket, which no browser is lured to.
    pub is_local_socket: bool,
}

struct Server {
    router: Router,
    limits: PageLimits,
    acceptor: Option<TlsAcceptor>,
    policy: Policy,
    room: Arc<Semaphore>,
    /// Somebody waits for a connection's place.
    wanted: Notify,
    tasks: TaskTracker,
    stopping: CancellationToken,
    killed: CancellationToken,
}

/// Serves until `stopping`, then gives requests that are under way `drain` to finish.
pub async fn serve_pages(
    listener: Listener,
    router: Router,
    limits: PageLimits,
    stopping: CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    let server = Arc::new(Server {
        router,
        acceptor: listener.acceptor(),
        policy: listener.policy(),
        room: Arc::new(Semaphore::new(limits.connections)),
        wanted: Notify::new(),
        limits,
        tasks: TaskTracker::new(),
        stopping,
        killed: CancellationToken::new(),
    });
    // Also when this future is dropped.
    let _kill = server.killed.clone().drop_guard();
    for socket in listener.into_sockets() {
        server.tasks.spawn(server.clone().accept_all(socket));
    }
    server.stopping.cancelled().await;
    server.tasks.close();
    // Whatever is left then is killed.
    let _ = tokio::time::timeout(drain, server.tasks.wait()).await;
    Ok(())
}

impl Server {
    async fn accept_all(self: Arc<Self>, socket: Socket) {
        loop {
            let accepted = tokio::select! {
                () = self.stopping.cancelled() => return,
                accepted = socket.accept() => accepted,
            };
            match accepted {
                Ok(connection) => {
                    let place = tokio::select! {
                        () = self.stopping.cancelled() => return,
                        place = self.place() => place,
                    };
                    let serving = self.clone().serve(connection, place);
                    self.tasks.spawn(serving);
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        const ROUND: Duration = Duration::from_millis(100);
        loop {
            if let Ok(place) = self.room.clone().try_acquire_owned() {
                return Some(place);
            }
            self.wanted.notify_one();
            if let Ok(place) = tokio::time::timeout(ROUND, self.room.clone().acquire_owned()).await
            {
                return place.ok();
            }
        }
    }

    async fn serve(
        self: Arc<Self>,
        connection: AcceptedStream,
        _place: Option<OwnedSemaphorePermit>,
    ) {
        let peer = connection.peer();
        let opening = opening::open_pages(connection, self.acceptor.as_ref());
        let opened = tokio::select! {
            opened = tokio::time::timeout(self.limits.head, opening) => opened,
            () = self.killed.cancelled() => return,
        };
        let (connection, certificate) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(reason)) => {
                tracing::debug!(?peer, reason, "closed a connection");
                return;
            }
            Err(_) => return,
        };
        let origin = PageOrigin {
            is_encrypted: self.acceptor.is_some() && connection.is_tcp(),
            is_local_socket: !connection.is_tcp(),
        };
        let identity = Arc::new(access::identify(&peer, certificate.as_ref()));
        let turn = Arc::new(TokenTurn::default());
        let under_way = Arc::new(AtomicUsize::new(0));
        let service = {
            let (router, under_way) = (self.router.clone(), under_way.clone());
            let policy = self.policy.clone();
            service_fn(move |request: Request<Incoming>| {
                let mut router = router.clone();
                let (policy, identity, turn) = (policy.clone(), identity.clone(), turn.clone());
                let begun = BegunRequest::new(under_way.clone());
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(origin);
                async move {
                    let headers = request.headers();
                    let identity = match policy.authenticate(&identity, &turn, headers).await {
                        Ok(identity) => identity,
                        Err(status) => {
                            let mut refusal =
                                Response::new(Body::from(status.message().to_owned()));
                            *refusal.status_mut() = StatusCode::UNAUTHORIZED;
                            return Ok(refusal);
                        }
                    };
                    let allowed = policy.of_pages(&identity);
                    request.extensions_mut().insert(allowed);
                    let answer = router.call(request).await;
                    drop(begun);
                    answer as Result<_, Infallible>
                }
            })
        };
        let mut protocol = auto::Builder::new(TokioExecutor::new());
        protocol
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head.max(Duration::from_secs(30)))
            .max_buf_size(64 << 10);
        protocol
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(32)
            .max_header_list_size(16 << 10)
            .keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20));
        let stream = TokioIo::new(AbortWhenSilent::new(connection, self.limits.silence));
        let mut serving = pin!(protocol.serve_connection(stream, service));
        let mut is_leaving = false;
        loop {
            let is_wanted = tokio::select! {
                _ = serving.as_mut() => return,
                () = self.killed.cancelled() => return,
                () = self.stopping.cancelled(), if !is_leaving => false,
                () = self.wanted.notified(), if !is_leaving => true,
            };
            if is_wanted && under_way.load(Ordering::Relaxed) > 0 {
                continue;
            }
            serving.as_mut().graceful_shutdown();
            is_leaving = true;
        }
    }
}

/// A request that has no answer yet.
struct BegunRequest(Arc<AtomicUsize>);

impl BegunRequest {
    fn new(under_way: Arc<AtomicUsize>) -> Self {
        under_way.fetch_add(1, Ordering::Relaxed);
        BegunRequest(under_way)
    }
}

impl Drop for BegunRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
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
