//! TLS (RFC 8446), by rustls with ring: `certificate` reads files and finds what is wrong with them,
//! `server` is a listener's, `client` a client's.
//!
//! 1. Files that change are used from the next handshake on; connections that there are go on.
//! 2. There is no resumption: each connection's certificates are looked at anew, against the files of
//!    that time. Connections are few, and last.

use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;

mod certificate;
mod client;
mod server;

pub use certificate::PeerCertificate;
pub use client::{Credentials, check_client, check_headers, warn_client};
pub(super) use client::{TlsConnector, explain};
pub(super) use server::TlsAcceptor;
pub use server::{ServerTls, check_server, server_tls, warn_server};

/// The one provider of cryptography.
static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// The only protocol that is spoken, but for pages (RFC 9113, section 3.2).
const ALPN: &[u8] = b"h2";

/// What else those speak who fetch pages (RFC 7301, section 6).
const PAGES_ALPN: &[u8] = b"http/1.1";
