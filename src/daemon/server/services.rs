//! The services of one listener, and what it says of them: health and reflection, in both versions.
//!
//! What is listed is what is served, as nothing is served that does not pass through here.

use std::convert::Infallible;

use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codec::CompressionEncoding, server::NamedService, service::Routes};
use tonic_health::{ServingStatus, pb::health_server::HealthServer};
use tonic_reflection::{pb, server::Builder};
use tower::Service;

use crate::{daemon::Failure, proto};

/// What a listener is to serve.
#[derive(Default)]
pub struct Services {
    routes: Routes,
    names: Vec<&'static str>,
}

impl Services {
    /// Adds a service.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "services are no numbers")]
    pub fn add<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes = self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }

    /// Without health and reflection.
    pub fn into_routes(self) -> Routes {
        self.routes
    }

    /// Adds health and reflection. From `stopping` on, nothing is healthy.
    pub fn observable(self, stopping: &CancellationToken) -> Result<Routes, Failure> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let mut names = self.names;
        names.extend([
            name_of(&health),
            pb::v1::server_reflection_server::SERVICE_NAME,
            pb::v1alpha::server_reflection_server::SERVICE_NAME,
        ]);
        let reflect = || {
            let builder = Builder::configure()
                .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(pb::v1::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(pb::v1alpha::FILE_DESCRIPTOR_SET);
            names
                .iter()
                .fold(builder, |builder, name| builder.with_service_name(*name))
        };
        let broken = |error: tonic_reflection::server::Error| Failure::Environment {
            message: format!("could not describe the services: {error}"),
        };
        let routes = self
            .routes
            .add_service(compressible(health))
            .add_service(
                reflect()
                    .build_v1()
                    .map_err(broken)?
                    .accept_compressed(CompressionEncoding::Gzip),
            )
            .add_service(
                reflect()
                    .build_v1alpha()
                    .map_err(broken)?
                    .accept_compressed(CompressionEncoding::Gzip),
            );
        let stopping = stopping.clone();
        tokio::spawn(async move {
            // The empty name is the server as a whole (gRPC Health Checking Protocol).
            names.push("");
            for name in &names {
                let serving = ServingStatus::Serving;
                reporter.set_service_status(name, serving).await;
            }
            stopping.cancelled().await;
            for name in &names {
                let leaving = ServingStatus::NotServing;
                reporter.set_service_status(name, leaving).await;
            }
        });
        Ok(routes)
    }
}

fn compressible<T: tonic_health::pb::health_server::Health>(
    health: HealthServer<T>,
) -> HealthServer<T> {
    health.accept_compressed(CompressionEncoding::Gzip)
}

fn name_of<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}
