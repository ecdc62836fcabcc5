//! Connecting to a gRPC peer: over TCP, with TLS or without, or to a Unix socket.

use std::{
    error::Error,
    path::Path,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::net::UnixStream;
use tower::Service;

use super::{
    batched_writes::BatchedWrites,
    dial::{Connection, DIAL_TIMEOUT},
    tls::{Credentials, TlsConnector},
};
use crate::config::Endpoint;

/// Connects to one endpoint, again and again.
#[derive(Clone)]
pub(super) enum Connector {
    Tcp(HttpConnector),
    Tls(TlsConnector),
    Unix(Arc<Path>),
}

impl Connector {
    /// To an endpoint; `credentials` say whom to trust, and who calls. Each of a host's addresses is given an
    /// even part of 10 seconds.
    pub(super) fn new(endpoint: &Endpoint, credentials: &Credentials) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(DIAL_TIMEOUT));
        match endpoint {
            Endpoint::Tcp(_) => Connector::Tcp(tcp),
            Endpoint::Tls(authority) => {
                Connector::Tls(TlsConnector::new(tcp, authority, credentials.tls()))
            }
            Endpoint::Unix(path) => Connector::Unix(path.as_path().into()),
        }
    }
}

type ConnectError = Box<dyn Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = TokioIo<BatchedWrites<Connection>>;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Self::Response, ConnectError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        match self {
            Connector::Tcp(tcp) => tcp.poll_ready(context).map_err(Into::into),
            Connector::Tls(tls) => tls.poll_ready(context),
            Connector::Unix(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        match self {
            Connector::Tcp(tcp) => {
                let connecting = tcp.call(uri);
                Box::pin(async { Ok(batched(Connection::Tcp(connecting.await?.into_inner()))) })
            }
            Connector::Tls(tls) => {
                let connecting = tls.call(uri);
                Box::pin(async { Ok(batched(Connection::Tls(Box::new(connecting.await?)))) })
            }
            Connector::Unix(path) => {
                let path = path.clone();
                Box::pin(
                    async move { Ok(batched(Connection::Unix(UnixStream::connect(path).await?))) },
                )
            }
        }
    }
}

fn batched(connection: Connection) -> TokioIo<BatchedWrites<Connection>> {
    TokioIo::new(BatchedWrites::new(connection))
}
