//! The deadline that a caller sends with a Run (`grpc-timeout`), as Buildbarn's worker does with an
//! action's timeout.
//!
//! tonic keeps such deadlines by itself: it drops the call and answers CANCELLED at once, but only
//! until the headers of the response are sent. Here a Run with a deadline has its headers sent before
//! the command runs, as those of a response with a stream of messages, of which it has one. So the
//! runner itself ends the command in time, and answers DEADLINE_EXCEEDED when nothing of it is left.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, Stream, stream};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::CompressionEncoding,
    codegen::{BoxFuture, Service, http},
    metadata::MetadataMap,
    server::{Grpc, NamedService, ServerStreamingService},
};
use tonic_prost::ProstCodec;

use super::{LARGEST_REQUEST, service::Runner};
use crate::proto::runner::{
    RunRequest, RunResponse,
    runner_server::{Runner as _, RunnerServer, SERVICE_NAME},
};

const HEADER: &str = "grpc-timeout";

/// How long the caller waits from now on; `None` when it does not say.
///
/// gRPC over HTTP/2, "Timeout": at most eight digits and a unit.
pub fn of(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

/// The runner's service, whose deadlines it keeps itself.
#[derive(Clone)]
pub struct Server {
    runner: Arc<Runner>,
    calls: RunnerServer<Runner>,
}

impl Server {
    pub fn new(runner: Runner) -> Self {
        let runner = Arc::new(runner);
        Server {
            calls: RunnerServer::from_arc(runner.clone())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(LARGEST_REQUEST),
            runner,
        }
    }
}

impl NamedService for Server {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<http::Request<Body>> for Server {
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
        if !is_run || !request.headers().contains_key(HEADER) {
            return self.calls.call(request);
        }
        let run = Run(self.runner.clone());
        Box::pin(async move {
            let mut grpc = Grpc::new(ProstCodec::default())
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(LARGEST_REQUEST);
            Ok(grpc.server_streaming(run, request).await)
        })
    }
}

/// A Run as a stream of one response, which is begun at once.
struct Run(Arc<Runner>);

type Responses = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

impl ServerStreamingService<RunRequest> for Run {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_every_unit_and_ill_formed_ones_are_none() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(HEADER, text.parse().unwrap());
            of(&metadata)
        };
        assert_eq!(of("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(of("3M"), Some(Duration::from_secs(180)));
        assert_eq!(of("4S"), Some(Duration::from_secs(4)));
        assert_eq!(of("99999999m"), Some(Duration::from_millis(99_999_999)));
        assert_eq!(of("5u"), Some(Duration::from_micros(5)));
        assert_eq!(of("6n"), Some(Duration::from_nanos(6)));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S"] {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
        assert_eq!(super::of(&MetadataMap::new()), None);
    }
}
