//! Channels to gRPC peers, over TCP or Unix sockets.

use std::{io, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Uri};
use tower::service_fn;

use crate::config::Endpoint;

// A 4 MiB chunk in flight needs no round trip on a loopback or a LAN.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;

/// Statuses of Buildbarn's programs quote what actions and clients say, which can be as long as a
/// command line may be (execve(2), MAX_ARG_STRLEN), and thrice that when percent-encoded. One that
/// does not fit ends all calls on its connection.
const LARGEST_HEADERS: u32 = 1 << 20;

/// Streams that we left early are remembered, since more of their frames may be on the way. A frame of
/// one that is forgotten counts as an error of the peer's, and h2 ends a connection, with every call
/// on it, after 1024 of those in its life: fifty streams in one second that are left before their
/// trailers have come are enough to begin the count. Our peers are those that the administrator
/// chose, so that there is no such limit, and few frames that must be answered.
const RESET_STREAMS: usize = 4096;

/// A channel that connects at its first call, and again after each loss.
///
/// Calls on an unreachable peer fail with UNAVAILABLE, and the endpoint is named in the text.
pub fn connect(endpoint: &Endpoint) -> Channel {
    // The URI only fills the :authority header; the connector knows where to go.
    let authority = match endpoint {
        Endpoint::Tcp(authority) => authority.as_str(),
        Endpoint::Unix(_) => "localhost",
    };
    let uri = Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query("/")
        .build()
        .unwrap_or_else(|_| Uri::from_static("http://localhost/"));
    let endpoint = endpoint.clone();
    Channel::builder(uri)
        .connect_timeout(Duration::from_secs(10))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(LARGEST_HEADERS)
        .http2_keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20))
        .http2_max_concurrent_reset_streams(RESET_STREAMS)
        .http2_max_local_error_reset_streams(None)
        .connect_with_connector_lazy(service_fn(move |_| {
            let endpoint = endpoint.clone();
            async move {
                dial(&endpoint).await.map_err(|error| {
                    io::Error::new(
                        error.kind(),
                        format!("could not connect to {endpoint}: {error}"),
                    )
                })
            }
        }))
}

type Io = TokioIo<Box<dyn Stream>>;

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

async fn dial(endpoint: &Endpoint) -> io::Result<Io> {
    let stream: Box<dyn Stream> = match endpoint {
        Endpoint::Tcp(authority) => {
            let stream = TcpStream::connect(authority.as_str()).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Endpoint::Unix(path) => Box::new(UnixStream::connect(path).await?),
    };
    Ok(TokioIo::new(stream))
}
