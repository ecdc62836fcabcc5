//! What a listener grants its callers: bytes, calls, connections and time.

use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::daemon::process;

/// What one listener grants its callers.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Bytes of messages that are on their way in, on one connection and on all.
    pub received: u64,
    /// The same, on one connection.
    pub request_bytes_per_connection: u64,
    /// Bytes of answers that are not written to their connections, on one and on all.
    pub answers: u64,
    /// The same, on one connection.
    pub response_bytes_per_connection: u64,
    /// Bytes that may arrive ahead of the calls of all connections, besides 64 KiB of each.
    pub windows: u64,
    /// Calls under way on all connections.
    pub calls: u64,
    /// The same, on one connection.
    pub calls_per_connection: u32,
    /// Connections that are open.
    pub connections: usize,
    /// Those of them on which neither TLS nor HTTP/2 has begun; the oldest gives way.
    pub half_open: usize,
    /// Bytes of a message.
    pub largest_message: u64,
    /// Until TLS and HTTP/2 have begun.
    pub handshake: Duration,
    /// Until the first call.
    pub first_call: Duration,
    /// Without a call.
    pub idle: Duration,
    /// Between two messages of a stream.
    pub pause: Duration,
    /// For a message that has begun, and a second for each 64 KiB of it.
    pub message: Duration,
    /// Of each caller; 0 for as many as it likes.
    pub requests_per_second: u64,
    /// Of messages of each caller, in both directions; 0 for as many as it likes.
    pub bytes_per_second: u64,
    /// Without reading any of what was asked for; and that when others wait for the room.
    pub stalled: Duration,
    /// The same, when others wait for the room.
    pub stalled_when_short: Duration,
    /// After so long without a word of the peer it is asked whether it is there (PING).
    pub ping_interval: Duration,
    /// How long it may take to answer.
    pub ping_timeout: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            received: 256 << 20,
            request_bytes_per_connection: 64 << 20,
            answers: 256 << 20,
            response_bytes_per_connection: 64 << 20,
            windows: 512 << 20,
            calls: call_limit(),
            // A Bazel with --jobs=2000 has as many streams on one connection, and proxies gather
            // several of them.
            calls_per_connection: 10_000,
            connections: connection_limit(),
            half_open: 1000,
            largest_message: 16 << 20,
            handshake: Duration::from_secs(10),
            first_call: Duration::from_secs(60),
            idle: Duration::from_secs(30 * 60),
            pause: Duration::from_secs(300),
            message: Duration::from_secs(60),
            requests_per_second: 0,
            bytes_per_second: 0,
            stalled: Duration::from_secs(300),
            stalled_when_short: Duration::from_secs(10),
            ping_interval: Duration::from_secs(60),
            ping_timeout: Duration::from_secs(20),
        }
    }
}

/// Two listeners together leave a fifth of all descriptors to files.
fn connection_limit() -> usize {
    let limit = process::file_limit().map_or(MAX_CONNECTIONS, |limit| {
        usize::try_from(limit).unwrap_or(MAX_CONNECTIONS)
    });
    (limit / 5 * 2).clamp(8, MAX_CONNECTIONS)
}

const MAX_CONNECTIONS: usize = 10_000;

/// Memory of a call that is under way, in bytes, when it waits for an operation: measured, and a quarter more.
const CALL_MEMORY: u64 = 32 << 10;

/// What a quarter of the memory has room for.
fn call_limit() -> u64 {
    (process::memory_limit() / 4 / CALL_MEMORY).clamp(10_000, 1_000_000)
}

/// A piece of 4 MiB in flight needs no round trip on a LAN. This is what a connection can hold besides
/// what its calls have been given; one that finds no room for that among all of them has less.
const STREAM_WINDOW: u32 = 4 << 20;
pub(super) const CONNECTION_WINDOW: u32 = 8 << 20;
/// With which every connection begins (RFC 9113, section 6.9.2).
pub(super) const SMALLEST_WINDOW: u32 = 65_535;

/// Calls that are read together with their cancellation. A client that is interrupted cancels all that
/// it has just asked for; at 20, the default of h2, that ends the calls of all who share the
/// connection.
const PENDING_RESETS: usize = 1000;

/// In the life of a connection: frames of calls that were answered before their client had sent
/// everything, and forgotten before it stopped. Beyond that h2 ends the connection, whose default is
/// 1024; each may leave an unread answer of a few bytes behind.
const ERROR_RESETS: usize = 16_384;

/// Of headers that are looked at. A call with more than `call::LARGEST_HEADERS` of them is told so; h2 answers one with
/// more than this by a bare HTTP 431, and ends the connection, with all its other calls, at four times this.
const HEADERS_READ: u32 = 64 << 10;

impl ServerLimits {
    /// `window` is how much may arrive on the connection ahead of its calls.
    pub(super) fn apply(&self, window: u32, protocol: &mut http2::Builder<TokioExecutor>) {
        protocol
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW.min(window))
            .initial_connection_window_size(window)
            .max_concurrent_streams(self.calls_per_connection)
            .max_frame_size(1 << 20)
            .max_header_list_size(HEADERS_READ)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(ERROR_RESETS)
            .keep_alive_interval(self.ping_interval)
            .keep_alive_timeout(self.ping_timeout);
    }
}

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
            connections: (connection_limit() / 8).clamp(8, 1500),
            head: Duration::from_secs(10),
            silence: Duration::from_secs(120),
        }
    }
}

/// Requests under way on one connection of HTTP/2.
const MAX_STREAMS: u32 = 32;

impl From<PageLimits> for ServerLimits {
    fn from(limits: PageLimits) -> Self {
        ServerLimits {
            connections: limits.connections,
            half_open: limits.connections,
            handshake: limits.head,
            idle: limits.silence,
            calls_per_connection: MAX_STREAMS,
            ..ServerLimits::default()
        }
    }
}
