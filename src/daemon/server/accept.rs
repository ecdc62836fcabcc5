//! Accepting connections of a listener, of gRPC or of pages, and ending them.
//!
//! 1. Neither a process without descriptors left nor a connection that died in the queue ends the loop, or
//!    has it spin.
//! 2. After `stopping`, nothing new is accepted, and calls that are under way have a while to end.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{
    grpc,
    limits::ServerLimits,
    open_connections::{Protocol, Server},
    pages,
};
use crate::daemon::listen::{AcceptedStream, Listener, Socket};

/// Serves until `stopping`, then gives calls that are under way `drain` to finish.
pub(super) async fn accept_and_drain(
    listener: Listener,
    protocol: Protocol,
    limits: ServerLimits,
    stopping: CancellationToken,
    drain: Duration,
) {
    let server = Server::new(&listener, protocol, limits, stopping);
    // Also when this future is dropped.
    let _kill = server.killed.clone().drop_guard();
    for socket in listener.into_sockets() {
        server.tasks.spawn(accept_all(server.clone(), socket));
    }
    server.stopping.cancelled().await;
    server.tasks.close();
    // Whatever is left then is killed.
    let _ = tokio::time::timeout(drain, server.tasks.wait()).await;
}

async fn accept_all(server: Arc<Server>, socket: Socket) {
    loop {
        let accepted = tokio::select! {
            () = server.stopping.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok(connection) => {
                tokio::select! {
                    () = server.stopping.cancelled() => return,
                    () = server.wait_for_capacity() => start(&server, connection),
                }
            }
            Err(error) => {
                // Out of descriptors, or a connection that died in the queue: neither ends the
                // server, and the first one must not make it spin.
                tracing::warn!(%error, "could not accept a connection");
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                    server.close_idle_connection(None);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn start(server: &Arc<Server>, connection: AcceptedStream) {
    let Some(open) = server.admit(&connection) else {
        return;
    };
    server.tasks.spawn(async move {
        match &open.server.protocol {
            Protocol::Grpc(routes) => grpc::serve(&open, connection, routes.clone()).await,
            Protocol::Pages(router) => pages::serve(&open, connection, router.clone()).await,
        }
    });
}
