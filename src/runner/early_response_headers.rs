//! Headers of a Run's response that are sent before its command runs, where the caller sends a deadline
//! (`grpc-timeout`), as Buildbarn's worker does with an action's timeout.
//!
//! tonic keeps such deadlines by itself: it drops the call and answers CANCELLED at once, but only
//! until the headers of the response are sent. Here a Run with a deadline is a server stream of one
//! message, whose headers are sent at once. So `service` keeps the deadline: it ends the command in time, and answers
//! DEADLINE_EXCEEDED when nothing of it is left.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt, Stream, stream};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::CompressionEncoding,
    codegen::{BoxFuture, Service, http},
    server::{Grpc, NamedService, ServerStreamingService},
};

use super::{grpc_timeout, service::RunnerService};
use crate::{
    codec::MessageCodec,
    proto::runner::{
        RunRequest, RunResponse,
        runner_server::{Runner as _, RunnerServer, SERVICE_NAME},
    },
};

/// Bytes of a request at most; execve(2) takes a few MiB of arguments and environment.
const MAXIMUM_REQUEST: usize = 16 << 20;

/// The runner's service, in which a Run with a deadline is answered by a stream.
#[derive(Clone)]
pub(super) struct EarlyHeadersService {
    runner: Arc<RunnerService>,
    calls: RunnerServer<RunnerService>,
}

impl EarlyHeadersService {
    pub(super) fn new(runner: RunnerService) -> Self {
        let runner = Arc::new(runner);
        EarlyHeadersService {
            calls: RunnerServer::from_arc(runner.clone())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(MAXIMUM_REQUEST),
            runner,
        }
    }
}

impl NamedService for EarlyHeadersService {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<http::Request<Body>> for EarlyHeadersService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_run = request.uri().path().strip_prefix('/').is_some_and(|path| {
            path.strip_prefix(SERVICE_NAME)
                .is_some_and(|method| method == "/Run")
        });
        if !is_run || !request.headers().contains_key(grpc_timeout::HEADER) {
            return self.calls.call(request);
        }
        let run = StreamingRun(self.runner.clone());
        Box::pin(async move {
            let mut grpc = Grpc::new(MessageCodec::default())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(MAXIMUM_REQUEST);
            Ok(grpc.server_streaming(run, request).await)
        })
    }
}

/// The method Run as a server stream of one response, which is begun at once.
struct StreamingRun(Arc<RunnerService>);

type Responses = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

impl ServerStreamingService<RunRequest> for StreamingRun {
    type Response = RunResponse;
    type ResponseStream = Responses;
    type Future = std::future::Ready<Result<Response<Responses>, Status>>;

    fn call(&mut self, request: Request<RunRequest>) -> Self::Future {
        let runner = self.0.clone();
        let response = async move { runner.run(request).await.map(Response::into_inner) };
        let responses: Responses = Box::pin(stream::once(response.boxed()));
        std::future::ready(Ok(Response::new(responses)))
    }
}
