//! Finds the route of an action: does what `routing` asks for, until there is one.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use super::{
    queue::{InvocationKeys, Platform},
    routing::{Facts, Route, RouteError, Router, Step},
    status::{self, invalid},
};
use crate::{
    config::{Endpoint, scheduler::Config},
    daemon::{self, Channel},
    digest::Digest,
    instance::InstanceName,
    proto::{
        auth::AuthenticationMetadata,
        reapi,
        remoteactionrouter::{
            RouteActionRequest, RouteActionResponse, action_router_client::ActionRouterClient,
        },
    },
    storage::Backend,
};

/// Commands may be longer than Actions; only those of clients before REAPI 2.2 are read.
const LARGEST_COMMAND: u64 = 16 << 20;
const REMOTE_ROUTER_TIMEOUT: Duration = Duration::from_secs(30);

/// The router, and what it asks for.
pub(super) struct ActionRouting {
    router: Router,
    storage: Backend,
    /// Remote action routers.
    channels: Vec<(Endpoint, Channel)>,
}

/// An action to find a route for.
pub(super) struct Routed<'a> {
    pub instance: &'a InstanceName,
    pub digest: &'a Digest,
    pub action: &'a reapi::Action,
    pub metadata: &'a reapi::RequestMetadata,
    pub user: Option<&'a AuthenticationMetadata>,
    /// Where the client calls from.
    pub address: Option<&'a str>,
    /// The keys that the name of an operation has that is taken up again.
    pub claimed: Option<&'a InvocationKeys>,
}

impl ActionRouting {
    pub(super) fn new(config: &Config, storage: Backend) -> Self {
        let router = Router::new(config);
        let channels = router
            .remotes()
            .map(|endpoint| (endpoint.clone(), daemon::connect(endpoint)));
        ActionRouting {
            channels: channels.collect(),
            storage,
            router,
        }
    }

    /// The platform that a worker offers, as it is compared.
    pub(super) fn offered(&self, platform: &Platform) -> Platform {
        self.router.offered(platform)
    }

    pub(super) async fn route(&self, asked: Routed<'_>) -> Result<Route, Status> {
        let mut command: Option<reapi::Command> = None;
        let mut answer: Option<RouteActionResponse> = None;
        loop {
            let facts = Facts {
                instance: asked.instance,
                function: asked.digest.function(),
                action: asked.action,
                metadata: asked.metadata,
                user: asked.user,
                address: asked.address,
                claimed: asked.claimed,
                command: command.as_ref(),
                answer: answer.as_ref(),
            };
            match self.router.route(facts).map_err(no_route)? {
                Step::Done(route) => return Ok(route),
                Step::NeedsCommand => command = Some(self.command(&asked).await?),
                Step::NeedsAnswer { endpoint, request } => {
                    answer = Some(self.ask(endpoint, *request).await?);
                }
            }
        }
    }

    async fn command(&self, asked: &Routed<'_>) -> Result<reapi::Command, Status> {
        let function = Some(asked.digest.function());
        let digest = Digest::parse_required(function, asked.action.command_digest.as_ref())
            .map_err(|error| invalid(format!("Invalid command digest: {error}")))?;
        let data: Bytes = self
            .storage
            .read(asked.instance, &digest, LARGEST_COMMAND)
            .await
            .map_err(|error| status::storage("Failed to obtain command", error))?;
        reapi::Command::decode(data)
            .map_err(|error| invalid(format!("Failed to obtain command: blob {digest}: {error}")))
    }

    async fn ask(
        &self,
        endpoint: &Endpoint,
        request: RouteActionRequest,
    ) -> Result<RouteActionResponse, Status> {
        let channel = self.channels.iter().find(|(known, _)| known == endpoint);
        let Some((_, channel)) = channel else {
            return Err(Status::internal(format!(
                "{endpoint} was never connected to"
            )));
        };
        let mut client = ActionRouterClient::new(channel.clone());
        let failed = |code: Code, message: &str| {
            let message = format!(
                "Failed to route action via remote service: {message} (action_router.remote, {endpoint})"
            );
            Status::new(code, message)
        };
        match tokio::time::timeout(REMOTE_ROUTER_TIMEOUT, client.route_action(request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(failed(status.code(), status.message())),
            Err(_) => Err(failed(Code::Unavailable, "it did not answer within 30 s")),
        }
    }
}

fn no_route(error: RouteError) -> Status {
    let message = format!("Failed to route action: {error}");
    match error {
        RouteError::Platform(_) => Status::invalid_argument(message),
        RouteError::NoPlatform
        | RouteError::RemotePlatform(_)
        | RouteError::RemoteInvocation(_) => Status::internal(message),
    }
}
