//! Connections to servers that are no gRPC peers: object stores, Redis, and whom object stores' clients ask
//! for credentials.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;

use super::Credentials;
use crate::config::Endpoint;

/// To connect to any server, gRPC peers too.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes to and from a server, which may be a gRPC peer (`connector`).
#[derive(Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Connection {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// Connects within 10 seconds, with the endpoint's TLS; `credentials` say whom to trust, and who calls. The
/// error says where to it could not connect, and why.
pub async fn dial(endpoint: &Endpoint, credentials: &Credentials) -> Result<Connection, String> {
    let place = match endpoint {
        Endpoint::Tcp(authority) | Endpoint::Tls(authority) => authority.clone(),
        Endpoint::Unix(path) => path.display().to_string(),
    };
    match tokio::time::timeout(DIAL_TIMEOUT, connect(endpoint, credentials)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(why)) => Err(format!("could not connect to {place}: {why}")),
        Err(_) => Err(format!(
            "could not connect to {place}: it did not answer within {} seconds",
            DIAL_TIMEOUT.as_secs()
        )),
    }
}

async fn connect(endpoint: &Endpoint, credentials: &Credentials) -> Result<Connection, String> {
    let told = |error: io::Error| error.to_string();
    let authority = match endpoint {
        Endpoint::Tcp(authority) | Endpoint::Tls(authority) => authority,
        Endpoint::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(told)?;
            return Ok(Connection::Unix(stream));
        }
    };
    let stream = TcpStream::connect(authority).await.map_err(told)?;
    stream.set_nodelay(true).map_err(told)?;
    match endpoint {
        Endpoint::Tls(_) => {
            let stream = credentials.secure(authority, stream).await?;
            Ok(Connection::Tls(Box::new(stream)))
        }
        _ => Ok(Connection::Tcp(stream)),
    }
}

macro_rules! either {
    ($connection:expr, $stream:ident => $work:expr) => {
        match $connection.get_mut() {
            Connection::Tcp($stream) => $work,
            Connection::Tls($stream) => $work,
            Connection::Unix($stream) => $work,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(context, data))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(context, data))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(context))
    }
}
