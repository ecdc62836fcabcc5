//! Channels to gRPC peers, over TCP or Unix sockets.

use std::{
    error::Error,
    iter,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::{Code, Status, body::Body, transport};
use tower::Service;

use super::{
    call_headers::CallHeaders,
    connector::Connector,
    dial::DIAL_TIMEOUT,
    tls::{self, Credentials},
};
use crate::{config::Endpoint, text::with_causes};

// A 4 MiB chunk in flight needs no round trip on a loopback or a LAN.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;

/// Statuses of Buildbarn's programs quote what actions and clients say, which can be as long as a
/// command line may be (execve(2), MAX_ARG_STRLEN), and thrice that when percent-encoded. One that
/// does not fit ends all calls on its connection.
const MAX_HEADERS: u32 = 1 << 20;

/// Streams that we left early are remembered, since more of their frames may be on the way. A frame of
/// one that is forgotten counts as an error of the peer's, and h2 ends a connection, with every call
/// on it, after 1024 of those in its life: fifty streams in one second that are left before their
/// trailers have come are enough to begin the count. Our peers are those that the administrator
/// chose, so that there is no such limit, and few frames that must be answered.
const RESET_STREAMS: usize = 4096;

/// A channel that connects at its first call, and again after each loss.
///
/// Calls on a peer that cannot be reached fail with UNAVAILABLE and a text that names the endpoint.
#[derive(Clone)]
pub struct Channel {
    inner: transport::Channel,
    peer: Arc<CalledPeer>,
}

/// Whom a channel leads to, and what it is shown in each call.
struct CalledPeer {
    endpoint: String,
    headers: CallHeaders,
}

/// A channel to a peer; nothing is connected yet.
pub fn connect(endpoint: &Endpoint) -> Channel {
    connect_with(endpoint, &Credentials::default())
}

/// The same with whom to trust, and who calls.
pub fn connect_with(endpoint: &Endpoint, credentials: &Credentials) -> Channel {
    let address = match endpoint {
        Endpoint::Tls(authority) => format!("https://{authority}"),
        Endpoint::Tcp(authority) => format!("http://{authority}"),
        // For the :authority header.
        Endpoint::Unix(_) => "http://localhost".to_owned(),
    };
    // An endpoint that was parsed has an address; nobody answers at the other one.
    let transport = transport::Endpoint::from_shared(address)
        .unwrap_or_else(|_| transport::Endpoint::from_static("http://0.0.0.0:0"));
    let transport = transport
        .connect_timeout(DIAL_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20))
        .http2_max_concurrent_reset_streams(RESET_STREAMS)
        .http2_max_local_error_reset_streams(None);
    let connector = Connector::new(endpoint, credentials);
    let inner = transport.connect_with_connector_lazy(connector);
    Channel {
        inner,
        peer: Arc::new(CalledPeer {
            endpoint: endpoint.to_string(),
            headers: credentials.headers().clone(),
        }),
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let endpoint = &self.peer.endpoint;
        self.inner
            .poll_ready(context)
            .map_err(|error| failed(endpoint, error))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        self.peer.headers.add_to(request.headers_mut());
        let answer = self.inner.call(request);
        let peer = self.peer.clone();
        Box::pin(async move { answer.await.map_err(|error| failed(&peer.endpoint, error)) })
    }
}

/// Among the extensions of a request whose answer takes as long as it takes.
#[derive(Clone, Copy, Debug)]
pub struct Unhurried;

/// A channel whose calls end when their answers have not begun in time.
#[derive(Clone)]
pub struct AnsweredChannel {
    channel: Channel,
    timeout: Duration,
    /// Who does not answer, and what to look at.
    silence: String,
}

impl AnsweredChannel {
    pub(super) fn new(channel: Channel, timeout: Duration, silence: String) -> Self {
        AnsweredChannel {
            channel,
            timeout,
            silence,
        }
    }
}

impl Service<Request<Body>> for AnsweredChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_unhurried = request.extensions().get::<Unhurried>().is_some();
        let (answer, silence) = (self.channel.call(request), self.silence.clone());
        let timeout = self.timeout;
        match is_unhurried {
            true => answer,
            false => Box::pin(async move {
                let answered = tokio::time::timeout(timeout, answer).await;
                answered.unwrap_or_else(|_| Err(Status::unavailable(silence)))
            }),
        }
    }
}

/// The status of a call that got no answer. tonic's own text leaves out where to it could not connect.
fn failed(endpoint: &str, error: transport::Error) -> Status {
    let error = Arc::new(error);
    let mut causes = iter::successors(error.source(), |cause| (*cause).source());
    let connecting = format!("could not connect to {endpoint}");
    let (code, text) = if let Some(text) = tls::explain(&*error) {
        // A server looks at our certificate after our side of the handshake.
        (Code::Unavailable, format!("{connecting}: {text}"))
    } else if causes.any(|cause| cause.is::<hyper::Error>()) {
        // From the handshake on, errors are hyper's.
        let code = Status::from_error(Box::new(error.clone())).code();
        (code, with_causes(error.to_string(), &*error))
    } else {
        (Code::Unavailable, with_causes(connecting, &*error))
    };
    let mut status = Status::new(code, text);
    status.set_source(error);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_cannot_be_reached_is_named() {
        for endpoint in ["grpc://127.0.0.1:1", "unix:/nonexistent/runner.sock"] {
            let mut channel = connect(&endpoint.parse().unwrap());
            std::future::poll_fn(|context| channel.poll_ready(context))
                .await
                .unwrap();
            let status = channel.call(Request::new(Body::empty())).await.unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unavailable);
            let start = format!("could not connect to {endpoint}: ");
            assert!(status.message().starts_with(&start), "{status}");
            assert!(status.message().contains("(os error "), "{status}");
            assert!(status.source().is_some());
        }
    }
    #[tokio::test]
    async fn what_broke_a_connection_is_told_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            let (mut peer, _) = listener.accept().await.unwrap();
            peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await
        });
        let mut channel = connect(&endpoint.parse().unwrap());
        std::future::poll_fn(|context| channel.poll_ready(context))
            .await
            .unwrap();
        let status = channel.call(Request::new(Body::empty())).await.unwrap_err();
        let start = "transport error: ";
        assert!(status.message().starts_with(start), "{status}");
        assert_eq!(
            with_causes(status.message().to_owned(), &status),
            status.message()
        );
        assert_ne!(status.code(), Code::Ok);
    }
}
