//! Serving gRPC on a connection, by HTTP/2, until it is closed or the server stops.

use std::{convert::Infallible, pin::pin, time::Instant};

use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tonic::service::Routes;

use super::{
    call,
    connection::{CHECK_INTERVAL, Decision, GOAWAY_GRACE},
    open_connections::OpenConnection,
    opening::{self, OpenedConnection},
};
use crate::daemon::{batched_writes::BatchedWrites, listen::AcceptedStream};

enum Event {
    Ended(Result<(), hyper::Error>),
    Stopping,
    Evict,
    Killed,
    Look,
}

/// Until the connection is closed, or the server stops.
pub(super) async fn serve(open: &OpenConnection, connection: AcceptedStream, routes: Routes) {
    let (server, caller) = (&open.server, &open.client);
    let limits = &server.limits;
    let opening = opening::open(connection, server.acceptor.as_ref());
    let (connection, certificate, refusal) = match open.open(opening).await {
        None => return,
        Some(OpenedConnection::Refused(connection, why)) => (connection, None, Some(why)),
        Some(OpenedConnection::Served(connection, certificate)) => (connection, certificate, None),
    };
    if !open.identify(certificate) {
        return;
    }
    let service = {
        let caller = caller.clone();
        service_fn(move |request| {
            let (caller, routes) = (caller.clone(), routes.clone());
            async move {
                Ok::<_, Infallible>(match refusal {
                    None => call::answer(&caller, routes, request).await,
                    Some(why) => call::refuse_connection(&caller, why),
                })
            }
        })
    };
    let mut protocol = http2::Builder::new(TokioExecutor::new());
    let (window, _held) = caller.accounts().caller.window();
    limits.apply(window, &mut protocol);
    let connection = TokioIo::new(BatchedWrites::new(connection));
    let mut serving = pin!(protocol.serve_connection(connection, service));
    let round = CHECK_INTERVAL
        .min(limits.handshake)
        .min(limits.first_call)
        .min(limits.idle)
        .min(limits.stalled_when_short);
    // From when on it is cut, unless calls are under way.
    let mut leaving: Option<Instant> = None;
    let mut told_to_stop = false;
    loop {
        let event = tokio::select! {
            ended = &mut serving => Event::Ended(ended),
            () = server.killed.cancelled() => Event::Killed,
            () = server.stopping.cancelled(), if !told_to_stop => Event::Stopping,
            () = caller.evicted(), if leaving.is_none() => Event::Evict,
            () = tokio::time::sleep(round) => Event::Look,
        };
        let now = Instant::now();
        match event {
            Event::Ended(Ok(())) | Event::Killed => return,
            Event::Ended(Err(error)) => {
                tracing::debug!(peer = ?caller.peer, %error, "a connection ended");
                return;
            }
            Event::Evict if caller.idle().is_some_and(|(called, _)| !called) => return,
            Event::Stopping | Event::Evict => {
                told_to_stop |= server.stopping.is_cancelled();
                serving.as_mut().graceful_shutdown();
                leaving.get_or_insert(now + GOAWAY_GRACE);
            }
            Event::Look => match caller.decide(now, limits) {
                Decision::Abort(reason) => {
                    tracing::info!(peer = ?caller.peer, reason, "closed a connection");
                    return;
                }
                _ if leaving.is_some_and(|end| now >= end) => {
                    if caller.idle().is_some() {
                        return;
                    }
                }
                Decision::CloseGracefully if leaving.is_none() => {
                    serving.as_mut().graceful_shutdown();
                    leaving = Some(now + GOAWAY_GRACE);
                }
                Decision::CloseGracefully | Decision::Keep => {}
            },
        }
    }
}
