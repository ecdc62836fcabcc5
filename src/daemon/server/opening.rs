//! What a connection begins with: TLS, where the listener speaks it, or HTTP/2 at once. Who got that
//! wrong is told, in a way that clients can understand.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::daemon::{PeerCertificate, listen::AcceptedStream, tls::TlsAcceptor};

/// A connection on which HTTP/2 can begin.
pub(super) enum OpenedConnection {
    /// Its calls are served.
    Served(AcceptedStream, Option<PeerCertificate>),
    /// All its calls are refused, with this.
    Refused(AcceptedStream, &'static str),
}

/// The first byte of a TLS handshake (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 22;
/// A fatal alert of an unknown version of the protocol (RFC 8446, section 6).
const PROTOCOL_VERSION_ALERT: [u8; 7] = [21, 3, 1, 0, 2, 2, 70];

const PAGES_NEED_TLS: &str = "this port speaks TLS; write https:// in place of http://";
const NEEDS_TLS: &str = "this port speaks TLS; write grpcs:// in place of grpc://";

/// Looks at what comes first, and makes the handshake. An error says what the peer got wrong.
pub(super) async fn open(
    mut connection: AcceptedStream,
    acceptor: Option<&TlsAcceptor>,
) -> Result<OpenedConnection, String> {
    if !connection.is_tcp() {
        return Ok(OpenedConnection::Served(connection, None));
    }
    let mut start = [0; 2];
    let length = connection.peek(&mut start).await;
    let length = length.map_err(|error| error.to_string())?;
    let start = start.get(..length).unwrap_or_default();
    let is_tls = start.first() == Some(&HANDSHAKE_RECORD);
    match acceptor {
        None if is_tls => {
            let _ = answer(&mut connection, &PROTOCOL_VERSION_ALERT).await;
            Err("it speaks TLS, and this port does not; write grpc:// there, or set tls.certificate here".to_owned())
        }
        None => Ok(OpenedConnection::Served(connection, None)),
        Some(acceptor) if is_tls || start.is_empty() => match connection.encrypt(acceptor).await {
            Ok((connection, certificate)) => Ok(OpenedConnection::Served(connection, certificate)),
            Err(error) => Err(explain(&error)),
        },
        // The preface of HTTP/2 (RFC 9113, section 3.4); HTTP/1's methods are PUT, POST and PATCH.
        Some(_) if b"PR".starts_with(start) => Ok(OpenedConnection::Refused(connection, NEEDS_TLS)),
        Some(_) => {
            let _ = answer(&mut connection, refusal(NEEDS_TLS).as_bytes()).await;
            Err("it does not speak TLS, as this port does".to_owned())
        }
    }
}

/// The same for pages, whose callers speak HTTP/1.1 or HTTP/2.
pub(super) async fn open_pages(
    mut connection: AcceptedStream,
    acceptor: Option<&TlsAcceptor>,
) -> Result<(AcceptedStream, Option<PeerCertificate>), String> {
    if !connection.is_tcp() {
        return Ok((connection, None));
    }
    let mut start = [0; 1];
    let length = connection.peek(&mut start).await;
    let length = length.map_err(|error| error.to_string())?;
    let is_tls = length > 0 && start == [HANDSHAKE_RECORD];
    match acceptor {
        None if is_tls => {
            let _ = answer(&mut connection, &PROTOCOL_VERSION_ALERT).await;
            Err("it speaks TLS, and this port does not".to_owned())
        }
        None => Ok((connection, None)),
        Some(acceptor) if is_tls || length == 0 => {
            let encrypted = connection.encrypt_pages(acceptor).await;
            encrypted.map_err(|error| explain(&error))
        }
        Some(_) => {
            let _ = answer(&mut connection, refusal(PAGES_NEED_TLS).as_bytes()).await;
            Err("it does not speak TLS, as this port does".to_owned())
        }
    }
}

/// Why there was no handshake, and what helps where the peer alone cannot tell.
fn explain(error: &io::Error) -> String {
    use rustls::{Error, PeerMisbehaved};
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match cause {
        Some(Error::PeerMisbehaved(PeerMisbehaved::ServerNameMustContainOneHostName)) => {
            "TLS: the server name that it asks for is none, such as one with a port; Buildbarn's \
             daemons need server_name in their tls configuration"
                .to_owned()
        }
        _ => format!("TLS: {error}"),
    }
}

fn refusal(text: &str) -> String {
    format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{text}\n",
        text.len() + 1
    )
}

/// Writes the last that a peer hears. What it sent is read first, as far as it is there: else the
/// kernel would reset the connection, and the peer hear nothing.
async fn answer(connection: &mut AcceptedStream, data: &[u8]) -> io::Result<()> {
    let mut sent = [0; 4096];
    let _ = connection.read(&mut sent).await?;
    connection.write_all(data).await?;
    connection.shutdown().await
}
